// With Scrub::kOnReuse no byte of a request is there for the next one; without, some are, so that
// these tests could fail.
#include <cstring>

#include "base/errors.h"
#include "double_control.h"
#include "row_contents.h"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr int kOld = 0xee;

RigOptions scrubbed(Scrub scrub, size_t budget_pages = 64) {
  RigOptions options = ways_to_lay_out(budget_pages).front();
  options.scrub = scrub;
  return options;
}

unsigned char* region_start(const Rig& rig, int64_t row, const Region& r) {
  return reinterpret_cast<unsigned char*>(rig.kv->base() + r.offset +
                                          static_cast<size_t>(row) * r.row_stride);
}

// Bytes of a region that a row of so many tokens may touch: to the end of the last page.
size_t touched_bytes(const Rig& rig, const Region& r, size_t tokens) {
  const size_t bytes = tokens == 0 ? 0 : r.lead_bytes + tokens * r.token_bytes;
  const size_t pages = (bytes + rig.page - 1) / rig.page * rig.page;
  return r.has_window() ? std::min(pages, r.head_bytes + r.ring_bytes) : pages;
}

void soil(const Rig& rig, int64_t row, size_t tokens) {
  for (const Region& r : rig.kv->layout().regions) {
    std::memset(region_start(rig, row, r), kOld, touched_bytes(rig, r, tokens));
  }
}

// Whether a byte of the row is not zero, from token `first` to the end of the page of the last.
bool sees_something(const Rig& rig, int64_t row, size_t first, size_t tokens) {
  for (const Region& r : rig.kv->layout().regions) {
    const unsigned char* const start = region_start(rig, row, r);
    const size_t from = first == 0 ? 0 : r.offset_of(first);
    const size_t end = touched_bytes(rig, r, tokens);
    CHECK(from < end);
    if (start[from] != 0 || std::memcmp(start + from, start + from + 1, end - from - 1) != 0) {
      return true;
    }
  }
  return false;
}

// A row that ended with every byte of its memory written.
int64_t old_request(Rig& rig, int64_t tokens) {
  const int64_t row = rig.alloc(tokens);
  rig.kv->step_rows({{row, tokens}});
  soil(rig, row, static_cast<size_t>(tokens));
  return row;
}

// Each returns whether a row sees what another has written.
using Look = bool (*)(const Backend&, RigOptions);

void only_without_scrubbing(const Backend& backend, Look look, RigOptions options) {
  options.scrub = Scrub::kOnReuse;
  CHECK(!look(backend, options));
  options.scrub = Scrub::kNever;
  CHECK(look(backend, options));
}

bool adopted_row_sees_something(const Backend& backend, RigOptions options) {
  Rig rig(backend, options);
  const int64_t row = old_request(rig, 30);
  rig.free(row);
  CHECK_EQ(rig.alloc(2), row);
  const bool sees = sees_something(rig, row, 0, 30);
  rig.kv->step_rows({{row, 30}});
  CHECK_EQ(sees_something(rig, row, 0, 30), sees);
  rig.end();
  return sees;
}

void the_memory_of_an_adopted_row_is_zero(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    only_without_scrubbing(backend, adopted_row_sees_something, options);
  }
}

void the_memory_of_an_adopted_ring_is_zero(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out_windows()) {
    only_without_scrubbing(backend, adopted_row_sees_something, options);
  }
}

// All the memory there is was the old request's.
bool growing_row_sees_something(const Backend& backend, RigOptions options) {
  Rig rig(backend, options);
  const int64_t other = rig.alloc();
  const int64_t row = old_request(rig, 30);
  options.budget_pages = rig.pages_taken();
  rig.end();

  Rig short_of_memory(backend, options);
  CHECK_EQ(short_of_memory.alloc(), other);
  CHECK_EQ(old_request(short_of_memory, 30), row);
  short_of_memory.free(row);
  short_of_memory.kv->step_rows({{other, 30}});
  const bool sees = sees_something(short_of_memory, other, 0, 30);
  short_of_memory.end();
  return sees;
}

void reclaimed_pages_are_zero(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    only_without_scrubbing(backend, growing_row_sees_something, options);
  }
  for (const RigOptions& options : ways_to_lay_out_windows()) {
    only_without_scrubbing(backend, growing_row_sees_something, options);
  }
}

