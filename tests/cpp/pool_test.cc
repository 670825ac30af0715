// The pool: all or nothing within a budget, and it adds up.
#include "core/pool.h"

#include "base/errors.h"
#include "base/units.h"
#include "cache_rig.h"
#include "double_control.h"

using namespace vattn;
using namespace vattn::test;

namespace {

struct PoolRig {
  PoolRig(const Backend& backend, size_t budget_pages, size_t max_extent_pages = 1)
      : ledger(std::make_shared<Ledger>(backend.open())),
        faults(inject_faults(ledger)),
        page(ledger->page_bytes()),
        pool(faults, page, max_extent_pages * page, budget_pages * page) {}

  std::vector<ExtentId> take(size_t n_pages) {
    std::vector<ExtentId> taken;
    pool.take(n_pages, taken);
    pool.check();
    return taken;
  }
  void give_back(const std::vector<ExtentId>& extents) {
    for (const ExtentId id : extents) pool.give_back(id);
    pool.check();
  }
  std::string sizes(const std::vector<ExtentId>& extents) const {
    std::string out;
    for (const ExtentId id : extents) out += std::to_string(pool.pages(id)) + " ";
    return out;
  }
  size_t held() const { return pool.stats().held_bytes / page; }
  size_t free() const { return pool.stats().free_bytes / page; }
  size_t created() const { return ledger->now().created_bytes / page; }

