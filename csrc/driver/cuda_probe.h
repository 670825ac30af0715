// What the CUDA driver and its devices offer, for `vattn doctor`: asked, and tried where it counts,
// because attributes promise what cuMemCreate then refuses.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace vattn {

struct CudaDeviceProbe {
  std::string name;
  // virtual_memory, posix_fd, gpudirect_rdma, fabric, integrated. 0 also if the driver knows none.
  std::map<std::string, int> attributes;
  // free, total, granularity, recommended_granularity, reservable (addresses in one piece).
  std::map<std::string, size_t> bytes;
  // Why no page of a kind could be created, empty if one could: plain, and what attributes promise.
  std::map<std::string, std::string> pages;
  std::string problem;  // why the rest is not known; empty if it is
};

struct CudaProbe {
  std::string failed_call;  // this and `problem` say why there are no devices
  std::string problem;
  std::vector<CudaDeviceProbe> devices;
};

// What is missing is in the result, not thrown. Makes a context on each device while it runs.
CudaProbe probe_cuda();

}  // namespace vattn
