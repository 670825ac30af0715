#include "bindings/tensor.h"

namespace vattn {
namespace {

struct Managed {
  DLManagedTensor tensor{};
  std::vector<int64_t> shape, strides;
  std::shared_ptr<void> owner;
};

void destroy_unused_capsule(PyObject* capsule) {
  // A consumer renames the capsule and takes the tensor over; then there is nothing to do here.
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  tensor->deleter(tensor);
}

}  // namespace

pybind11::capsule make_capsule(std::shared_ptr<void> owner, uintptr_t address,
                               std::vector<int64_t> shape, std::vector<int64_t> strides,
                               DLDataType dtype, DLDevice device) {
  auto managed = std::make_unique<Managed>();
  managed->shape = std::move(shape);
  managed->strides = std::move(strides);
  managed->owner = std::move(owner);
  DLTensor& tensor = managed->tensor.dl_tensor;
  tensor.data = reinterpret_cast<void*>(address);
  tensor.device = device;
  tensor.ndim = static_cast<int32_t>(managed->shape.size());
  tensor.dtype = dtype;
  tensor.shape = managed->shape.data();
  tensor.strides = managed->strides.data();
  managed->tensor.manager_ctx = managed.get();
  managed->tensor.deleter = [](DLManagedTensor* self) {
    delete static_cast<Managed*>(self->manager_ctx);
  };
  auto* capsule = PyCapsule_New(&managed->tensor, "dltensor", destroy_unused_capsule);
  if (capsule == nullptr) throw pybind11::error_already_set();
  static_cast<void>(managed.release());  // the capsule owns it now
  return pybind11::reinterpret_steal<pybind11::capsule>(capsule);
}

}  // namespace vattn