  std::shared_ptr<Ledger> ledger;
  std::shared_ptr<FaultDriver> faults;
  size_t page;
  Pool pool;
};

void taking_and_giving_back_adds_up(const Backend& backend) {
  PoolRig rig(backend, 10);
  CHECK_EQ(rig.pool.available_pages(), 10u);
  const auto a = rig.take(4);
  const auto b = rig.take(3);
  CHECK_EQ(a.size(), 4u);
  CHECK_EQ(rig.held(), 7u);
  CHECK_EQ(rig.free(), 0u);
  CHECK_EQ(rig.pool.available_pages(), 3u);
  rig.give_back(a);
  CHECK_EQ(rig.held(), 7u);
  CHECK_EQ(rig.free(), 4u);
  CHECK_EQ(rig.pool.available_pages(), 7u);
  CHECK_EQ(rig.pool.stats().peak_taken_bytes, 7 * rig.page);
  CHECK_EQ(rig.ledger->now().creates, 7u);
  rig.give_back(rig.take(4));
  CHECK_EQ(rig.ledger->now().creates, 7u);  // what was free is used again
  rig.give_back(b);
}

void extents_come_largest_first_and_are_that_large(const Backend& backend) {
  PoolRig rig(backend, 32, 8);
  const auto taken = rig.take(13);
  CHECK_EQ(rig.sizes(taken), "8 4 1 ");
  CHECK_EQ(rig.pool.max_extent_bytes(), 8 * rig.page);
  for (const ExtentId id : taken) {
    CHECK_EQ(rig.pool.extent(id).bytes, rig.pool.pages(id) * rig.page);
    CHECK_EQ(rig.pool.references(id), 1u);
  }
  rig.give_back(taken);
}

void taking_appends(const Backend& backend) {
  PoolRig rig(backend, 8);
  std::vector<ExtentId> taken = rig.take(2);
  const ExtentId first = taken[0];
  rig.pool.take(0, taken);
  CHECK_EQ(taken.size(), 2u);
  rig.pool.take(3, taken);
  CHECK_EQ(taken.size(), 5u);
  CHECK(taken[0] == first);
  rig.give_back(taken);
}

void the_budget_is_never_exceeded(const Backend& backend) {
  PoolRig rig(backend, 10, 4);
  const auto taken = rig.take(7);
  std::vector<ExtentId> more;
  check_out_of_pages([&] { rig.pool.take(4, more); }, 4, 3);
  CHECK(more.empty());
  CHECK_EQ(rig.created(), 7u);
  const auto rest = rig.take(3);
  CHECK_EQ(rig.created(), 10u);
  check_out_of_pages([&] { rig.take(1); }, 1, 0);
  CHECK_THROWS(OutOfPages, rig.take(1), "need 1 pages, 0 free; free a request or raise memory");
  rig.give_back(taken);
  rig.give_back(rest);
}

// A budget is used in whole pages.
void a_budget_that_ends_within_a_page_is_rounded_down(const Backend& backend) {
  const auto driver = backend.open();
  const size_t page = driver->page_bytes();
  const Pool pool(driver, page, page, 3 * page - 1);
  CHECK_EQ(pool.stats().budget_bytes, 2 * page);
  CHECK_EQ(pool.available_pages(), 2u);
}

void a_free_extent_that_is_too_large_is_traded(const Backend& backend) {
  PoolRig rig(backend, 8, 8);
  rig.give_back(rig.take(8));
  CHECK_EQ(rig.created(), 8u);
  const auto taken = rig.take(3);
  CHECK_EQ(rig.sizes(taken), "2 1 ");
  CHECK_EQ(rig.created(), 3u);
  rig.give_back(taken);
}

void a_failed_create_leaves_what_was_made_as_free_extents(const Backend& backend) {
  PoolRig rig(backend, 10);
  std::vector<ExtentId> taken;
  rig.faults->fail_nth(3);
  CHECK_THROWS(DriverError, rig.pool.take(4, taken), "create failed (-1): injected fault");
  CHECK(taken.empty());
  CHECK_EQ(rig.held(), 2u);
  CHECK_EQ(rig.free(), 2u);
  rig.pool.check();
  taken = rig.take(4);
  CHECK_EQ(rig.created(), 4u);
  rig.give_back(taken);
}

void references_are_counted(const Backend& backend) {
  PoolRig rig(backend, 2);
  const ExtentId id = rig.take(1)[0];
  rig.pool.add_reference(id);
  CHECK_EQ(rig.pool.references(id), 2u);
  rig.pool.give_back(id);
  rig.pool.check();
  CHECK_EQ(rig.pool.references(id), 1u);
  CHECK_EQ(rig.free(), 0u);
  rig.pool.give_back(id);
  rig.pool.check();
  CHECK_EQ(rig.free(), 1u);
}

void trim_returns_free_extents_only(const Backend& backend) {
  PoolRig rig(backend, 16, 4);
  const auto kept = rig.take(5);
  rig.give_back(rig.take(6));
  CHECK_EQ(rig.pool.trim(), 6 * rig.page);
  rig.pool.check();
  CHECK_EQ(rig.created(), 5u);
  CHECK_EQ(rig.pool.trim(), 0u);
  CHECK_EQ(rig.pool.available_pages(), 11u);
  rig.give_back(kept);
}

void prepare_makes_one_extent_at_a_time_until_take_needs_none(const Backend& backend) {
  PoolRig rig(backend, 16, 4);
  for (size_t created : {4u, 8u, 9u}) {
    CHECK(rig.pool.prepare(9));
    rig.pool.check();
    CHECK_EQ(rig.created(), created);
    CHECK_EQ(rig.free(), created);
  }
  CHECK(!rig.pool.prepare(9));
  const size_t creates = rig.ledger->now().creates;
  rig.give_back(rig.take(9));
  CHECK_EQ(rig.ledger->now().creates, creates);
}

void prepare_neither_exceeds_the_budget_nor_trades(const Backend& backend) {
  PoolRig rig(backend, 8, 8);
  CHECK(!rig.pool.prepare(9));
  CHECK_EQ(rig.created(), 0u);
  rig.give_back(rig.take(8));
  CHECK(!rig.pool.prepare(3));
  CHECK_EQ(rig.created(), 8u);
}

void rebalance_makes_room_for_a_large_extent(const Backend& backend) {
  PoolRig rig(backend, 8, 4);
  std::vector<std::vector<ExtentId>> singles;
  for (int i = 0; i < 8; ++i) singles.push_back(rig.take(1));
  CHECK(!rig.pool.rebalance());  // nothing is free
  for (size_t i = 0; i < 3; ++i) rig.give_back(singles[i]);
  CHECK(!rig.pool.rebalance());  // three are not enough for a large one
  rig.give_back(singles[3]);
  size_t n = 0;
  while (rig.pool.rebalance()) ++n;
  rig.pool.check();
  CHECK_EQ(n, 4u);
  const auto large = rig.take(4);
  CHECK_EQ(rig.sizes(large), "4 ");
  rig.give_back(large);
  CHECK(!rig.pool.rebalance());  // there is a large one
  for (size_t i = 4; i < 8; ++i) rig.give_back(singles[i]);
}

void bad_sizes_are_refused_by_name(const Backend& backend) {
  const auto driver = backend.open();
  const size_t page = driver->page_bytes();
  const auto make = [&](size_t page_bytes, size_t max_extent_bytes, size_t budget_bytes) {
    Pool(driver, page_bytes, max_extent_bytes, budget_bytes);
  };
  CHECK_THROWS(std::invalid_argument, make(0, page, page), "page_bytes is 0, expected a power");
  CHECK_THROWS(std::invalid_argument, make(3 * page, 4 * page, page), "page_bytes is ");
  CHECK_THROWS(std::invalid_argument, make(page / 2, page, page),
               "a multiple of " + std::to_string(page) + ", the driver's granularity");
  CHECK_THROWS(std::invalid_argument, make(page, 3 * page, page),
               "max_extent_bytes is " + std::to_string(3 * page) + ", expected a power of two");
  CHECK_THROWS(std::invalid_argument, make(2 * page, page, page), "max_extent_bytes is ");
  CHECK_THROWS(std::invalid_argument, make(page, 0, page), "max_extent_bytes is 0");
  CHECK_THROWS(std::invalid_argument, make(page, page << 32, page), "max_extent_bytes is ");
  const size_t all = driver->memory_info().total_bytes;
  CHECK_THROWS(std::invalid_argument, make(page, page, all + page), "lower memory");
  make(2 * page, 4 * page, 8 * page);
}

// Total memory 12 pages, of which others hold 6: the budget of 10 cannot be had.
struct ScarceRig : PoolRig {
  explicit ScarceRig(const Backend& backend, size_t max_extent_pages = 1)
      : PoolRig(scarce(backend), 10, max_extent_pages) {
    other = {ledger->create(6 * page), 6 * page};
  }
  ~ScarceRig() { ledger->release(other); }
  ScarceRig(const ScarceRig&) = delete;
  ScarceRig& operator=(const ScarceRig&) = delete;

