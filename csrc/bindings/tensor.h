// Tensors leave the extension as DLPack capsules: no libtorch ABI in the binary.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "bindings/dlpack.h"

namespace vattn {

// A "dltensor" capsule of the elements at `address`. `owner`, and with it the reservation, lives as
// long as the capsule or the tensor made from it. Shape and strides are in elements.
pybind11::capsule make_capsule(std::shared_ptr<void> owner, uintptr_t address,
                               std::vector<int64_t> shape, std::vector<int64_t> strides,
                               DLDataType dtype, DLDevice device);

}  // namespace vattn