// Of 4 rows the last is free no more: the pages of the old request are the pool's.
bool forked_row_sees_something(const Backend& backend, RigOptions options) {
  options.rows = 2;
  Rig rig(backend, options);
  const int64_t parent = rig.alloc();
  const int64_t row = old_request(rig, 30);
  rig.kv->step_rows({{parent, 10}});
  soil(rig, parent, 10);
  rig.free(row);
  CHECK_EQ(static_cast<int64_t>(rig.kv->fork(parent, 9, 1, Stream{}).front()), row);
  CHECK(sees_something(rig, row, 0, 9));
  const bool sees = sees_something(rig, row, 9, 9);
  rig.end();
  return sees;
}

void what_a_fork_has_beyond_its_tokens_is_zero(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    only_without_scrubbing(backend, forked_row_sees_something, options);
  }
}

// The copy of the page is one of the old request's.
bool own_copy_sees_something(const Backend& backend, RigOptions options) {
  options.rows = 3;
  Rig rig(backend, options);
  const int64_t parent = rig.alloc();
  rig.kv->step_rows({{parent, 16}});
  const auto child = static_cast<int64_t>(rig.kv->fork(parent, 16, 1, Stream{}).front());
  const int64_t row = old_request(rig, 12);
  soil(rig, parent, 16);
  rig.free(row);
  const auto last = static_cast<int64_t>(rig.kv->fork(parent, 16, 1, Stream{}).front());
  CHECK_EQ(last, row);
  rig.kv->truncate(child, 9);
  rig.kv->step_rows({{child, 10}});
  const bool sees = sees_something(rig, child, 9, 10);
  rig.end();
  return sees;
}

void what_a_page_of_its_own_has_beyond_its_tokens_is_zero(const Backend& backend) {
  only_without_scrubbing(backend, own_copy_sees_something, scrubbed(Scrub::kNever));
}

bool reordered_row_sees_something(const Backend& backend, RigOptions options) {
  options.rows = 3;
  Rig rig(backend, options);
  const int64_t a = rig.alloc(), b = rig.alloc();
  const int64_t row = old_request(rig, 30);
  rig.kv->step_rows({{a, 9}, {b, 1}});
  rig.free(row);
  CHECK_EQ(static_cast<int64_t>(rig.kv->fork(a, 0, 1, Stream{}).front()), row);
  rig.kv->reorder({b}, {a}, Stream{});
  const bool sees = sees_something(rig, b, 9, 9);
  rig.end();
  return sees;
}

void what_a_reordered_row_has_beyond_its_tokens_is_zero(const Backend& backend) {
  only_without_scrubbing(backend, reordered_row_sees_something, scrubbed(Scrub::kNever));
}

bool adopted_prefix_sees_something(const Backend& backend, RigOptions options) {
  Rig rig(backend, options);
  const int64_t row = old_request(rig, 30);
  const uint64_t life = rig.kv->keep_prefix(row, 9);
  rig.free(row);
  CHECK(rig.kv->adopt_prefix(row, life, 9, Stream{}));
  for (size_t i = 0; i < 9 * rig.kv->layout().token_bytes; ++i) {
    CHECK_EQ(int{rig.token(row, 0)[i]}, kOld);
  }
  const bool sees = sees_something(rig, row, 9, 30);
  rig.end();
  return sees;
}

void what_lies_beyond_a_kept_prefix_is_zero(const Backend& backend) {
  only_without_scrubbing(backend, adopted_prefix_sees_something, scrubbed(Scrub::kNever));
}

bool forked_prefix_sees_something(const Backend& backend, RigOptions options) {
  options.rows = 3;
  Rig rig(backend, options);
  const int64_t kept = old_request(rig, 12);
  const uint64_t life = rig.kv->keep_prefix(kept, 12);
  rig.free(kept);
  const int64_t row = old_request(rig, 30);
  const int64_t other = rig.alloc();
  rig.kv->step_rows({{other, 1}});
  rig.free(row);
  const auto forked = rig.kv->fork_prefix(kept, life, 9, Stream{});
  CHECK(forked.has_value());
  CHECK_EQ(forked->second, 9u);
  const bool sees = sees_something(rig, static_cast<int64_t>(forked->first), 9, 9);
  rig.end();
  return sees;
}

