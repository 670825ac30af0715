// Tokens of earlier requests that are kept to be found again.
#include "base/errors.h"
#include "double_control.h"
#include "row_contents.h"

using namespace vattn;
using namespace vattn::test;

namespace {

RigOptions four_in_a_page(size_t budget_pages = 64) {
  RigOptions options;
  options.rows = 4;
  options.tokens_per_page = 4;
  options.budget_pages = budget_pages;
  return options;
}

size_t intact(const Rig& rig, int64_t row) {
  return rig.kv->kept_prefixes()[static_cast<size_t>(row)].tokens;
}

uint64_t life(const Rig& rig, int64_t row) {
  return rig.kv->kept_prefixes()[static_cast<size_t>(row)].life;
}

// An idle row that keeps the first `kept` of its tokens. Its life.
uint64_t idle_row(Rig& rig, RowContents& rows, int64_t row, int64_t tokens, int64_t kept) {
  CHECK_EQ(rows.start(tokens), row);
  const uint64_t now = rig.kv->keep_prefix(row, kept);
  rows.free(row);
  CHECK(rig.state(row) == RowState::kIdle);
  return now;
}

void what_is_kept_is_adopted_without_a_call(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    const uint64_t now = idle_row(rig, rows, 0, 22, 17);
    CHECK_EQ(intact(rig, 0), 17u);
    const size_t before = rig.ledger->now().calls;
    CHECK(rows.adopt(0, now, 17));
    CHECK_EQ(rig.ledger->now().calls, before);
    CHECK_EQ(life(rig, 0), now);
    CHECK_EQ(intact(rig, 0), 17u);
    rows.check();
    rows.step(0, 30);
    rows.check();
    rig.end();
  }
}

void another_stream_waits_for_the_row_it_reads(const Backend& backend) {
  for (const bool adopts : {true, false}) {
    Rig rig(backend, four_in_a_page());
    rig.start({10, 3});
    const uint64_t now = rig.kv->keep_prefix(0, 10);
    rig.free_while_busy(0, 2, kStreamA);
    CHECK(adopts ? rig.kv->adopt_prefix(0, now, 10, kStreamB)
                 : rig.kv->fork_prefix(0, now, 10, kStreamB).has_value());
    CHECK_EQ(rig.ledger->now().stream_waits, 1u);
    CHECK(DOUBLE(stream_busy)(static_cast<uintptr_t>(kStreamB)) != 0);
    set_busy(kStreamA, false);
    rig.end();
  }
}

void what_is_not_kept_is_not_adopted(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  const uint64_t now = idle_row(rig, rows, 0, 22, 17);
  CHECK(!rows.adopt(0, now, 18));
  CHECK(!rows.adopt(0, now + 1, 17));
  CHECK(!rows.adopt(0, 0, 0));
  CHECK(!rows.adopt(0, now, -1));
  CHECK(rig.state(0) == RowState::kIdle);
  CHECK(rows.adopt(0, now, 17));
  CHECK(!rows.adopt(0, now, 17));
  rows.check();
  rig.end();
}

void a_part_of_what_is_kept_is_adopted_alone(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  const uint64_t now = idle_row(rig, rows, 0, 22, 17);
  CHECK(rows.adopt(0, now, 9));
  CHECK_EQ(intact(rig, 0), 9u);
  rows.step(0, 20);
  rows.check();
  rig.end();
}

// It could not be continued where it is.
void a_row_that_shares_what_comes_next_is_not_adopted(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(22);
  const int64_t child = rows.fork(0);
  const uint64_t now = rig.kv->keep_prefix(0, 10);
  rows.free(0);
  CHECK(rig.state(0) == RowState::kIdle);
  CHECK(!rows.adopt(0, now, 10));
  rows.free(child);
  CHECK(eventually([&] { return rig.state(child) == RowState::kFree; }));
  CHECK(rows.adopt(0, now, 10));
  rows.check();
  rig.end();
}

void a_row_that_shares_only_what_is_kept_is_adopted(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(22);
  const int64_t child = rows.fork(0, 10);
  const uint64_t now = rig.kv->keep_prefix(0, 11);
  rows.free(0);
  CHECK(rows.adopt(0, now, 11));
  rows.step(0, 14);
  rows.step(child, 14);
  rows.check();
  rig.end();
}

