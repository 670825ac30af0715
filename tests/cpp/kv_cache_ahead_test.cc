// What the background thread gives and takes before step() has to: it makes adopted rows fit, and
// finds pages for its work in rows that have some to spare.
#include "base/errors.h"
#include "cache_rig.h"
#include "double_control.h"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr int64_t kSoon = 10'000;  // milliseconds

RigOptions extents_of_16_pages(size_t budget_pages) {
  RigOptions options;
  options.budget_pages = budget_pages;
  options.max_extent_pages = 16;
  options.lookahead = 2;
  return options;
}

void an_adopted_row_loses_extents_that_are_too_large_for_it(const Backend& backend) {
  Rig rig(backend, extents_of_16_pages(32));
  CHECK_EQ(rig.idle_row(16), 0);
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.alloc(5), 0);
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.mapped(0), 5u);
  rig.step({5, 0, 0, 0});
  CHECK_EQ(rig.kv->stats().steps_with_growth, 1u);  // that of the first request
  CHECK(rig.kv->wait_background(kSoon));
  const CacheStats stats = rig.kv->stats();
  CHECK_EQ(stats.mapped_bytes - stats.reclaimable_bytes, 5 * rig.page);
  CHECK_EQ(stats.mapped_bytes, 7 * rig.page);
  rig.kv->check();
  rig.end();
}

// The budget has no room for the two extents: the large one is traded for small ones.
void it_fits_also_when_the_large_extent_was_the_whole_budget(const Backend& backend) {
  Rig rig(backend, extents_of_16_pages(16));
  CHECK_EQ(rig.idle_row(16), 0);
  CHECK_EQ(rig.alloc(3), 0);
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.mapped(0), 3u);
  CHECK_EQ(rig.alloc(13), 1);
  rig.step({3, 13, 0, 0});
  rig.kv->check();
  rig.end();
}

// The prefetch of a longer request was cut short: only some regions have its large extents.
void a_row_that_is_mapped_in_part_is_made_to_fit(const Backend& backend) {
  RigOptions options = extents_of_16_pages(20);
  options.kind = LayoutKind::kPerLayer;
  options.layers = 2;  // 4 regions: 5 tokens, or 8 in two of them
  Rig rig(backend, options);
  CHECK_EQ(rig.alloc(8), 0);
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.pages_mapped(), 16u);
  rig.free(0);
  CHECK_EQ(rig.alloc(5), 0);
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.mapped(0), 5u);
  rig.step({5, 0, 0, 0});
  CHECK_EQ(rig.kv->stats().steps_with_growth, 0u);
  rig.kv->check();
  rig.end();
}

void a_first_step_that_is_short_makes_its_row_fit(const Backend& backend) {
  RigOptions options = extents_of_16_pages(20);
  options.lookahead = 0;  // nobody else does
  Rig rig(backend, options);
  CHECK_EQ(rig.idle_row(16), 0);
  CHECK_EQ(rig.alloc(3), 0);
  CHECK_EQ(rig.alloc(0), 1);
  rig.step({3, 17, 0, 0});
  CHECK_EQ(rig.mapped(0), 3u);
  CHECK_EQ(rig.mapped(1), 17u);
  check_out_of_pages([&] { rig.step({4, 17, 0, 0}); }, 1, 0);
  rig.kv->check();
  rig.end();
}

void a_short_step_leaves_rows_with_tokens_as_they_are(const Backend& backend) {
  RigOptions options = extents_of_16_pages(20);
  options.lookahead = 0;
  Rig rig(backend, options);
  CHECK_EQ(rig.idle_row(16), 0);
  CHECK_EQ(rig.alloc(3), 0);
  rig.step({3, 0, 0, 0});
  CHECK_EQ(rig.alloc(0), 1);
  check_out_of_pages([&] { rig.step({3, 10, 0, 0}); }, 10, 4);
  CHECK_EQ(rig.mapped(0), 16u);
  rig.kv->check();
  rig.end();
}

void a_row_whose_extents_fit_is_adopted_without_a_call(const Backend& backend) {
  Rig rig(backend, extents_of_16_pages(32));
  CHECK_EQ(rig.idle_row(24), 0);  // 16 and 8
  CHECK(rig.kv->wait_background(kSoon));
  for (const int64_t tokens : {24, 16}) {
    const LedgerCounts before = rig.ledger->now();
    CHECK_EQ(rig.alloc(tokens), 0);
    CHECK(rig.kv->wait_background(kSoon));
    CHECK_EQ(rig.ledger->now().maps, before.maps);
    CHECK_EQ(rig.ledger->now().unmaps, before.unmaps);
    CHECK_EQ(rig.mapped(0), 24u);
    rig.free(0);
  }
  rig.end();
}

