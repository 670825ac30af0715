#include "driver/mapping_reserve.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

namespace vattn {
namespace {

constexpr size_t kMappings = 512;

size_t page_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

bool MappingReserve::acquire() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (base_ != nullptr) return true;
  const size_t page = page_bytes();
  void* base = mmap(nullptr, kMappings * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return false;
  // Neighbours that differ are mappings of their own.
  for (size_t i = 1; i < kMappings; i += 2) {
    if (mprotect(static_cast<char*>(base) + i * page, page, PROT_READ) != 0) {
      munmap(base, kMappings * page);
      return false;
    }
  }
  base_ = base;
  return true;
}

void MappingReserve::release() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (base_ != nullptr) munmap(base_, kMappings * page_bytes());
  base_ = nullptr;
}

}  // namespace vattn
