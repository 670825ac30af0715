// Fences as CUDA events. Events are recycled, fence values are not: a fence that was released is
// told apart from the next one that uses its event.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "driver/cuda_device.h"
#include "driver/vmm_driver.h"

namespace vattn {

inline cuda::StreamPtr to_cuda(Stream stream) {
  return reinterpret_cast<cuda::StreamPtr>(static_cast<uintptr_t>(stream));
}

class CudaFences {
 public:
  explicit CudaFences(CudaDevice& device) : device_(device) {}
  ~CudaFences();
  CudaFences(const CudaFences&) = delete;
  CudaFences& operator=(const CudaFences&) = delete;

  Fence record(Stream stream);
  bool passed(Fence fence);
  // Throws std::invalid_argument, as passed() and stream_wait() do, for a fence that is not live.
  void wait(Fence fence);
  void stream_wait(Stream stream, Fence fence);
  void release(Fence fence) noexcept;

 private:
  struct Slot {
    cuda::EventPtr event;
    uint32_t generation;  // of the fence that uses the slot, or will use it next
    bool live;
  };

  Fence take(cuda::EventPtr* event);
  // Null when the fence is not live. pre: mutex_ is held.
  Slot* find(Fence fence) noexcept;
  cuda::EventPtr event_of(Fence fence);

  CudaDevice& device_;
  std::mutex mutex_;  // guards slots_, free_; held over driver calls only when the pool grows
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
};

}  // namespace vattn
