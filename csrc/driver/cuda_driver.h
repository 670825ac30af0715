// Virtual memory of a CUDA device, by the driver's cuMem* functions.
#pragma once

#include <memory>

#include "driver/cuda_fences.h"
#include "driver/vmm_driver.h"

namespace vattn {

class CudaVmmDriver : public VmmDriver {
 public:
  explicit CudaVmmDriver(int device_ordinal);

  size_t page_bytes() const noexcept override { return page_bytes_; }
  MemoryInfo memory_info() override;

  uintptr_t reserve(size_t bytes) override;
  void unreserve(uintptr_t base, size_t bytes) noexcept override;
  Handle create_after(Extent last, size_t bytes) override;
  bool creates_zeroed() const noexcept override { return false; }
  bool overcommits() const noexcept override { return false; }
  void release(Extent extent) noexcept override;
  void map(uintptr_t base, const std::vector<Extent>& run) override;
  bool unmap(uintptr_t base, const std::vector<Extent>& run) noexcept override;
  void populate(uintptr_t, size_t) noexcept override {}  // device memory is there from create() on

  void copy(Stream stream, uintptr_t to, uintptr_t from, size_t bytes) override;
  void clear(Stream stream, uintptr_t base, size_t bytes) override;

  Fence record_fence(Stream stream) override { return fences_.record(stream); }
  bool fence_passed(Fence fence) override { return fences_.passed(fence); }
  void wait_fence(Fence fence) override { fences_.wait(fence); }
  void stream_wait_fence(Stream stream, Fence fence) override {
    fences_.stream_wait(stream, fence);
  }
  void release_fence(Fence fence) noexcept override { fences_.release(fence); }
  void synchronize() override;

  SharedHandle export_handle(Extent extent) override;
  Handle import_handle(SharedHandle shared, size_t bytes) override;
  std::string describe() const override;

  // Give-backs that the driver refused since the driver was opened. Each is in the log.
  size_t failed_give_backs() const noexcept { return device_.failed_give_backs(); }

 private:
  // What create() asks for. Fixed at open, by trying.
  void choose_allocation();
  void check_sound() const;
  cuda::Result set_access(cuda::DevicePtr base, const Extent* run, size_t n) noexcept;
  cuda::Result map_each(cuda::DevicePtr base, const Extent* run, size_t n, size_t* done) noexcept;
  cuda::Result unmap_run(cuda::DevicePtr base, const Extent* run, size_t n) noexcept;
  cuda::Result unmap_each(cuda::DevicePtr base, const Extent* run, size_t n) noexcept;
  void put_back(cuda::DevicePtr base, const Extent* run, size_t n) noexcept;

  CudaDevice device_;
  CudaFences fences_{device_};
  cuda::MemAllocationProp prop_{};
  size_t page_bytes_ = 0;
  // Cleared when the driver refuses a call over a run of several extents but takes single ones.
  std::atomic<bool> access_per_run_{true};
  std::atomic<bool> unmap_per_run_{true};
  // Set when a range is neither mapped nor unmapped any more. Nothing is acquired after that.
  std::atomic<cuda::Result> broken_{cuda::kSuccess};
};

// Throws std::invalid_argument when there is no such device, DriverError when it cannot be used.
std::shared_ptr<VmmDriver> open_cuda_driver(int device_ordinal);

}  // namespace vattn