void what_is_overwritten_is_not_kept(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(20);
  const uint64_t now = rig.kv->keep_prefix(0, 18);
  rows.step(0, 19);
  CHECK_EQ(intact(rig, 0), 18u);
  rows.truncate(0, 15);
  rows.step(0, 20);
  CHECK_EQ(intact(rig, 0), 15u);
  rows.step(0, 12);
  rows.step(0, 20);
  CHECK_EQ(intact(rig, 0), 12u);
  rows.compact(0, {9, 12});
  CHECK_EQ(intact(rig, 0), 0u);
  CHECK_EQ(life(rig, 0), 0u);
  CHECK(rig.kv->keep_prefix(0, 2) != now);
  rows.compact(0, {0});
  CHECK_EQ(intact(rig, 0), 1u);
  rig.end();
}

void other_tokens_are_another_life(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  std::vector<uint64_t> lives = {idle_row(rig, rows, 0, 8, 8)};
  rig.kv->forget_prefix(0, lives[0]);
  lives.push_back(idle_row(rig, rows, 0, 8, 8));
  CHECK(rows.adopt(0, lives[1], 8));
  rows.start(5);
  rows.reorder({0}, {1});
  CHECK_EQ(life(rig, 0), 0u);
  lives.push_back(rig.kv->keep_prefix(0, 5));
  const int64_t child = rows.fork(0);
  CHECK_EQ(life(rig, child), 0u);
  lives.push_back(rig.kv->keep_prefix(child, 5));
  for (size_t i = 0; i < lives.size(); ++i) {
    CHECK(lives[i] != 0);
    for (size_t j = 0; j < i; ++j) CHECK(lives[i] != lives[j]);
  }
  rig.end();
}

void new_requests_take_what_is_kept_last_and_the_oldest_of_it_first(const Backend& backend) {
  RigOptions options = four_in_a_page();
  options.rows = 5;
  Rig rig(backend, options);
  RowContents rows(rig);
  for (const int64_t length : {8, 20, 16, 8}) rows.start(length);
  for (const int64_t row : {2, 1, 0}) rig.kv->keep_prefix(row, 8);
  for (const int64_t row : {1, 2, 0, 3}) rows.free(row);
  rig.kv->forget_prefix(0, life(rig, 0));
  CHECK_EQ(rows.start(8), 0);
  CHECK_EQ(rows.start(8), 3);
  CHECK_EQ(rows.start(16), 4);
  CHECK_EQ(intact(rig, 1), 8u);
  CHECK_EQ(rows.start(16), 1);
  CHECK_EQ(rows.start(16), 2);
  CHECK_EQ(life(rig, 1), 0u);
  rows.check();
  rig.end();
}

void memory_is_taken_from_the_end_of_the_oldest_row(const Backend& backend) {
  Rig rig(backend, four_in_a_page(11));
  RowContents rows(rig);
  rows.start(4);
  const uint64_t old = idle_row(rig, rows, 1, 20, 18);
  rows.start(4);
  rows.step(2, 20);
  const uint64_t young = rig.kv->keep_prefix(2, 20);
  rows.free(2);
  rows.step(0, 5);
  CHECK_EQ(intact(rig, 1), 16u);
  rows.step(0, 16);
  CHECK_EQ(intact(rig, 1), 8u);
  CHECK_EQ(intact(rig, 2), 20u);
  const auto [child, length] = rows.fork_prefix(1, old, 8);
  CHECK_EQ(length, 8);
  rows.check();
  rows.free(child);
  CHECK(eventually([&] { return rig.state(child) == RowState::kFree; }));
  rows.step(0, 28);
  CHECK_EQ(life(rig, 1), 0u);
  CHECK_EQ(intact(rig, 2), 16u);
  CHECK(rows.adopt(2, young, 16));
  rows.check();
  rig.end();
}

