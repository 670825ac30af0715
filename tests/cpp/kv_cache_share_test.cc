// Rows that read tokens of other rows: what they cost, and that nobody writes what another reads.
#include "base/errors.h"
#include "row_contents.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// Four tokens in a page; rows of one region.
RigOptions four_in_a_page() {
  RigOptions options;
  options.rows = 6;
  options.tokens_per_page = 4;
  return options;
}

size_t calls(const Rig& rig) {
  return rig.ledger->now().calls;
}

size_t copied_tokens(const Rig& rig) {
  const size_t token_bytes = rig.kv->layout().token_bytes;
  CHECK_EQ(rig.ledger->now().copied_bytes % token_bytes, 0u);
  return rig.ledger->now().copied_bytes / token_bytes;
}

void a_fork_reads_what_its_parent_had(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    for (const int64_t length : {0, 1, 4, 7, 8, 22}) {
      Rig rig(backend, options);
      RowContents rows(rig);
      const int64_t parent = rows.start(22);
      const int64_t child = rows.fork(parent, length);
      CHECK(child != parent);
      CHECK(rig.state(child) == RowState::kActive);
      CHECK_EQ(rows.length(child), length);
      CHECK_EQ(rows.length(rows.fork(child)), length);
      rows.check();
      rig.end();
    }
  }
}

void only_the_partly_filled_page_is_copied(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(22);
  rows.fork(0, 10);
  CHECK_EQ(copied_tokens(rig), 2u);
  CHECK_EQ(rig.ledger->now().copies, 1u);
  CHECK_EQ(rig.pages_taken(), 7u);
  CHECK_EQ(rig.pages_mapped(), 9u);
  const CacheStats stats = rig.kv->stats();
  CHECK_EQ(stats.mapped_bytes, 7 * rig.page);
  CHECK_EQ(stats.aliased_bytes, 2 * rig.page);
  rig.end();
}

// A page in each region.
void of_each_region_the_partly_filled_page_is_copied(const Backend& backend) {
  RigOptions options = four_in_a_page();
  options.kind = LayoutKind::kPerLayer;
  options.layers = 2;
  Rig rig(backend, options);
  RowContents rows(rig);
  rows.start(22);
  rows.fork(0, 10);
  CHECK_EQ(copied_tokens(rig), 2u);
  CHECK_EQ(rig.ledger->now().copies, 4u);
  CHECK_EQ(rig.pages_taken(), 4 * 7u);
  rig.end();
}

void at_the_end_of_a_page_nothing_is_copied(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(22);
  const size_t created = rig.ledger->now().creates;
  rows.fork(0, 8);
  CHECK_EQ(rig.ledger->now().copies, 0u);
  CHECK_EQ(rig.ledger->now().creates, created);
  CHECK_EQ(rig.pages_taken(), 6u);
  rig.end();
}

void many_children_share_one_prefix(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(10);
  const std::vector<int64_t> children = rows.fork_n(0, std::nullopt, 4);
  CHECK_EQ(children.size(), 4u);
  CHECK_EQ(rig.pages_taken(), 3u + 4);
  for (const int64_t child : children) rows.step(child, 15 + child);
  rows.step(0, 11);
  rows.check();
  CHECK(rig.kv->fork(0, 5, 0, Stream{}).empty());
  rig.end();
}

void a_fork_of_a_fork_shares_with_both(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(12);
  const int64_t child = rows.fork(0);
  rows.step(child, 20);
  const int64_t grandchild = rows.fork(child, 18);
  CHECK_EQ(rig.pages_taken(), 3u + 2 + 1);
  rows.step(grandchild, 25);
  rows.step(child, 23);
  rows.step(0, 14);
  rows.check();
  rig.end();
}

void either_side_may_go_first(const Backend& backend) {
  for (const bool parent_first : {true, false}) {
    Rig rig(backend, four_in_a_page());
    RowContents rows(rig);
    rows.start(22);
    const int64_t child = rows.fork(0, 10);
    rows.free(parent_first ? 0 : child);
    CHECK(eventually([&] { return rig.state(parent_first ? 0 : child) == RowState::kFree; }));
    CHECK_EQ(rig.pages_taken(), parent_first ? 3u : 6u);
    CHECK_EQ(rig.kv->stats().aliased_bytes, 0u);
    rows.step(parent_first ? child : 0, 30);
    rows.check();
    rig.end();
  }
}

// It would have to be emptied before its next token.
void a_row_that_shares_retires_when_it_is_freed(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  rig.kv->stop_background();
  RowContents rows(rig);
  rows.start(9);
  const int64_t child = rows.fork(0);
  rows.free(child);
  CHECK(rig.state(child) == RowState::kRetiring);
  rows.free(0);
  CHECK(rig.state(0) == RowState::kRetiring);
  CHECK_EQ(rig.pages_taken(), 4u);
  CHECK_EQ(rows.start(3), 0);
  CHECK(rig.state(child) == RowState::kFree);
  CHECK_EQ(rig.pages_taken(), 1u);
  rows.check();
  rig.end();
}

