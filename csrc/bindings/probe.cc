#include "bindings/probe.h"

#include <pybind11/stl.h>

#include "driver/cuda_probe.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace vattn {

void define_probe(py::module_& m) {
  m.def("probe_cuda", [] {
    const CudaProbe probe = probe_cuda();
    py::list devices;
    for (const CudaDeviceProbe& device : probe.devices) {
      devices.append(py::dict("name"_a = device.name, "attributes"_a = device.attributes,
                              "bytes"_a = device.bytes, "pages"_a = device.pages,
                              "problem"_a = device.problem));
    }
    return py::dict("failed_call"_a = probe.failed_call, "problem"_a = probe.problem,
                    "devices"_a = devices);
  });
}

}  // namespace vattn
