// Lengths as Python has them: a list, a dict, a numpy array, a torch CPU tensor, any 1-d buffer.
#pragma once

#include <pybind11/pybind11.h>

#include "core/kv_cache.h"

namespace vattn {

// cache.step() with what `seq_lens` holds; releases the GIL. An int64 buffer is handed on as it is.
// Throws TypeError or std::invalid_argument for anything but whole numbers of one dimension.
void step_with(KvCache& cache, pybind11::handle seq_lens);

}  // namespace vattn
