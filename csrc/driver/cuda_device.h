// One CUDA device as this process sees it: the primary context (shared with torch), made current
// around every call, and the bookkeeping of calls that give something back.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "base/fork.h"
#include "driver/cuda_api.h"

namespace vattn {

// Makes a context current on the calling thread, and the previous one again at the end. Engine
// threads, our background thread and destructors run under whatever context the thread had.
class CurrentContext {
 public:
  struct OrThrow {};

  CurrentContext(const cuda::Api& api, cuda::ContextPtr wanted) noexcept;
  CurrentContext(const cuda::Api& api, cuda::ContextPtr wanted, OrThrow);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

  cuda::Result status() const noexcept { return status_; }

 private:
  const cuda::Api& api_;
  cuda::Result status_;
  bool pushed_ = false;
};

// Starts the driver. 0 also where CUDA_VISIBLE_DEVICES hides all. Throws DriverError.
int count_devices(const cuda::Api& api);

class CudaDevice {
 public:
  // Throws std::invalid_argument when the device is not there, DriverError when it cannot map.
  explicit CudaDevice(int ordinal);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  const cuda::Api& api() const noexcept { return api_; }
  cuda::Device id() const noexcept { return id_; }
  // 0 also when the driver is too old to know the attribute.
  int attribute(int attribute) const noexcept;
  // Needs no working device: it goes into error messages and bug reports.
  const std::string& describe() const noexcept { return description_; }

  // For every call that acquires or asks. Throws DriverError, in a forked child too.
  [[nodiscard]] CurrentContext enter() const;

  // For calls that give back: noexcept, nothing in a forked child (the memory is the parent's), and
  // success once the driver is shut down at process exit (the memory went with the context).
  template <typename Call>
  cuda::Result give_back(Call&& call) const noexcept {
    if (process_.forked()) return cuda::kSuccess;
    const CurrentContext here(api_, context_);
    const cuda::Result result = here.status() == cuda::kSuccess ? call(api_) : here.status();
    return result == cuda::kErrorDeinitialized ? cuda::kSuccess : result;
  }
  // One log line and one count for a give-back that failed. `object` is an address or a handle.
  void note_failed_give_back(const char* call, cuda::Result result, uint64_t object,
                             size_t bytes) noexcept;
  size_t failed_give_backs() const noexcept { return failed_give_backs_.load(); }

 private:
  const ProcessBound process_;
  const cuda::Api api_;
  cuda::Device id_ = 0;
  std::string description_;
  cuda::ContextPtr context_ = nullptr;
  std::atomic<size_t> failed_give_backs_{0};
};

}  // namespace vattn
