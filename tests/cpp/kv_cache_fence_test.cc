// Memory is taken from a row only when the device is done with it.
#include <chrono>
#include <thread>

#include "base/errors.h"
#include "cache_rig.h"
#include "double_control.h"

using namespace vattn;
using namespace vattn::test;

namespace {

RigOptions ten_pages() {
  RigOptions options;
  options.budget_pages = 10;
  return options;
}

void a_short_step_waits_for_the_work_of_freed_rows(const Backend& backend) {
  Rig rig(backend, ten_pages());
  rig.start({6, 2});
  rig.free_while_busy(0, 6, kStreamA);
  CHECK(waits_for(kStreamA, "cuEventSynchronize", [&] { rig.step({0, 8, 0, 0}); }));
  CHECK_EQ(rig.mapped(1), 8u);
  CHECK(rig.state(0) == RowState::kFree);
  rig.kv->check();
  rig.end();
}

void a_step_with_enough_pages_waits_for_nobody(const Backend& backend) {
  Rig rig(backend, ten_pages());
  rig.start({6, 2});
  rig.free_while_busy(0, 6, kStreamA);
  rig.step({0, 4, 0, 0});
  CHECK(rig.state(0) == RowState::kIdle);
  CHECK_EQ(rig.mapped(0), 6u);
  set_busy(kStreamA, false);
  rig.end();
}

void rows_that_the_device_is_done_with_go_first(const Backend& backend) {
  Rig rig(backend, ten_pages());
  rig.start({3, 3, 2});
  rig.free_while_busy(0, 3, kStreamA);
  rig.free(1, kStreamB);
  rig.step({0, 0, 7, 0});
  CHECK(rig.state(0) == RowState::kIdle);
  CHECK(rig.state(1) == RowState::kFree);
  CHECK_EQ(DOUBLE(calls)("cuEventSynchronize"), 0u);
  set_busy(kStreamA, false);
  rig.kv->check();
  rig.end();
}

void the_row_that_was_freed_first_goes_first(const Backend& backend) {
  Rig rig(backend, ten_pages());
  rig.start({3, 3, 3});
  for (const int64_t row : {1, 2, 0}) rig.free(row, kStreamA);
  CHECK_EQ(rig.alloc(9), 0);
  rig.step({6, 0, 0, 0});
  CHECK(rig.state(1) == RowState::kFree);
  CHECK(rig.state(2) == RowState::kIdle);
  rig.end();
}

void out_of_pages_does_not_wait(const Backend& backend) {
  Rig rig(backend, ten_pages());
  rig.start({6, 2});
  rig.free_while_busy(0, 6, kStreamA);
  check_out_of_pages([&] { rig.step({0, 11, 0, 0}); }, 9, 8);
  CHECK(rig.state(0) == RowState::kIdle);
  CHECK_EQ(rig.mapped(0), 6u);
  set_busy(kStreamA, false);
  rig.end();
}

void another_stream_waits_for_the_row_it_gets(const Backend& backend) {
  Rig rig(backend);
  rig.start({6});
  rig.free_while_busy(0, 6, kStreamA);
  CHECK_EQ(rig.alloc(6, kStreamB), 0);
  CHECK_EQ(rig.ledger->now().stream_waits, 1u);
  CHECK(DOUBLE(stream_busy)(static_cast<uintptr_t>(kStreamB)) != 0);
  rig.step({6, 0, 0, 0});
  // B's end is after A's: freeing on B covers both.
  rig.free(0, kStreamB);
  set_busy(kStreamA, false);
  CHECK(DOUBLE(stream_busy)(static_cast<uintptr_t>(kStreamB)) == 0);
  CHECK_EQ(rig.kv->trim(), 6 * rig.page);
  rig.end();
}

void the_same_stream_waits_for_nothing(const Backend& backend) {
  Rig rig(backend);
  rig.start({6});
  rig.free_while_busy(0, 6, kStreamA);
  CHECK_EQ(rig.alloc(6, kStreamA), 0);
  CHECK_EQ(rig.ledger->now().stream_waits, 0u);
  set_busy(kStreamA, false);
  rig.end();
}

// Freed on A, used again and freed on C: the fence of C alone would forget A.
void a_row_freed_on_a_third_stream_still_waits_for_the_first(const Backend& backend) {
  Rig rig(backend);
  rig.start({6});
  rig.free_while_busy(0, 6, kStreamA);
  CHECK_EQ(rig.alloc(6, kStreamA), 0);
  rig.free(0, kStreamB);
  CHECK_EQ(rig.ledger->now().fences, 1u);
  CHECK_EQ(rig.kv->trim(), 0u);
  CHECK(rig.state(0) == RowState::kRetiring);
  set_busy(kStreamA, false);
  CHECK(eventually([&] { return rig.state(0) == RowState::kFree; }));
  rig.end();
}

// The row is active again, but what lies ahead of it is what the request before was using.
void pages_ahead_that_the_device_still_uses_are_waited_for(const Backend& backend) {
  Rig rig(backend, ten_pages());
  rig.start({6, 2});
  rig.free_while_busy(0, 6, kStreamA);
  CHECK_EQ(rig.alloc(6, kStreamA), 0);
  CHECK(waits_for(kStreamA, "cuEventSynchronize", [&] { rig.step({1, 7, 0, 0}); }));
  CHECK_EQ(rig.mapped(0), 1u);
  rig.kv->check();
  rig.end();
}

void trimmed_rows_retire_when_the_device_is_done(const Backend& backend) {
  Rig rig(backend);
  rig.start({6, 2});
  rig.free_while_busy(0, 6, kStreamA);
  CHECK_EQ(rig.kv->trim(), 0u);
  CHECK(rig.state(0) == RowState::kRetiring);
  CHECK_EQ(rig.kv->stats().rows_retiring, 1u);
  CHECK_EQ(rig.mapped(0), 6u);
  rig.kv->check();
  set_busy(kStreamA, false);
  CHECK(eventually([&] { return rig.state(0) == RowState::kFree; }));
  CHECK(eventually([&] { return rig.ledger->now().created_bytes == 2 * rig.page; }));
  rig.kv->check();
  rig.end();
}

// Prefetching finds no pages meanwhile; that must not put the retiring rows to sleep.
void trimmed_rows_retire_also_when_no_page_is_left_to_prefetch(const Backend& backend) {
  RigOptions options = ten_pages();
  options.lookahead = 8;
  Rig rig(backend, options);
  rig.start({6, 4});
  rig.free_while_busy(0, 6, kStreamA);
  rig.kv->trim();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  set_busy(kStreamA, false);
  CHECK(eventually([&] { return rig.state(0) == RowState::kFree; }));
  rig.end();
}

void without_the_background_thread_alloc_retires(const Backend& backend) {
  Rig rig(backend);
  rig.kv->stop_background();
  rig.start({6, 2});
  rig.free_while_busy(0, 6, kStreamA);
  rig.kv->trim();
  set_busy(kStreamA, false);
  CHECK(rig.state(0) == RowState::kRetiring);
  rig.alloc();
  CHECK_EQ(rig.ledger->now().created_bytes, 2 * rig.page);
  rig.end();
}

void a_retiring_row_can_be_adopted(const Backend& backend) {
  RigOptions options;
  options.rows = 2;
  Rig rig(backend, options);
  rig.start({6, 2});
  rig.free_while_busy(0, 6, kStreamA);
  rig.kv->trim();
  CHECK_EQ(rig.alloc(6, kStreamA), 0);
  CHECK(rig.state(0) == RowState::kActive);
  rig.step({6, 2});
  set_busy(kStreamA, false);
  CHECK_EQ(rig.mapped(0), 6u);
  rig.kv->check();
  rig.end();
}

void close_waits_for_the_device(const Backend& backend) {
  Rig rig(backend);
  rig.start({6, 2});
  rig.free_while_busy(0, 6, kStreamA);
  CHECK(waits_for(kStreamA, "cuCtxSynchronize", [&] { rig.kv->close(); }));
  CHECK_EQ(rig.ledger->now().created_bytes, 0u);
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      over_cuda({BACKEND_TEST(a_short_step_waits_for_the_work_of_freed_rows),
                 BACKEND_TEST(a_step_with_enough_pages_waits_for_nobody),
                 BACKEND_TEST(rows_that_the_device_is_done_with_go_first),
                 BACKEND_TEST(the_row_that_was_freed_first_goes_first),
                 BACKEND_TEST(out_of_pages_does_not_wait),
                 BACKEND_TEST(another_stream_waits_for_the_row_it_gets),
                 BACKEND_TEST(the_same_stream_waits_for_nothing),
                 BACKEND_TEST(a_row_freed_on_a_third_stream_still_waits_for_the_first),
                 BACKEND_TEST(pages_ahead_that_the_device_still_uses_are_waited_for),
                 BACKEND_TEST(trimmed_rows_retire_when_the_device_is_done),
                 BACKEND_TEST(trimmed_rows_retire_also_when_no_page_is_left_to_prefetch),
                 BACKEND_TEST(without_the_background_thread_alloc_retires),
                 BACKEND_TEST(a_retiring_row_can_be_adopted),
                 BACKEND_TEST(close_waits_for_the_device)}),
      argc > 1 ? argv[1] : nullptr);
}