  static const Backend& scarce(const Backend& backend) {
    DOUBLE(set_total_memory)(12 * 2 * kMiB);
    return backend;
  }
  Extent other{};
};

void a_driver_without_memory_is_out_of_pages(const Backend& backend) {
  ScarceRig rig(backend);
  const auto taken = rig.take(4);
  CHECK_THROWS(OutOfPages, rig.take(3), "the driver has no memory left below the budget");
  check_out_of_pages([&] { rig.take(3); }, 3, 2);  // what it managed to make is free
  const auto rest = rig.take(2);
  CHECK_EQ(rig.created(), 6u + 6);
  CHECK(!rig.pool.prepare(1));
  rig.give_back(taken);
  rig.give_back(rest);
}

void what_is_free_serves_where_the_driver_has_no_large_extent_left(const Backend& backend) {
  ScarceRig rig(backend, 4);
  const auto a = rig.take(1), b = rig.take(1), c = rig.take(1), d = rig.take(1);
  for (const auto& extents : {a, b, c, d}) rig.give_back(extents);
  const auto taken = rig.take(4);
  CHECK_EQ(rig.sizes(taken), "1 1 1 1 ");
  rig.give_back(taken);
}

// The engine preempts until needed - free is covered: free must stay below needed.
void out_of_pages_is_always_short_of_something(const Backend& backend) {
  ScarceRig rig(backend, 4);
  const auto four = rig.take(4), two = rig.take(2);
  rig.give_back(four);
  try {
    rig.give_back(rig.take(1));
  } catch (const OutOfPages& error) {
    CHECK(error.free() < error.needed());
  }
  rig.give_back(two);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = over_all_backends(
      {BACKEND_TEST(taking_and_giving_back_adds_up),
       BACKEND_TEST(extents_come_largest_first_and_are_that_large), BACKEND_TEST(taking_appends),
       BACKEND_TEST(the_budget_is_never_exceeded),
       BACKEND_TEST(a_budget_that_ends_within_a_page_is_rounded_down),
       BACKEND_TEST(a_free_extent_that_is_too_large_is_traded),
       BACKEND_TEST(a_failed_create_leaves_what_was_made_as_free_extents),
       BACKEND_TEST(references_are_counted), BACKEND_TEST(trim_returns_free_extents_only),
       BACKEND_TEST(prepare_makes_one_extent_at_a_time_until_take_needs_none),
       BACKEND_TEST(prepare_neither_exceeds_the_budget_nor_trades),
       BACKEND_TEST(rebalance_makes_room_for_a_large_extent),
       BACKEND_TEST(bad_sizes_are_refused_by_name)});
  for (const Test& test :
       over_cuda({BACKEND_TEST(a_driver_without_memory_is_out_of_pages),
                  BACKEND_TEST(what_is_free_serves_where_the_driver_has_no_large_extent_left),
                  BACKEND_TEST(out_of_pages_is_always_short_of_something)})) {
    tests.push_back(test);
  }
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
