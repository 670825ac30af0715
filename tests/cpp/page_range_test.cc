// A range of which any page may have memory.
#include <cstring>

#include "base/errors.h"
#include "range_rig.h"

using namespace vattn;
using namespace vattn::test;

namespace {

using Runs = PageRange::Runs;

void a_new_range_has_no_memory(const Backend& backend) {
  RangeRig rig(backend);
  CHECK_EQ(rig.range->n_pages(), 32u);
  CHECK_EQ(rig.runs(), "");
  CHECK_EQ(rig.range->mapped_pages(), 0u);
  CHECK_EQ(rig.created(), 0u);
  rig.range->check();
  rig.end();
}

void any_page_can_have_memory_and_lose_it(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{20, 3}, {4, 2}});
  CHECK_EQ(rig.runs(), "4+2 20+3 ");
  CHECK_EQ(rig.range->mapped_pages(), 5u);
  CHECK_EQ(rig.created(), 5u);
  for (const size_t page : {4, 5, 20, 21, 22}) {
    std::memset(rig.at(page), static_cast<int>(page), rig.page);
  }
  CHECK_EQ(rig.unmap({{21, 1}, {4, 1}}), 2u);
  CHECK_EQ(rig.runs(), "5+1 20+1 22+1 ");
  CHECK_EQ(rig.range->mapped_pages(), 3u);
  CHECK_EQ(rig.created(), 3u);
  CHECK(rig.range->is_mapped(5));
  CHECK(!rig.range->is_mapped(21));
  rig.range->map({{21, 1}});
  for (const size_t page : {5, 20, 22}) CHECK_EQ(size_t{*rig.at(page)}, page);
  rig.range->check();
  rig.end();
}

void neighbours_are_one_driver_call(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{7, 1}, {20, 2}, {4, 3}, {8, 2}});
  CHECK_EQ(rig.runs(), "4+6 20+2 ");
  CHECK_EQ(rig.ledger->now().maps, 2u);
  CHECK_EQ(rig.unmap({{6, 1}, {4, 2}, {21, 1}}), 4u);
  CHECK_EQ(rig.ledger->now().unmaps, 2u);
  CHECK_EQ(rig.runs(), "7+3 20+1 ");
  rig.end();
}

// Also where the pool has larger extents for others.
void each_page_can_be_taken_out_alone(const Backend& backend) {
  RangeRig rig(backend);
  const auto pool = std::make_shared<Pool>(rig.ledger, rig.page, /*max_extent_bytes=*/8 * rig.page,
                                           16 * rig.page);
  PageRange range(pool, 16);
  range.map({{0, 16}});
  range.check();
  for (int64_t page = 0; page < 16; page += 2) CHECK_EQ(range.unmap({{page, 1}}, Stream{}), 1u);
  CHECK_EQ(range.mapped_pages(), 8u);
  CHECK_EQ(rig.created(), 8u);
}

void no_runs_are_no_work(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({});
  CHECK_EQ(rig.unmap({}), 0u);
  CHECK_EQ(rig.ledger->now().maps, 0u);
  rig.end();
}

void a_wrong_call_changes_nothing(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{4, 4}});
  for (const auto& run :
       Runs{{-1, 2}, {32, 1}, {30, 3}, {3, 0}, {3, -1}, {INT64_MAX, 1}, {1, INT64_MAX}}) {
    CHECK_THROWS(std::invalid_argument, rig.range->map({{0, 1}, run}), "not in the range of 32");
    CHECK_THROWS(std::invalid_argument, rig.unmap({{4, 1}, run}), "not in the range of 32");
    CHECK_THROWS(std::invalid_argument, rig.range->alias(run.first, run.second), "of 32 pages");
  }
  CHECK_THROWS(std::invalid_argument, rig.range->map({{20, 3}, {22, 1}}),
               "run (22, 1) overlaps run (20, 3)");
  CHECK_THROWS(std::invalid_argument, rig.range->map({{20, 2}, {22, 2}, {21, 1}}), "overlaps");
  CHECK_THROWS(std::invalid_argument, rig.unmap({{5, 1}, {5, 1}}), "overlaps run (5, 1)");
  CHECK_THROWS(std::invalid_argument, rig.range->map({{0, 2}, {3, 2}}),
               "page 4 is mapped already; unmap it first");
  CHECK_THROWS(std::invalid_argument, rig.range->alias(7, 2), "page 7 is mapped already");
  CHECK_THROWS(std::invalid_argument, rig.unmap({{4, 1}, {7, 2}}), "page 8 is not mapped; mapped");
  CHECK_THROWS(std::invalid_argument, rig.range->is_mapped(32), "page 32 is not in 0..31");
  CHECK_THROWS(std::invalid_argument, rig.range->is_mapped(-1), "page -1 is not in 0..31");
  CHECK_EQ(rig.runs(), "4+4 ");
  CHECK_EQ(rig.created(), 4u);
  rig.range->check();
  rig.end();
}

void a_range_without_pages_is_refused(const Backend& backend) {
  RangeRig rig(backend);
  CHECK_THROWS(std::invalid_argument, PageRange(rig.pool, 0), "n_pages is 0");
  rig.end();
}

