#include "driver/cuda_driver.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "base/log.h"
#include "base/units.h"

namespace vattn {
namespace {

using cuda::DevicePtr;
using cuda::kSuccess;
using cuda::MemHandle;
using cuda::Result;

MemHandle to_cuda(Handle handle) {
  return static_cast<MemHandle>(handle);
}

size_t total_bytes(const Extent* run, size_t n) {
  size_t bytes = 0;
  for (size_t i = 0; i < n; ++i) bytes += run[i].bytes;
  return bytes;
}

// What a driver says that cannot do a call over several mappings at once.
bool is_refusal(Result result) {
  return result == cuda::kErrorInvalidValue || result == cuda::kErrorNotSupported;
}

struct Attempt {
  const char* call;
  Result result;
};

// One page, created and released: attributes promise what cuMemCreate then refuses, on consumer
// GPUs and in containers.
Attempt try_allocation(const cuda::Api& api, const cuda::MemAllocationProp& prop, size_t* page) {
  Result result = api.cuMemGetAllocationGranularity(page, &prop, cuda::kMemGranularityMinimum);
  if (result != kSuccess) return {"cuMemGetAllocationGranularity", result};
  MemHandle handle = 0;
  result = api.cuMemCreate(&handle, *page, &prop, 0);
  if (result != kSuccess) return {"cuMemCreate", result};
  return {"cuMemRelease", api.cuMemRelease(handle)};
}

}  // namespace

CudaVmmDriver::CudaVmmDriver(int device_ordinal) : device_(device_ordinal) {
  choose_allocation();
}

void CudaVmmDriver::choose_allocation() {
  const CurrentContext here = device_.enter();
  const bool has_fd = device_.attribute(cuda::kAttributeHandleTypePosixFdSupported) != 0;
  const bool has_rdma = device_.attribute(cuda::kAttributeGpuDirectRdmaWithVmmSupported) != 0;
  if (!has_fd) log_line(LogLevel::kInfo, "handle export not supported device=%d", device_.id());
  if (!has_rdma) log_line(LogLevel::kInfo, "gpudirect rdma not supported device=%d", device_.id());
  prop_.type = cuda::kMemAllocationTypePinned;
  prop_.location = {cuda::kMemLocationTypeDevice, device_.id()};
  prop_.requested_handle_types = has_fd ? cuda::kMemHandleTypePosixFd : cuda::kMemHandleTypeNone;
  prop_.flags.gpu_direct_rdma_capable = has_rdma ? 1 : 0;
  for (;;) {
    const Attempt attempt = try_allocation(device_.api(), prop_, &page_bytes_);
    if (attempt.result == kSuccess) return;
    const char* dropped = nullptr;
    if (attempt.result != cuda::kErrorOutOfMemory) {
      if (prop_.flags.gpu_direct_rdma_capable != 0) {
        prop_.flags.gpu_direct_rdma_capable = 0;
        dropped = "gpudirect_rdma";
      } else if (prop_.requested_handle_types != cuda::kMemHandleTypeNone) {
        prop_.requested_handle_types = cuda::kMemHandleTypeNone;
        dropped = "posix_fd";
      }
    }
    if (dropped == nullptr) {
      cuda::throw_error(device_.api(), attempt.call, attempt.result,
                        "not even one page could be allocated on device " +
                            std::to_string(device_.id()) +
                            "; check with nvidia-smi who holds its memory, or use device=\"cpu\"");
    }
    log_line(LogLevel::kWarning,
             "allocation downgraded without=%s call=%s code=%d name=%s device=%d", dropped,
             attempt.call, attempt.result, cuda::error_name(device_.api(), attempt.result),
             device_.id());
  }
}

MemoryInfo CudaVmmDriver::memory_info() {
  const CurrentContext here = device_.enter();
  MemoryInfo info{};
  cuda::check(device_.api(), "cuMemGetInfo",
              device_.api().cuMemGetInfo(&info.free_bytes, &info.total_bytes));
  return info;
}

uintptr_t CudaVmmDriver::reserve(size_t bytes) {
  const CurrentContext here = device_.enter();
  check_sound();
  DevicePtr base = 0;
  const Result result = device_.api().cuMemAddressReserve(&base, bytes, page_bytes_, 0, 0);
  if (result != kSuccess) {
    cuda::throw_error(
        device_.api(), "cuMemAddressReserve", result,
        "asked for " + format_bytes(bytes) + " of addresses, lower max_batch_size or max_seq_len");
  }
  return static_cast<uintptr_t>(base);
}

void CudaVmmDriver::unreserve(uintptr_t base, size_t bytes) noexcept {
  const Result result = device_.give_back(
      [&](const cuda::Api& api) noexcept { return api.cuMemAddressFree(base, bytes); });
  if (result != kSuccess) device_.note_failed_give_back("cuMemAddressFree", result, base, bytes);
}

Handle CudaVmmDriver::create_after(Extent /*last*/, size_t bytes) {
  const CurrentContext here = device_.enter();
  check_sound();
  MemHandle handle = 0;
  const Result result = device_.api().cuMemCreate(&handle, bytes, &prop_, 0);
  if (result == cuda::kErrorOutOfMemory) {
    throw OutOfDeviceMemory("cuMemCreate", result,
                            cuda::error_text(device_.api(), result) + "; asked for " +
                                format_bytes(bytes) +
                                ", lower the budget, or free what other processes and torch's "
                                "caching allocator (torch.cuda.empty_cache()) hold");
  }
  cuda::check(device_.api(), "cuMemCreate", result);
  return static_cast<Handle>(handle);
}

void CudaVmmDriver::release(Extent extent) noexcept {
  const Result result = device_.give_back(
      [&](const cuda::Api& api) noexcept { return api.cuMemRelease(to_cuda(extent.handle)); });
  if (result != kSuccess) {
    device_.note_failed_give_back("cuMemRelease", result, to_cuda(extent.handle), extent.bytes);
  }
}

void CudaVmmDriver::map(uintptr_t base, const std::vector<Extent>& run) {
  const CurrentContext here = device_.enter();
  check_sound();
  size_t done = 0;
  const char* call = "cuMemMap";
  Result result = map_each(base, run.data(), run.size(), &done);
  if (result == kSuccess) {
    call = "cuMemSetAccess";
    result = set_access(base, run.data(), run.size());
  }
  if (result == kSuccess) return;
  const Result undone = unmap_each(base, run.data(), done);
  if (undone != kSuccess) {
    broken_ = undone;
    device_.note_failed_give_back("cuMemUnmap", undone, base, total_bytes(run.data(), done));
  }
  cuda::throw_error(device_.api(), call, result,
                    "run of " + std::to_string(run.size()) + " extents, " +
                        format_bytes(total_bytes(run.data(), run.size())));
}

bool CudaVmmDriver::unmap(uintptr_t base, const std::vector<Extent>& run) noexcept {
  const Result result = device_.give_back(
      [&](const cuda::Api&) noexcept { return unmap_run(base, run.data(), run.size()); });
  if (result == kSuccess) return true;
  device_.note_failed_give_back("cuMemUnmap", result, base, total_bytes(run.data(), run.size()));
  return false;
}

void CudaVmmDriver::copy(Stream stream, uintptr_t to, uintptr_t from, size_t bytes) {
  const CurrentContext here = device_.enter();
  check_sound();  // work on a range that is mapped in part kills the context, torch's work with it
  cuda::check(device_.api(), "cuMemcpyDtoDAsync",
              device_.api().cuMemcpyDtoDAsync(to, from, bytes, to_cuda(stream)));
}

void CudaVmmDriver::clear(Stream stream, uintptr_t base, size_t bytes) {
  const CurrentContext here = device_.enter();
  check_sound();
  cuda::check(device_.api(), "cuMemsetD8Async",
              device_.api().cuMemsetD8Async(base, 0, bytes, to_cuda(stream)));
}

void CudaVmmDriver::synchronize() {
  const CurrentContext here = device_.enter();
  cuda::check(device_.api(), "cuCtxSynchronize", device_.api().cuCtxSynchronize());
}

SharedHandle CudaVmmDriver::export_handle(Extent extent) {
  const CurrentContext here = device_.enter();
  check_sound();
  if (prop_.requested_handle_types == cuda::kMemHandleTypeNone) {
    throw DriverError("cuMemExportToShareableHandle", cuda::kErrorNotSupported,
                      "device " + std::to_string(device_.id()) +
                          " made its memory with handle type none, because it refused posix_fd at "
                          "open; keep the cache in one process");
  }
  int fd = -1;
  cuda::check(device_.api(), "cuMemExportToShareableHandle",
              device_.api().cuMemExportToShareableHandle(&fd, to_cuda(extent.handle),
                                                         cuda::kMemHandleTypePosixFd, 0));
  // A program that the process starts would otherwise inherit it, and keep the memory alive.
  if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
    const int code = errno;
    close(fd);
    throw DriverError("fcntl(FD_CLOEXEC)", code, std::strerror(code));
  }
  return {fd, 0};
}

