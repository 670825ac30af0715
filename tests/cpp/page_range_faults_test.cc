// What a page range does about streams, failures, threads and forks.
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <future>
#include <thread>

#include "base/errors.h"
#include "driver_contract.h"
#include "range_rig.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// Streams.

void unmapping_waits_for_the_work_in_the_stream(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{0, 6}});
  rig.use(2, 3);
  CHECK(waits_for(kStreamA, "cuEventSynchronize", [&] { rig.unmap({{2, 3}}, kStreamA); }));
  CHECK_EQ(rig.runs(), "0+2 5+1 ");
  rig.end();
}

void closing_waits_for_the_device(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{0, 6}});
  rig.use(2, 3);
  CHECK(waits_for(kStreamA, "cuCtxSynchronize", [&] { rig.range->close(); }));
  CHECK_EQ(rig.created(), 0u);
  rig.end();
}

void a_wrong_call_does_not_wait(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{0, 6}});
  rig.use(0, 6);
  CHECK_THROWS(std::invalid_argument, rig.unmap({{5, 2}}, kStreamA), "page 6 is not mapped");
  rig.range->map({{6, 2}});
  rig.range->alias(8, 3);
  CHECK_EQ(DOUBLE(calls)("cuEventSynchronize"), 0u);
  set_busy(kStreamA, false);
  rig.end();
}

// Also: of two that unmap the same pages, one does and the other says so.
void others_can_map_while_one_waits_for_the_device(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{0, 6}});
  rig.use(0, 3);
  std::vector<std::future<size_t>> waiting;
  for (int i = 0; i < 2; ++i) {
    waiting.push_back(std::async(std::launch::async, [&] {
      try {
        return rig.unmap({{0, 3}}, kStreamA);
      } catch (const std::invalid_argument&) {
        return size_t{0};
      }
    }));
  }
  CHECK(eventually([] { return DOUBLE(calls)("cuEventSynchronize") == 2; }));
  auto mapping = std::async(std::launch::async, [&] { rig.range->map({{10, 2}}); });
  const bool free = mapping.wait_for(std::chrono::seconds(10)) == std::future_status::ready;
  const std::string meanwhile = free ? rig.runs() : "";
  set_busy(kStreamA, false);
  CHECK_EQ(meanwhile, "0+6 10+2 ");
  CHECK_EQ(waiting[0].get() + waiting[1].get(), 3u);
  CHECK_EQ(rig.runs(), "3+3 10+2 ");
  rig.range->check();
  rig.end();
}

// Failures.

// Somebody else has what the budget allows.
void a_device_without_memory_changes_nothing(const Backend& backend) {
  constexpr int kOutOfMemory = 2;
  RangeRig rig(backend);
  rig.range->map({{0, 2}});
  DOUBLE(fail)("cuMemCreate", /*skip=*/5, /*times=*/1000, kOutOfMemory);
  check_out_of_pages([&] { rig.range->map({{4, 4}, {10, 4}}); }, 8, 5);
  CHECK_EQ(rig.runs(), "0+2 ");
  CHECK_EQ(rig.created(), 2u);
  DOUBLE(fail)("cuMemCreate", 0, 0, kOutOfMemory);
  rig.range->map({{4, 4}, {10, 4}});
  rig.range->check();
  rig.end();
}

void what_the_driver_refuses_to_unmap_stays_and_is_counted(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{0, 4}, {10, 2}, {20, 1}});
  rig.range->alias(12, 2);
  *rig.at(11) = 77;
  rig.faults->fail_nth(4);  // record, wait, unmap, unmap
  CHECK_EQ(rig.unmap({{0, 4}, {10, 3}, {20, 1}}), 5u);
  CHECK_EQ(rig.runs(), "10+4 ");
  CHECK_EQ(rig.range->mapped_pages(), 3u);
  CHECK_EQ(rig.created(), 3u);
  CHECK_EQ(int{*rig.at(11)}, 77);
  rig.range->check();
  CHECK_EQ(rig.unmap({{10, 3}}), 3u);
  CHECK_EQ(rig.runs(), "13+1 ");
  rig.range->check();
  rig.end();
}

