// The libcuda double catches what it is there to catch: each rule is broken once, on purpose.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <thread>

#include "double_control.h"
#include "driver/cuda_api.h"
#include "driver_contract.h"

using namespace vattn::cuda;
using namespace vattn::test;

namespace {

constexpr size_t kPage = size_t{2} << 20;

// A started driver with a current context on this thread, called directly.
class Raw {
 public:
  Raw() : api(load_api()) {
    DOUBLE(reset)();
    DOUBLE(set_device_count)(2);
    CHECK_EQ(api.cuInit(0), kSuccess);
    ContextPtr context = nullptr;
    CHECK_EQ(api.cuDevicePrimaryCtxRetain(&context, 0), kSuccess);
    CHECK_EQ(api.cuCtxPushCurrent(context), kSuccess);
    prop.type = kMemAllocationTypePinned;
    prop.location = {kMemLocationTypeDevice, 0};
    prop.requested_handle_types = kMemHandleTypePosixFd;
    access = {prop.location, kMemAccessReadWrite};
  }
  ~Raw() {
    DOUBLE(reset)();
    CHECK_EQ(api.cuInit(0), kSuccess);
    ContextPtr popped = nullptr;
    while (api.cuCtxPopCurrent(&popped) == kSuccess) continue;
    DOUBLE(reset)();
  }
  Raw(const Raw&) = delete;
  Raw& operator=(const Raw&) = delete;

  MemHandle create(size_t pages) {
    MemHandle handle = 0;
    CHECK_EQ(api.cuMemCreate(&handle, pages * kPage, &prop, 0), kSuccess);
    return handle;
  }
  DevicePtr reserve(size_t pages) {
    DevicePtr base = 0;
    CHECK_EQ(api.cuMemAddressReserve(&base, pages * kPage, 0, 0, 0), kSuccess);
    return base;
  }
  DevicePtr mapped(size_t pages) {
    const DevicePtr base = reserve(pages);
    CHECK_EQ(api.cuMemMap(base, pages * kPage, 0, create(pages), 0), kSuccess);
    CHECK_EQ(breaches(), "");
    return base;
  }

  const Api api;
  MemAllocationProp prop{};
  MemAccessDesc access{};
};

// One rule: what to do wrong, what the driver answers, what the double says.
struct Rule {
  const char* name;
  Result answer;
  const char* sentence;
  Result (*violate)(Raw&);
};

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
};

