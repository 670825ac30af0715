// For tests of the double itself: the driver called directly, and rules to break one at a time.
#pragma once

#include <vector>

#include "double_control.h"
#include "driver/cuda_api.h"

namespace vattn::test {

using namespace vattn::cuda;

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

// The answer and the sentence are as expected, and it is the only breach.
inline void check_rule(const Rule& rule) {
  Raw raw;
  CHECK_EQ(rule.violate(raw), rule.answer);
  check_breach(rule.sentence);
  CHECK_EQ(DOUBLE(breaches)(), 1u);
}

template <size_t kCount>
void append_rules(std::vector<Test>* tests, const Rule (&rules)[kCount]) {
  for (const Rule& rule : rules) {
    tests->push_back({std::string("caught: ") + rule.name, [&rule] { check_rule(rule); }});
  }
}

}  // namespace vattn::test
