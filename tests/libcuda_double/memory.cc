// Physical memory, addresses, and what is mapped where. CPU code can read and write a range as soon
// as it has access, and faults before and after, as a kernel on the GPU would.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <iterator>

#include "exported.h"
#include "state.h"

using namespace vattn::cuda;
using cuda_double::Allocation;
using cuda_double::Call;
using cuda_double::kGranularity;
using cuda_double::Mapping;
using cuda_double::Needs;
using cuda_double::State;

namespace {

bool aligned(uint64_t value) {
  return value % kGranularity == 0;
}

// Addresses with nothing behind them: any access faults.
void* place_nothing(DevicePtr base, size_t bytes) {
  const int fixed = base == 0 ? 0 : MAP_FIXED;
  return mmap(reinterpret_cast<void*>(base), bytes, PROT_NONE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
}

bool fill_with_leftovers(int fd, size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return false;
  std::memset(memory, 0xdb, bytes);
  return munmap(memory, bytes) == 0;
}

// One memfd a handle: the usual soft limit of 1024 files is too low for that.
void raise_file_limit() {
  static const bool done = [] {
    rlimit limit{};
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return false;
    limit.rlim_cur = limit.rlim_max;
    return setrlimit(RLIMIT_NOFILE, &limit) == 0;
  }();
  static_cast<void>(done);
}

MemHandle add_allocation(State& state, const Allocation& allocation) {
  // Steps of 16: an off-by-one in a caller's bookkeeping is no valid handle.
  const MemHandle handle = state.next_handle += 16;
  state.allocations.emplace(handle, allocation);
  return handle;
}

Result check_prop(Call& call, const MemAllocationProp& prop) {
  const State& state = call.state();
  if (prop.type != kMemAllocationTypePinned || prop.location.type != kMemLocationTypeDevice) {
    return call.breach(kErrorInvalidValue, "prop is not pinned memory of a device");
  }
  if (!state.is_device(prop.location.id)) {
    return call.breach(kErrorInvalidDevice, "prop names a device that is not there");
  }
  if (prop.location.id != call.device()) {
    return call.breach(kErrorInvalidDevice, "prop names another device than the current context");
  }
  if (prop.win32_metadata != nullptr || prop.flags.usage != 0 || prop.flags.compression_type != 0) {
    return call.breach(kErrorInvalidValue, "prop has fields set that vattn does not use");
  }
  const bool posix_fd = prop.requested_handle_types == kMemHandleTypePosixFd;
  const bool fabric = prop.requested_handle_types == kMemHandleTypeFabric;
  if (!posix_fd && !fabric && prop.requested_handle_types != kMemHandleTypeNone) {
    return call.breach(kErrorInvalidValue, "prop requests an unknown handle type");
  }
  if (posix_fd && state.options.attributes.at(kAttributeHandleTypePosixFdSupported) == 0) {
    return call.breach(kErrorNotSupported, "posix_fd requested where the attribute says no");
  }
  if (fabric && state.options.attributes.at(kAttributeHandleTypeFabricSupported) == 0) {
    return call.breach(kErrorNotSupported, "fabric requested where the attribute says no");
  }
  if (prop.flags.gpu_direct_rdma_capable != 0 &&
      state.options.attributes.at(kAttributeGpuDirectRdmaWithVmmSupported) == 0) {
    return call.breach(kErrorNotSupported, "RDMA requested where the attribute says no");
  }
  return kSuccess;
}

// Whether [base, base + bytes) is made of whole mappings without a gap, and of how many.
bool is_whole_mappings(const State& state, DevicePtr base, size_t bytes, size_t* count) {
  *count = 0;
  DevicePtr at = base;
  while (at < base + bytes) {
    const auto found = state.mappings.find(at);
    if (found == state.mappings.end()) return false;
    at += found->second.bytes;
    ++*count;
  }
  return at == base + bytes;
}

bool overlaps_mapping(const State& state, DevicePtr base, size_t bytes) {
  auto next = state.mappings.lower_bound(base);
  if (next != state.mappings.end() && next->first < base + bytes) return true;
  if (next == state.mappings.begin()) return false;
  const auto previous = std::prev(next);
  return previous->first + previous->second.bytes > base;
}

bool inside_reservation(const State& state, DevicePtr base, size_t bytes) {
  auto next = state.reservations.upper_bound(base);
  if (next == state.reservations.begin()) return false;
  const auto found = std::prev(next);
  return base + bytes <= found->first + found->second;
}

Result check_handle(Call& call, MemHandle handle) {
  const auto found = call.state().allocations.find(handle);
  if (found != call.state().allocations.end() && !found->second.released) return kSuccess;
  const bool was = handle <= call.state().next_handle && handle > 0x1000 && handle % 16 == 0;
  return call.breach(kErrorInvalidValue,
                     was ? "the handle was already released" : "unknown handle");
}

}  // namespace

extern "C" {

VATTN_CUDA_FUNCTIONS(VATTN_DOUBLE_DECLARE)

Result cuMemGetInfo(size_t* free, size_t* total) {
  Call call(Needs::kContext, "cuMemGetInfo", " ");
  if (call.refused() != kSuccess) return call.refused();
  *total = call.state().options.total_memory;
  const size_t used = call.state().used_memory();
  *free = used < *total ? *total - used : 0;
  return kSuccess;
}

Result cuMemGetAllocationGranularity(size_t* granularity, const MemAllocationProp* prop,
                                     int option) {
  Call call(Needs::kContext, "cuMemGetAllocationGranularity", "option=%d", option);
  if (call.refused() != kSuccess) return call.refused();
  if (option != kMemGranularityMinimum && option != kMemGranularityRecommended) {
    return call.breach(kErrorInvalidValue, "unknown option");
  }
  const Result result = check_prop(call, *prop);
  if (result == kSuccess) *granularity = kGranularity;
  return result;
}

Result cuMemAddressReserve(DevicePtr* base, size_t bytes, size_t alignment, DevicePtr hint,
                           unsigned long long flags) {
  Call call(Needs::kContext, "cuMemAddressReserve", "bytes=%zu alignment=%zu", bytes, alignment);
  if (call.refused() != kSuccess) return call.refused();
  if (bytes == 0 || !aligned(bytes)) {
    return call.breach(kErrorInvalidValue, "bytes is not a multiple of the granularity");
  }
  if ((alignment & (alignment - 1)) != 0) {
    return call.breach(kErrorInvalidValue, "alignment is not a power of two");
  }
  if (hint != 0 || flags != 0) return call.breach(kErrorInvalidValue, "hint and flags must be 0");
  const size_t to = alignment < kGranularity ? kGranularity : alignment;
  void* got = place_nothing(0, bytes + to);
  if (got == MAP_FAILED) return kErrorOutOfMemory;
  const auto start = reinterpret_cast<DevicePtr>(got);
  *base = (start + to - 1) / to * to;
  if (*base > start) munmap(got, *base - start);
  if (start + to > *base) munmap(reinterpret_cast<void*>(*base + bytes), start + to - *base);
  call.state().reservations[*base] = bytes;
  return kSuccess;
}

Result cuMemAddressFree(DevicePtr base, size_t bytes) {
  Call call(Needs::kContext, "cuMemAddressFree", "base=0x%llx bytes=%zu", base, bytes);
  if (call.refused() != kSuccess) return call.refused();
  State& state = call.state();
  const auto found = state.reservations.find(base);
  if (found == state.reservations.end() || found->second != bytes) {
    return call.breach(kErrorInvalidValue, "not exactly what cuMemAddressReserve returned");
  }
  if (overlaps_mapping(state, base, bytes)) {
    return call.breach(kErrorInvalidValue, "the reservation still has mappings");
  }
  munmap(reinterpret_cast<void*>(base), bytes);
  state.reservations.erase(found);
  return kSuccess;
}

Result cuMemCreate(MemHandle* handle, size_t bytes, const MemAllocationProp* prop,
                   unsigned long long flags) {
  Call call(Needs::kContext, "cuMemCreate", "bytes=%zu device=%d handle_types=%d rdma=%d", bytes,
            prop->location.id, prop->requested_handle_types, prop->flags.gpu_direct_rdma_capable);
  if (call.refused() != kSuccess) return call.refused();
  State& state = call.state();
  if (bytes == 0 || !aligned(bytes)) {
    return call.breach(kErrorInvalidValue, "bytes is not a multiple of the granularity");
  }
  if (flags != 0) return call.breach(kErrorInvalidValue, "flags must be 0");
  const Result result = check_prop(call, *prop);
  if (result != kSuccess) return result;
  const bool posix_fd = prop->requested_handle_types == kMemHandleTypePosixFd;
  if (state.options.refuse_rdma && prop->flags.gpu_direct_rdma_capable != 0) {
    return kErrorNotSupported;
  }
  if (state.options.refuse_posix_fd && posix_fd) return kErrorNotSupported;
  if (state.used_memory() + bytes > state.options.total_memory) return kErrorOutOfMemory;
  raise_file_limit();
  const int fd = memfd_create("vattn_double", MFD_CLOEXEC);
  if (fd < 0) return kErrorOutOfMemory;
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
      (state.options.leave_leftovers && !fill_with_leftovers(fd, bytes))) {
    close(fd);
    return kErrorOutOfMemory;
  }
  *handle = add_allocation(state, {fd, bytes, prop->location.id, posix_fd, /*imported=*/false});
  return kSuccess;
}

Result cuMemRelease(MemHandle handle) {
  Call call(Needs::kContext, "cuMemRelease", "handle=0x%llx", handle);
  if (call.refused() != kSuccess) return call.refused();
  const Result result = check_handle(call, handle);
  if (result != kSuccess) return result;
  Allocation& allocation = call.state().allocations.at(handle);
  if (allocation.mappings > 0) {
    call.breach(kSuccess, "the handle is still mapped (legal in CUDA, not in vattn)");
  }
  allocation.released = true;
  call.state().drop_allocation_if_unused(handle);
  return kSuccess;
}

Result cuMemMap(DevicePtr base, size_t bytes, size_t offset, MemHandle handle,
                unsigned long long flags) {
  Call call(Needs::kContext, "cuMemMap", "base=0x%llx bytes=%zu offset=%zu handle=0x%llx", base,
            bytes, offset, handle);
  if (call.refused() != kSuccess) return call.refused();
  State& state = call.state();
  if (bytes == 0 || !aligned(base) || !aligned(bytes)) {
    return call.breach(kErrorInvalidValue, "base or bytes not a multiple of the granularity");
  }
  if (offset != 0 || flags != 0) {
    return call.breach(kErrorInvalidValue, "offset and flags must be 0");
  }
  const Result result = check_handle(call, handle);
  if (result != kSuccess) return result;
  Allocation& allocation = state.allocations.at(handle);
  if (bytes != allocation.bytes) {
    return call.breach(kErrorInvalidValue, "bytes is not the size of the handle");
  }
  if (!inside_reservation(state, base, bytes)) {
    return call.breach(kErrorInvalidValue, "the range is not inside one reservation");
  }
  if (overlaps_mapping(state, base, bytes)) {
    return call.breach(kErrorInvalidValue, "the range overlaps a mapping");
  }
  if (mmap(reinterpret_cast<void*>(base), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, allocation.fd,
           0) == MAP_FAILED) {
    return kErrorOutOfMemory;
  }
  ++allocation.mappings;
  state.mappings[base] = Mapping{bytes, handle};
  return kSuccess;
}

Result cuMemUnmap(DevicePtr base, size_t bytes) {
  Call call(Needs::kContext, "cuMemUnmap", "base=0x%llx bytes=%zu", base, bytes);
  if (call.refused() != kSuccess) return call.refused();
  State& state = call.state();
  size_t count = 0;
  if (bytes == 0 || !is_whole_mappings(state, base, bytes, &count)) {
    return call.breach(kErrorInvalidValue, "the range is not made of whole mappings");
  }
  if (state.busy_use(base, bytes) != nullptr) {
    call.breach(kSuccess, "work in a busy stream uses the range; cuMemUnmap does not wait");
  }
  if (count > 1 && state.options.refuse_multi_unmap) return kErrorInvalidValue;
  if (place_nothing(base, bytes) == MAP_FAILED) return kErrorOutOfMemory;
  for (DevicePtr at = base; at < base + bytes;) {
    const auto found = state.mappings.find(at);
    const Mapping mapping = found->second;
    state.mappings.erase(found);
    --state.allocations.at(mapping.handle).mappings;
    state.drop_allocation_if_unused(mapping.handle);
    at += mapping.bytes;
  }
  return kSuccess;
}

Result cuMemSetAccess(DevicePtr base, size_t bytes, const MemAccessDesc* desc, size_t count) {
  Call call(Needs::kContext, "cuMemSetAccess", "base=0x%llx bytes=%zu count=%zu", base, bytes,
            count);
  if (call.refused() != kSuccess) return call.refused();
  size_t mappings = 0;
  if (bytes == 0 || !is_whole_mappings(call.state(), base, bytes, &mappings)) {
    return call.breach(kErrorInvalidValue, "the range is not wholly mapped");
  }
  if (count != 1 || desc->location.type != kMemLocationTypeDevice ||
      desc->flags != kMemAccessReadWrite) {
    return call.breach(kErrorInvalidValue, "desc is not read and write for one device");
  }
  if (desc->location.id != call.device()) {
    return call.breach(kErrorInvalidDevice, "desc names another device than the current context");
  }
  if (mappings > 1 && call.state().options.refuse_multi_set_access) return kErrorInvalidValue;
  if (mprotect(reinterpret_cast<void*>(base), bytes, PROT_READ | PROT_WRITE) != 0) {
    return kErrorOutOfMemory;
  }
  for (DevicePtr at = base; at < base + bytes;) {
    Mapping& mapping = call.state().mappings.at(at);
    mapping.access = desc->location.id;
    at += mapping.bytes;
  }
  return kSuccess;
}

Result cuMemExportToShareableHandle(void* shareable, MemHandle handle, int type,
                                    unsigned long long flags) {
  Call call(Needs::kContext, "cuMemExportToShareableHandle", "handle=0x%llx type=%d", handle, type);
  if (call.refused() != kSuccess) return call.refused();
  const Result result = check_handle(call, handle);
  if (result != kSuccess) return result;
  const Allocation& allocation = call.state().allocations.at(handle);
  if (!allocation.exportable || type != kMemHandleTypePosixFd || flags != 0) {
    return call.breach(kErrorInvalidValue, "the handle was not created for posix_fd export");
  }
  const int fd = dup(allocation.fd);
  if (fd < 0) return kErrorOutOfMemory;
  *static_cast<int*>(shareable) = fd;
  return kSuccess;
}

Result cuMemImportFromShareableHandle(MemHandle* handle, void* os_handle, int type) {
  const auto fd = static_cast<int>(reinterpret_cast<uintptr_t>(os_handle));
  Call call(Needs::kContext, "cuMemImportFromShareableHandle", "fd=%d type=%d", fd, type);
  if (call.refused() != kSuccess) return call.refused();
  struct stat info{};
  if (type != kMemHandleTypePosixFd || fstat(fd, &info) != 0 || info.st_size == 0) {
    return call.breach(kErrorInvalidValue, "not a descriptor that an export returned");
  }
  const int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) return kErrorOutOfMemory;
  *handle = add_allocation(call.state(), {copy, static_cast<size_t>(info.st_size), call.device(),
                                          /*exportable=*/true, /*imported=*/true});
  return kSuccess;
}

}  // extern "C"
