#include "bindings/seq_lens.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace vattn {
namespace {

class Buffer {
 public:
  explicit Buffer(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_FORMAT | PyBUF_STRIDED_RO) != 0) {
      throw py::error_already_set();
    }
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  const Py_buffer& view() const { return view_; }
  // 'i', 'l' or 'q' in native byte order: whole numbers with a sign.
  bool holds_integers() const {
    std::string format = view_.format == nullptr ? "B" : view_.format;
    if (format.size() == 2 && (format[0] == '@' || format[0] == '=')) format.erase(0, 1);
    return format == "i" || format == "l" || format == "q";
  }

 private:
  Py_buffer view_{};
};

int64_t to_int64(PyObject* object) {
  // __index__: ints and numpy's integers, but not floats.
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (!index) throw py::error_already_set();
  const int64_t value = PyLong_AsLongLong(index.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

void step_released(KvCache& cache, const int64_t* lens, size_t n) {
  const py::gil_scoped_release release;
  cache.step(lens, n);
}

void step_with_buffer(KvCache& cache, py::handle object) {
  const Buffer buffer(object);
  const Py_buffer& view = buffer.view();
  if (view.ndim != 1) {
    throw std::invalid_argument("seq_lens has " + std::to_string(view.ndim) +
                                " dimensions, expected shape (max_batch_size,)");
  }
  if (!buffer.holds_integers()) {
    throw std::invalid_argument("seq_lens has elements of type '" +
                                std::string(view.format == nullptr ? "B" : view.format) +
                                "', expected int32 or int64");
  }
  const auto n = static_cast<size_t>(view.shape[0]);
  if (view.itemsize == 8 && view.strides[0] == 8) {
    step_released(cache, static_cast<const int64_t*>(view.buf), n);
    return;
  }
  thread_local std::vector<int64_t> copy;
  copy.resize(n);
  const char* item = static_cast<const char*>(view.buf);
  for (size_t i = 0; i < n; ++i, item += view.strides[0]) {
    copy[i] = view.itemsize == 8 ? *reinterpret_cast<const int64_t*>(item)
                                 : *reinterpret_cast<const int32_t*>(item);
  }
  step_released(cache, copy.data(), n);
}

void step_with_sequence(KvCache& cache, py::handle object) {
  const bool is_list = PyList_Check(object.ptr());
  const auto n =
      static_cast<size_t>(is_list ? PyList_GET_SIZE(object.ptr()) : PyTuple_GET_SIZE(object.ptr()));
  thread_local std::vector<int64_t> copy;
  copy.resize(n);
  for (size_t i = 0; i < n; ++i) {
    const auto at = static_cast<Py_ssize_t>(i);
    copy[i] =
        to_int64(is_list ? PyList_GET_ITEM(object.ptr(), at) : PyTuple_GET_ITEM(object.ptr(), at));
  }
  step_released(cache, copy.data(), n);
}

void step_with_dict(KvCache& cache, py::handle object) {
  std::vector<std::pair<int64_t, int64_t>> lens;
  for (const auto& [row, seq_len] : py::reinterpret_borrow<py::dict>(object)) {
    lens.emplace_back(to_int64(row.ptr()), to_int64(seq_len.ptr()));
  }
  const py::gil_scoped_release release;
  cache.step_rows(lens);
}

}  // namespace

void step_with(KvCache& cache, py::handle seq_lens) {
  PyObject* object = seq_lens.ptr();
  if (PyList_Check(object) || PyTuple_Check(object)) {
    step_with_sequence(cache, seq_lens);
  } else if (PyDict_Check(object)) {
    step_with_dict(cache, seq_lens);
  } else if (PyObject_CheckBuffer(object) != 0) {
    step_with_buffer(cache, seq_lens);
  } else if (py::hasattr(seq_lens, "numpy")) {
    // torch has no buffer protocol; numpy() copies nothing, and refuses a CUDA tensor with a
    // remedy.
    step_with_buffer(cache, seq_lens.attr("numpy")());
  } else {
    throw py::type_error("seq_lens is a " + std::string(Py_TYPE(object)->tp_name) +
                         ", expected a list, a dict {row: tokens}, or an int32 or int64 array of "
                         "shape (max_batch_size,)");
  }
}

}  // namespace vattn