void more_pages_than_the_budget_change_nothing(const Backend& backend) {
  RangeRig rig(backend);  // 32 pages of addresses, 16 of memory
  rig.range->map({{0, 10}});
  check_out_of_pages([&] { rig.range->map({{10, 4}, {20, 3}}); }, 7, 6);
  CHECK_EQ(rig.ledger->now().creates, 10u);  // it did not even begin
  CHECK_EQ(rig.runs(), "0+10 ");
  CHECK_EQ(rig.created(), 10u);
  rig.range->map({{10, 4}, {20, 2}});
  check_out_of_pages([&] { rig.range->alias(30, 2); }, 1, 0);
  CHECK_EQ(rig.unmap({{3, 1}}), 1u);
  rig.range->alias(30, 2);
  rig.range->check();
  rig.end();
}

void pages_of_an_alias_are_the_same_memory(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{3, 1}});
  rig.range->alias(4, 20);  // more than there are in the budget
  CHECK_EQ(rig.runs(), "3+21 ");
  CHECK_EQ(rig.range->mapped_pages(), 2u);
  CHECK_EQ(rig.created(), 2u);
  CHECK_EQ(rig.places(), 21u);
  *rig.at(3) = 1;
  *rig.at(9) = 77;
  for (size_t page = 4; page < 24; ++page) CHECK_EQ(int{*rig.at(page)}, 77);
  CHECK_EQ(int{*rig.at(3)}, 1);
  rig.range->check();
  rig.end();
}

void the_last_page_of_an_alias_gives_its_memory_back(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{3, 1}});
  rig.range->alias(4, 8);
  *rig.at(11) = 77;
  CHECK_EQ(rig.unmap({{3, 5}, {9, 1}}), 6u);  // with a page that is none of it
  CHECK_EQ(rig.runs(), "8+1 10+2 ");
  CHECK_EQ(rig.range->mapped_pages(), 1u);
  CHECK_EQ(int{*rig.at(8)}, 77);
  rig.range->check();
  CHECK_EQ(rig.unmap({{8, 1}, {10, 2}}), 3u);
  CHECK_EQ(rig.range->mapped_pages(), 0u);
  CHECK_EQ(rig.created(), 0u);
  rig.range->check();
  rig.end();
}

void closing_gives_all_back_but_the_addresses(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{0, 1}, {5, 4}});
  rig.range->alias(9, 3);
  rig.range->close();
  CHECK(rig.range->closed());
  CHECK_EQ(rig.runs(), "");
  CHECK_EQ(rig.range->mapped_pages(), 0u);
  CHECK_EQ(rig.created(), 0u);
  CHECK_EQ(rig.ledger->now().reserved_bytes, 32 * rig.page);
  const size_t calls = rig.ledger->now().calls;
  rig.range->close();
  CHECK_EQ(rig.ledger->now().calls, calls);
  constexpr const char* kSentence = "the range is closed; make a new vattn.PageRange";
  CHECK_THROWS(std::invalid_argument, rig.range->map({{0, 1}}), kSentence);
  CHECK_THROWS(std::invalid_argument, rig.range->alias(0, 1), kSentence);
  CHECK_THROWS(std::invalid_argument, rig.unmap({{0, 1}}), kSentence);
  rig.range->check();
  rig.end();
}

void two_ranges_share_a_pool(const Backend& backend) {
  RangeRig rig(backend);
  auto other = std::make_unique<PageRange>(rig.pool, 32);
  rig.range->map({{0, 10}});
  other->map({{0, 5}});
  check_out_of_pages([&] { other->map({{5, 2}}); }, 2, 1);
  CHECK_EQ(rig.unmap({{0, 1}}), 1u);
  other->map({{5, 2}});
  other->check();
  rig.range->check();
  other.reset();
  CHECK_EQ(rig.created(), 9u);
  rig.range->check();
  rig.end();
}

// The host would hand it out, and end whoever touches it. A device says itself what it lacks.
void memory_that_the_machine_lacks_is_refused(const Backend& backend) {
  RangeRig rig(backend);
  rig.range->map({{0, 2}});
  rig.ledger->free_bytes = rig.ledger->memory_info().total_bytes / 64 + 3 * rig.page;
  if (!rig.is_cuda) {
    check_out_of_pages([&] { rig.range->map({{4, 3}, {9, 1}}); }, 4, 3);
    check_out_of_pages([&] { rig.range->map({{4, 4}}); }, 4, 3);
    rig.range->map({{4, 3}});
    rig.ledger->free_bytes = 0;
    check_out_of_pages([&] { rig.range->alias(9, 2); }, 1, 0);
    CHECK_EQ(rig.runs(), "0+2 4+3 ");
  } else {
    rig.ledger->free_bytes = 0;
    rig.range->map({{4, 4}});
    CHECK_EQ(rig.runs(), "0+2 4+4 ");
  }
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(over_all_backends({BACKEND_TEST(a_new_range_has_no_memory),
                                      BACKEND_TEST(any_page_can_have_memory_and_lose_it),
                                      BACKEND_TEST(neighbours_are_one_driver_call),
                                      BACKEND_TEST(each_page_can_be_taken_out_alone),
                                      BACKEND_TEST(no_runs_are_no_work),
                                      BACKEND_TEST(a_wrong_call_changes_nothing),
                                      BACKEND_TEST(a_range_without_pages_is_refused),
                                      BACKEND_TEST(more_pages_than_the_budget_change_nothing),
                                      BACKEND_TEST(pages_of_an_alias_are_the_same_memory),
                                      BACKEND_TEST(the_last_page_of_an_alias_gives_its_memory_back),
                                      BACKEND_TEST(closing_gives_all_back_but_the_addresses),
                                      BACKEND_TEST(two_ranges_share_a_pool),
                                      BACKEND_TEST(memory_that_the_machine_lacks_is_refused)}),
                   argc > 1 ? argv[1] : nullptr);
}