void what_cannot_be_undone_stays_and_is_counted(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{0, 1}});
  rig.faults->fail_from(6);  // four creations, a run, and the next one fails
  CHECK_THROWS(DriverError, rig.range->map({{4, 2}, {8, 2}}), "map failed");
  rig.faults->disarm();
  CHECK_EQ(rig.runs(), "0+1 4+2 ");
  CHECK_EQ(rig.range->mapped_pages(), 3u);
  CHECK_EQ(rig.created(), 3u);
  rig.range->check();
  CHECK_EQ(rig.unmap({{4, 2}}), 2u);
  rig.range->map({{4, 2}, {8, 2}});
  rig.range->check();
  rig.end();
}

struct Scenario {
  std::function<void(RangeRig&)> act;
  size_t at_least;  // calls of the driver that it makes
};

// Runs the scenario with a failure of the nth call. False: it made fewer calls than that.
bool survives(const Backend& backend, const Scenario& scenario, uint64_t nth) {
  RangeRig rig(backend);
  rig.range->map({{1, 3}, {20, 2}});
  rig.range->alias(10, 2);
  const std::string before = rig.runs();
  rig.faults->fail_nth(nth);
  bool threw = false;
  try {
    scenario.act(rig);
  } catch (const DriverError&) {
    threw = true;
  }
  const bool injected = rig.faults->injected() != 0;
  rig.faults->disarm();
  CHECK(injected || !threw);
  rig.range->check();
  CHECK_EQ(rig.created(), rig.range->mapped_pages());
  if (threw) {
    CHECK_EQ(rig.runs(), before);
    CHECK_EQ(rig.created(), 6u);
    scenario.act(rig);
    rig.range->check();
  }
  rig.end();
  return injected;
}

void sweep(const Backend& backend, const Scenario& scenario) {
  uint64_t nth = 1;
  while (survives(backend, scenario, nth)) ++nth;
  CHECK_EQ(nth, scenario.at_least + 1);
}

void mapping_is_all_or_nothing(const Backend& backend) {
  sweep(backend, {[](RangeRig& rig) { rig.range->map({{4, 2}, {14, 3}, {30, 1}}); }, 6 + 3});
}

void aliasing_is_all_or_nothing(const Backend& backend) {
  sweep(backend, {[](RangeRig& rig) { rig.range->alias(12, 5); }, 2});
}

void unmapping_is_all_or_counted(const Backend& backend) {
  sweep(backend, {[](RangeRig& rig) {
                    size_t pages = 0;
                    for (const PageRun run : rig.range->mapped_runs()) pages += run.count;
                    const size_t taken_out = rig.unmap({{2, 1}, {10, 2}, {20, 2}});
                    for (const PageRun run : rig.range->mapped_runs()) pages -= run.count;
                    CHECK_EQ(taken_out, pages);
                  },
                  2 + 3});
}

// Whatever of it fails, the destructor gives back what is left.
void closing_never_fails(const Backend& backend) {
  sweep(backend, {[](RangeRig& rig) {
                    try {
                      rig.range->close();
                    } catch (const DriverError& error) {
                      fail(__FILE__, __LINE__, error.what());
                    }
                    CHECK(rig.range->closed());
                  },
                  1 + 3});
}

void making_a_range_fails_cleanly(const Backend& backend) {
  RangeRig rig(backend);
  rig.faults->fail_nth(1);
  CHECK_THROWS(DriverError, PageRange(rig.pool, 4), "reserve failed");
  CHECK_EQ(rig.pool->users(), 1);
  rig.end();
}

// Threads and forks.

