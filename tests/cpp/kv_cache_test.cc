// The life of a row, over every kind of memory.
#include "core/kv_cache.h"

#include "base/errors.h"
#include "base/units.h"
#include "cache_rig.h"
#include "driver_contract.h"

using namespace vattn;
using namespace vattn::test;

namespace {

void a_row_goes_from_free_to_active_to_idle_to_active(const Backend& backend) {
  Rig rig(backend);
  CHECK(rig.state(0) == RowState::kFree);
  const int64_t row = rig.alloc();
  CHECK_EQ(row, 0);
  CHECK(rig.state(0) == RowState::kActive);
  rig.step({5, 0, 0, 0});
  CHECK_EQ(rig.mapped(0), 5u);
  CHECK_EQ(rig.pages_mapped(), 5u);
  rig.free(0);
  CHECK(rig.state(0) == RowState::kIdle);
  CHECK_EQ(rig.kv->seq_lens()[0], 0);
  CHECK_EQ(rig.mapped(0), 5u);  // still
  const LedgerCounts before = rig.ledger->now();
  CHECK_EQ(rig.alloc(5), 0);
  rig.step({5, 0, 0, 0});
  CHECK_EQ(rig.ledger->now().maps, before.maps);
  CHECK_EQ(rig.ledger->now().unmaps, before.unmaps);
  rig.kv->check();
  rig.end();
}

void the_idle_row_that_fits_best_is_adopted(const Backend& backend) {
  Rig rig(backend);
  rig.start({0, 5, 9});
  for (int64_t row = 0; row < 3; ++row) rig.free(row);
  CHECK_EQ(rig.alloc(5), 1);
  CHECK_EQ(rig.alloc(4), 2);
  CHECK_EQ(rig.alloc(4), 0);
  CHECK_EQ(rig.alloc(4), 3);
  CHECK_THROWS(OutOfRows, rig.alloc(), "all 4 rows are active; free one, or raise max_batch_size");
  rig.kv->check();
  rig.end();
}

void rows_grow_by_what_they_lack(const Backend& backend) {
  RigOptions options;
  options.tokens_per_page = 4;
  Rig rig(backend, options);
  rig.start({1, 4, 5});
  CHECK_EQ(rig.pages_mapped(), 1u + 1 + 2);
  CHECK_EQ(rig.mapped(2), 8u);
  rig.step({4, 5, 8, 0});
  CHECK_EQ(rig.pages_mapped(), 1u + 2 + 2);
  const CacheStats stats = rig.kv->stats();
  CHECK_EQ(stats.mapped_bytes, 5 * rig.page);
  CHECK_EQ(stats.used_bytes, 17 * rig.page / 4);
  CHECK_EQ(stats.rows_active, 3u);
  CHECK_EQ(stats.rows_free, 1u);
  CHECK_EQ(stats.steps, 2u);
  CHECK_EQ(stats.steps_with_growth, 2u);
  rig.end();
}

void shrinking_unmaps_nothing(const Backend& backend) {
  Rig rig(backend);
  rig.start({9, 9});
  rig.token(0, 8)[0] = 77;
  const size_t calls = rig.ledger->now().calls;
  rig.step({2, 0, 0, 0});
  rig.step({9, 9, 0, 0});
  CHECK_EQ(rig.ledger->now().calls, calls);
  CHECK_EQ(rig.token(0, 8)[0], 77);
  rig.kv->check();
  rig.end();
}

void step_rows_leaves_the_other_rows_alone(const Backend& backend) {
  Rig rig(backend);
  rig.start({3, 4});
  rig.kv->step_rows({{1, 6}});
  CHECK(rig.kv->seq_lens() == (std::vector<int64_t>{3, 6, 0, 0}));
  rig.kv->step_rows({{0, 1}, {0, 7}});  // the last one counts
  rig.kv->step_rows({});
  CHECK(rig.kv->seq_lens() == (std::vector<int64_t>{7, 6, 0, 0}));
  CHECK_EQ(rig.mapped(0), 7u);
  rig.end();
}

void a_region_of_every_tensor_is_mapped_per_layer(const Backend& backend) {
  RigOptions options;
  options.kind = LayoutKind::kPerLayer;
  options.layers = 3;
  options.tokens_per_page = 2;
  Rig rig(backend, options);
  rig.start({3});
  CHECK_EQ(rig.pages_mapped(), 6u * 2);
  for (size_t region = 0; region < 6; ++region) {
    for (size_t token = 0; token < 4; ++token) {
      CHECK(writable(reinterpret_cast<uintptr_t>(rig.token(0, token, region))));
    }
    CHECK(!writable(reinterpret_cast<uintptr_t>(rig.token(0, 4, region))));
  }
  rig.end();
}

void unusable_calls_are_refused_and_change_nothing(const Backend& backend) {
  Rig rig(backend);
  rig.start({3});
  const std::vector<int64_t> before = rig.kv->seq_lens();
  const size_t calls = rig.ledger->now().calls;
  using Bad = std::invalid_argument;
  CHECK_THROWS(Bad, rig.alloc(-1), "seq_len is -1, expected 0 to 64; raise max_seq_len");
  CHECK_THROWS(Bad, rig.alloc(65), "seq_len is 65");
  CHECK_THROWS(Bad, rig.alloc(INT64_MIN), "seq_len is -9223372036854775808");
  CHECK_THROWS(Bad, rig.free(-1), "row -1 is not in 0..3; raise max_batch_size for more rows");
  CHECK_THROWS(Bad, rig.free(4), "row 4 is not in 0..3");
  CHECK_THROWS(Bad, rig.free(1), "row 1 is free, not active");
  CHECK_THROWS(Bad, rig.step({3, 0, 0}), "seq_lens has 3 entries, expected max_batch_size = 4");
  CHECK_THROWS(Bad, rig.step({3, 0, 0, 0, 0}), "seq_lens has 5 entries");
  CHECK_THROWS(Bad, rig.step({-1, 0, 0, 0}), "seq_lens[0] is -1, expected 0 to max_seq_len = 64");
  CHECK_THROWS(Bad, rig.step({INT64_MIN, 0, 0, 0}), "seq_lens[0] is -9223372036854775808");
  CHECK_THROWS(Bad, rig.step({65, 0, 0, 0}), "seq_lens[0] is 65");
  CHECK_THROWS(Bad, rig.step({9, 1, 0, 0}), "seq_lens[1] is 1, but the row is free; alloc()");
  CHECK_THROWS(Bad, rig.kv->step_rows({{0, 5}, {4, 1}}), "row 4 is not in 0..3");
  CHECK_THROWS(Bad, rig.kv->step_rows({{0, 65}}), "seq_lens[0] is 65");
  CHECK_THROWS(Bad, rig.state(4), "row 4");
  CHECK_THROWS(Bad, rig.mapped(-1), "row -1");
  CHECK(rig.kv->seq_lens() == before);
  CHECK_EQ(rig.ledger->now().calls, calls);
  CHECK_EQ(rig.mapped(0), 3u);
  rig.kv->check();
  rig.free(0);
  CHECK_THROWS(Bad, rig.free(0), "row 0 is idle, not active: it was freed before");
  CHECK_THROWS(Bad, rig.step({1, 0, 0, 0}), "but the row is idle; alloc() it first, or pass 0");
  rig.end();
}

void a_budget_below_one_page_a_region_is_refused(const Backend& backend) {
  RigOptions options;
  options.kind = LayoutKind::kPerLayer;
  options.layers = 3;
  options.budget_pages = 5;
  CHECK_THROWS(std::invalid_argument, Rig(backend, options), "in each of 6 regions; raise memory");
  options.budget_pages = 6;
  Rig(backend, options).end();
}

void trim_returns_the_memory_of_idle_rows_and_free_pages(const Backend& backend) {
  Rig rig(backend);
  rig.start({3, 4, 5});
  rig.free(1);
  rig.free(2);
  CHECK_EQ(rig.kv->trim(), 9 * rig.page);
  CHECK_EQ(rig.ledger->now().created_bytes, 3 * rig.page);
  CHECK(rig.state(1) == RowState::kFree);
  CHECK_EQ(rig.mapped(1), 0u);
  CHECK_EQ(rig.mapped(0), 3u);
  CHECK_EQ(rig.kv->trim(), 0u);
  std::vector<ExtentId> taken;
  rig.pool->take(2, taken);
  for (const ExtentId id : taken) rig.pool->give_back(id);
  CHECK_EQ(rig.kv->trim(), 2 * rig.page);
  rig.kv->check();
  rig.end();
}

void a_closed_cache_refuses_work_and_says_so(const Backend& backend) {
  Rig rig(backend);
  rig.start({3, 4});
  rig.free(1);
  rig.kv->close();
  CHECK(rig.kv->closed());
  CHECK_EQ(rig.ledger->now().created_bytes, 0u);
  CHECK_EQ(rig.ledger->now().mapped_bytes, 0u);
  CHECK(rig.ledger->now().reserved_bytes > 0);  // tensors may still point there
  using Bad = std::invalid_argument;
  CHECK_THROWS(Bad, rig.alloc(), "the cache is closed");
  CHECK_THROWS(Bad, rig.free(0), "the cache is closed");
  CHECK_THROWS(Bad, rig.step({0, 0, 0, 0}), "the cache is closed");
  CHECK_THROWS(Bad, rig.kv->step_rows({}), "the cache is closed");
  CHECK_THROWS(Bad, rig.kv->trim(), "the cache is closed");
  CHECK_THROWS(Bad, rig.kv->seq_lens(), "the cache is closed");
  CHECK_THROWS(Bad, rig.state(0), "the cache is closed");
  CHECK_THROWS(Bad, rig.mapped(0), "the cache is closed");
  CHECK_EQ(rig.kv->stats().mapped_bytes, 0u);
  rig.kv->stop_background();
  rig.kv->check();
  rig.kv->close();
  rig.end();
}

void two_caches_share_one_pool(const Backend& backend) {
  RigOptions options;
  options.budget_pages = 10;
  Rig rig(backend, options);
  auto other = std::make_unique<KvCache>(rig.pool, rig_spec(rig.page, options), 0);
  CHECK_EQ(rig.pool->users(), 2);
  rig.start({6});
  other->alloc(0, Stream{});
  other->step_rows({{0, 4}});
  check_out_of_pages([&] { other->step_rows({{0, 5}}); }, 1, 0);
  check_out_of_pages([&] { rig.step({8, 0, 0, 0}); }, 2, 0);
  rig.kv->check();
  other->check();
  // The idle memory of one cache becomes the other's by trim().
  rig.free(0);
  check_out_of_pages([&] { other->step_rows({{0, 5}}); }, 1, 0);
  CHECK_EQ(rig.kv->trim(), 6 * rig.page);
  other->step_rows({{0, 10}});
  rig.kv->check();
  other->check();
  other.reset();
  CHECK_EQ(rig.pool->users(), 1);
  rig.kv->check();
  rig.end();
}

void the_addresses_never_change(const Backend& backend) {
  Rig rig(backend);
  const uintptr_t base = rig.kv->base();
  rig.start({9});
  rig.free(0);
  rig.kv->trim();
  rig.start({4});
  CHECK_EQ(rig.kv->base(), base);
  CHECK_EQ(base % rig.page, 0u);
  CHECK_EQ(rig.kv->layout().reserved_bytes, rig.ledger->now().reserved_bytes);
  CHECK_EQ(rig.kv->stats().reserved_bytes, rig.ledger->now().reserved_bytes);
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      over_all_backends(
          {BACKEND_TEST(a_row_goes_from_free_to_active_to_idle_to_active),
           BACKEND_TEST(the_idle_row_that_fits_best_is_adopted),
           BACKEND_TEST(rows_grow_by_what_they_lack), BACKEND_TEST(shrinking_unmaps_nothing),
           BACKEND_TEST(step_rows_leaves_the_other_rows_alone),
           BACKEND_TEST(a_region_of_every_tensor_is_mapped_per_layer),
           BACKEND_TEST(unusable_calls_are_refused_and_change_nothing),
           BACKEND_TEST(a_budget_below_one_page_a_region_is_refused),
           BACKEND_TEST(trim_returns_the_memory_of_idle_rows_and_free_pages),
           BACKEND_TEST(a_closed_cache_refuses_work_and_says_so),
           BACKEND_TEST(two_caches_share_one_pool), BACKEND_TEST(the_addresses_never_change)}),
      argc > 1 ? argv[1] : nullptr);
}
