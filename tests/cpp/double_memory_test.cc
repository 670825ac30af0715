// The libcuda double catches what it is there to catch, in cuMem*: each rule is broken once, on
// purpose.
#include "double_rules.h"
#include "driver_contract.h"

using namespace vattn::test;

namespace {

const Rule kMappingRules[] = {
    {"map at a misaligned address", kErrorInvalidValue, "multiple of the granularity",
     [](Raw& raw) { return raw.api.cuMemMap(raw.reserve(2) + 4096, kPage, 0, raw.create(1), 0); }},
    {"map a misaligned size", kErrorInvalidValue, "multiple of the granularity",
     [](Raw& raw) { return raw.api.cuMemMap(raw.reserve(1), 4096, 0, raw.create(1), 0); }},
    {"map from an offset", kErrorInvalidValue, "offset and flags must be 0",
     [](Raw& raw) { return raw.api.cuMemMap(raw.reserve(1), kPage, kPage, raw.create(2), 0); }},
    {"map part of a handle", kErrorInvalidValue, "not the size of the handle",
     [](Raw& raw) { return raw.api.cuMemMap(raw.reserve(1), kPage, 0, raw.create(2), 0); }},
    {"map outside a reservation", kErrorInvalidValue, "not inside one reservation",
     [](Raw& raw) { return raw.api.cuMemMap(raw.reserve(1), 2 * kPage, 0, raw.create(2), 0); }},
    {"map over a mapping", kErrorInvalidValue, "overlaps a mapping",
     [](Raw& raw) { return raw.api.cuMemMap(raw.mapped(2) + kPage, kPage, 0, raw.create(1), 0); }},
    {"map an unknown handle", kErrorInvalidValue, "unknown handle",
     [](Raw& raw) { return raw.api.cuMemMap(raw.reserve(1), kPage, 0, 99, 0); }},
    {"map a released handle", kErrorInvalidValue, "already released",
     [](Raw& raw) {
       const MemHandle handle = raw.create(1);
       CHECK_EQ(raw.api.cuMemRelease(handle), kSuccess);
       return raw.api.cuMemMap(raw.reserve(1), kPage, 0, handle, 0);
     }},
    {"unmap part of a mapping", kErrorInvalidValue, "not made of whole mappings",
     [](Raw& raw) { return raw.api.cuMemUnmap(raw.mapped(2), kPage); }},
    {"unmap what is not mapped", kErrorInvalidValue, "not made of whole mappings",
     [](Raw& raw) { return raw.api.cuMemUnmap(raw.reserve(1), kPage); }},
    {"unmap a range with a hole", kErrorInvalidValue, "not made of whole mappings",
     [](Raw& raw) {
       const DevicePtr base = raw.reserve(3);
       CHECK_EQ(raw.api.cuMemMap(base, kPage, 0, raw.create(1), 0), kSuccess);
       CHECK_EQ(raw.api.cuMemMap(base + 2 * kPage, kPage, 0, raw.create(1), 0), kSuccess);
       return raw.api.cuMemUnmap(base, 3 * kPage);
     }},
    {"unmap what a busy stream uses", kSuccess, "cuMemUnmap does not wait",
     [](Raw& raw) {
       const DevicePtr base = raw.mapped(2);
       DOUBLE(set_stream_busy)(7, 1);
       DOUBLE(use_range)(7, base + kPage, kPage);
       return raw.api.cuMemUnmap(base, 2 * kPage);
     }},
    {"set access over an unmapped part", kErrorInvalidValue, "not wholly mapped",
     [](Raw& raw) {
       const DevicePtr base = raw.reserve(2);
       CHECK_EQ(raw.api.cuMemMap(base, kPage, 0, raw.create(1), 0), kSuccess);
       return raw.api.cuMemSetAccess(base, 2 * kPage, &raw.access, 1);
     }},
    {"set access for another device", kErrorInvalidDevice, "desc names another device",
     [](Raw& raw) {
       raw.access.location.id = 1;
       return raw.api.cuMemSetAccess(raw.mapped(1), kPage, &raw.access, 1);
     }},
    {"set access to nothing", kErrorInvalidValue, "not read and write",
     [](Raw& raw) {
       raw.access.flags = 0;
       return raw.api.cuMemSetAccess(raw.mapped(1), kPage, &raw.access, 1);
     }},
    {"free a reservation with mappings", kErrorInvalidValue, "still has mappings",
     [](Raw& raw) { return raw.api.cuMemAddressFree(raw.mapped(2), 2 * kPage); }},
    {"free part of a reservation", kErrorInvalidValue, "not exactly what",
     [](Raw& raw) { return raw.api.cuMemAddressFree(raw.reserve(2), kPage); }},
    {"free the middle of a reservation", kErrorInvalidValue, "not exactly what",
     [](Raw& raw) { return raw.api.cuMemAddressFree(raw.reserve(2) + kPage, kPage); }},
    {"reserve a misaligned size", kErrorInvalidValue, "multiple of the granularity",
     [](Raw& raw) {
       DevicePtr base = 0;
       return raw.api.cuMemAddressReserve(&base, kPage + 4096, 0, 0, 0);
     }},
    {"reserve with an odd alignment", kErrorInvalidValue, "not a power of two",
     [](Raw& raw) {
       DevicePtr base = 0;
       return raw.api.cuMemAddressReserve(&base, kPage, 3 * kPage, 0, 0);
     }},
    {"reserve with flags", kErrorInvalidValue, "hint and flags must be 0",
     [](Raw& raw) {
       DevicePtr base = 0;
       return raw.api.cuMemAddressReserve(&base, kPage, 0, 0, 1);
     }},
    {"unmap the end of a mapping", kErrorInvalidValue, "not made of whole mappings",
     [](Raw& raw) { return raw.api.cuMemUnmap(raw.mapped(2) + kPage, kPage); }},
};

const Rule kHandleRules[] = {
    {"create with flags", kErrorInvalidValue, "flags must be 0",
     [](Raw& raw) {
       MemHandle handle = 0;
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 1);
     }},
    {"create with a usage", kErrorInvalidValue, "fields set that vattn does not use",
     [](Raw& raw) {
       MemHandle handle = 0;
       raw.prop.flags.usage = 1;
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 0);
     }},
    {"create for an unknown handle type", kErrorInvalidValue, "an unknown handle type",
     [](Raw& raw) {
       MemHandle handle = 0;
       raw.prop.requested_handle_types = 64;
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 0);
     }},
    {"ask for an unknown granularity", kErrorInvalidValue, "unknown option",
     [](Raw& raw) {
       size_t bytes = 0;
       return raw.api.cuMemGetAllocationGranularity(&bytes, &raw.prop, 2);
     }},
    {"release an unknown handle", kErrorInvalidValue, "unknown handle",
     [](Raw& raw) { return raw.api.cuMemRelease(99); }},
    {"release twice", kErrorInvalidValue, "already released",
     [](Raw& raw) {
       const MemHandle handle = raw.create(1);
       CHECK_EQ(raw.api.cuMemRelease(handle), kSuccess);
       return raw.api.cuMemRelease(handle);
     }},
    {"release a mapped handle", kSuccess, "still mapped (legal in CUDA, not in vattn)",
     [](Raw& raw) {
       const MemHandle handle = raw.create(1);
       CHECK_EQ(raw.api.cuMemMap(raw.reserve(1), kPage, 0, handle, 0), kSuccess);
       return raw.api.cuMemRelease(handle);
     }},
    {"create a misaligned size", kErrorInvalidValue, "multiple of the granularity",
     [](Raw& raw) {
       MemHandle handle = 0;
       return raw.api.cuMemCreate(&handle, 4096, &raw.prop, 0);
     }},
    {"create on a device that is not there", kErrorInvalidDevice, "a device that is not there",
     [](Raw& raw) {
       MemHandle handle = 0;
       raw.prop.location.id = 5;
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 0);
     }},
    {"create on another device", kErrorInvalidDevice, "another device than the current context",
     [](Raw& raw) {
       MemHandle handle = 0;
       raw.prop.location.id = 1;
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 0);
     }},
    {"create with a wrong location type", kErrorInvalidValue, "not pinned memory of a device",
     [](Raw& raw) {
       MemHandle handle = 0;
       raw.prop.location.type = 2;
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 0);
     }},
    {"create with RDMA against the attribute", kErrorNotSupported, "RDMA requested",
     [](Raw& raw) {
       MemHandle handle = 0;
       DOUBLE(set_attribute)(kAttributeGpuDirectRdmaWithVmmSupported, 0);
       raw.prop.flags.gpu_direct_rdma_capable = 1;
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 0);
     }},
    {"create with posix_fd against the attribute", kErrorNotSupported, "posix_fd requested",
     [](Raw& raw) {
       MemHandle handle = 0;
       DOUBLE(set_attribute)(kAttributeHandleTypePosixFdSupported, 0);
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 0);
     }},
    {"export what was not made for it", kErrorInvalidValue, "not created for posix_fd",
     [](Raw& raw) {
       int fd = -1;
       raw.prop.requested_handle_types = kMemHandleTypeNone;
       return raw.api.cuMemExportToShareableHandle(&fd, raw.create(1), kMemHandleTypePosixFd, 0);
     }},
    {"import what no export returned", kErrorInvalidValue, "not a descriptor",
     [](Raw& raw) {
       MemHandle handle = 0;
       return raw.api.cuMemImportFromShareableHandle(&handle, reinterpret_cast<void*>(-1),
                                                     kMemHandleTypePosixFd);
     }},
};

