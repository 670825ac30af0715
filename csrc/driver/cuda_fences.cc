#include "driver/cuda_fences.h"

#include <stdexcept>
#include <string>

namespace vattn {
namespace {

// The low half is index + 1, so that no fence is Fence::kNone.
Fence make_fence(uint32_t index, uint32_t generation) {
  return static_cast<Fence>((uint64_t{generation} << 32) | (uint64_t{index} + 1));
}
uint32_t index_of(Fence fence) {
  return static_cast<uint32_t>(static_cast<uint64_t>(fence) & 0xffffffffu) - 1;
}
uint32_t generation_of(Fence fence) {
  return static_cast<uint32_t>(static_cast<uint64_t>(fence) >> 32);
}

}  // namespace

CudaFences::~CudaFences() {
  for (const Slot& slot : slots_) {
    const cuda::Result result = device_.give_back(
        [&](const cuda::Api& api) noexcept { return api.cuEventDestroy(slot.event); });
    if (result != cuda::kSuccess) {
      device_.note_failed_give_back("cuEventDestroy", result,
                                    reinterpret_cast<uintptr_t>(slot.event), 0);
    }
  }
}

Fence CudaFences::record(Stream stream) {
  const CurrentContext here = device_.enter();
  cuda::EventPtr event = nullptr;
  const Fence fence = take(&event);
  const cuda::Result result = device_.api().cuEventRecord(event, to_cuda(stream));
  if (result != cuda::kSuccess) {
    release(fence);
    cuda::throw_error(device_.api(), "cuEventRecord", result);
  }
  return fence;
}

bool CudaFences::passed(Fence fence) {
  if (fence == Fence::kNone) return true;
  const CurrentContext here = device_.enter();
  const cuda::Result result = device_.api().cuEventQuery(event_of(fence));
  if (result == cuda::kErrorNotReady) return false;
  cuda::check(device_.api(), "cuEventQuery", result);
  return true;
}

void CudaFences::wait(Fence fence) {
  if (fence == Fence::kNone) return;
  const CurrentContext here = device_.enter();
  cuda::check(device_.api(), "cuEventSynchronize",
              device_.api().cuEventSynchronize(event_of(fence)));
}

void CudaFences::stream_wait(Stream stream, Fence fence) {
  if (fence == Fence::kNone) return;
  const CurrentContext here = device_.enter();
  cuda::check(device_.api(), "cuStreamWaitEvent",
              device_.api().cuStreamWaitEvent(to_cuda(stream), event_of(fence), 0));
}

void CudaFences::release(Fence fence) noexcept {
  if (fence == Fence::kNone) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  Slot* slot = find(fence);
  if (slot == nullptr) {
    device_.note_failed_give_back("release_fence", cuda::kErrorInvalidHandle,
                                  static_cast<uint64_t>(fence), 0);
    return;
  }
  // The event may still be pending: recording it again starts over, and streams that wait for it
  // wait for what it held when they were told to.
  slot->live = false;
  ++slot->generation;
  free_.push_back(index_of(fence));  // capacity was reserved in take()
}

Fence CudaFences::take(cuda::EventPtr* event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    slots_.reserve(slots_.size() + 1);
    free_.reserve(slots_.size() + 1);
    Slot slot{nullptr, 0, false};
    cuda::check(device_.api(), "cuEventCreate",
                device_.api().cuEventCreate(&slot.event, cuda::kEventDisableTiming));
    free_.push_back(static_cast<uint32_t>(slots_.size()));
    slots_.push_back(slot);
  }
  const uint32_t index = free_.back();
  free_.pop_back();
  slots_[index].live = true;
  *event = slots_[index].event;
  return make_fence(index, slots_[index].generation);
}

CudaFences::Slot* CudaFences::find(Fence fence) noexcept {
  const uint32_t index = index_of(fence);
  if (index >= slots_.size()) return nullptr;
  Slot& slot = slots_[index];
  return slot.live && slot.generation == generation_of(fence) ? &slot : nullptr;
}

cuda::EventPtr CudaFences::event_of(Fence fence) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Slot* slot = find(fence);
  if (slot == nullptr) {
    throw std::invalid_argument("fence " + std::to_string(static_cast<uint64_t>(fence)) +
                                " is not live: it was released, or another driver recorded it");
  }
  return slot->event;
}

}  // namespace vattn
