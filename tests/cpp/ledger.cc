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

bool Ledger::mapped_throughout(uintptr_t base, size_t bytes) const {
  auto next = mapped_.upper_bound(base);
  if (next == mapped_.begin()) return false;
  --next;
  uintptr_t mapped_to = next->first + next->second.bytes;
  for (++next; next != mapped_.end() && next->first == mapped_to; ++next) {
    mapped_to += next->second.bytes;
  }
  return base + bytes <= mapped_to;
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

void Ledger::copy(Stream stream, uintptr_t to, uintptr_t from, size_t bytes) {
  bool allowed = true;
  note([&] {
    allowed = mapped_throughout(to, bytes) && mapped_throughout(from, bytes);
    if (!allowed) violations_ += "copy: not mapped\n";
    if (to < from + bytes && from < to + bytes) {
      violations_ += "copy: the ranges overlap\n";
      allowed = false;
    }
    ++counts_.copies;
    counts_.copied_bytes += bytes;
  });
  if (allowed) inner_->copy(stream, to, from, bytes);
}

void Ledger::clear(Stream stream, uintptr_t base, size_t bytes) {
  bool allowed = true;
  note([&] {
    allowed = mapped_throughout(base, bytes);
    if (!allowed) violations_ += "clear: not mapped\n";
    ++counts_.clears;
    counts_.cleared_bytes += bytes;
  });
  if (allowed) inner_->clear(stream, base, bytes);
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
