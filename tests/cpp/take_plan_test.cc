// Which extents a growth takes.
#include "core/take_plan.h"

#include <random>

#include "check.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// {free extents by order}, pages that may still be created.
PoolCounts pool_of(const std::vector<size_t>& free, size_t creatable_pages) {
  PoolCounts counts;
  for (size_t order = 0; order < free.size(); ++order) counts.free[order] = free[order];
  counts.max_order = free.size() - 1;
  counts.creatable_pages = creatable_pages;
  return counts;
}

// "release 1x8 reuse 2x1 create 1x4": extents x pages, small ones first.
std::string text(const std::optional<TakePlan>& plan) {
  if (!plan) return "none";
  std::string out;
  const auto add = [&](const char* what, const OrderCounts& counts) {
    bool named = false;
    for (size_t order = 0; order < kMaxOrders; ++order) {
      if (counts[order] == 0) continue;
      if (!named) out += (out.empty() ? "" : " ") + std::string(what);
      named = true;
      out += " " + std::to_string(counts[order]) + "x" + std::to_string(size_t{1} << order);
    }
  };
  add("release", plan->release);
  add("reuse", plan->reuse);
  add("create", plan->create);
  return out;
}

void an_empty_pool_creates_large_extents_and_ends_with_small_ones() {
  CHECK_EQ(text(plan_take(13, pool_of({0, 0, 0, 0}, 100))), "create 1x1 1x4 1x8");
  CHECK_EQ(text(plan_take(13, pool_of({0, 0, 0}, 100))), "create 1x1 3x4");
  CHECK_EQ(text(plan_take(13, pool_of({0}, 100))), "create 13x1");
}

void what_is_free_is_taken_before_anything_is_made() {
  CHECK_EQ(text(plan_take(13, pool_of({1, 0, 1, 1}, 100))), "reuse 1x1 1x4 1x8");
  CHECK_EQ(text(plan_take(3, pool_of({1, 1, 0, 1}, 100))), "reuse 1x1 1x2");
  CHECK_EQ(text(plan_take(2, pool_of({2, 0}, 0))), "reuse 2x1");
}

void large_ones_are_made_while_the_budget_allows() {
  CHECK_EQ(text(plan_take(8, pool_of({8, 0, 0, 0}, 8))), "create 1x8");
  CHECK_EQ(text(plan_take(8, pool_of({8, 0, 0, 0}, 7))), "reuse 2x1 create 1x2 1x4");
  CHECK_EQ(text(plan_take(8, pool_of({8, 0, 0, 0}, 0))), "reuse 8x1");
}

void a_large_free_extent_is_traded_for_pieces() {
  CHECK_EQ(text(plan_take(1, pool_of({0, 0, 0, 1}, 0))), "release 1x8 create 1x1");
  CHECK_EQ(text(plan_take(7, pool_of({2, 0, 0, 2}, 0))), "release 1x8 reuse 2x1 create 1x1 1x4");
  CHECK_EQ(text(plan_take(3, pool_of({0, 0, 1, 1}, 1))), "release 1x4 create 1x1 1x2");
}

void too_much_is_refused() {
  CHECK_EQ(text(plan_take(14, pool_of({1, 0, 1, 1}, 0))), "none");
  CHECK_EQ(text(plan_take(1, pool_of({0, 0}, 0))), "none");
  CHECK_EQ(text(plan_take(SIZE_MAX, pool_of({1, 1}, 5))), "none");
}

void nothing_is_free_of_charge() {
  CHECK_EQ(text(plan_take(0, pool_of({1, 1}, 5))), "");
}

size_t pages(const OrderCounts& counts) {
  size_t pages = 0;
  for (size_t order = 0; order < kMaxOrders; ++order) pages += counts[order] << order;
  return pages;
}

size_t extents(const TakePlan& plan) {
  size_t extents = 0;
  for (size_t order = 0; order < kMaxOrders; ++order) {
    extents += plan.reuse[order] + plan.create[order];
  }
  return extents;
}

PoolCounts random_pool(std::mt19937& random) {
  const auto any = [&](size_t high) {
    return std::uniform_int_distribution<size_t>(0, high)(random);
  };
  std::vector<size_t> free(any(6) + 1);
  for (size_t& n : free) n = any(1) == 0 ? 0 : any(4);
  return pool_of(free, any(1) == 0 ? 0 : any(80));
}

void plans_provide_exactly_what_was_asked_within_the_budget() {
  std::mt19937 random(3);
  for (int round = 0; round < 20000; ++round) {
    const PoolCounts counts = random_pool(random);
    const size_t available = counts.available_pages();
    const size_t wanted = std::uniform_int_distribution<size_t>(0, available + 3)(random);
    const auto plan = plan_take(wanted, counts);
    CHECK_EQ(plan.has_value(), wanted <= available);
    if (!plan) continue;
    CHECK_EQ(pages(plan->reuse) + pages(plan->create), wanted);
    CHECK(pages(plan->create) <= counts.creatable_pages + pages(plan->release));
    for (size_t order = 0; order < kMaxOrders; ++order) {
      CHECK(plan->release[order] + plan->reuse[order] <= counts.free[order]);
      CHECK(order <= counts.max_order || plan->create[order] == 0);
    }
  }
}

// Nothing is given back to the driver that could have been used, or that was not needed.
void at_most_one_extent_is_traded_and_only_for_want_of_small_ones() {
  std::mt19937 random(4);
  for (int round = 0; round < 20000; ++round) {
    const PoolCounts counts = random_pool(random);
    const size_t wanted =
        std::uniform_int_distribution<size_t>(0, counts.available_pages())(random);
    const auto plan = plan_take(wanted, counts);
    CHECK(plan.has_value());
    size_t traded = 0;
    for (size_t order = 0; order < kMaxOrders; ++order) traded += plan->release[order];
    CHECK(traded <= 1);
    const size_t without = pages(plan->reuse) + counts.creatable_pages;
    CHECK(traded == 0 || without < wanted);
  }
}

// A binary number of pages: one extent per bit, and whole ones of the largest order.
void an_empty_pool_takes_the_fewest_extents() {
  for (size_t max_order = 0; max_order < 8; ++max_order) {
    for (size_t wanted = 0; wanted < 600; ++wanted) {
      const auto plan = plan_take(wanted, pool_of(std::vector<size_t>(max_order + 1, 0), 600));
      const size_t rest = wanted & ((size_t{1} << max_order) - 1);
      CHECK_EQ(extents(*plan),
               (wanted >> max_order) + static_cast<size_t>(__builtin_popcountll(rest)));
    }
  }
}

void available_pages_are_the_free_and_the_creatable_ones() {
  CHECK_EQ(pool_of({1, 2, 3}, 10).available_pages(), 1u + 4 + 12 + 10);
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests({TEST(an_empty_pool_creates_large_extents_and_ends_with_small_ones),
                    TEST(what_is_free_is_taken_before_anything_is_made),
                    TEST(large_ones_are_made_while_the_budget_allows),
                    TEST(a_large_free_extent_is_traded_for_pieces), TEST(too_much_is_refused),
                    TEST(nothing_is_free_of_charge),
                    TEST(plans_provide_exactly_what_was_asked_within_the_budget),
                    TEST(at_most_one_extent_is_traded_and_only_for_want_of_small_ones),
                    TEST(an_empty_pool_takes_the_fewest_extents),
                    TEST(available_pages_are_the_free_and_the_creatable_ones)},
                   argc > 1 ? argv[1] : nullptr);
}
