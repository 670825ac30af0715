// The libcuda double catches what it is there to catch, outside cuMem*: each rule is broken once,
// on purpose.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <thread>

#include "double_rules.h"
#include "driver_contract.h"

using namespace vattn::test;

namespace {

GetProcAddressV12000 look_up() {
  return reinterpret_cast<GetProcAddressV12000>(double_symbol("cuGetProcAddress_v2"));
}

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
    {"an attribute that nobody knows", kErrorInvalidValue, "does not know this attribute",
     [](Raw& raw) {
       int value = 0;
       return raw.api.cuDeviceGetAttribute(&value, 9999, 0);
     }},
    {"the attribute of a device that is not there", kErrorInvalidDevice, "no such device",
     [](Raw& raw) {
       int value = 0;
       return raw.api.cuDeviceGetAttribute(&value, 102, 2);
     }},
    {"the name of a device that is not there", kErrorInvalidDevice, "no such device",
     [](Raw& raw) {
       char name[8];
       return raw.api.cuDeviceGetName(name, sizeof(name), 2);
     }},
    {"retain the context of a device that is not there", kErrorInvalidDevice, "no such device",
     [](Raw& raw) {
       ContextPtr context = nullptr;
       return raw.api.cuDevicePrimaryCtxRetain(&context, 2);
     }},
    {"release the context of a device that is not there", kErrorInvalidDevice, "no such device",
     [](Raw& raw) { return raw.api.cuDevicePrimaryCtxRelease(-1); }},
    {"start with flags", kErrorInvalidValue, "flags must be 0",
     [](Raw& raw) { return raw.api.cuInit(1); }},
    {"wait for an event with flags", kErrorInvalidValue, "flags must be 0",
     [](Raw& raw) {
       EventPtr event = nullptr;
       CHECK_EQ(raw.api.cuEventCreate(&event, kEventDisableTiming), kSuccess);
       return raw.api.cuStreamWaitEvent(nullptr, event, 1);
     }},
    {"look a function up without saying which stream 0 is", kSuccess, "left to the build",
     [](Raw&) {
       void* found = nullptr;
       int status = 0;
       return look_up()("cuMemMap", &found, 10020, 0, &status);
     }},
    {"look a function up in another version", kSuccess, "not the version of the ABI in use",
     [](Raw&) {
       void* found = nullptr;
       int status = 0;
       return look_up()("cuMemMap", &found, 12000, kProcAddressLegacyStream, &status);
     }},
};

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
  std::vector<Test> tests = {
      TEST(each_kind_of_leak_is_reported), TEST(use_in_a_forked_child_is_a_breach),
      TEST(a_leak_at_exit_fails_a_strict_program), TEST(busy_streams_hand_on_idleness)};
  append_rules(&tests, kContextRules);
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