void prefetch_takes_pages_of_the_oldest_idle_row_and_no_more_than_it_needs(const Backend& backend) {
  RigOptions options;
  options.budget_pages = 12;
  options.lookahead = 2;
  Rig rig(backend, options);
  for (const int64_t row : {0, 1, 2}) CHECK_EQ(rig.alloc(), row);
  rig.step({4, 4, 1, 0});
  CHECK(rig.kv->wait_background(kSoon));
  rig.step({4, 4, 2, 0});  // 4 + 2, 4 + 2 and no page left for the row 2
  for (const int64_t row : {1, 0}) rig.free(row);
  rig.step({0, 0, 4, 0});
  CHECK(rig.kv->wait_background(kSoon));
  const uint64_t grown = rig.kv->stats().steps_with_growth;
  for (int64_t tokens = 5; tokens <= 9; ++tokens) {
    rig.step({0, 0, tokens, 0});
    CHECK(rig.kv->wait_background(kSoon));
    CHECK_EQ(rig.mapped(2), static_cast<size_t>(tokens) + 2);
  }
  CHECK_EQ(rig.kv->stats().steps_with_growth, grown);
  CHECK_EQ(rig.mapped(0), 1u);  // was freed last: row 1 gave all that it had first
  CHECK_EQ(rig.mapped(1), 0u);
  rig.kv->check();
  rig.end();
}

// What a row has left over from the request before it, not what it is about to need.
void prefetch_takes_pages_far_ahead_of_active_rows(const Backend& backend) {
  RigOptions options;
  options.budget_pages = 12;
  options.lookahead = 2;
  Rig rig(backend, options);
  CHECK_EQ(rig.idle_row(8), 0);
  CHECK_EQ(rig.alloc(4), 0);
  CHECK_EQ(rig.alloc(1), 1);
  rig.step({1, 1, 0, 0});
  CHECK(rig.kv->wait_background(kSoon));
  const uint64_t grown = rig.kv->stats().steps_with_growth;
  for (int64_t tokens = 2; tokens <= 6; ++tokens) {
    rig.step({1, tokens, 0, 0});
    CHECK(rig.kv->wait_background(kSoon));
    CHECK_EQ(rig.mapped(1), static_cast<size_t>(tokens) + 2);
  }
  CHECK_EQ(rig.kv->stats().steps_with_growth, grown);
  CHECK_EQ(rig.mapped(0), 4u);  // what alloc() was told to expect
  rig.step({1, 7, 0, 0});
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.mapped(0), 4u);
  CHECK_EQ(rig.mapped(1), 8u);
  rig.kv->check();
  rig.end();
}

void prefetch_takes_from_every_region_of_an_idle_row(const Backend& backend) {
  RigOptions options;
  options.kind = LayoutKind::kPerLayer;
  options.layers = 2;
  options.budget_pages = 32;  // 4 regions: 8 tokens
  options.lookahead = 1;
  Rig rig(backend, options);
  CHECK_EQ(rig.idle_row(6), 0);
  CHECK_EQ(rig.alloc(), 0);
  CHECK_EQ(rig.alloc(3), 1);  // 12 pages, and 8 are left
  CHECK(rig.kv->wait_background(kSoon));
  rig.free(0);
  rig.step({0, 1, 0, 0});
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.mapped(1), 3u);
  CHECK_EQ(rig.mapped(0), 5u);
  rig.kv->check();
  rig.end();
}

// On CUDA only from here: the double calls it a breach to unmap what the device still uses.
void rows_that_the_device_still_uses_are_left_alone(const Backend& backend) {
  Rig rig(backend, extents_of_16_pages(16));
  const int64_t row = rig.alloc(0, kStreamA);
  rig.step({16, 0, 0, 0});
  rig.free_while_busy(row, 16, kStreamA);
  CHECK_EQ(rig.alloc(3, kStreamA), row);
  const int64_t other = rig.alloc(1, kStreamB);
  CHECK_EQ(other, 1);
  CHECK(!rig.kv->wait_background(50));  // it waits for the device
  CHECK_EQ(rig.mapped(row), 16u);
  set_busy(kStreamA, false);
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.mapped(row), 3u);
  rig.kv->check();
  rig.end();
}

// It was used before the device was done with the request before: now it is too late.
void a_row_that_has_tokens_keeps_its_extents(const Backend& backend) {
  Rig rig(backend, extents_of_16_pages(16));
  CHECK_EQ(rig.alloc(0, kStreamA), 0);
  rig.step({16, 0, 0, 0});
  rig.free_while_busy(0, 16, kStreamA);
  CHECK_EQ(rig.alloc(3, kStreamA), 0);
  rig.step({3, 0, 0, 0});
  set_busy(kStreamA, false);
  CHECK(rig.kv->wait_background(kSoon));
  CHECK_EQ(rig.mapped(0), 16u);
  rig.kv->check();
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = over_all_backends(
      {BACKEND_TEST(an_adopted_row_loses_extents_that_are_too_large_for_it),
       BACKEND_TEST(it_fits_also_when_the_large_extent_was_the_whole_budget),
       BACKEND_TEST(a_row_that_is_mapped_in_part_is_made_to_fit),
       BACKEND_TEST(a_first_step_that_is_short_makes_its_row_fit),
       BACKEND_TEST(a_short_step_leaves_rows_with_tokens_as_they_are),
       BACKEND_TEST(a_row_whose_extents_fit_is_adopted_without_a_call),
       BACKEND_TEST(prefetch_takes_pages_of_the_oldest_idle_row_and_no_more_than_it_needs),
       BACKEND_TEST(prefetch_takes_pages_far_ahead_of_active_rows),
       BACKEND_TEST(prefetch_takes_from_every_region_of_an_idle_row)});
  for (const Test& test : over_cuda({BACKEND_TEST(rows_that_the_device_still_uses_are_left_alone),
                                     BACKEND_TEST(a_row_that_has_tokens_keeps_its_extents)})) {
    tests.push_back(test);
  }
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
