#include "bindings/pool.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "base/units.h"
#include "driver/cuda_driver.h"
#include "driver/host_driver.h"

namespace py = pybind11;

namespace vattn {
namespace {

PyPool decorate(std::shared_ptr<VmmDriver> driver, bool inject) {
  PyPool result;
  if (inject) driver = result.faults = inject_faults(driver);
  result.trace = trace_driver(driver);
  return result;
}

// page_bytes == 0: the driver's granularity (CUDA only).
PyPool open_pool(const std::string& device_type, int device_index, size_t page_bytes,
                 size_t max_extent_bytes, size_t memory_bytes, bool inject, bool rehearsal) {
  const bool cuda = device_type == "cuda";
  if (cuda && rehearsal) {
    throw std::invalid_argument("rehearsal is for device 'cpu', where memory may stay untouched");
  }
  const HostUse use = rehearsal ? HostUse::kRehearsal : HostUse::kMemory;
  std::shared_ptr<VmmDriver> driver =
      cuda ? open_cuda_driver(device_index) : open_host_driver(page_bytes, use);
  if (page_bytes == 0) page_bytes = driver->page_bytes();
  PyPool result = decorate(driver, inject);
  result.pool = std::make_shared<Pool>(result.trace, page_bytes, max_extent_bytes, memory_bytes);
  return result;
}

// Of single pages, for a range of `bytes`. It may be larger than all the memory there is.
PyPool open_page_pool(const std::string& device_type, int device_index, size_t page_bytes,
                      size_t bytes, bool inject) {
  const std::shared_ptr<VmmDriver> driver =
      device_type == "cuda" ? open_cuda_driver(device_index) : open_host_driver(page_bytes);
  if (page_bytes == 0) page_bytes = driver->page_bytes();
  const size_t budget = std::min(round_up(bytes, page_bytes), driver->memory_info().total_bytes);
  PyPool result = decorate(driver, inject);
  result.pool = std::make_shared<Pool>(result.trace, page_bytes, page_bytes, budget);
  return result;
}

py::dict to_dict(const CallTable& table) {
  constexpr std::array<const char*, kNumCallOrigins> kOrigins = {"other", "step", "background"};
  py::dict by_origin;
  for (size_t origin = 0; origin < kNumCallOrigins; ++origin) {
    py::dict by_call;
    for (size_t call = 0; call < kNumDriverCalls; ++call) {
      const CallCounters& counters = table[origin][call];
      if (counters.count == 0) continue;
      py::dict entry;
      entry["count"] = counters.count;
      entry["failed"] = counters.failed;
      entry["total_ns"] = counters.total_ns;
      entry["histogram"] =
          std::vector<uint64_t>(counters.histogram.begin(), counters.histogram.end());
      by_call[name_of(static_cast<DriverCall>(call))] = entry;
    }
    by_origin[kOrigins[origin]] = by_call;
  }
  return by_origin;
}

}  // namespace

FaultDriver& PyPool::checked_faults() const {
  if (faults == nullptr) {
    throw std::invalid_argument("this pool has no fault injection; make it with inject_faults");
  }
  return *faults;
}

void define_pool(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<PyPool>(m, "Pool")
      .def(py::init(&open_pool), py::kw_only(), py::arg("device_type"), py::arg("device_index"),
           py::arg("page_bytes"), py::arg("max_extent_bytes"), py::arg("memory_bytes"),
           py::arg("inject_faults") = false, py::arg("rehearsal") = false, Release())
      .def_property_readonly("page_bytes", [](const PyPool& p) { return p.pool->page_bytes(); })
      .def_property_readonly("max_extent_bytes",
                             [](const PyPool& p) { return p.pool->max_extent_bytes(); })
      .def("describe", [](const PyPool& p) { return p.trace->describe(); })
      .def("driver_calls", [](const PyPool& p) { return to_dict(p.trace->counters()); })
      .def("recent_calls", [](const PyPool& p) { return p.trace->recent_calls(); })
      .def("fail_nth", [](const PyPool& p, uint64_t n) { p.checked_faults().fail_nth(n); })
      .def("fail_from", [](const PyPool& p, uint64_t n) { p.checked_faults().fail_from(n); })
      .def("disarm", [](const PyPool& p) { p.checked_faults().disarm(); })
      .def("injected", [](const PyPool& p) { return p.checked_faults().injected(); });
  m.def("open_page_pool", &open_page_pool, py::kw_only(), py::arg("device_type"),
        py::arg("device_index"), py::arg("page_bytes"), py::arg("range_bytes"),
        py::arg("inject_faults"), Release());
}

}  // namespace vattn