// A page that two idle rows have comes free when both lose it: first all of the older row.
void shared_pages_are_taken_from_all_that_have_them(const Backend& backend) {
  Rig rig(backend, four_in_a_page(6));
  RowContents rows(rig);
  rows.start(16);
  const int64_t child = rows.fork(0);
  rig.kv->keep_prefix(0, 16);
  rig.kv->keep_prefix(child, 16);
  CHECK_EQ(rows.start(1), 2);
  rows.free(0);
  rows.free(child);
  CHECK_EQ(rig.kv->stats().reclaimable_bytes, 4 * rig.page);
  rows.step(2, 12);
  CHECK_EQ(intact(rig, 0), 0u);
  CHECK_EQ(intact(rig, child), 12u);
  rows.step(2, 24);
  CHECK_EQ(rig.mapped(0), 0u);
  rows.check();
  rig.end();
}

void forgotten_rows_are_like_others(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  const uint64_t now = idle_row(rig, rows, 0, 10, 10);
  rig.kv->forget_prefix(0, now + 1);
  CHECK_EQ(intact(rig, 0), 10u);
  const auto [child, length] = rows.fork_prefix(0, now, 10);
  CHECK_EQ(length, 10);
  rig.kv->forget_prefix(0, now);
  CHECK_EQ(life(rig, 0), 0u);
  CHECK(eventually([&] { return rig.state(0) == RowState::kFree; }));
  rig.kv->forget_prefix(0, now);
  rows.check();
  rig.kv->forget_prefix(child, rig.kv->keep_prefix(child, 4));
  CHECK_EQ(life(rig, child), 0u);
  rig.end();
}

// The rest of a page: at most one is copied. Of an extent of 8 pages that is the first.
void a_shorter_prefix_copies_at_most_a_page(const Backend& backend) {
  for (const size_t extent_pages : {1, 8}) {
    RigOptions options = four_in_a_page();
    options.rows = 6;
    options.max_extent_pages = extent_pages;
    Rig rig(backend, options);
    RowContents rows(rig);
    const uint64_t now = idle_row(rig, rows, 0, 34, 34);
    const std::vector<std::pair<int64_t, int64_t>> asked_and_got = {
        {34, 34}, {32, 32}, {22, extent_pages == 8 ? 4 : 22}, {3, 3}};
    for (const auto& [asked, got] : asked_and_got) {
      const size_t before = rig.ledger->now().copied_bytes;
      CHECK_EQ(rows.fork_prefix(0, now, asked).second, got);
      const size_t copied = rig.ledger->now().copied_bytes - before;
      CHECK(copied <= rig.page);
      if (asked == 32) CHECK_EQ(copied, 0u);
    }
    rows.check();
    rig.end();
  }
}

void without_a_page_only_whole_pages_are_shared(const Backend& backend) {
  Rig rig(backend, four_in_a_page(6));
  RowContents rows(rig);
  const uint64_t now = idle_row(rig, rows, 0, 22, 22);
  const auto [child, length] = rows.fork_prefix(0, now, 22);
  CHECK_EQ(length, 20);
  CHECK_EQ(intact(rig, 0), 22u);
  rows.check();
  rig.end();
}

void without_a_page_less_than_a_page_is_not_shared(const Backend& backend) {
  Rig rig(backend, four_in_a_page(1));
  RowContents rows(rig);
  const uint64_t now = idle_row(rig, rows, 0, 3, 3);
  CHECK_EQ(rows.fork_prefix(0, now, 3).first, -1);
  CHECK(rows.adopt(0, now, 3));
  rows.check();
  rig.end();
}

// What lies beyond may go.
void what_is_forked_is_not_taken_meanwhile(const Backend& backend) {
  Rig rig(backend, four_in_a_page(6));
  RowContents rows(rig);
  const uint64_t now = idle_row(rig, rows, 0, 22, 22);
  const auto [child, length] = rows.fork_prefix(0, now, 18);
  CHECK_EQ(length, 18);
  CHECK_EQ(intact(rig, 0), 20u);
  rows.check();
  rig.end();
}

