// The tokens that are kept of a tree move together.
#include <random>

#include "base/errors.h"
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

// Of the tokens from `start` to `end`, some.
std::vector<int64_t> some_of(int64_t start, int64_t end, std::mt19937& random) {
  std::vector<int64_t> kept;
  for (int64_t token = start; token < end; ++token) {
    if (std::uniform_int_distribution<int>(0, 3)(random) != 0) kept.push_back(token);
  }
  return kept;
}

void what_is_kept_moves_together(const Backend& backend) {
  std::mt19937 random(3);
  for (const RigOptions& options : ways_to_lay_out()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    rows.start(0);
    for (int round = 0; round < 20; ++round) {
      rows.step(0, 30);
      const int64_t start = std::uniform_int_distribution<int64_t>(0, 30)(random);
      rows.compact(0, some_of(start, 30, random), start);
      rows.check();
    }
    rig.end();
  }
}

void others_that_read_the_tokens_keep_them(const Backend& backend) {
  std::mt19937 random(4);
  for (const RigOptions& options : ways_to_lay_out()) {
    for (const int64_t start : {0, 3, 8, 19}) {
      Rig rig(backend, options);
      RowContents rows(rig);
      rows.start(30);
      const std::vector<int64_t> children = rows.fork_n(0, std::nullopt, 2);
      rows.compact(children[0], some_of(start, 30, random), start);
      rows.check();
      rows.compact(0, some_of(start, 30, random), start);
      rows.check();
      for (const int64_t row : {int64_t{0}, children[0], children[1]}) rows.step(row, 35);
      rows.check();
      rig.end();
    }
  }
}

// The tokens before the first that moves stay shared: 8 of them, and those of its page are copied.
void only_what_moves_is_copied(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(24);
  const int64_t child = rows.fork(0);
  rows.compact(child, {9, 11}, 9);
  CHECK_EQ(rig.ledger->now().copied_bytes / (rig.page / 4), 16u + 1);
  CHECK_EQ(rig.kv->stats().aliased_bytes, 2 * rig.page);
  rows.check();
  rig.end();
}

// As far as the copy does not reach into what it copies.
void neighbours_move_in_one_copy(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(24);
  rows.compact(0, {0, 1, 5, 6, 7});
  CHECK_EQ(rig.ledger->now().copies, 1u);
  rows.check();
  rows.step(0, 24);
  rows.compact(0, {1, 2, 3});
  CHECK_EQ(rig.ledger->now().copies, 1u + 3);
  rows.check();
  rig.end();
}

void what_lies_where_it_belongs_is_not_touched(const Backend& backend) {
  Rig rig(backend, four_in_a_page());
  RowContents rows(rig);
  rows.start(24);
  const int64_t child = rows.fork(0);
  const size_t before = rig.ledger->now().calls;
  rows.compact(0, {5, 6, 7}, 5);
  rows.compact(0, {}, 4);
  rows.compact(child, {0, 1, 2});
  rows.compact(child, {}, 0);
  CHECK_EQ(rig.ledger->now().calls, before);
  CHECK_EQ(rows.length(0), 4);
  CHECK_EQ(rows.length(child), 0);
  rows.check();
  rig.end();
}

void positions_that_cannot_be_change_nothing(const Backend& backend) {
  RigOptions options = four_in_a_page();
  options.budget_pages = 6;
  Rig rig(backend, options);
  RowContents rows(rig);
  rows.start(20);
  const int64_t child = rows.fork(0);
  const auto refused = [&](const std::vector<int64_t>& keep, int64_t start, const char* text) {
    CHECK_THROWS(std::invalid_argument, rig.kv->compact(child, keep, start, {}), text);
    rows.check();
  };
  refused({3, 3}, 0, "keep_token_indices[1] is 3, expected ascending positions from 0 to 19");
  refused({4, 3}, 0, "keep_token_indices[1] is 3");
  refused({20}, 0, "keep_token_indices[0] is 20");
  refused({3}, 4, "keep_token_indices[0] is 3");
  refused({-1}, 0, "keep_token_indices[0] is -1");
  refused({}, -1, "start is -1, expected 0 to 20, the length of row 1");
  refused({}, 21, "start is 21");
  CHECK_THROWS(std::invalid_argument, rig.kv->compact(3, {}, 0, {}), "row 3 is free");
  check_out_of_pages([&] { rows.compact(child, {1}); }, 5, 1);
  rows.check();
  rows.compact(child, {18}, 17);
  rows.check();
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(over_all_backends({BACKEND_TEST(what_is_kept_moves_together),
                                      BACKEND_TEST(others_that_read_the_tokens_keep_them),
                                      BACKEND_TEST(only_what_moves_is_copied),
                                      BACKEND_TEST(neighbours_move_in_one_copy),
                                      BACKEND_TEST(what_lies_where_it_belongs_is_not_touched),
                                      BACKEND_TEST(positions_that_cannot_be_change_nothing)}),
                   argc > 1 ? argv[1] : nullptr);
}
