#pragma once

#include <pybind11/pybind11.h>

namespace vattn {

// vattn._C.probe_cuda(): what driver/cuda_probe.h finds, as dicts.
void define_probe(pybind11::module_& m);

}  // namespace vattn