void free_rows_are_used_before_idle_ones_and_those_oldest_first(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  for (int i = 0; i < 5; ++i) rows.start(4);
  rig.kv->keep_prefix(2, 4);
  for (const int64_t row : {2, 4, 1}) rows.free(row);
  CHECK_EQ(rows.fork(0), 5);
  CHECK_EQ(rig.mapped(4), 4u);
  CHECK_EQ(rows.fork(0), 4);
  CHECK_EQ(rig.mapped(1), 4u);
  CHECK(rows.fork_n(0, 3, 2) == std::vector<int64_t>({1, 2}));
  rows.check();
  rig.end();
}

void a_fork_that_cannot_be_changes_nothing(const Backend& backend) {
  RigOptions options = four_in_a_page();
  options.budget_pages = 5;
  Rig rig(backend, options);
  RowContents rows(rig);
  rows.start(10);
  rows.start(4);
  const auto nothing_changed = [&] {
    CHECK_EQ(rig.pages_taken(), 4u);
    CHECK_EQ(rig.kv->stats().rows_active, 2u);
    rows.check();
  };
  CHECK_THROWS(OutOfRows, rows.fork_n(0, 10, 5), "5 rows wanted, but only 4 of 6 are not in use");
  nothing_changed();
  check_out_of_pages([&] { rows.fork_n(0, 10, 2); }, 2, 1);
  nothing_changed();
  CHECK_THROWS(std::invalid_argument, rig.kv->fork(0, 11, 1, {}),
               "seq_len is 11, but row 0 has 10 tokens");
  CHECK_THROWS(std::invalid_argument, rig.kv->fork(0, -2, 1, {}), "seq_len is -2");
  CHECK_THROWS(std::invalid_argument, rig.kv->fork(3, 0, 1, {}), "row 3 is free, not active");
  CHECK_THROWS(std::invalid_argument, rig.kv->fork(6, 0, 1, {}), "row 6 is not in 0..5");
  CHECK_THROWS(std::invalid_argument, rig.kv->truncate(0, 11), "seq_len is 11");
  CHECK_THROWS(std::invalid_argument, rig.kv->truncate(0, -1), "seq_len is -1");
  CHECK_THROWS(std::invalid_argument, rig.kv->truncate(2, 0), "row 2 is free");
  nothing_changed();
  rows.fork(0);
  rows.check();
  rig.end();
}

// The memory of an idle row is there for a fork too.
void a_fork_takes_memory_back_from_idle_rows(const Backend& backend) {
  RigOptions options = four_in_a_page();
  options.budget_pages = 5;
  Rig rig(backend, options);
  RowContents rows(rig);
  rows.start(10);
  rows.start(8);
  rows.free(1);
  const std::vector<int64_t> children = rows.fork_n(0, 10, 2);
  CHECK_EQ(rig.pages_taken(), 5u);
  rows.check();
  rig.end();
}

// What is shared of an extent in part is copied. Only the last page, partly filled, is always an
// extent of its own: of 8 pages here the others are extents of 4, 2 and 1.
void a_part_of_a_super_page_is_copied(const Backend& backend) {
  RigOptions options = four_in_a_page();
  options.max_extent_pages = 8;
  Rig rig(backend, options);
  RowContents rows(rig);
  rows.start(30);
  CHECK_EQ(rig.ledger->now().creates, 4u);
  rows.fork(0);
  CHECK_EQ(copied_tokens(rig), 2u);
  CHECK_EQ(rig.pages_taken(), 9u);
  const int64_t child = rows.fork(0, 22);
  CHECK_EQ(copied_tokens(rig), 2u + 6);
  CHECK_EQ(rig.pages_taken(), 11u);
  rows.fork(child);
  CHECK_EQ(copied_tokens(rig), 2u + 6 + 2);
  CHECK_EQ(rig.pages_taken(), 12u);
  rows.check();
  rig.end();
}

void neither_side_sees_what_the_other_writes(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    rows.start(22);
    const int64_t child = rows.fork(0, 17);
    rows.step(child, 30);
    rows.check();
    rows.step(0, 35);
    rows.check();
    rows.truncate(0, 3);
    rows.step(0, 20);
    rows.check();
    rows.truncate(child, 5);
    rows.step(child, 23);
    rows.check();
    rig.end();
  }
}

// For the calls it does not matter how long the parent is; the map call has a longer run.
void a_fork_costs_the_same_whatever_is_shared(const Backend& backend) {
  RigOptions options;
  options.rows = 3;
  options.max_tokens = 33 * 1024;
  options.tokens_per_page = 64;
  options.budget_pages = 600;
  std::vector<LedgerCounts> costs;
  for (const int64_t length : {1024 + 5, 32 * 1024 + 5}) {
    Rig rig(backend, options);
    rig.start({length});
    const LedgerCounts before = rig.ledger->now();
    rig.kv->fork(0, std::nullopt, 1, Stream{});
    const LedgerCounts after = rig.ledger->now();
    costs.push_back({});
    costs.back().calls = after.calls - before.calls;
    costs.back().maps = after.maps - before.maps;
    costs.back().creates = after.creates - before.creates;
    costs.back().copied_bytes = after.copied_bytes - before.copied_bytes;
    CHECK_EQ(costs.back().copied_bytes, 5 * rig.page / 64);
    CHECK_EQ(costs.back().maps, 1u);
    rig.end();
  }
  CHECK_EQ(costs[0].calls, costs[1].calls);
  CHECK_EQ(costs[0].creates, costs[1].creates);
  CHECK_EQ(costs[0].copied_bytes, costs[1].copied_bytes);
}