void an_active_row_can_be_forked_too(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(22);
  const uint64_t now = rig.kv->keep_prefix(0, 14);
  const auto [child, length] = rows.fork_prefix(0, now, 13);
  CHECK_EQ(length, 13);
  CHECK(rig.state(child) == RowState::kActive);
  rows.step(0, 30);
  rows.step(child, 30);
  rows.check();
  CHECK_EQ(rows.fork_prefix(0, now, 15).first, -1);
  CHECK_EQ(rows.fork_prefix(0, now + 1, 5).first, -1);
  CHECK_EQ(rows.fork_prefix(0, now, 0).first, -1);
  rig.end();
}

// The row that is forked is not one to take.
void a_fork_needs_another_row(const Backend& backend) {
  RigOptions options = four_in_a_page();
  options.rows = 2;
  Rig rig(backend, options);
  RowContents rows(rig);
  const uint64_t now = idle_row(rig, rows, 0, 10, 10);
  CHECK_EQ(rows.start(60), 1);
  CHECK_THROWS(OutOfRows, rows.fork_prefix(0, now, 10), "1 rows wanted, but only 0 of 2");
  CHECK_EQ(intact(rig, 0), 10u);
  rows.free(1);
  CHECK_EQ(rows.fork_prefix(0, now, 10).first, 1);
  rows.check();
  rig.end();
}

void what_cannot_be_kept_is_refused(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  rig.start({10});
  const auto refused = [&](int64_t row, int64_t tokens, const char* text) {
    CHECK_THROWS(std::invalid_argument, rig.kv->keep_prefix(row, tokens), text);
  };
  refused(0, 11, "a prefix of 11 tokens, but row 0 has 10");
  refused(0, 0, "a prefix of 0 tokens");
  refused(1, 1, "row 1 is free, not active");
  refused(4, 1, "row 4 is not in 0..3");
  CHECK_EQ(intact(rig, 0), 0u);
  rig.end();
}

// The copy still reads the row when the row's own last work is long done.
void a_source_is_not_unmapped_while_it_is_copied(const Backend& backend) {
  Rig rig(backend, four_in_a_page(6));
  RowContents rows(rig, kStreamA);
  CHECK_EQ(rows.start(10), 0);
  CHECK_EQ(rows.start(4), 1);
  const uint64_t now = rig.kv->keep_prefix(0, 10);
  rows.free(0);
  set_busy(kStreamB, true);
  CHECK(rig.kv->fork_prefix(0, now, 10, kStreamB).has_value());
  CHECK(waits_for(kStreamB, "cuEventSynchronize", [&] { rig.kv->step_rows({{1, 12}}); }));
  CHECK_EQ(rig.mapped(0), 8u);
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = over_all_backends(
      {BACKEND_TEST(what_is_kept_is_adopted_without_a_call),
       BACKEND_TEST(what_is_not_kept_is_not_adopted),
       BACKEND_TEST(a_part_of_what_is_kept_is_adopted_alone),
       BACKEND_TEST(a_row_that_shares_what_comes_next_is_not_adopted),
       BACKEND_TEST(a_row_that_shares_only_what_is_kept_is_adopted),
       BACKEND_TEST(what_is_overwritten_is_not_kept), BACKEND_TEST(other_tokens_are_another_life),
       BACKEND_TEST(new_requests_take_what_is_kept_last_and_the_oldest_of_it_first),
       BACKEND_TEST(memory_is_taken_from_the_end_of_the_oldest_row),
       BACKEND_TEST(shared_pages_are_taken_from_all_that_have_them),
       BACKEND_TEST(forgotten_rows_are_like_others),
       BACKEND_TEST(a_shorter_prefix_copies_at_most_a_page),
       BACKEND_TEST(without_a_page_only_whole_pages_are_shared),
       BACKEND_TEST(without_a_page_less_than_a_page_is_not_shared),
       BACKEND_TEST(what_is_forked_is_not_taken_meanwhile),
       BACKEND_TEST(an_active_row_can_be_forked_too), BACKEND_TEST(a_fork_needs_another_row),
       BACKEND_TEST(what_cannot_be_kept_is_refused)});
  for (const Test& test : over_cuda({BACKEND_TEST(another_stream_waits_for_the_row_it_reads),

                                     BACKEND_TEST(a_source_is_not_unmapped_while_it_is_copied)})) {
    tests.push_back(test);
  }
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
