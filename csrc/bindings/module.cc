// vattn._C: what Python sees of the core. Thin: names and docstrings live in vattn/*.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/errors.h"
#include "base/log.h"
#include "bindings/page_range.h"
#include "bindings/pool.h"
#include "bindings/probe.h"
#include "bindings/seq_lens.h"
#include "bindings/tensor.h"
#include "core/kv_cache.h"

namespace py = pybind11;

namespace vattn {
namespace {

py::dict to_dict(const CacheStats& stats) {
  py::dict d;
  d["budget_bytes"] = stats.pool.budget_bytes;
  d["held_bytes"] = stats.pool.held_bytes;
  d["free_bytes"] = stats.pool.free_bytes;
  d["peak_mapped_bytes"] = stats.pool.peak_taken_bytes;
  d["reserved_bytes"] = stats.reserved_bytes;
  d["used_bytes"] = stats.used_bytes;
  d["mapped_bytes"] = stats.mapped_bytes;
  d["aliased_bytes"] = stats.aliased_bytes;
  d["reclaimable_bytes"] = stats.reclaimable_bytes;
  d["rows_free"] = stats.rows_free;
  d["rows_active"] = stats.rows_active;
  d["rows_idle"] = stats.rows_idle;
  d["rows_retiring"] = stats.rows_retiring;
  d["steps"] = stats.steps;
  d["steps_with_growth"] = stats.steps_with_growth;
  d["prefetched_runs"] = stats.prefetched_runs;
  d["prefetch_failures"] = stats.prefetch_failures;
  return d;
}

// Layers, heads, head dim of K and of V, window, sink.
using GroupTuple = std::tuple<std::vector<size_t>, size_t, size_t, size_t, size_t, size_t>;

LayoutSpec make_spec(const std::string& layout, const std::string& order, size_t item_bytes,
                     const std::vector<GroupTuple>& groups) {
  LayoutSpec spec;
  spec.kind = layout == "per_layer" ? LayoutKind::kPerLayer : LayoutKind::kInterleaved;
  spec.order = order == "HND" ? DimOrder::kHND : DimOrder::kNHD;
  spec.item_bytes = item_bytes;
  for (const auto& [layers, heads, k_dim, v_dim, window, sink] : groups) {
    spec.groups.push_back({layers, heads, k_dim, v_dim, window, sink});
  }
  return spec;
}

std::shared_ptr<KvCache> make_cache(const PyPool& pool, const std::string& layout,
                                    const std::string& order, size_t item_bytes,
                                    size_t max_batch_size, size_t max_seq_len, size_t lookahead,
                                    bool scrub, const std::vector<GroupTuple>& groups) {
  LayoutSpec spec = make_spec(layout, order, item_bytes, groups);
  spec.max_batch_size = max_batch_size;
  spec.max_seq_len = max_seq_len;
  spec.page_bytes = pool.pool->page_bytes();
  return std::make_shared<KvCache>(pool.pool, spec, lookahead,
                                   scrub ? Scrub::kOnReuse : Scrub::kNever);
}

const TensorView* view_of(const KvCache& cache, size_t layer, bool is_v) {
  const LayerViews& views = cache.layout().layers.at(layer);
  if (!is_v) return &views.k;
  return views.v ? &*views.v : nullptr;
}

py::object capsule_of(const std::shared_ptr<KvCache>& cache, size_t layer, bool is_v,
                      uint8_t type_code, uint8_t bits, int32_t device_type, int32_t device_id) {
  const TensorView* view = view_of(*cache, layer, is_v);
  if (view == nullptr) return py::none();
  return make_capsule(cache, cache->base() + view->offset, {view->shape.begin(), view->shape.end()},
                      {view->strides.begin(), view->strides.end()}, {type_code, bits, 1},
                      {device_type, device_id});
}

// The Python classes carry the numbers as attributes, so they are made in Python.
void raise_python(const char* name, const py::tuple& arguments) {
  const py::object type = py::module_::import("vattn.errors").attr(name);
  const py::object error = type(*arguments);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const OutOfPages& error) {
    raise_python("OutOfPagesError", py::make_tuple(error.what(), error.needed(), error.free()));
  } catch (const OutOfRows& error) {
    raise_python("OutOfRowsError", py::make_tuple(error.what()));
  } catch (const DriverError& error) {
    raise_python("DriverError", py::make_tuple(error.what(), error.call(), error.code()));
  }
}

using CacheClass = py::class_<KvCache, std::shared_ptr<KvCache>>;

std::vector<int32_t> fork_rows(KvCache& cache, int64_t row, std::optional<int64_t> seq_len,
                               size_t n, uintptr_t stream) {
  std::vector<int32_t> rows;
  for (const BatchIdx child : cache.fork(row, seq_len, n, static_cast<Stream>(stream))) {
    rows.push_back(static_cast<int32_t>(child));
  }
  return rows;
}

std::vector<std::pair<uint64_t, size_t>> kept_prefixes(const KvCache& cache) {
  std::vector<std::pair<uint64_t, size_t>> kept;
  for (const KeptPrefix& prefix : cache.kept_prefixes()) {
    kept.emplace_back(prefix.life, prefix.tokens);
  }
  return kept;
}

std::optional<std::pair<int32_t, size_t>> fork_prefix(KvCache& cache, int64_t row, uint64_t life,
                                                      int64_t tokens, uintptr_t stream) {
  const auto fork = cache.fork_prefix(row, life, tokens, static_cast<Stream>(stream));
  if (!fork) return std::nullopt;
  return std::pair{static_cast<int32_t>(fork->first), fork->second};
}

void define_sharing(CacheClass& cache) {
  using Release = py::call_guard<py::gil_scoped_release>;
  cache
      .def("fork", &fork_rows, py::arg("row"), py::arg("seq_len"), py::arg("n"), py::arg("stream"),
           Release())
      .def("truncate", &KvCache::truncate, py::arg("row"), py::arg("seq_len"), Release())
      .def(
          "reorder",
          [](KvCache& self, const std::vector<int64_t>& rows, const std::vector<int64_t>& parents,
             uintptr_t stream) { self.reorder(rows, parents, static_cast<Stream>(stream)); },
          py::arg("rows"), py::arg("parents"), py::arg("stream"), Release())
      .def(
          "compact",
          [](KvCache& self, int64_t row, const std::vector<int64_t>& keep, int64_t start,
             uintptr_t stream) { self.compact(row, keep, start, static_cast<Stream>(stream)); },
          py::arg("row"), py::arg("keep"), py::arg("start"), py::arg("stream"), Release())
      .def("keep_prefix", &KvCache::keep_prefix, py::arg("row"), py::arg("tokens"), Release())
      .def("kept_prefixes", &kept_prefixes, Release())
      .def("forget_prefix", &KvCache::forget_prefix, py::arg("row"), py::arg("life"), Release())
      .def(
          "adopt_prefix",
          [](KvCache& self, int64_t row, uint64_t life, int64_t tokens, uintptr_t stream) {
            return self.adopt_prefix(row, life, tokens, static_cast<Stream>(stream));
          },
          py::arg("row"), py::arg("life"), py::arg("tokens"), py::arg("stream"), Release())
      .def("fork_prefix", &fork_prefix, py::arg("row"), py::arg("life"), py::arg("tokens"),
           py::arg("stream"), Release());
}

void define_cache(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  CacheClass cache(m, "KVCache");
  define_sharing(cache);
  cache
      .def(py::init(&make_cache), py::arg("pool"), py::kw_only(), py::arg("layout"),
           py::arg("order"), py::arg("item_bytes"), py::arg("max_batch_size"),
           py::arg("max_seq_len"), py::arg("lookahead"), py::arg("scrub"), py::arg("groups"))
      .def(
          "alloc",
          [](KvCache& self, int64_t seq_len, uintptr_t stream) {
            return static_cast<int32_t>(self.alloc(seq_len, static_cast<Stream>(stream)));
          },
          py::arg("seq_len"), py::arg("stream"), Release())
      .def(
          "free",
          [](KvCache& self, int64_t row, uintptr_t stream) {
            self.free(row, static_cast<Stream>(stream));
          },
          py::arg("row"), py::arg("stream"), Release())
      .def("step", &step_with, py::arg("seq_lens"))
      .def("trim", &KvCache::trim, Release())
      .def("close", &KvCache::close, Release())
      .def("wait_background", &KvCache::wait_background, py::arg("timeout_ms"), Release())
      .def("stop_background", &KvCache::stop_background, Release())
      .def("check", &KvCache::check, Release())
      .def("seq_lens", &KvCache::seq_lens, Release())
      .def("mapped_tokens", &KvCache::mapped_tokens, py::arg("row"), Release())
      .def("row_state",
           [](const KvCache& self, int64_t row) { return name_of(self.row_state(row)); })
      .def_property_readonly("closed", &KvCache::closed)
      .def_property_readonly("token_bytes",
                             [](const KvCache& self) { return self.layout().token_bytes; })
      .def_property_readonly("regions_per_row",
                             [](const KvCache& self) { return self.layout().regions.size(); })
      .def("stats", [](const KvCache& self) { return to_dict(self.stats()); })
      .def("capsule", &capsule_of, py::arg("layer"), py::arg("is_v"), py::arg("type_code"),
           py::arg("bits"), py::arg("device_type"), py::arg("device_id"));
}

}  // namespace
}  // namespace vattn

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of vattn. Use the classes in vattn instead.";
  py::register_exception_translator(&vattn::translate);
  vattn::define_pool(m);
  vattn::define_cache(m);
  vattn::define_page_range(m);
  vattn::define_probe(m);
  m.def(
      "default_host_page_bytes",
      [](const std::string& layout, const std::string& order, size_t item_bytes,
         const std::vector<vattn::GroupTuple>& groups) {
        return vattn::default_host_page_bytes(vattn::make_spec(layout, order, item_bytes, groups));
      },
      py::kw_only(), py::arg("layout"), py::arg("order"), py::arg("item_bytes"), py::arg("groups"));
  m.def(
      "set_log_level", [](int level) { vattn::set_log_level(static_cast<vattn::LogLevel>(level)); },
      py::arg("level"));
}