const Rule kHandleRules[] = {
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

const Rule kContextRules[] = {
    {"a device beyond the count", kErrorInvalidDevice, "not below the device count",
     [](Raw& raw) {
       Device device = 0;
       return raw.api.cuDeviceGet(&device, 2);
     }},
    {"no current context", kErrorInvalidContext, "no context is current",
     [](Raw& raw) {
       ContextPtr popped = nullptr;
       CHECK_EQ(raw.api.cuCtxPopCurrent(&popped), kSuccess);
       MemHandle handle = 0;
       return raw.api.cuMemCreate(&handle, kPage, &raw.prop, 0);
     }},
    {"no current context on another thread", kErrorInvalidContext, "no context is current",
     [](Raw& raw) {
       const DevicePtr base = raw.mapped(1);
       Result result = kSuccess;
       std::thread([&] { result = raw.api.cuMemUnmap(base, kPage); }).join();
       return result;
     }},
    {"a context that nobody retains", kErrorInvalidContext, "not a retained primary context",
     [](Raw& raw) {
       CHECK_EQ(raw.api.cuDevicePrimaryCtxRelease(0), kSuccess);
       size_t free = 0;
       size_t total = 0;
       return raw.api.cuMemGetInfo(&free, &total);
     }},
    {"release a context once too often", kErrorInvalidContext, "not retained",
     [](Raw& raw) {
       CHECK_EQ(raw.api.cuDevicePrimaryCtxRelease(0), kSuccess);
       return raw.api.cuDevicePrimaryCtxRelease(0);
     }},
    {"release the last context under live events", kSuccess, "they die with it",
     [](Raw& raw) {
       EventPtr event = nullptr;
       CHECK_EQ(raw.api.cuEventCreate(&event, kEventDisableTiming), kSuccess);
       return raw.api.cuDevicePrimaryCtxRelease(0);
     }},
    {"pop more than was pushed", kErrorInvalidContext, "no context is on the stack",
     [](Raw& raw) {
       ContextPtr popped = nullptr;
       CHECK_EQ(raw.api.cuCtxPopCurrent(&popped), kSuccess);
       return raw.api.cuCtxPopCurrent(&popped);
     }},
    {"use before cuInit", kErrorNotInitialized, "before cuInit",
     [](Raw& raw) {
       DOUBLE(reset)();
       int count = 0;
       return raw.api.cuDeviceGetCount(&count);
     }},
    {"an event of another context", kErrorInvalidHandle, "belongs to another context",
     [](Raw& raw) {
       EventPtr event = nullptr;
       CHECK_EQ(raw.api.cuEventCreate(&event, kEventDisableTiming), kSuccess);
       ContextPtr other = nullptr;
       CHECK_EQ(raw.api.cuDevicePrimaryCtxRetain(&other, 1), kSuccess);
       CHECK_EQ(raw.api.cuCtxPushCurrent(other), kSuccess);
       return raw.api.cuEventRecord(event, nullptr);
     }},
    {"a destroyed event", kErrorInvalidHandle, "unknown or destroyed event",
     [](Raw& raw) {
       EventPtr event = nullptr;
       CHECK_EQ(raw.api.cuEventCreate(&event, kEventDisableTiming), kSuccess);
       CHECK_EQ(raw.api.cuEventDestroy(event), kSuccess);
       return raw.api.cuEventQuery(event);
     }},
    {"an event that times", kSuccess, "must disable timing",
     [](Raw& raw) {
       EventPtr event = nullptr;
       return raw.api.cuEventCreate(&event, 0);
     }},
};

void check_rule(const Rule& rule) {
  Raw raw;
  CHECK_EQ(rule.violate(raw), rule.answer);
  check_breach(rule.sentence);
  CHECK_EQ(DOUBLE(breaches)(), 1u);
}

void each_kind_of_leak_is_reported() {
  Raw raw;
  raw.mapped(1);
  EventPtr event = nullptr;
  CHECK_EQ(raw.api.cuEventCreate(&event, kEventDisableTiming), kSuccess);
  DOUBLE(check_leaks)();
  const std::string text = breaches();
  for (const char* what : {"mapping", "reservation", "handle", "event", "reference"}) {
    CHECK(text.find(std::string("leaked ") + what) != std::string::npos);
  }
  CHECK_EQ(DOUBLE(breaches)(), 5u);
}

void use_in_a_forked_child_is_a_breach() {
  Raw raw;
  CHECK(holds_in_child([&] {
    int count = 0;
    const Result result = raw.api.cuDeviceGetCount(&count);
    check_breach("forked child");
    return result == kErrorNotInitialized;
  }));
}

// The program itself ends with status 70, so that a leak cannot go unseen where nobody asks.
void a_leak_at_exit_fails_a_strict_program() {
  for (const bool leak : {true, false}) {
    const pid_t child = fork();
    if (child == 0) {
      setenv("VATTN_DOUBLE_STRICT_EXIT", "1", 1);
      if (freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
      const Api api = load_api();
      DOUBLE(reset)();
      ContextPtr context = nullptr;
      if (api.cuInit(0) != kSuccess) _exit(1);
      if (leak) api.cuDevicePrimaryCtxRetain(&context, 0);
      std::exit(0);
    }
    CHECK_EQ(exit_status_of(child), leak ? 70 : 0);
  }
}

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

// Two streams, the second waits for the first: idle is handed on, and what was captured counts.
void busy_streams_hand_on_idleness() {
  Raw raw;
  EventPtr event = nullptr;
  EventPtr second = nullptr;
  CHECK_EQ(raw.api.cuEventCreate(&event, kEventDisableTiming), kSuccess);
  CHECK_EQ(raw.api.cuEventCreate(&second, kEventDisableTiming), kSuccess);
  const auto a = reinterpret_cast<StreamPtr>(uintptr_t{1});
  const auto b = reinterpret_cast<StreamPtr>(uintptr_t{2});
  CHECK_EQ(raw.api.cuEventQuery(event), kSuccess);  // never recorded
  DOUBLE(set_stream_busy)(1, 1);
  CHECK_EQ(raw.api.cuEventRecord(event, a), kSuccess);
  CHECK_EQ(raw.api.cuStreamWaitEvent(b, event, 0), kSuccess);
  CHECK_EQ(DOUBLE(stream_busy)(2), 1);
  CHECK_EQ(raw.api.cuEventRecord(second, b), kSuccess);
  CHECK_EQ(raw.api.cuEventQuery(second), kErrorNotReady);
  // Recorded again: the second stream still waits for what it was told to wait for.
  CHECK_EQ(raw.api.cuEventRecord(event, b), kSuccess);
  DOUBLE(set_stream_busy)(1, 0);
  CHECK_EQ(DOUBLE(stream_busy)(2), 0);
  CHECK_EQ(raw.api.cuEventQuery(second), kSuccess);
  CHECK_EQ(raw.api.cuEventQuery(event), kSuccess);
  CHECK_EQ(breaches(), "");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests;
  const auto add = [&](const Rule& rule) {
    tests.push_back({std::string("caught: ") + rule.name, [&rule] { check_rule(rule); }});
  };
  for (const Rule& rule : kMappingRules) add(rule);
  for (const Rule& rule : kHandleRules) add(rule);
  for (const Rule& rule : kContextRules) add(rule);
  for (const Test& test :
       {TEST(each_kind_of_leak_is_reported), TEST(use_in_a_forked_child_is_a_breach),
        TEST(a_leak_at_exit_fails_a_strict_program),
        TEST(memory_beyond_the_total_is_refused_without_a_breach),
        TEST(memory_is_reachable_exactly_while_it_has_access),
        TEST(busy_streams_hand_on_idleness)}) {
    tests.push_back(test);
  }
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
