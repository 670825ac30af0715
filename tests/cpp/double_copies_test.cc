// The libcuda double catches what it is there to catch, in work on the device: each rule is broken
// once, on purpose. And what it does is what a device would have done in the end.
#include "double_rules.h"
#include "driver_contract.h"

using namespace vattn::test;

namespace {

constexpr uintptr_t kBusy = 7;
const StreamPtr kBusyStream = reinterpret_cast<StreamPtr>(kBusy);

// Pages in handles of one page each, with access.
DevicePtr usable(Raw& raw, size_t pages) {
  const DevicePtr base = raw.reserve(pages);
  for (size_t i = 0; i < pages; ++i) {
    CHECK_EQ(raw.api.cuMemMap(base + i * kPage, kPage, 0, raw.create(1), 0), kSuccess);
  }
  CHECK_EQ(raw.api.cuMemSetAccess(base, pages * kPage, &raw.access, 1), kSuccess);
  return base;
}

// One page at two addresses, one behind the other.
DevicePtr mapped_twice(Raw& raw) {
  const DevicePtr base = raw.reserve(2);
  const MemHandle handle = raw.create(1);
  for (const DevicePtr at : {base, base + kPage}) {
    CHECK_EQ(raw.api.cuMemMap(at, kPage, 0, handle, 0), kSuccess);
  }
  CHECK_EQ(raw.api.cuMemSetAccess(base, 2 * kPage, &raw.access, 1), kSuccess);
  return base;
}

void enter_second_device(Raw& raw) {
  ContextPtr context = nullptr;
  CHECK_EQ(raw.api.cuDevicePrimaryCtxRetain(&context, 1), kSuccess);
  CHECK_EQ(raw.api.cuCtxPushCurrent(context), kSuccess);
}

unsigned char& byte_at(DevicePtr address) {
  return *reinterpret_cast<unsigned char*>(address);
}

const Rule kCopyRules[] = {
    {"copy nothing", kSuccess, "a copy of nothing",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 2);
       return raw.api.cuMemcpyDtoDAsync(base, base + kPage, 0, nullptr);
     }},
    {"copy to what is not mapped", kErrorInvalidValue, "no access to the target",
     [](Raw& raw) {
       return raw.api.cuMemcpyDtoDAsync(raw.reserve(1), usable(raw, 1), 8, nullptr);
     }},
    {"copy from what is not mapped", kErrorInvalidValue, "no access to the source",
     [](Raw& raw) {
       return raw.api.cuMemcpyDtoDAsync(usable(raw, 1), raw.reserve(1), 8, nullptr);
     }},
    {"copy to what has no access", kErrorInvalidValue, "no access to the target",
     [](Raw& raw) {
       const DevicePtr to = raw.mapped(1);
       return raw.api.cuMemcpyDtoDAsync(to, usable(raw, 1), 8, nullptr);
     }},
    {"copy from what has no access", kErrorInvalidValue, "no access to the source",
     [](Raw& raw) {
       const DevicePtr from = raw.mapped(1);
       return raw.api.cuMemcpyDtoDAsync(usable(raw, 1), from, 8, nullptr);
     }},
    {"copy past the end", kErrorInvalidValue, "no access to the target",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 2);
       return raw.api.cuMemcpyDtoDAsync(base + 2 * kPage - 7, base, 8, nullptr);
     }},
    {"copy from over a hole", kErrorInvalidValue, "no access to the source",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 5);
       CHECK_EQ(raw.api.cuMemUnmap(base + kPage, kPage), kSuccess);
       return raw.api.cuMemcpyDtoDAsync(base + 3 * kPage, base + kPage - 4, kPage + 8, nullptr);
     }},
    {"copy memory of another device", kErrorInvalidValue, "no access to the target",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 2);
       enter_second_device(raw);
       return raw.api.cuMemcpyDtoDAsync(base, base + kPage, 8, nullptr);
     }},
    {"copy a range onto part of itself", kSuccess, "the result is undefined",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 3);
       return raw.api.cuMemcpyDtoDAsync(base, base + kPage, kPage + 1, nullptr);
     }},
    {"copy a page onto itself at another address", kSuccess, "the result is undefined",
     [](Raw& raw) {
       const DevicePtr base = mapped_twice(raw);
       return raw.api.cuMemcpyDtoDAsync(base + 8, base + kPage + 15, 8, nullptr);
     }},
    {"unmap the source of a copy in a busy stream", kSuccess, "cuMemUnmap does not wait",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 2);
       DOUBLE(set_stream_busy)(kBusy, 1);
       CHECK_EQ(raw.api.cuMemcpyDtoDAsync(base, base + kPage, 8, kBusyStream), kSuccess);
       return raw.api.cuMemUnmap(base + kPage, kPage);
     }},
    {"unmap the target of a copy in a busy stream", kSuccess, "cuMemUnmap does not wait",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 2);
       DOUBLE(set_stream_busy)(kBusy, 1);
       CHECK_EQ(raw.api.cuMemcpyDtoDAsync(base, base + kPage, 8, kBusyStream), kSuccess);
       return raw.api.cuMemUnmap(base, kPage);
     }},
};

