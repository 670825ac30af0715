#include "driver/host_driver.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <mutex>
#include <unordered_map>

#include "base/errors.h"
#include "base/fork.h"
#include "base/log.h"
#include "base/units.h"
#include "driver/file_offsets.h"
#include "driver/mapping_reserve.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels answer EINVAL
#endif

namespace vattn {
namespace {

constexpr size_t kPopulateBytes = 256 * kKiB;
constexpr int kPlaceholder = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

[[noreturn]] void throw_errno(const char* call, const std::string& remedy = "") {
  const int code = errno;
  throw DriverError(call, code, std::strerror(code) + remedy);
}

// The first number in a file of /proc or /sys, or after `key` in it. 0: no file, no such key.
size_t read_number(const char* path, const std::string& key = "") {
  std::ifstream file(path);
  std::string word;
  while (!key.empty() && file >> word && word != key) continue;
  size_t value = 0;
  return file >> value ? value : 0;
}

// What a container may still take. The kernel drops cached files first, but not memory files.
size_t free_below(size_t limit) {
  constexpr const char* kStat = "/sys/fs/cgroup/memory.stat";
  const size_t used = read_number("/sys/fs/cgroup/memory.current");
  const size_t files = read_number(kStat, "file");
  const size_t dropped = files - std::min(files, read_number(kStat, "shmem"));
  return limit - std::min(limit, used - std::min(used, dropped));
}

class HostVmmDriver final : public VmmDriver {
 public:
  HostVmmDriver(size_t page_bytes, HostUse use) : page_bytes_(page_bytes), use_(use) {
    fd_ = memfd_create("vattn", MFD_CLOEXEC);
    if (fd_ < 0) throw_errno("memfd_create");
    if (ftruncate(fd_, static_cast<off_t>(FileOffsets::kLimit)) != 0) {
      const int code = errno;
      close(fd_);
      throw DriverError("ftruncate", code, std::strerror(code));
    }
  }
  ~HostVmmDriver() override { close(fd_); }
  HostVmmDriver(const HostVmmDriver&) = delete;
  HostVmmDriver& operator=(const HostVmmDriver&) = delete;

  size_t page_bytes() const noexcept override { return page_bytes_; }

  MemoryInfo memory_info() override {
    if (use_ == HostUse::kRehearsal) return {FileOffsets::kLimit, FileOffsets::kLimit};
    const auto pages = static_cast<size_t>(sysconf(_SC_PHYS_PAGES));
    size_t total = pages * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t free = read_number("/proc/meminfo", "MemAvailable:") * kKiB;
    const size_t limit = read_number("/sys/fs/cgroup/memory.max");  // 0 for "max"
    if (limit != 0 && limit < total) {
      total = limit;
      free = std::min(free, free_below(limit));
    }
    return {total, free};
  }

  uintptr_t reserve(size_t bytes) override {
    process_.check_not_forked();
    // Huge pages need addresses and file offsets that agree modulo 2 MiB: take more, give it back.
    const size_t slack = kHugePageBytes;
    void* got = mmap(nullptr, bytes + slack, PROT_READ, kPlaceholder, -1, 0);
    if (got == MAP_FAILED) {
      throw_errno("mmap(reserve)", "; asked for " + format_bytes(bytes) +
                                       " of addresses, lower max_batch_size or max_seq_len");
    }
    const auto start = reinterpret_cast<uintptr_t>(got);
    const uintptr_t base = round_up(start, slack);
    if (base > start) munmap(got, base - start);
    if (start + slack > base) munmap(pointer(base + bytes), start + slack - base);
    return base;
  }

  void unreserve(uintptr_t base, size_t bytes) noexcept override {
    if (process_.forked()) return;
    if (munmap(pointer(base), bytes) != 0) log_failure("munmap", base, bytes);
  }

  Handle create_after(Extent last, size_t bytes) override {
    process_.check_not_forked();
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<Handle>(offsets_.take(last.bytes == 0 ? 0 : end_of(last), bytes));
  }

