// What is counted, what is remembered, and what is said when a call fails.
#include "driver/tracing_driver.h"

#include <algorithm>
#include <numeric>

#include "base/errors.h"
#include "base/units.h"
#include "check.h"
#include "double_control.h"
#include "driver/cuda_driver.h"
#include "driver/fault_driver.h"
#include "driver/host_driver.h"
#include "stderr_text.h"

namespace {

using namespace vattn;
using namespace vattn::test;

constexpr size_t kPage = 4 * kKiB;

struct Traced {
  std::shared_ptr<FaultDriver> faults = inject_faults(open_host_driver(kPage));
  std::shared_ptr<TracingDriver> driver = trace_driver(faults);

  CallCounters counters(CallOrigin origin, DriverCall call) const {
    return driver->counters()[static_cast<size_t>(origin)][static_cast<size_t>(call)];
  }
  void create_and_release() { driver->release({driver->create(kPage), kPage}); }
};

void every_call_is_counted_once_with_its_time() {
  Traced traced;
  for (int i = 0; i < 5; ++i) traced.create_and_release();
  for (const DriverCall call : {DriverCall::kCreate, DriverCall::kRelease}) {
    const CallCounters counters = traced.counters(CallOrigin::kOther, call);
    CHECK_EQ(counters.count, uint64_t{5});
    CHECK_EQ(counters.failed, uint64_t{0});
    const auto& histogram = counters.histogram;
    CHECK_EQ(std::accumulate(histogram.begin(), histogram.end(), uint64_t{0}), uint64_t{5});
    // The histogram's bounds hold for the sum too.
    uint64_t least = 0;
    for (size_t i = 1; i < histogram.size(); ++i) least += histogram[i] << i;
    CHECK(least <= counters.total_ns);
  }
}

void a_call_belongs_to_the_innermost_origin_of_its_thread() {
  Traced traced;
  {
    const OriginScope background(CallOrigin::kBackground);
    traced.create_and_release();
    {
      const OriginScope step(CallOrigin::kStep);
      traced.create_and_release();
    }
    traced.create_and_release();
  }
  traced.create_and_release();
  CHECK_EQ(traced.counters(CallOrigin::kBackground, DriverCall::kCreate).count, uint64_t{2});
  CHECK_EQ(traced.counters(CallOrigin::kStep, DriverCall::kCreate).count, uint64_t{1});
  CHECK_EQ(traced.counters(CallOrigin::kOther, DriverCall::kCreate).count, uint64_t{1});
}

void copies_are_counted_and_remembered_with_their_bytes() {
  Traced traced;
  const uintptr_t base = traced.driver->reserve(kPage);
  const Extent extent{traced.driver->create(kPage), kPage};
  traced.driver->map(base, {extent});
  traced.driver->copy(Stream{}, base, base + 100, 77);
  traced.driver->clear(Stream{}, base, 33);
  CHECK_EQ(traced.counters(CallOrigin::kOther, DriverCall::kCopy).count, uint64_t{1});
  CHECK_EQ(traced.counters(CallOrigin::kOther, DriverCall::kClear).count, uint64_t{1});
  const std::vector<std::string> lines = traced.driver->recent_calls();
  CHECK(lines[3].find("call=copy by=other") == 0);
  CHECK(lines[3].find("bytes=77") != std::string::npos);
  CHECK(lines[4].find("call=clear by=other") == 0);
  CHECK(lines[4].find("bytes=33") != std::string::npos);
  CHECK(traced.driver->unmap(base, {extent}));
  traced.driver->release(extent);
  traced.driver->unreserve(base, kPage);
}

// A new call that is not in the table of names would shift all behind it.
void every_call_has_the_name_of_its_function() {
  CHECK_EQ(name_of(DriverCall::kReserve), std::string("reserve"));
  CHECK_EQ(name_of(DriverCall::kCopy), std::string("copy"));
  CHECK_EQ(name_of(DriverCall::kClear), std::string("clear"));
  CHECK_EQ(name_of(DriverCall::kImportHandle), std::string("import_handle"));
  CHECK_EQ(static_cast<size_t>(DriverCall::kImportHandle) + 1, kNumDriverCalls);
}

void copies_can_be_made_to_fail_and_then_do_nothing() {
  Traced traced;
  const uintptr_t base = traced.driver->reserve(kPage);
  const Extent extent{traced.driver->create(kPage), kPage};
  traced.driver->map(base, {extent});
  auto* const bytes = reinterpret_cast<unsigned char*>(base);
  bytes[0] = 7;
  traced.faults->fail_from(1);
  stderr_text([&] {
    CHECK_THROWS(DriverError, traced.driver->copy(Stream{}, base, base + 1, 1),
                 "copy failed (-1): injected fault");
    CHECK_THROWS(DriverError, traced.driver->clear(Stream{}, base, 1),
                 "clear failed (-1): injected fault");
  });
  traced.faults->disarm();
  CHECK_EQ(int{bytes[0]}, 7);
  CHECK_EQ(traced.faults->injected(), uint64_t{2});
  for (const DriverCall call : {DriverCall::kCopy, DriverCall::kClear}) {
    CHECK_EQ(traced.counters(CallOrigin::kOther, call).failed, uint64_t{1});
  }
  CHECK(traced.driver->unmap(base, {extent}));
  traced.driver->release(extent);
  traced.driver->unreserve(base, kPage);
}

// It decides whether freed memory has to be cleared, so no decorator may answer for the driver.
void decorators_say_what_the_driver_says_of_new_memory() {
  CHECK(Traced().driver->creates_zeroed());
  CHECK(Traced().driver->overcommits());
  DOUBLE(reset)();
  CHECK(!trace_driver(inject_faults(open_cuda_driver(0)))->creates_zeroed());
  CHECK(!trace_driver(inject_faults(open_cuda_driver(0)))->overcommits());
}

void the_last_64_calls_are_remembered_oldest_first() {
  Traced traced;
  traced.driver->synchronize();
  for (int i = 0; i < 32; ++i) traced.create_and_release();
  const std::vector<std::string> lines = traced.driver->recent_calls();
  CHECK_EQ(lines.size(), size_t{64});
  CHECK(lines.front().find("call=create by=other") == 0);
  CHECK(lines.back().find("call=release by=other") == 0);
  CHECK(lines.back().find("bytes=4096") != std::string::npos);
}

void a_failed_call_prints_those_before_it() {
  Traced traced;
  const uintptr_t base = traced.driver->reserve(kPage);
  const Extent extent{traced.driver->create(kPage), kPage};
  traced.faults->fail_nth(1);
  const std::string text = stderr_text(
      [&] { CHECK_THROWS(DriverError, traced.driver->map(base, {extent}), "injected fault"); });
  CHECK(text.find("vattn E before -2 call=reserve") != std::string::npos);
  CHECK(text.find("vattn E before -1 call=create") != std::string::npos);
  CHECK(text.find("vattn E FAILED -0 call=map") != std::string::npos);
  CHECK_EQ(traced.counters(CallOrigin::kOther, DriverCall::kMap).failed, uint64_t{1});
  traced.driver->release(extent);
  traced.driver->unreserve(base, kPage);
}

void running_out_of_memory_prints_nothing() {
  Traced traced;
  traced.faults->fail_nth(1);
  const std::string text = stderr_text(
      [&] { CHECK_THROWS(DriverError, traced.driver->create(kPage), "injected fault"); });
  CHECK_EQ(text, std::string());
  CHECK_EQ(traced.counters(CallOrigin::kOther, DriverCall::kCreate).failed, uint64_t{1});
}

void faults_come_at_the_call_that_was_named() {
  Traced traced;
  traced.faults->fail_nth(2);
  traced.create_and_release();
  CHECK_THROWS(DriverError, traced.create_and_release(), "create failed (-1): injected fault");
  traced.create_and_release();
  CHECK_EQ(traced.faults->injected(), uint64_t{1});
  traced.faults->fail_from(2);
  traced.create_and_release();
  for (int i = 0; i < 3; ++i) CHECK_THROWS(DriverError, traced.create_and_release(), "injected");
  CHECK_EQ(traced.faults->injected(), uint64_t{3});
  traced.faults->disarm();
  traced.create_and_release();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      {TEST(every_call_is_counted_once_with_its_time),
       TEST(a_call_belongs_to_the_innermost_origin_of_its_thread),
       TEST(copies_are_counted_and_remembered_with_their_bytes),
       TEST(every_call_has_the_name_of_its_function),
       TEST(copies_can_be_made_to_fail_and_then_do_nothing),
       TEST(decorators_say_what_the_driver_says_of_new_memory),
       TEST(the_last_64_calls_are_remembered_oldest_first),
       TEST(a_failed_call_prints_those_before_it), TEST(running_out_of_memory_prints_nothing),
       TEST(faults_come_at_the_call_that_was_named)},
      argc > 1 ? argv[1] : nullptr);
}