Handle CudaVmmDriver::import_handle(SharedHandle shared, size_t bytes) {
  const CurrentContext here = device_.enter();
  check_sound();
  if (shared.offset != 0) {
    throw std::invalid_argument("shared handle has offset " + std::to_string(shared.offset) +
                                ", expected 0: it was exported by another kind of driver");
  }
  MemHandle handle = 0;
  // CUDA takes the descriptor itself where the parameter says pointer.
  const Result result = device_.api().cuMemImportFromShareableHandle(
      &handle, reinterpret_cast<void*>(static_cast<uintptr_t>(shared.fd)),
      cuda::kMemHandleTypePosixFd);
  if (result != kSuccess) {
    cuda::throw_error(device_.api(), "cuMemImportFromShareableHandle", result,
                      "fd " + std::to_string(shared.fd) + " of " + format_bytes(bytes) +
                          "; it must come from export_handle() on the same GPU");
  }
  return static_cast<Handle>(handle);
}

std::string CudaVmmDriver::describe() const {
  return device_.describe() + ", pages of " + format_bytes(page_bytes_) + ", handle type " +
         (prop_.requested_handle_types == cuda::kMemHandleTypePosixFd ? "posix_fd" : "none") +
         ", gpudirect rdma " + (prop_.flags.gpu_direct_rdma_capable != 0 ? "requested" : "off") +
         ", access set per " + (access_per_run_ ? "run" : "extent");
}

