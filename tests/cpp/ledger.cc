#include "ledger.h"

namespace vattn::test {

LedgerCounts Ledger::now() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return counts_;
}

std::string Ledger::violations() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return violations_;
}

bool Ledger::mapped_in(uintptr_t base, size_t bytes) const {
  const auto next = mapped_.lower_bound(base);
  return next != mapped_.end() && next->first < base + bytes;
}

uintptr_t Ledger::reserve(size_t bytes) {
  const uintptr_t base = inner_->reserve(bytes);
  note([&] { counts_.reserved_bytes += bytes; });
  return base;
}

void Ledger::unreserve(uintptr_t base, size_t bytes) noexcept {
  note([&] {
    if (mapped_in(base, bytes)) violations_ += "unreserve: still mapped\n";
    counts_.reserved_bytes -= bytes;
  });
  inner_->unreserve(base, bytes);
}

Handle Ledger::create_after(Extent last, size_t bytes) {
  if (in_create) in_create();
  const Handle handle = inner_->create_after(last, bytes);
  note([&] {
    ++counts_.creates;
    counts_.created_bytes += bytes;
  });
  return handle;
}

void Ledger::release(Extent extent) noexcept {
  note([&] {
    if (places_[extent.handle] != 0) violations_ += "release: still mapped\n";
    counts_.created_bytes -= extent.bytes;
  });
  inner_->release(extent);
}

void Ledger::map(uintptr_t base, const std::vector<Extent>& run) {
  inner_->map(base, run);
  note([&] {
    ++counts_.maps;
    for (const Extent& extent : run) {
      if (mapped_in(base, extent.bytes)) violations_ += "map: over a mapping\n";
      mapped_[base] = extent;
      ++places_[extent.handle];
      counts_.mapped_bytes += extent.bytes;
      base += extent.bytes;
    }
  });
}

bool Ledger::unmap(uintptr_t base, const std::vector<Extent>& run) noexcept {
  if (!inner_->unmap(base, run)) return false;
  note([&] {
    ++counts_.unmaps;
    for (const Extent& extent : run) {
      const auto found = mapped_.find(base);
      if (found == mapped_.end() || found->second.handle != extent.handle) {
        violations_ += "unmap: not what was mapped\n";
        return;
      }
      mapped_.erase(found);
      --places_[extent.handle];
      counts_.mapped_bytes -= extent.bytes;
      base += extent.bytes;
    }
  });
  return true;
}

Fence Ledger::record_fence(Stream stream) {
  const Fence fence = inner_->record_fence(stream);
  note([&] { counts_.fences += fence != Fence::kNone ? 1 : 0; });
  return fence;
}

bool Ledger::fence_passed(Fence fence) {
  note([] {});
  return inner_->fence_passed(fence);
}

void Ledger::wait_fence(Fence fence) {
  note([] {});
  inner_->wait_fence(fence);
}

void Ledger::stream_wait_fence(Stream stream, Fence fence) {
  inner_->stream_wait_fence(stream, fence);
  note([&] { ++counts_.stream_waits; });
}

void Ledger::release_fence(Fence fence) noexcept {
  note([&] { counts_.fences -= fence != Fence::kNone ? 1 : 0; });
  inner_->release_fence(fence);
}

void Ledger::synchronize() {
  note([] {});
  inner_->synchronize();
}

}  // namespace vattn::test
