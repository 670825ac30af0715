// Decorator that keeps the books of a driver: what was made and mapped and not yet given back. It
// sits under the code under test, and under the fault injection, so it sees what really happened.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "base/fork.h"
#include "driver/vmm_driver.h"

namespace vattn::test {

struct LedgerCounts {
  // Held now.
  size_t reserved_bytes = 0;
  size_t created_bytes = 0;
  size_t mapped_bytes = 0;
  size_t fences = 0;
  // Calls so far; `calls` is all that change something or ask the device.
  size_t calls = 0;
  size_t creates = 0;
  size_t maps = 0;
  size_t unmaps = 0;
  size_t stream_waits = 0;
  size_t copies = 0;
  size_t copied_bytes = 0;
  size_t clears = 0;
  size_t cleared_bytes = 0;
};

class Ledger final : public VmmDriver {
 public:
  explicit Ledger(std::shared_ptr<VmmDriver> inner) : inner_(std::move(inner)) {}

  LedgerCounts now() const;
  // Preconditions of VmmDriver that the caller broke, one per line.
  std::string violations() const;
  // Runs inside create(). Set it while nobody creates.
  std::function<void()> in_create;
  // What memory_info() says is free, if not what the driver says.
  std::optional<size_t> free_bytes;

  size_t page_bytes() const noexcept override { return inner_->page_bytes(); }
  MemoryInfo memory_info() override {
    const MemoryInfo info = inner_->memory_info();
    return {info.total_bytes, free_bytes.value_or(info.free_bytes)};
  }
  std::string describe() const override { return inner_->describe(); }

  uintptr_t reserve(size_t bytes) override;
  void unreserve(uintptr_t base, size_t bytes) noexcept override;
  Handle create_after(Extent last, size_t bytes) override;
  bool creates_zeroed() const noexcept override { return inner_->creates_zeroed(); }
  bool overcommits() const noexcept override { return inner_->overcommits(); }
  void release(Extent extent) noexcept override;
  void map(uintptr_t base, const std::vector<Extent>& run) override;
  bool unmap(uintptr_t base, const std::vector<Extent>& run) noexcept override;
  void populate(uintptr_t base, size_t bytes) noexcept override { inner_->populate(base, bytes); }

  // What breaks a precondition goes no further: the host would crash on it.
  void copy(Stream stream, uintptr_t to, uintptr_t from, size_t bytes) override;
  void clear(Stream stream, uintptr_t base, size_t bytes) override;

  Fence record_fence(Stream stream) override;
  bool fence_passed(Fence fence) override;
  void wait_fence(Fence fence) override;
  void stream_wait_fence(Stream stream, Fence fence) override;
  void release_fence(Fence fence) noexcept override;
  void synchronize() override;

  SharedHandle export_handle(Extent extent) override { return inner_->export_handle(extent); }
  Handle import_handle(SharedHandle shared, size_t bytes) override {
    return inner_->import_handle(shared, bytes);
  }

 private:
  template <typename Function>
  void note(Function function) {
    // The mutex may be held by a thread that a forked child does not have.
    if (process_.forked()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counts_.calls;
    function();
  }
  bool mapped_in(uintptr_t base, size_t bytes) const;
  bool mapped_throughout(uintptr_t base, size_t bytes) const;

  const std::shared_ptr<VmmDriver> inner_;
  const ProcessBound process_;
  mutable std::mutex mutex_;  // guards everything below
  LedgerCounts counts_;
  std::map<uintptr_t, Extent> mapped_;  // by address
  std::map<Handle, size_t> places_;     // where each handle is mapped
  std::string violations_;
};

}  // namespace vattn::test