void threads_map_and_unmap_disjoint_pages(const Backend& backend) {
  const int rounds = backend.is_cuda ? 20 : 200;
  RangeRig rig(backend);
  const auto serve = [&](size_t first) {
    const auto page = static_cast<int64_t>(first);
    for (int i = 0; i < rounds; ++i) {
      rig.range->map({{page, 2}, {page + 4, 1}});
      rig.range->alias(page + 2, 2);
      for (size_t at = first; at < first + 5; ++at) *rig.at(at) = static_cast<unsigned char>(first);
      for (size_t at = first; at < first + 5; ++at) CHECK_EQ(size_t{*rig.at(at)}, first);
      CHECK_EQ(rig.unmap({{page + 1, 4}}), 4u);
      CHECK(rig.range->is_mapped(page));
      CHECK_EQ(rig.unmap({{page, 1}}), 1u);
    }
  };
  std::vector<std::future<void>> threads;
  for (const size_t first : {1, 6}) {
    threads.push_back(std::async(std::launch::async, serve, first));
  }
  threads.push_back(std::async(std::launch::async, [&] {
    for (int i = 0; i < rounds; ++i) {
      rig.range->check();
      CHECK(rig.range->mapped_pages() <= 8);
      CHECK(rig.range->mapped_runs().size() <= 4);
    }
  }));
  for (std::future<void>& thread : threads) thread.get();
  CHECK_EQ(rig.runs(), "");
  rig.range->check();
  rig.end();
}

void check_that_all_is_refused(RangeRig& rig) {
  constexpr const char* kSentence = "this process was forked";
  CHECK_THROWS(DriverError, rig.range->map({{0, 1}}), kSentence);
  CHECK_THROWS(DriverError, rig.range->alias(0, 1), kSentence);
  CHECK_THROWS(DriverError, rig.unmap({{2, 1}}), kSentence);
  CHECK_THROWS(DriverError, rig.range->is_mapped(2), kSentence);
  CHECK_THROWS(DriverError, rig.range->mapped_runs(), kSentence);
  CHECK_THROWS(DriverError, rig.range->mapped_pages(), kSentence);
  CHECK_THROWS(DriverError, rig.range->closed(), kSentence);
  CHECK_THROWS(DriverError, rig.range->check(), kSentence);
}

void a_child_can_do_nothing_and_no_harm(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{2, 2}});
  std::memset(rig.at(2), 77, 2 * rig.page);
  CHECK(holds_in_child([&] {
    check_that_all_is_refused(rig);
    rig.range->close();
    rig.range.reset();
    rig.pool.reset();
    return true;
  }));
  for (const size_t page : {2, 3}) CHECK_EQ(int{rig.at(page)[rig.page - 1]}, 77);
  rig.range->map({{0, 1}});
  rig.range->check();
  rig.end();
}

// The fork may come while another thread holds the lock of the range, the pool or the driver.
void a_child_does_not_wait_for_a_thread_it_lacks(const Backend& backend) {
  RangeRig rig(backend);
  std::atomic<bool> inside{false}, go_on{false};
  rig.ledger->in_create = [&] {
    inside = true;
    while (!go_on) std::this_thread::yield();
  };
  auto mapping = std::async(std::launch::async, [&] { rig.range->map({{2, 2}}); });
  CHECK(eventually([&] { return inside.load(); }));
  const bool held = holds_in_child([&] {
    alarm(20);  // a child that hangs has not held
    check_that_all_is_refused(rig);
    rig.range->close();
    rig.range.reset();
    rig.pool.reset();
    return true;
  });
  go_on = true;
  mapping.get();
  CHECK(held);
  CHECK_EQ(rig.runs(), "2+2 ");
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = over_all_backends(
      {BACKEND_TEST(what_the_driver_refuses_to_unmap_stays_and_is_counted),
       BACKEND_TEST(what_cannot_be_undone_stays_and_is_counted),
       BACKEND_TEST(mapping_is_all_or_nothing), BACKEND_TEST(aliasing_is_all_or_nothing),
       BACKEND_TEST(unmapping_is_all_or_counted), BACKEND_TEST(closing_never_fails),
       BACKEND_TEST(making_a_range_fails_cleanly),
       BACKEND_TEST(threads_map_and_unmap_disjoint_pages),
       BACKEND_TEST(a_child_can_do_nothing_and_no_harm),
       BACKEND_TEST(a_child_does_not_wait_for_a_thread_it_lacks)});
  for (const Test& test : over_cuda({BACKEND_TEST(a_device_without_memory_changes_nothing),
                                     BACKEND_TEST(unmapping_waits_for_the_work_in_the_stream),
                                     BACKEND_TEST(closing_waits_for_the_device),
                                     BACKEND_TEST(a_wrong_call_does_not_wait),
                                     BACKEND_TEST(others_can_map_while_one_waits_for_the_device)}))
    tests.push_back(test);
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