void what_lies_beyond_a_forked_prefix_is_zero(const Backend& backend) {
  only_without_scrubbing(backend, forked_prefix_sees_something, scrubbed(Scrub::kNever));
}

bool ahead_sees_something(const Backend& backend, RigOptions options) {
  options.lookahead = 8;
  options.budget_pages = 10;
  Rig rig(backend, options);
  const int64_t other = rig.alloc();
  const int64_t row = old_request(rig, 30);
  rig.free(row);
  rig.kv->step_rows({{other, 15}});
  CHECK(rig.kv->wait_background(10'000));
  CHECK(rig.mapped(other) >= 23);
  const bool sees = sees_something(rig, other, 0, 23);
  rig.end();
  return sees;
}

void pages_that_are_mapped_ahead_are_zero(const Backend& backend) {
  only_without_scrubbing(backend, ahead_sees_something, scrubbed(Scrub::kNever));
}

bool new_row_sees_something(const Backend& backend, RigOptions options) {
  DOUBLE(leave_leftovers)(1);
  Rig rig(backend, options);
  rig.start({22});
  const bool sees = sees_something(rig, 0, 0, 22);
  rig.end();
  return sees;
}

// What others had before this process did.
void memory_that_the_driver_does_not_clear_is_zero(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    only_without_scrubbing(backend, new_row_sees_something, options);
  }
  for (const RigOptions& options : ways_to_lay_out_windows()) {
    only_without_scrubbing(backend, new_row_sees_something, options);
  }
}

void memory_that_was_never_used_is_not_cleared_again(const Backend& backend) {
  Rig rig(backend, scrubbed(Scrub::kOnReuse));
  rig.start({22, 10});
  rig.step({30, 11, 0, 0, 0, 0});
  rig.kv->fork(0, 9, 1, Stream{});
  const bool creates_zeroed = !rig.is_cuda;
  CHECK_EQ(rig.ledger->now().clears == 0, creates_zeroed);
  rig.end();
}

void without_scrubbing_nothing_is_cleared(const Backend& backend) {
  Rig rig(backend, scrubbed(Scrub::kNever));
  rig.free(old_request(rig, 30));
  rig.start({30});
  CHECK_EQ(rig.ledger->now().clears, 0u);
  rig.end();
}

// What is being cleared on one stream is not taken from the row meanwhile.
void pages_stay_mapped_while_they_are_cleared(const Backend& backend) {
  Rig rig(backend, scrubbed(Scrub::kOnReuse, /*budget_pages=*/8));
  rig.start({24, 4});
  rig.free(0, kStreamA);
  set_busy(kStreamB, true);
  CHECK_EQ(rig.alloc(0, kStreamB), 0);
  CHECK(waits_for(kStreamB, "cuEventSynchronize", [&] { rig.kv->step_rows({{1, 16}}); }));
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = over_all_backends(
      {BACKEND_TEST(the_memory_of_an_adopted_row_is_zero),
       BACKEND_TEST(the_memory_of_an_adopted_ring_is_zero), BACKEND_TEST(reclaimed_pages_are_zero),
       BACKEND_TEST(what_a_fork_has_beyond_its_tokens_is_zero),
       BACKEND_TEST(what_a_page_of_its_own_has_beyond_its_tokens_is_zero),
       BACKEND_TEST(what_a_reordered_row_has_beyond_its_tokens_is_zero),
       BACKEND_TEST(what_lies_beyond_a_kept_prefix_is_zero),
       BACKEND_TEST(what_lies_beyond_a_forked_prefix_is_zero),
       BACKEND_TEST(pages_that_are_mapped_ahead_are_zero),
       BACKEND_TEST(memory_that_was_never_used_is_not_cleared_again),
       BACKEND_TEST(without_scrubbing_nothing_is_cleared)});
  for (const Test& test : over_cuda({BACKEND_TEST(memory_that_the_driver_does_not_clear_is_zero),
                                     BACKEND_TEST(pages_stay_mapped_while_they_are_cleared)})) {
    tests.push_back(test);
  }
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
