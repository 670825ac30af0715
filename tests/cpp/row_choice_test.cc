// Which row a request gets.
#include "core/row_choice.h"

#include "check.h"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr auto kFree = RowState::kFree;
constexpr auto kActive = RowState::kActive;
constexpr auto kIdle = RowState::kIdle;
constexpr auto kRetiring = RowState::kRetiring;

size_t chosen(const std::vector<RowCandidate>& rows, size_t tokens) {
  const auto row = choose_row(rows, tokens);
  CHECK(row.has_value());
  return *row;
}

// vAttention takes row 0 here: the mapped pages are then wasted, and must be unmapped.
void a_row_that_has_enough_beats_an_empty_one() {
  CHECK_EQ(chosen({{kIdle, 0}, {kIdle, 5}}, 5), 1u);
}

void the_smallest_row_that_is_enough_is_taken() {
  const std::vector<RowCandidate> rows = {{kIdle, 9}, {kIdle, 5}, {kIdle, 6}, {kIdle, 4}};
  CHECK_EQ(chosen(rows, 5), 1u);
  CHECK_EQ(chosen(rows, 6), 2u);
  CHECK_EQ(chosen(rows, 7), 0u);
  CHECK_EQ(chosen(rows, 0), 3u);
}

void else_the_row_that_has_most_is_taken() {
  CHECK_EQ(chosen({{kIdle, 3}, {kIdle, 9}, {kIdle, 8}}, 10), 1u);
}

void idle_rows_come_before_free_ones_and_those_before_retiring_ones() {
  CHECK_EQ(chosen({{kFree, 0}, {kRetiring, 9}, {kIdle, 1}}, 8), 2u);
  CHECK_EQ(chosen({{kActive, 9}, {kRetiring, 9}, {kFree, 0}}, 8), 2u);
  CHECK_EQ(chosen({{kRetiring, 3}, {kRetiring, 9}, {kRetiring, 7}}, 2), 1u);
}

void of_equal_rows_the_first_is_taken() {
  CHECK_EQ(chosen({{kActive, 0}, {kFree, 0}, {kFree, 0}}, 1), 1u);
  CHECK_EQ(chosen({{kIdle, 4}, {kIdle, 4}}, 2), 0u);
}

void active_rows_are_never_taken() {
  CHECK(!choose_row({{kActive, 5}, {kActive, 0}}, 0).has_value());
  CHECK(!choose_row({}, 0).has_value());
}

void every_state_has_a_name() {
  CHECK_EQ(name_of(kFree), std::string("free"));
  CHECK_EQ(name_of(kActive), std::string("active"));
  CHECK_EQ(name_of(kIdle), std::string("idle"));
  CHECK_EQ(name_of(kRetiring), std::string("retiring"));
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      {TEST(a_row_that_has_enough_beats_an_empty_one),
       TEST(the_smallest_row_that_is_enough_is_taken), TEST(else_the_row_that_has_most_is_taken),
       TEST(idle_rows_come_before_free_ones_and_those_before_retiring_ones),
       TEST(of_equal_rows_the_first_is_taken), TEST(active_rows_are_never_taken),
       TEST(every_state_has_a_name)},
      argc > 1 ? argv[1] : nullptr);
}