void truncating_makes_no_driver_call(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(22);
  const int64_t child = rows.fork(0);
  const size_t before = calls(rig);
  rows.truncate(0, 6);
  rows.truncate(child, 0);
  rows.truncate(0, 6);
  CHECK_EQ(calls(rig), before);
  CHECK_EQ(rig.mapped(0), 24u);
  rows.check();
  rig.end();
}

enum class Shorten { kTruncate, kStep };

// The row's next token lies in a page that others read: its tokens there move to a page of its own.
void growth_into_a_shared_page_copies_it_first(const Backend& backend) {
  for (const Shorten how : {Shorten::kTruncate, Shorten::kStep}) {
    for (const bool parent : {true, false}) {
      Rig rig(backend, four_in_a_page());
      RowContents rows(rig);
      rows.start(24);
      const int64_t child = rows.fork(0);
      const int64_t row = parent ? 0 : child;
      const size_t before = calls(rig);
      if (how == Shorten::kTruncate) rows.truncate(row, 10);
      if (how == Shorten::kStep) rows.step(row, 10);
      CHECK_EQ(calls(rig), before);
      CHECK_EQ(rig.pages_taken(), 6u);
      rows.step(row, 11);
      CHECK_EQ(copied_tokens(rig), 2u);
      CHECK_EQ(rig.pages_taken(), 7u);
      CHECK_EQ(rig.mapped(row), 12u);
      rows.check();
      const size_t after = calls(rig);
      rows.step(row, 12);
      CHECK_EQ(calls(rig), after);
      rows.check();
      rig.end();
    }
  }
}

// Also when the row was cut at the end of a page: there is nothing to copy, only to let go.
void growth_behind_a_shared_page_lets_the_rest_go(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(24);
  const int64_t child = rows.fork(0);
  rows.truncate(child, 8);
  rows.step(child, 9);
  CHECK_EQ(rig.ledger->now().copies, 0u);
  CHECK_EQ(rig.pages_taken(), 7u);
  rows.check();
  rig.end();
}

void the_last_to_have_a_page_needs_no_copy(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(24);
  const int64_t child = rows.fork(0);
  rows.truncate(0, 10);
  rows.free(child);
  CHECK(eventually([&] { return rig.state(child) == RowState::kFree; }));
  const size_t before = calls(rig);
  rows.step(0, 15);
  CHECK_EQ(calls(rig), before);
  rows.check();
  rig.end();
}

// The first of two copies leaves the pages to the second.
void of_two_that_grow_into_a_page_one_copies(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(24);
  const int64_t child = rows.fork(0);
  rows.truncate(0, 10);
  rows.truncate(child, 10);
  rig.kv->step_rows({{0, 11}, {child, 11}});
  CHECK_EQ(copied_tokens(rig), 2u);
  CHECK_EQ(rig.pages_taken(), 7u);
  rows.truncate(0, 10);
  rows.truncate(child, 10);
  rows.check();
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      over_all_backends({BACKEND_TEST(a_fork_reads_what_its_parent_had),
                         BACKEND_TEST(only_the_partly_filled_page_is_copied),
                         BACKEND_TEST(of_each_region_the_partly_filled_page_is_copied),
                         BACKEND_TEST(at_the_end_of_a_page_nothing_is_copied),
                         BACKEND_TEST(many_children_share_one_prefix),
                         BACKEND_TEST(a_fork_of_a_fork_shares_with_both),
                         BACKEND_TEST(either_side_may_go_first),
                         BACKEND_TEST(a_row_that_shares_retires_when_it_is_freed),
                         BACKEND_TEST(free_rows_are_used_before_idle_ones_and_those_oldest_first),
                         BACKEND_TEST(a_fork_that_cannot_be_changes_nothing),
                         BACKEND_TEST(a_fork_takes_memory_back_from_idle_rows),
                         BACKEND_TEST(a_part_of_a_super_page_is_copied),
                         BACKEND_TEST(neither_side_sees_what_the_other_writes),
                         BACKEND_TEST(a_fork_costs_the_same_whatever_is_shared),
                         BACKEND_TEST(truncating_makes_no_driver_call),
                         BACKEND_TEST(growth_into_a_shared_page_copies_it_first),
                         BACKEND_TEST(growth_behind_a_shared_page_lets_the_rest_go),
                         BACKEND_TEST(the_last_to_have_a_page_needs_no_copy),
                         BACKEND_TEST(of_two_that_grow_into_a_page_one_copies)}),
      argc > 1 ? argv[1] : nullptr);
}