void memory_beyond_the_total_is_refused_without_a_breach() {
  Raw raw;
  DOUBLE(set_total_memory)(3 * kPage);
  const MemHandle two = raw.create(2);
  MemHandle handle = 0;
  CHECK_EQ(raw.api.cuMemCreate(&handle, 2 * kPage, &raw.prop, 0), kErrorOutOfMemory);
  CHECK_EQ(raw.api.cuMemRelease(two), kSuccess);
  CHECK_EQ(raw.api.cuMemCreate(&handle, 2 * kPage, &raw.prop, 0), kSuccess);
  CHECK_EQ(breaches(), "");
}

// Access starts with cuMemSetAccess and ends with cuMemUnmap, for the CPU as for a kernel.
void memory_is_reachable_exactly_while_it_has_access() {
  Raw raw;
  const DevicePtr base = raw.mapped(1);
  CHECK(!readable(base));
  CHECK_EQ(raw.api.cuMemSetAccess(base, kPage, &raw.access, 1), kSuccess);
  CHECK(writable(base));
  CHECK_EQ(raw.api.cuMemUnmap(base, kPage), kSuccess);
  CHECK(!readable(base));
  CHECK_EQ(breaches(), "");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = {TEST(memory_beyond_the_total_is_refused_without_a_breach),
                             TEST(memory_is_reachable_exactly_while_it_has_access)};
  append_rules(&tests, kMappingRules);
  append_rules(&tests, kHandleRules);
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
