// When memory is short: what step() takes back, from whom, and what it says when that is not
// enough.
#include "base/errors.h"
#include "cache_rig.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// 20 pages: row 0 has 5; row 1 uses 3 of the 10 that it took over from an earlier request.
RigOptions twenty_pages() {
  RigOptions options;
  options.budget_pages = 20;
  return options;
}

void start_with_pages_ahead(Rig& rig) {
  rig.start({5});
  CHECK_EQ(rig.idle_row(10), 1);
  CHECK_EQ(rig.alloc(10), 1);
  rig.step({5, 3, 0, 0});
  CHECK_EQ(rig.mapped(1), 10u);
}

void pages_ahead_of_active_rows_are_taken_before_giving_up(const Backend& backend) {
  Rig rig(backend, twenty_pages());
  start_with_pages_ahead(rig);
  rig.step({17, 3, 0, 0});
  CHECK_EQ(rig.mapped(0), 17u);
  CHECK_EQ(rig.mapped(1), 3u);
  rig.kv->check();
  check_out_of_pages([&] { rig.step({18, 3, 0, 0}); }, 1, 0);
  rig.end();
}

// What a row is about to use in this very step is not "ahead", though it was mapped before.
void memory_for_this_step_is_not_taken_from_a_row_that_does_not_grow(const Backend& backend) {
  Rig rig(backend, twenty_pages());
  start_with_pages_ahead(rig);
  rig.step({12, 8, 0, 0});
  CHECK_EQ(rig.mapped(0), 12u);
  CHECK_EQ(rig.mapped(1), 8u);
  rig.kv->check();
  rig.end();
}

void out_of_pages_counts_what_this_step_leaves_free(const Backend& backend) {
  Rig rig(backend, twenty_pages());
  start_with_pages_ahead(rig);
  check_out_of_pages([&] { rig.step({13, 8, 0, 0}); }, 8, 7);
  CHECK_EQ(rig.mapped(0), 5u);
  CHECK(rig.kv->seq_lens() == (std::vector<int64_t>{5, 3, 0, 0}));
  rig.kv->check();
  rig.end();
}

// A growing row would have to take its own pages ahead right back: they make nobody richer.
void pages_ahead_of_the_growing_row_are_not_free(const Backend& backend) {
  Rig rig(backend, twenty_pages());
  start_with_pages_ahead(rig);
  check_out_of_pages([&] { rig.step({5, 16, 0, 0}); }, 6, 5);
  CHECK_EQ(rig.mapped(1), 10u);
  rig.kv->check();
  rig.end();
}

// Kernels of the steps before may still be reading what the row has given up since.
void tokens_that_a_row_once_had_are_kept_after_it_shrinks(const Backend& backend) {
  Rig rig(backend, twenty_pages());
  rig.start({5, 10});
  rig.step({5, 2, 0, 0});
  check_out_of_pages([&] { rig.step({12, 2, 0, 0}); }, 7, 5);
  CHECK_EQ(rig.mapped(1), 10u);
  rig.kv->check();
  rig.end();
}

// Rows 0 and 1 grow and have pages ahead; what they need is ahead of row 2.
void growing_rows_do_not_hide_the_pages_ahead_of_others(const Backend& backend) {
  RigOptions options;
  options.budget_pages = 30;
  Rig rig(backend, options);
  rig.start({10, 10, 10});
  for (int64_t row = 0; row < 3; ++row) rig.free(row);
  for (int64_t row = 0; row < 3; ++row) CHECK_EQ(rig.alloc(10), row);
  rig.step({14, 14, 1, 0});
  CHECK_EQ(rig.mapped(0), 14u);
  CHECK_EQ(rig.mapped(1), 14u);
  rig.kv->check();
  rig.end();
}

// What admission may count on: a step can be given that much, and not a page more.
void reclaimable_is_what_a_step_can_be_given_besides_the_free_pages(const Backend& backend) {
  Rig rig(backend, twenty_pages());
  start_with_pages_ahead(rig);  // 5 used; 3 used of 10
  CHECK_EQ(rig.idle_row(3), 2);
  const CacheStats stats = rig.kv->stats();
  CHECK_EQ(stats.mapped_bytes, 18 * rig.page);
  CHECK_EQ(stats.reclaimable_bytes, (7 + 3) * rig.page);
  check_out_of_pages([&] { rig.step({5 + 13, 3, 0, 0}); }, 13, 12);
  rig.step({5 + 12, 3, 0, 0});
  CHECK_EQ(rig.kv->stats().reclaimable_bytes, 0u);
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      over_all_backends(
          {BACKEND_TEST(pages_ahead_of_active_rows_are_taken_before_giving_up),
           BACKEND_TEST(memory_for_this_step_is_not_taken_from_a_row_that_does_not_grow),
           BACKEND_TEST(out_of_pages_counts_what_this_step_leaves_free),
           BACKEND_TEST(pages_ahead_of_the_growing_row_are_not_free),
           BACKEND_TEST(tokens_that_a_row_once_had_are_kept_after_it_shrinks),
           BACKEND_TEST(growing_rows_do_not_hide_the_pages_ahead_of_others),
           BACKEND_TEST(reclaimable_is_what_a_step_can_be_given_besides_the_free_pages)}),
      argc > 1 ? argv[1] : nullptr);
}
