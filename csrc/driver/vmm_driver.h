// The primitive virtual-memory API. One implementation per kind of memory (CUDA, host).
//
// pre, on every function: addresses and sizes are multiples of page_bytes() (but for copy() and
// clear(), which take any), sizes are > 0.
// A function that throws has changed nothing. Functions that give something back are noexcept:
// they run in destructors and rollbacks, so they count and log a failure instead.
// Every function may be called from any thread. In a forked child, functions that acquire throw
// DriverError and functions that give back do nothing: the memory is the parent's.
// Nothing here takes a decision. Policy lives above this line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vattn {

enum class Handle : uint64_t {};   // physical memory, opaque driver handle
enum class Stream : uintptr_t {};  // CUstream; 0 is the legacy default stream. Ignored on the host
enum class Fence : uint64_t { kNone = 0 };  // a point in a stream; kNone has always passed

// One physical allocation. Its size is fixed at create() and it is mapped whole.
struct Extent {
  Handle handle;
  size_t bytes;
};

inline size_t total_bytes(const std::vector<Extent>& run) {
  size_t bytes = 0;
  for (const Extent& extent : run) bytes += extent.bytes;
  return bytes;
}

// A handle that another process can import. The receiver of `fd` closes it.
struct SharedHandle {
  int fd;
  size_t offset;  // where the extent starts in the file; 0 on CUDA
};

struct MemoryInfo {
  size_t total_bytes;
  size_t free_bytes;
};

class VmmDriver {
 public:
  virtual ~VmmDriver() = default;

  // Smallest unit of physical memory, a power of two.
  virtual size_t page_bytes() const noexcept = 0;
  // Of the device (CUDA) or of the machine (host). A hint: other processes take memory too.
  virtual MemoryInfo memory_info() = 0;

  // A range of addresses with nothing under it. On the host it reads as zeros and a write faults;
  // on CUDA any access is an error.
  virtual uintptr_t reserve(size_t bytes) = 0;
  // pre: nothing is mapped in the range.
  virtual void unreserve(uintptr_t base, size_t bytes) noexcept = 0;

  // Physical memory. Throws OutOfDeviceMemory when there is none left.
  Handle create(size_t bytes) { return create_after({}, bytes); }
  // As create(), for an extent that will be mapped right behind `last`. A hint: on the host two
  // such extents are one mapping to the kernel. Extent{} means none.
  virtual Handle create_after(Extent last, size_t bytes) = 0;
  // Whether memory from create() reads as zeros. CUDA promises nothing.
  virtual bool creates_zeroed() const noexcept = 0;
  // Whether create() hands out more than is free, because memory is taken when it is touched: who
  // then touches what is not there is killed.
  virtual bool overcommits() const noexcept = 0;
  // pre: mapped nowhere.
  virtual void release(Extent extent) noexcept = 0;

  // Put the extents one after the other from `base` on and make the whole range readable and
  // writable. One call per contiguous run, so an implementation can set access once for the run.
  virtual void map(uintptr_t base, const std::vector<Extent>& run) = 0;
  // Take out a run that was mapped, or part of one, whole extents each. The range stays reserved.
  // False: the driver refused, and the whole run is still mapped.
  // pre: no device work that reads or writes the range is in flight.
  [[nodiscard]] virtual bool unmap(uintptr_t base, const std::vector<Extent>& run) noexcept = 0;
  // Fault the pages of a mapped range in ahead of first use. A hint; nothing to do on CUDA. The
  // range may be unmapped meanwhile by another thread: then part of the work is wasted, no more.
  virtual void populate(uintptr_t base, size_t bytes) noexcept = 0;

  // Copy device memory, in the order of `stream`; on the host, now.
  // pre: both ranges are mapped, stay so until the stream is past this, and share no byte, neither
  // of addresses nor of physical memory.
  virtual void copy(Stream stream, uintptr_t to, uintptr_t from, size_t bytes) = 0;
  // As copy(), to the start of a run that is mapped at `to`. On the host faster than that: the file
  // is written, not the mapping, so no page is faulted in.
  virtual void fill(Stream stream, const std::vector<Extent>& /*run*/, uintptr_t to, uintptr_t from,
                    size_t bytes) {
    copy(stream, to, from, bytes);
  }
  // Zero a range, in the order of `stream`; on the host, now.
  // pre: the range is mapped, and stays so until the stream is past this.
  virtual void clear(Stream stream, uintptr_t base, size_t bytes) = 0;

  // Everything in `stream` up to now. The host has no streams: there every fence has passed.
  virtual Fence record_fence(Stream stream) = 0;
  virtual bool fence_passed(Fence fence) = 0;
  virtual void wait_fence(Fence fence) = 0;                        // the calling thread waits
  virtual void stream_wait_fence(Stream stream, Fence fence) = 0;  // later work in `stream` waits
  virtual void release_fence(Fence fence) noexcept = 0;            // kNone is allowed
  // Waits until the device has finished everything that was submitted to it.
  virtual void synchronize() = 0;

  virtual SharedHandle export_handle(Extent extent) = 0;
  // pre: `bytes` is the size of the exported extent. Does not take ownership of shared.fd.
  virtual Handle import_handle(SharedHandle shared, size_t bytes) = 0;

  // In words, for error messages and bug reports: which driver, which device, which options.
  virtual std::string describe() const = 0;
};

}  // namespace vattn
