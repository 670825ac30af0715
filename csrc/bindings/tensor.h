// Tensors leave the extension as DLPack capsules: no libtorch ABI in the binary.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/dlpack.h"
#include "core/kv_cache.h"

namespace vattn {

// A "dltensor" capsule of `view`. The cache, and with it the reservation, lives as long as the
// capsule or the tensor made from it.
pybind11::capsule make_capsule(std::shared_ptr<KvCache> cache, const TensorView& view,
                               DLDataType dtype, DLDevice device);

}  // namespace vattn