void CudaVmmDriver::check_sound() const {
  const Result broken = broken_;
  if (broken == kSuccess) return;
  throw DriverError("cuMemUnmap", broken,
                    cuda::error_text(device_.api(), broken) +
                        "; an earlier unmap failed half way and could not be undone, so part of a "
                        "range is mapped and part is not; stop using this cache");
}

Result CudaVmmDriver::map_each(DevicePtr base, const Extent* run, size_t n, size_t* done) noexcept {
  for (*done = 0; *done < n; base += run[(*done)++].bytes) {
    const Result result =
        device_.api().cuMemMap(base, run[*done].bytes, 0, to_cuda(run[*done].handle), 0);
    if (result != kSuccess) return result;
  }
  return kSuccess;
}

Result CudaVmmDriver::set_access(DevicePtr base, const Extent* run, size_t n) noexcept {
  const cuda::MemAccessDesc access{prop_.location, cuda::kMemAccessReadWrite};
  if (access_per_run_ || n == 1) {
    const Result result = device_.api().cuMemSetAccess(base, total_bytes(run, n), &access, 1);
    if (n == 1 || !is_refusal(result)) return result;
  }
  for (size_t i = 0; i < n; base += run[i++].bytes) {
    const Result result = device_.api().cuMemSetAccess(base, run[i].bytes, &access, 1);
    if (result != kSuccess) return result;
  }
  if (access_per_run_.exchange(false)) {
    log_line(LogLevel::kWarning, "access set per extent call=cuMemSetAccess extents=%zu device=%d",
             n, device_.id());
  }
  return kSuccess;
}

// NVIDIA's vectorAddMMAP sample unmaps a range of several handles in one call; HIP, for one,
// cannot.
Result CudaVmmDriver::unmap_run(DevicePtr base, const Extent* run, size_t n) noexcept {
  if (unmap_per_run_ || n == 1) {
    const Result result = device_.api().cuMemUnmap(base, total_bytes(run, n));
    if (n == 1 || !is_refusal(result)) return result;
  }
  const Result result = unmap_each(base, run, n);
  if (result == kSuccess && unmap_per_run_.exchange(false)) {
    log_line(LogLevel::kWarning, "unmapping per extent call=cuMemUnmap extents=%zu device=%d", n,
             device_.id());
  }
  return result;
}

// When an extent in the middle is refused, the ones before it are mapped again: their memory still
// has its contents, so the run is then as it was.
Result CudaVmmDriver::unmap_each(DevicePtr base, const Extent* run, size_t n) noexcept {
  DevicePtr at = base;
  for (size_t i = 0; i < n; at += run[i++].bytes) {
    const Result result = device_.api().cuMemUnmap(at, run[i].bytes);
    if (result == kSuccess) continue;
    if (i > 0 && result != cuda::kErrorDeinitialized) put_back(base, run, i);
    return result;
  }
  return kSuccess;
}

void CudaVmmDriver::put_back(DevicePtr base, const Extent* run, size_t n) noexcept {
  size_t done = 0;
  Result result = map_each(base, run, n, &done);
  if (result == kSuccess) result = set_access(base, run, n);
  if (result == kSuccess) return;
  broken_ = result;
  log_line(LogLevel::kError, "unmap not undone code=%d name=%s base=0x%llx mapped=%zu of=%zu",
           result, cuda::error_name(device_.api(), result), base, done, n);
}

std::shared_ptr<VmmDriver> open_cuda_driver(int device_ordinal) {
  return std::make_shared<CudaVmmDriver>(device_ordinal);
}

}  // namespace vattn
