// Fences on CUDA: events behind values that are never mistaken for one another.
#include <atomic>
#include <set>
#include <stdexcept>
#include <thread>

#include "base/units.h"
#include "double_control.h"
#include "driver/cuda_driver.h"
#include "stderr_text.h"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr Stream kA = static_cast<Stream>(0x10);
constexpr Stream kB = static_cast<Stream>(0x20);

void set_busy(Stream stream, bool busy) {
  DOUBLE(set_stream_busy)(static_cast<uintptr_t>(stream), busy ? 1 : 0);
}

void a_fence_passes_when_its_stream_gets_there() {
  CudaVmmDriver driver(0);
  set_busy(kA, true);
  const Fence a = driver.record_fence(kA);
  const Fence b = driver.record_fence(kB);
  CHECK(!driver.fence_passed(a));
  CHECK(driver.fence_passed(b));
  CHECK(driver.fence_passed(Fence::kNone));
  set_busy(kA, false);
  CHECK(driver.fence_passed(a));
  driver.release_fence(a);
  driver.release_fence(b);
}

void waiting_ends_when_the_stream_gets_there() {
  CudaVmmDriver driver(0);
  set_busy(kA, true);
  const Fence fence = driver.record_fence(kA);
  std::atomic<bool> idle{false};
  bool was_idle = false;
  std::thread waiter([&] {
    driver.wait_fence(fence);
    was_idle = idle;
  });
  // Other fences work while a thread waits.
  while (DOUBLE(calls)("cuEventSynchronize") == 0) std::this_thread::yield();
  driver.release_fence(driver.record_fence(kB));
  idle = true;
  set_busy(kA, false);
  waiter.join();
  CHECK(was_idle);
  driver.release_fence(fence);
}

void synchronize_waits_for_every_stream() {
  CudaVmmDriver driver(0);
  set_busy(kA, true);
  std::atomic<bool> idle{false};
  bool was_idle = false;
  std::thread waiter([&] {
    driver.synchronize();
    was_idle = idle;
  });
  while (DOUBLE(calls)("cuCtxSynchronize") == 0) std::this_thread::yield();
  idle = true;
  set_busy(kA, false);
  waiter.join();
  CHECK(was_idle);
}

void a_stream_waits_for_a_fence_of_another() {
  CudaVmmDriver driver(0);
  set_busy(kA, true);
  const Fence a = driver.record_fence(kA);
  driver.stream_wait_fence(kB, a);
  const Fence b = driver.record_fence(kB);
  CHECK(!driver.fence_passed(b));
  // The stream keeps waiting for what the fence held, also when its event is recorded anew.
  driver.release_fence(a);
  const Fence c = driver.record_fence(static_cast<Stream>(0x30));
  CHECK(driver.fence_passed(c));
  CHECK(!driver.fence_passed(b));
  set_busy(kA, false);
  CHECK(driver.fence_passed(b));
  driver.release_fence(b);
  driver.release_fence(c);
}

void events_are_recycled_and_fences_are_not() {
  CudaVmmDriver driver(0);
  std::set<Fence> seen;
  for (int i = 0; i < 100; ++i) {
    const Fence fence = driver.record_fence(kA);
    CHECK(fence != Fence::kNone);
    CHECK(seen.insert(fence).second);
    driver.release_fence(fence);
  }
  CHECK_EQ(DOUBLE(live_events)(), 1u);
  const Fence a = driver.record_fence(kA);
  const Fence b = driver.record_fence(kA);
  CHECK(a != b);
  CHECK_EQ(DOUBLE(live_events)(), 2u);
  driver.release_fence(b);
  driver.release_fence(a);
}

void a_released_fence_is_told_from_the_one_that_has_its_event() {
  CudaVmmDriver driver(0);
  const Fence old = driver.record_fence(kA);
  driver.release_fence(old);
  set_busy(kA, true);
  const Fence now = driver.record_fence(kA);
  CHECK_THROWS(std::invalid_argument, driver.fence_passed(old), "is not live: it was released");
  CHECK_THROWS(std::invalid_argument, driver.wait_fence(old), "is not live");
  CHECK_THROWS(std::invalid_argument, driver.stream_wait_fence(kB, old), "is not live");
  const std::string log = stderr_text([&] { driver.release_fence(old); });
  CHECK(log.find("call=release_fence code=400 name=CUDA_ERROR_INVALID_HANDLE") !=
        std::string::npos);
  CHECK_EQ(driver.failed_give_backs(), 1u);
  CHECK(!driver.fence_passed(now));
  set_busy(kA, false);
  driver.release_fence(now);
}

void a_failed_record_leaves_no_fence() {
  CudaVmmDriver driver(0);
  for (const char* call : {"cuEventCreate", "cuEventRecord"}) {
    DOUBLE(fail)(call, 0, 1, 700);
    CHECK_THROWS(DriverError, driver.record_fence(kA), std::string(call) + " failed (700)");
  }
  driver.release_fence(driver.record_fence(kA));
  CHECK_EQ(DOUBLE(live_events)(), 1u);
}

// After a kernel faulted every query fails; that is neither "passed" nor "not yet".
void a_broken_device_is_an_error_not_an_answer() {
  CudaVmmDriver driver(0);
  const Fence fence = driver.record_fence(kA);
  DOUBLE(fail)("cuEventQuery", 0, 1, 700);
  CHECK_THROWS(DriverError, driver.fence_passed(fence), "cuEventQuery failed (700)");
  DOUBLE(fail)("cuEventSynchronize", 0, 1, 700);
  CHECK_THROWS(DriverError, driver.wait_fence(fence), "cuEventSynchronize failed (700)");
  DOUBLE(fail)("cuStreamWaitEvent", 0, 1, 700);
  CHECK_THROWS(DriverError, driver.stream_wait_fence(kB, fence), "cuStreamWaitEvent failed (700)");
  DOUBLE(fail)("cuCtxSynchronize", 0, 1, 700);
  CHECK_THROWS(DriverError, driver.synchronize(), "cuCtxSynchronize failed (700)");
  driver.release_fence(fence);
}

void unmapping_after_the_fence_is_clean() {
  CudaVmmDriver driver(0);
  const Extent extent = {driver.create(2 * kMiB), 2 * kMiB};
  const uintptr_t base = driver.reserve(extent.bytes);
  driver.map(base, {extent});
  set_busy(kA, true);
  DOUBLE(use_range)(static_cast<uintptr_t>(kA), base, extent.bytes);
  const Fence fence = driver.record_fence(kA);
  std::thread device([] { set_busy(kA, false); });
  driver.wait_fence(fence);
  CHECK(driver.unmap(base, {extent}));
  device.join();
  driver.release_fence(fence);
  driver.release(extent);
  driver.unreserve(base, extent.bytes);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Test> tests = {TEST(a_fence_passes_when_its_stream_gets_there),
                                   TEST(waiting_ends_when_the_stream_gets_there),
                                   TEST(synchronize_waits_for_every_stream),
                                   TEST(a_stream_waits_for_a_fence_of_another),
                                   TEST(events_are_recycled_and_fences_are_not),
                                   TEST(a_released_fence_is_told_from_the_one_that_has_its_event),
                                   TEST(a_failed_record_leaves_no_fence),
                                   TEST(a_broken_device_is_an_error_not_an_answer),
                                   TEST(unmapping_after_the_fence_is_clean)};
  return run_tests(on_clean_double(tests), argc > 1 ? argv[1] : nullptr);
}
