#include "driver/cuda_device.h"

#include <stdexcept>

#include "base/log.h"

namespace vattn {
namespace {

using cuda::Result;

cuda::Device find_device(const cuda::Api& api, int ordinal) {
  const int count = count_devices(api);
  if (ordinal < 0 || ordinal >= count) {
    throw std::invalid_argument("CUDA device " + std::to_string(ordinal) +
                                " is not there: " + std::to_string(count) +
                                " CUDA devices are visible; use an ordinal below that, check "
                                "CUDA_VISIBLE_DEVICES and nvidia-smi, or use device=\"cpu\"");
  }
  cuda::Device device = 0;
  cuda::check(api, "cuDeviceGet", api.cuDeviceGet(&device, ordinal));
  return device;
}

std::string describe_device(const cuda::Api& api, cuda::Device device) {
  int version = 0;
  char name[128] = "?";
  cuda::check(api, "cuDriverGetVersion", api.cuDriverGetVersion(&version));
  cuda::check(api, "cuDeviceGetName", api.cuDeviceGetName(name, sizeof(name), device));
  return "CUDA driver " + std::to_string(version / 1000) + "." +
         std::to_string(version % 1000 / 10) + ", device " + std::to_string(device) + " " + name;
}

}  // namespace

int count_devices(const cuda::Api& api) {
  const Result result = api.cuInit(0);
  // With CUDA_VISIBLE_DEVICES="" or without a GPU, cuInit itself says that there is no device.
  if (result == cuda::kErrorNoDevice) return 0;
  if (result != cuda::kSuccess) {
    cuda::throw_error(api, "cuInit", result, "check that nvidia-smi works, or use device=\"cpu\"");
  }
  int count = 0;
  cuda::check(api, "cuDeviceGetCount", api.cuDeviceGetCount(&count));
  return count;
}

CurrentContext::CurrentContext(const cuda::Api& api, cuda::ContextPtr wanted) noexcept : api_(api) {
  cuda::ContextPtr current = nullptr;
  status_ = api_.cuCtxGetCurrent(&current);
  if (status_ != cuda::kSuccess || current == wanted) return;
  status_ = api_.cuCtxPushCurrent(wanted);
  pushed_ = status_ == cuda::kSuccess;
}

CurrentContext::CurrentContext(const cuda::Api& api, cuda::ContextPtr wanted, OrThrow)
    : CurrentContext(api, wanted) {
  cuda::check(api_, "cuCtxPushCurrent", status_);
}

CurrentContext::~CurrentContext() {
  if (!pushed_) return;
  cuda::ContextPtr popped = nullptr;
  const Result result = api_.cuCtxPopCurrent(&popped);
  if (result == cuda::kSuccess || result == cuda::kErrorDeinitialized) return;
  log_line(LogLevel::kWarning, "context not restored call=cuCtxPopCurrent code=%d name=%s", result,
           cuda::error_name(api_, result));
}

CudaDevice::CudaDevice(int ordinal) : api_(cuda::load_api()) {
  id_ = find_device(api_, ordinal);
  if (attribute(cuda::kAttributeVirtualMemoryManagementSupported) == 0) {
    throw DriverError("cuDeviceGetAttribute", 0,
                      "device " + std::to_string(ordinal) +
                          " has CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 0, as "
                          "under WSL, on Jetson or with an old driver; update the driver, or use "
                          "device=\"cpu\"");
  }
  description_ = describe_device(api_, id_);
  // Last: a constructor that throws after this would not release it.
  const Result result = api_.cuDevicePrimaryCtxRetain(&context_, id_);
  if (result != cuda::kSuccess) {
    cuda::throw_error(api_, "cuDevicePrimaryCtxRetain", result,
                      "a context needs some free device memory of its own");
  }
}

CudaDevice::~CudaDevice() {
  if (process_.forked()) return;
  // Not under give_back(): releasing needs no current context, and must not leave a dead one so.
  const Result result = api_.cuDevicePrimaryCtxRelease(id_);
  if (result != cuda::kSuccess && result != cuda::kErrorDeinitialized) {
    note_failed_give_back("cuDevicePrimaryCtxRelease", result, static_cast<uint64_t>(id_), 0);
  }
}

int CudaDevice::attribute(int attribute) const noexcept {
  int value = 0;
  return api_.cuDeviceGetAttribute(&value, attribute, id_) == cuda::kSuccess ? value : 0;
}

CurrentContext CudaDevice::enter() const {
  process_.check_not_forked();
  return CurrentContext(api_, context_, CurrentContext::OrThrow{});
}

void CudaDevice::note_failed_give_back(const char* call, Result result, uint64_t object,
                                       size_t bytes) noexcept {
  failed_give_backs_.fetch_add(1, std::memory_order_relaxed);
  log_line(LogLevel::kWarning, "give-back failed call=%s code=%d name=%s object=0x%llx bytes=%zu",
           call, result, cuda::error_name(api_, result), static_cast<unsigned long long>(object),
           bytes);
}

}  // namespace vattn
