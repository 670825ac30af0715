#include "driver/cuda_probe.h"

#include "base/units.h"
#include "driver/cuda_device.h"

namespace vattn {
namespace {

constexpr std::pair<const char*, int> kAttributes[] = {
    {"virtual_memory", cuda::kAttributeVirtualMemoryManagementSupported},
    {"posix_fd", cuda::kAttributeHandleTypePosixFdSupported},
    {"gpudirect_rdma", cuda::kAttributeGpuDirectRdmaWithVmmSupported},
    {"fabric", cuda::kAttributeHandleTypeFabricSupported},
    {"integrated", cuda::kAttributeIntegrated}};

struct PageKind {
  const char* name;  // but for "plain", that of the attribute that promises it
  int handle_type;
  unsigned char rdma;
};
constexpr PageKind kPageKinds[] = {{"plain", cuda::kMemHandleTypeNone, 0},
                                   {"posix_fd", cuda::kMemHandleTypePosixFd, 0},
                                   {"gpudirect_rdma", cuda::kMemHandleTypeNone, 1},
                                   {"fabric", cuda::kMemHandleTypeFabric, 0}};

size_t granularity(const cuda::Api& api, const cuda::MemAllocationProp& prop, int option) {
  size_t bytes = 0;
  cuda::check(api, "cuMemGetAllocationGranularity",
              api.cuMemGetAllocationGranularity(&bytes, &prop, option));
  return bytes;
}

std::string try_page(const cuda::Api& api, const cuda::MemAllocationProp& prop) {
  try {
    cuda::MemHandle handle = 0;
    const size_t bytes = granularity(api, prop, cuda::kMemGranularityMinimum);
    cuda::check(api, "cuMemCreate", api.cuMemCreate(&handle, bytes, &prop, 0));
    cuda::check(api, "cuMemRelease", api.cuMemRelease(handle));
    return "";
  } catch (const DriverError& error) {
    return error.what();
  }
}

size_t largest_reservation(const cuda::Api& api) {
  for (size_t bytes = 16 * kTiB; bytes >= kGiB; bytes /= 2) {
    cuda::DevicePtr base = 0;
    if (api.cuMemAddressReserve(&base, bytes, 0, 0, 0) != cuda::kSuccess) continue;
    cuda::check(api, "cuMemAddressFree", api.cuMemAddressFree(base, bytes));
    return bytes;
  }
  return 0;
}

void probe_memory(const CudaDevice& device, CudaDeviceProbe& probe) {
  const CurrentContext here = device.enter();
  const cuda::Api& api = device.api();
  auto& bytes = probe.bytes;
  cuda::check(api, "cuMemGetInfo", api.cuMemGetInfo(&bytes["free"], &bytes["total"]));
  cuda::MemAllocationProp prop{};
  prop.type = cuda::kMemAllocationTypePinned;
  prop.location = {cuda::kMemLocationTypeDevice, device.id()};
  bytes["granularity"] = granularity(api, prop, cuda::kMemGranularityMinimum);
  bytes["recommended_granularity"] = granularity(api, prop, cuda::kMemGranularityRecommended);
  bytes["reservable"] = largest_reservation(api);
  for (const PageKind& kind : kPageKinds) {
    const auto promise = probe.attributes.find(kind.name);
    if (promise != probe.attributes.end() && promise->second == 0) continue;
    prop.requested_handle_types = kind.handle_type;
    prop.flags.gpu_direct_rdma_capable = kind.rdma;
    probe.pages[kind.name] = try_page(api, prop);
  }
}

CudaDeviceProbe probe_device(const cuda::Api& api, int ordinal) {
  CudaDeviceProbe probe;
  try {
    cuda::Device id = 0;
    char name[128] = "?";
    cuda::check(api, "cuDeviceGet", api.cuDeviceGet(&id, ordinal));
    cuda::check(api, "cuDeviceGetName", api.cuDeviceGetName(name, sizeof(name), id));
    probe.name = name;
    for (const auto& [key, attribute] : kAttributes) {
      int& value = probe.attributes[key];
      if (api.cuDeviceGetAttribute(&value, attribute, id) != cuda::kSuccess) value = 0;
    }
    probe_memory(CudaDevice(ordinal), probe);
  } catch (const std::exception& error) {
    probe.problem = error.what();
  }
  return probe;
}

}  // namespace

CudaProbe probe_cuda() {
  CudaProbe probe;
  try {
    const cuda::Api api = cuda::load_api();
    const int count = count_devices(api);
    for (int i = 0; i < count; ++i) probe.devices.push_back(probe_device(api, i));
  } catch (const DriverError& error) {
    probe.failed_call = error.call();
    probe.problem = error.what();
  }
  return probe;
}

}  // namespace vattn