const Rule kFillRules[] = {
    {"fill nothing", kSuccess, "a fill of nothing",
     [](Raw& raw) { return raw.api.cuMemsetD8Async(usable(raw, 1), 0, 0, nullptr); }},
    {"fill what is not mapped", kErrorInvalidValue, "no access to the range",
     [](Raw& raw) { return raw.api.cuMemsetD8Async(raw.reserve(1), 0, 8, nullptr); }},
    {"fill what has no access", kErrorInvalidValue, "no access to the range",
     [](Raw& raw) { return raw.api.cuMemsetD8Async(raw.mapped(1), 0, 8, nullptr); }},
    {"fill past the end", kErrorInvalidValue, "no access to the range",
     [](Raw& raw) { return raw.api.cuMemsetD8Async(usable(raw, 2) + 1, 0, 2 * kPage, nullptr); }},
    {"fill memory of another device", kErrorInvalidValue, "no access to the range",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 1);
       enter_second_device(raw);
       return raw.api.cuMemsetD8Async(base, 0, 8, nullptr);
     }},
    {"fill without a context", kErrorInvalidContext, "no context is current",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 1);
       ContextPtr popped = nullptr;
       CHECK_EQ(raw.api.cuCtxPopCurrent(&popped), kSuccess);
       return raw.api.cuMemsetD8Async(base, 0, 8, nullptr);
     }},
    {"unmap what is filled in a busy stream", kSuccess, "cuMemUnmap does not wait",
     [](Raw& raw) {
       const DevicePtr base = usable(raw, 2);
       DOUBLE(set_stream_busy)(kBusy, 1);
       CHECK_EQ(raw.api.cuMemsetD8Async(base + kPage, 0, 8, kBusyStream), kSuccess);
       return raw.api.cuMemUnmap(base, 2 * kPage);
     }},
};

void copies_and_fills_reach_over_handles() {
  Raw raw;
  const DevicePtr base = usable(raw, 4);
  const size_t bytes = kPage + 9;
  for (size_t at = 0; at < bytes; ++at) {
    byte_at(base + 3 + at) = static_cast<unsigned char>(at % 251);
  }
  const DevicePtr to = base + 3 * kPage - 5;
  CHECK_EQ(raw.api.cuMemcpyDtoDAsync(to, base + 3, bytes - 20, nullptr), kSuccess);
  for (size_t at = 0; at < bytes - 20; ++at) CHECK_EQ(size_t{byte_at(to + at)}, at % 251);
  CHECK_EQ(raw.api.cuMemsetD8Async(base + 4, 0xee, bytes, nullptr), kSuccess);
  CHECK_EQ(int{byte_at(base + 3)}, 0);
  for (size_t at = 0; at < bytes; ++at) CHECK_EQ(int{byte_at(base + 4 + at)}, 0xee);
  CHECK_EQ(int{byte_at(base + 4 + bytes)}, 0);
  CHECK_EQ(breaches(), "");
}

// A stream that is done, or was never busy, holds on to nothing.
void ranges_are_free_once_their_stream_is_idle() {
  Raw raw;
  const DevicePtr base = usable(raw, 2);
  CHECK_EQ(raw.api.cuMemcpyDtoDAsync(base, base + kPage, 8, kBusyStream), kSuccess);
  DOUBLE(set_stream_busy)(kBusy, 1);
  CHECK_EQ(raw.api.cuMemUnmap(base, kPage), kSuccess);
  CHECK_EQ(raw.api.cuMemsetD8Async(base + kPage, 0, 8, kBusyStream), kSuccess);
  DOUBLE(set_stream_busy)(kBusy, 0);
  CHECK_EQ(raw.api.cuMemUnmap(base + kPage, kPage), kSuccess);
  CHECK_EQ(breaches(), "");
}

void leftovers_are_everywhere_in_new_memory_and_only_there() {
  Raw raw;
  const DevicePtr clean = usable(raw, 1);
  DOUBLE(leave_leftovers)(1);
  const DevicePtr base = usable(raw, 1);
  for (size_t at = 0; at < kPage; ++at) {
    CHECK_EQ(int{byte_at(base + at)}, 0xdb);
    CHECK_EQ(int{byte_at(clean + at)}, 0);
  }
  CHECK_EQ(breaches(), "");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = {TEST(copies_and_fills_reach_over_handles),
                             TEST(ranges_are_free_once_their_stream_is_idle),
                             TEST(leftovers_are_everywhere_in_new_memory_and_only_there)};
  append_rules(&tests, kCopyRules);
  append_rules(&tests, kFillRules);
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
