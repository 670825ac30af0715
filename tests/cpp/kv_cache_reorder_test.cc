// A step of a beam search: rows get the tokens of other rows, all at once.
#include "base/errors.h"
#include "double_control.h"
#include "row_contents.h"

using namespace vattn;
using namespace vattn::test;

namespace {

RigOptions four_in_a_page() {
  RigOptions options;
  options.rows = 6;
  options.tokens_per_page = 4;
  return options;
}

void rows_that_keep_their_parent_make_no_call(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(10);
  rows.start(5);
  const size_t before = rig.ledger->now().calls;
  rows.reorder({0, 1}, {0, 1});
  rows.reorder({1}, {1});
  rows.reorder({}, {});
  CHECK_EQ(rig.ledger->now().calls, before);
  rows.check();
  rig.end();
}

void two_rows_change_places(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    rows.start(22);
    rows.start(5);
    const size_t pages = rig.pages_taken();
    rows.reorder({0, 1}, {1, 0});
    CHECK_EQ(rig.pages_taken(), pages);
    CHECK_EQ(rows.length(1), 22);
    rows.check();
    rows.step(0, 25);
    rows.step(1, 25);
    rows.check();
    rig.end();
  }
}

void all_rows_get_one_parent(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    for (const int64_t length : {10, 9, 21, 1}) rows.start(length);
    rows.reorder({0, 1, 2, 3}, {1, 1, 1, 1});
    for (int64_t row = 0; row < 4; ++row) CHECK_EQ(rows.length(row), 9);
    rows.check();
    for (int64_t row = 0; row < 4; ++row) rows.step(row, 20 - row);
    rows.check();
    rig.end();
  }
}

void a_chain_moves_by_one(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    for (const int64_t length : {10, 0, 21, 8}) rows.start(length);
    rows.reorder({1, 2, 3}, {0, 1, 2});
    rows.check();
    rows.reorder({0, 1, 2, 3}, {3, 0, 1, 2});
    rows.check();
    for (int64_t row = 0; row < 4; ++row) rows.step(row, 23);
    rows.check();
    rig.end();
  }
}

void the_parents_of_a_round_may_be_children_of_the_last(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    const int64_t prompt = rows.start(13);
    const std::vector<int64_t> beams = rows.fork_n(prompt, std::nullopt, 3);
    rows.free(prompt);
    for (int64_t length = 14; length < 40; ++length) {
      for (const int64_t beam : beams) rows.step(beam, length);
      const auto at = static_cast<size_t>(length % 3);
      rows.reorder(beams, {beams[at], beams[at], beams[(at + 1) % 3]});
      rows.check();
    }
    rig.end();
  }
}

// Of beams with one prompt, a step costs the page that each has for itself.
void what_is_shared_stays_mapped(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig, kStreamA);
  rows.start(22);
  CHECK_EQ(rows.fork(0), 1);
  rows.step(0, 23);
  rows.step(1, 23);
  // Unmapping it now would be a breach.
  set_busy(kStreamB, true);
  for (const int64_t row : {0, 1}) {
    const auto start = reinterpret_cast<uintptr_t>(rig.token(row, 0));
    DOUBLE(use_range)(static_cast<uintptr_t>(kStreamB), start, 5 * rig.page);
  }
  const LedgerCounts before = rig.ledger->now();
  rows.reorder({0, 1}, {1, 0});
  const LedgerCounts after = rig.ledger->now();
  CHECK_EQ((after.copied_bytes - before.copied_bytes) / (rig.page / 4), 2u * 3);
  CHECK_EQ(after.mapped_bytes, before.mapped_bytes);
  set_busy(kStreamB, false);
  rows.check();
  rig.end();
}

void what_is_replaced_is_unmapped_when_the_stream_is_done(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig, kStreamA);
  rows.start(10);
  rows.start(9);
  set_busy(kStreamA, true);
  for (const int64_t row : {0, 1}) {
    const auto start = reinterpret_cast<uintptr_t>(rig.token(row, 0));
    DOUBLE(use_range)(static_cast<uintptr_t>(kStreamA), start, 3 * rig.page);
  }
  CHECK(waits_for(kStreamA, "cuEventSynchronize", [&] { rows.reorder({0, 1}, {1, 0}); }));
  rows.check();
  rig.end();
}

void a_page_that_becomes_a_rows_own_is_unmapped_when_its_stream_is_done(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig, kStreamA);
  rows.start(24);
  const int64_t child = rows.fork(0);
  rows.truncate(child, 10);
  set_busy(kStreamA, true);
  const auto start = reinterpret_cast<uintptr_t>(rig.token(child, 0));
  DOUBLE(use_range)(static_cast<uintptr_t>(kStreamA), start, 6 * rig.page);
  CHECK(waits_for(kStreamA, "cuEventSynchronize", [&] { rows.step(child, 11); }));
  rows.check();
  rig.end();
}

void a_fork_waits_for_nothing(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig, kStreamA);
  rows.start(22);
  set_busy(kStreamA, true);
  const int64_t child = rows.fork(0);
  CHECK_EQ(DOUBLE(calls)("cuEventSynchronize"), 0u);
  set_busy(kStreamA, false);
  rows.step(child, 30);
  rows.check();
  rig.end();
}

void an_order_that_cannot_be_changes_nothing(const Backend& backend) {
  RigOptions options = four_in_a_page();
  options.budget_pages = 8;
  Rig rig(backend, options);
  RowContents rows(rig);
  rows.start(11);
  rows.start(3);
  rows.start(9);
  const auto refused = [&](const std::vector<int64_t>& to, const std::vector<int64_t>& from,
                           const char* text) {
    CHECK_THROWS(std::invalid_argument, rig.kv->reorder(to, from, {}), text);
    rows.check();
  };
  refused({0, 1}, {1}, "rows has 2 entries and parents 1");
  refused({0, 0}, {1, 2}, "row 0 is in rows twice");
  refused({0}, {4}, "row 4 is free, not active");
  refused({4}, {0}, "row 4 is free, not active");
  refused({6}, {0}, "row 6 is not in 0..5");
  check_out_of_pages([&] { rows.reorder({0, 1, 2}, {1, 0, 0}); }, 3, 1);
  CHECK_EQ(rig.pages_taken(), 7u);
  rows.check();
  rows.reorder({1}, {0});
  rows.check();
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = over_all_backends(
      {BACKEND_TEST(rows_that_keep_their_parent_make_no_call), BACKEND_TEST(two_rows_change_places),
       BACKEND_TEST(all_rows_get_one_parent), BACKEND_TEST(a_chain_moves_by_one),
       BACKEND_TEST(the_parents_of_a_round_may_be_children_of_the_last),
       BACKEND_TEST(an_order_that_cannot_be_changes_nothing)});
  for (const Test& test :
       over_cuda({BACKEND_TEST(what_is_shared_stays_mapped),
                  BACKEND_TEST(what_is_replaced_is_unmapped_when_the_stream_is_done),
                  BACKEND_TEST(a_page_that_becomes_a_rows_own_is_unmapped_when_its_stream_is_done),
                  BACKEND_TEST(a_fork_waits_for_nothing)})) {
    tests.push_back(test);
  }
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