  // File offsets are fresh or a punched hole.
  bool creates_zeroed() const noexcept override { return true; }
  bool overcommits() const noexcept override { return use_ == HostUse::kMemory; }

  void release(Extent extent) noexcept override {
    if (process_.forked()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = imported_.find(extent.handle);
    if (found != imported_.end()) {
      close(found->second.fd);
      imported_.erase(found);
      return;
    }
    const auto offset = static_cast<off_t>(extent.handle);
    if (fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
                  static_cast<off_t>(extent.bytes)) != 0) {
      log_failure("fallocate(punch hole)", static_cast<uintptr_t>(offset), extent.bytes);
    }
  }

  void map(uintptr_t base, const std::vector<Extent>& run) override {
    process_.check_not_forked();
    uintptr_t at = base;
    for (size_t i = 0; i < run.size();) {
      const SharedHandle file = locate(run[i]);
      size_t bytes = run[i].bytes;
      // Neighbours in the file become one mapping: one call, and one towards vm.max_map_count.
      for (++i; i < run.size() && follows(run[i], file, bytes); ++i) bytes += run[i].bytes;
      if (!spare_mappings_.acquire() ||
          mmap(pointer(at), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file.fd,
               static_cast<off_t>(file.offset)) == MAP_FAILED) {
        const int code = errno;
        spare_mappings_.release();
        if (at > base) restore_placeholder(base, at - base);
        throw_map_failed(code);
      }
      at += bytes;
    }
    advise_huge_pages(base, run);
  }

  bool unmap(uintptr_t base, const std::vector<Extent>& run) noexcept override {
    if (process_.forked()) return true;
    return restore_placeholder(base, total_bytes(run));
  }

  void populate(uintptr_t base, size_t bytes) noexcept override {
    if (process_.forked() || use_ == HostUse::kRehearsal) return;
    // The kernel keeps others from mapping until a call is over, so none is long.
    for (size_t done = 0; done < bytes; done += kPopulateBytes) {
      const size_t piece = std::min(bytes - done, kPopulateBytes);
      if (madvise(pointer(base + done), piece, MADV_POPULATE_WRITE) == 0) continue;
      log_line(LogLevel::kDebug, "populate skipped call=madvise code=%d base=0x%zx bytes=%zu",
               errno, base + done, bytes - done);
      return;
    }
  }

  void copy(Stream, uintptr_t to, uintptr_t from, size_t bytes) override {
    process_.check_not_forked();
    if (use_ == HostUse::kMemory) std::memcpy(pointer(to), pointer(from), bytes);
  }

  void fill(Stream, const std::vector<Extent>& run, uintptr_t, uintptr_t from,
            size_t bytes) override {
    process_.check_not_forked();
    if (use_ == HostUse::kRehearsal) return;
    for (const Extent& extent : run) {
      const SharedHandle file = locate(extent);
      for (size_t done = 0, here = std::min(extent.bytes, bytes); done < here;) {
        const ssize_t written =
            pwrite(file.fd, pointer(from), here - done, static_cast<off_t>(file.offset + done));
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) throw_errno("pwrite");
        done += static_cast<size_t>(written);
        from += static_cast<size_t>(written);
        bytes -= static_cast<size_t>(written);
      }
    }
  }

  void clear(Stream, uintptr_t base, size_t bytes) override {
    process_.check_not_forked();
    if (use_ == HostUse::kMemory) std::memset(pointer(base), 0, bytes);
  }

  Fence record_fence(Stream) override {
    process_.check_not_forked();
    return Fence::kNone;
  }
  bool fence_passed(Fence) override { return true; }
  void wait_fence(Fence) override {}
  void stream_wait_fence(Stream, Fence) override {}
  void release_fence(Fence) noexcept override {}
  void synchronize() override {}

