#include "bindings/page_range.h"

#include <pybind11/stl.h>

#include "bindings/pool.h"
#include "bindings/tensor.h"
#include "core/page_range.h"

namespace py = pybind11;

namespace vattn {
namespace {

std::vector<std::pair<size_t, size_t>> mapped_runs(const PageRange& range) {
  std::vector<std::pair<size_t, size_t>> runs;
  for (const PageRun run : range.mapped_runs()) runs.emplace_back(run.first, run.count);
  return runs;
}

py::capsule capsule_of(const std::shared_ptr<PageRange>& range, uint8_t type_code, uint8_t bits,
                       int32_t device_type, int32_t device_id) {
  const size_t bytes = range->n_pages() * range->pool().page_bytes();
  return make_capsule(range, range->base(), {static_cast<int64_t>(bytes / (bits / 8))}, {1},
                      {type_code, bits, 1}, {device_type, device_id});
}

}  // namespace

void define_page_range(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<PageRange, std::shared_ptr<PageRange>>(m, "PageRange")
      .def(py::init([](const PyPool& pool, size_t n_pages) {
             return std::make_shared<PageRange>(pool.pool, n_pages);
           }),
           py::arg("pool"), py::arg("n_pages"), Release())
      .def("map", &PageRange::map, py::arg("runs"), Release())
      .def("populate", &PageRange::populate, py::arg("runs"), Release())
      .def("alias", &PageRange::alias, py::arg("first"), py::arg("count"), Release())
      .def(
          "unmap",
          [](PageRange& self, const PageRange::Runs& runs, uintptr_t stream) {
            return self.unmap(runs, static_cast<Stream>(stream));
          },
          py::arg("runs"), py::arg("stream"), Release())
      .def("close", &PageRange::close, Release())
      .def("check", &PageRange::check, Release())
      .def("is_mapped", &PageRange::is_mapped, py::arg("page"), Release())
      .def("mapped_runs", &mapped_runs, Release())
      .def("mapped_pages", &PageRange::mapped_pages, Release())
      .def_property_readonly("closed", &PageRange::closed)
      .def_property_readonly("n_pages", &PageRange::n_pages)
      .def("capsule", &capsule_of, py::arg("type_code"), py::arg("bits"), py::arg("device_type"),
           py::arg("device_id"));
}

}  // namespace vattn
