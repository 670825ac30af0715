#include "driver/fault_driver.h"

#include <atomic>

#include "base/errors.h"

namespace vattn {
namespace {

constexpr int64_t kDisarmed = INT64_MAX / 2;

class Injector final : public FaultDriver {
 public:
  explicit Injector(std::shared_ptr<VmmDriver> inner) : inner_(std::move(inner)) {}

  void fail_nth(uint64_t nth) override { arm(nth, /*persistent=*/false); }
  void fail_from(uint64_t nth) override { arm(nth, /*persistent=*/true); }
  void disarm() override { countdown_ = kDisarmed; }
  uint64_t injected() const override { return injected_; }

  size_t page_bytes() const noexcept override { return inner_->page_bytes(); }
  MemoryInfo memory_info() override { return inner_->memory_info(); }
  std::string describe() const override { return inner_->describe(); }

  uintptr_t reserve(size_t bytes) override {
    maybe_throw("reserve");
    return inner_->reserve(bytes);
  }
  void unreserve(uintptr_t base, size_t bytes) noexcept override { inner_->unreserve(base, bytes); }
  Handle create_after(Extent last, size_t bytes) override {
    maybe_throw("create");
    return inner_->create_after(last, bytes);
  }
  bool creates_zeroed() const noexcept override { return inner_->creates_zeroed(); }
  bool overcommits() const noexcept override { return inner_->overcommits(); }
  void release(Extent extent) noexcept override { inner_->release(extent); }
  void map(uintptr_t base, const std::vector<Extent>& run) override {
    maybe_throw("map");
    inner_->map(base, run);
  }
  bool unmap(uintptr_t base, const std::vector<Extent>& run) noexcept override {
    return !fails() && inner_->unmap(base, run);
  }
  void populate(uintptr_t base, size_t bytes) noexcept override { inner_->populate(base, bytes); }
  void copy(Stream stream, uintptr_t to, uintptr_t from, size_t bytes) override {
    maybe_throw("copy");
    inner_->copy(stream, to, from, bytes);
  }
  void fill(Stream stream, const std::vector<Extent>& run, uintptr_t to, uintptr_t from,
            size_t bytes) override {
    maybe_throw("copy");
    inner_->fill(stream, run, to, from, bytes);
  }
  void clear(Stream stream, uintptr_t base, size_t bytes) override {
    maybe_throw("clear");
    inner_->clear(stream, base, bytes);
  }
  Fence record_fence(Stream stream) override {
    maybe_throw("record_fence");
    return inner_->record_fence(stream);
  }
  bool fence_passed(Fence fence) override {
    maybe_throw("fence_passed");
    return inner_->fence_passed(fence);
  }
  void wait_fence(Fence fence) override {
    maybe_throw("wait_fence");
    inner_->wait_fence(fence);
  }
  void stream_wait_fence(Stream stream, Fence fence) override {
    maybe_throw("stream_wait_fence");
    inner_->stream_wait_fence(stream, fence);
  }
  void release_fence(Fence fence) noexcept override { inner_->release_fence(fence); }
  void synchronize() override {
    maybe_throw("synchronize");
    inner_->synchronize();
  }
  SharedHandle export_handle(Extent extent) override {
    maybe_throw("export_handle");
    return inner_->export_handle(extent);
  }
  Handle import_handle(SharedHandle shared, size_t bytes) override {
    maybe_throw("import_handle");
    return inner_->import_handle(shared, bytes);
  }

 private:
  void arm(uint64_t nth, bool persistent) {
    injected_ = 0;
    persistent_ = persistent;
    countdown_ = static_cast<int64_t>(nth);
  }

  bool fails() noexcept {
    const int64_t left = --countdown_;
    const bool now = left == 0 || (left < 0 && persistent_);
    if (now) ++injected_;
    return now;
  }

  void maybe_throw(const char* call) {
    if (fails()) throw DriverError(call, -1, "injected fault");
  }

  const std::shared_ptr<VmmDriver> inner_;
  std::atomic<int64_t> countdown_{kDisarmed};
  std::atomic<bool> persistent_{false};
  std::atomic<uint64_t> injected_{0};
};

}  // namespace

std::shared_ptr<FaultDriver> inject_faults(std::shared_ptr<VmmDriver> inner) {
  return std::make_shared<Injector>(std::move(inner));
}

}  // namespace vattn