  SharedHandle export_handle(Extent extent) override {
    process_.check_not_forked();
    const SharedHandle file = locate(extent);
    const int fd = fcntl(file.fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) throw_errno("fcntl(F_DUPFD_CLOEXEC)");
    return {fd, file.offset};
  }

  Handle import_handle(SharedHandle shared, size_t /*bytes*/) override {
    process_.check_not_forked();
    const int fd = fcntl(shared.fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) throw_errno("fcntl(F_DUPFD_CLOEXEC)");
    const std::lock_guard<std::mutex> lock(mutex_);
    // Odd numbers cannot be offsets of our own.
    const auto handle = static_cast<Handle>(2 * next_import_++ + 1);
    imported_[handle] = {fd, shared.offset};
    return handle;
  }

  std::string describe() const override {
    return "host memory (memfd), pages of " + format_bytes(page_bytes_);
  }

 private:
  [[noreturn]] static void throw_map_failed(int code) {
    throw DriverError("mmap(MAP_FIXED)", code,
                      std::string(std::strerror(code)) + "; vm.max_map_count is " +
                          std::to_string(read_number("/proc/sys/vm/max_map_count")) +
                          ", raise it with sysctl or use larger page_bytes");
  }

  // Where a neighbour of `extent` starts in our file; 0 if it is in another's.
  static size_t end_of(Extent extent) {
    const auto offset = static_cast<size_t>(extent.handle);
    return offset % 2 == 0 ? offset + extent.bytes : 0;
  }

  SharedHandle locate(const Extent& extent) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = imported_.find(extent.handle);
    if (found != imported_.end()) return found->second;
    return {fd_, static_cast<size_t>(extent.handle)};
  }

  bool follows(const Extent& extent, SharedHandle file, size_t bytes) {
    const SharedHandle next = locate(extent);
    return next.fd == file.fd && next.offset == file.offset + bytes;
  }

  // Extents of 2 MiB and more start at multiples of 2 MiB in the file, so a huge page never
  // reaches into file offsets that nobody created. Refused (EINVAL) where the kernel has none.
  static void advise_huge_pages(uintptr_t base, const std::vector<Extent>& run) {
    for (const Extent& extent : run) {
      if (extent.bytes >= kHugePageBytes &&
          madvise(pointer(base), extent.bytes, MADV_HUGEPAGE) != 0) {
        log_line(LogLevel::kDebug, "huge pages refused call=madvise code=%d", errno);
        return;
      }
      base += extent.bytes;
    }
  }

  // A fresh placeholder instead of munmap(): a hole could be handed to another thread's mmap.
  bool restore_placeholder(uintptr_t base, size_t bytes) noexcept {
    if (mmap(pointer(base), bytes, PROT_READ, kPlaceholder | MAP_FIXED, -1, 0) != MAP_FAILED) {
      return true;
    }
    log_failure("mmap(placeholder)", base, bytes);
    return false;
  }

  static void log_failure(const char* call, uintptr_t base, size_t bytes) noexcept {
    log_line(LogLevel::kError, "give back failed call=%s code=%d base=0x%zx bytes=%zu", call, errno,
             base, bytes);
  }

  const size_t page_bytes_;
  const HostUse use_;
  const ProcessBound process_;
  int fd_ = -1;
  MappingReserve spare_mappings_;
  std::mutex mutex_;  // guards everything below
  FileOffsets offsets_;
  uint64_t next_import_ = 0;
  std::unordered_map<Handle, SharedHandle> imported_;
};

}  // namespace

std::shared_ptr<VmmDriver> open_host_driver(size_t page_bytes, HostUse use) {
  const auto system_page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (!is_power_of_two(page_bytes) || page_bytes < system_page) {
    throw std::invalid_argument("page_bytes is " + std::to_string(page_bytes) +
                                ", expected a power of two of at least the system's page, " +
                                std::to_string(system_page));
  }
  return std::make_shared<HostVmmDriver>(page_bytes, use);
}

}  // namespace vattn
