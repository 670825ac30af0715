// What step() costs: nothing when everything is mapped, and little when a row grows by a lot.
#include <atomic>
#include <cstdlib>
#include <new>

#include "base/units.h"
#include "cache_rig.h"
#include "double_control.h"
#include "driver/host_driver.h"
#include "driver/tracing_driver.h"

using namespace vattn;
using namespace vattn::test;

namespace {

std::atomic<size_t> g_allocations{0};

}  // namespace

void* operator new(size_t bytes) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* const got = std::malloc(bytes)) return got;
  throw std::bad_alloc();
}
void operator delete(void* pointer) noexcept {
  std::free(pointer);
}
void operator delete(void* pointer, size_t) noexcept {
  std::free(pointer);
}

namespace {

void step_makes_no_call_and_no_allocation_when_all_is_mapped(const Backend& backend) {
  Rig rig(backend);
  rig.start({16, 16, 16});
  const std::vector<std::pair<int64_t, int64_t>> some = {{2, 16}, {0, 15}};
  std::vector<int64_t> seq_lens = {1, 2, 3, 0};
  const size_t calls = rig.ledger->now().calls;
  const size_t allocations = g_allocations;
  for (int i = 0; i < 13; ++i) {
    for (size_t row = 0; row < 3; ++row) ++seq_lens[row];
    rig.step(seq_lens);
    rig.kv->step_rows(some);
  }
  CHECK_EQ(g_allocations - allocations, 0u);
  CHECK_EQ(rig.ledger->now().calls, calls);
  CHECK_EQ(rig.kv->stats().steps_with_growth, 1u);
  rig.end();
}

// The test above would pass if nothing were counted.
void a_growing_step_is_counted(const Backend& backend) {
  Rig rig(backend);
  rig.start({1});
  const size_t calls = rig.ledger->now().calls;
  const size_t allocations = g_allocations;
  rig.step({2, 0, 0, 0});
  CHECK(g_allocations > allocations);
  CHECK(rig.ledger->now().calls > calls);
  rig.end();
}

// Bytes of one token, in a cache whose row 0 can grow by 1 GiB.
struct Gigabyte {
  Gigabyte(std::shared_ptr<VmmDriver> driver, size_t page_bytes, size_t max_extent_bytes)
      : tracer(trace_driver(std::move(driver))),
        pool(std::make_shared<Pool>(tracer, page_bytes, max_extent_bytes, 2 * kGiB)) {
    LayoutSpec spec;
    spec.item_bytes = 2;
    spec.max_seq_len = kGiB / kTokenBytes + 100;
    spec.page_bytes = page_bytes;
    spec.groups = {{{0}, 8, kTokenBytes / 32, kTokenBytes / 32}};
    kv = std::make_unique<KvCache>(pool, spec, /*lookahead=*/0);
    kv->alloc(0, Stream{});
  }
  void grow(int64_t tokens) { kv->step(&tokens, 1); }
  uint64_t calls() const {
    uint64_t count = 0;
    for (const auto& origin : tracer->counters()) {
      for (const CallCounters& call : origin) count += call.count;
    }
    return count;
  }

  static constexpr size_t kTokenBytes = 12 * kKiB;  // straddles pages
  std::shared_ptr<TracingDriver> tracer;
  std::shared_ptr<Pool> pool;
  std::unique_ptr<KvCache> kv;
};

// Nothing of the gigabyte is touched, so it takes no memory here.
void check_gigabyte(Gigabyte& cache) {
  const size_t page = cache.pool->page_bytes();
  const uint64_t before = cache.calls();
  int64_t tokens = 7;
  cache.grow(tokens);
  for (const int64_t more : {int64_t{kGiB / Gigabyte::kTokenBytes}, int64_t{1}, int64_t{50}}) {
    cache.grow(tokens += more);
    const size_t used = static_cast<size_t>(tokens) * Gigabyte::kTokenBytes;
    const size_t mapped = cache.kv->stats().mapped_bytes;
    CHECK(mapped >= used);
    CHECK(mapped - used < page);
  }
  CHECK(cache.calls() - before <= kGiB / page / 10);
  cache.kv->check();
  cache.kv.reset();
}

void a_gigabyte_of_64_kib_host_pages_takes_few_calls() {
  Gigabyte cache(open_host_driver(64 * kKiB), 64 * kKiB, 64 * kMiB);
  check_gigabyte(cache);
}

void a_gigabyte_of_2_mib_host_pages_takes_few_calls() {
  Gigabyte cache(open_host_driver(2 * kMiB), 2 * kMiB, 128 * kMiB);
  check_gigabyte(cache);
}

void a_gigabyte_on_cuda_takes_few_calls() {
  Gigabyte cache(cuda_backend().open(), 2 * kMiB, 128 * kMiB);
  const size_t before = DOUBLE(calls)("cuMemMap") + DOUBLE(calls)("cuMemCreate");
  check_gigabyte(cache);
  CHECK(DOUBLE(calls)("cuMemMap") + DOUBLE(calls)("cuMemCreate") - before <= 51);
}

void without_super_pages_it_takes_a_call_a_page() {
  Gigabyte cache(cuda_backend().open(), 2 * kMiB, 2 * kMiB);
  cache.grow(kGiB / Gigabyte::kTokenBytes);
  CHECK(DOUBLE(calls)("cuMemMap") >= 511);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests =
      over_all_backends({BACKEND_TEST(step_makes_no_call_and_no_allocation_when_all_is_mapped),
                         BACKEND_TEST(a_growing_step_is_counted)});
  tests.push_back(TEST(a_gigabyte_of_64_kib_host_pages_takes_few_calls));
  tests.push_back(TEST(a_gigabyte_of_2_mib_host_pages_takes_few_calls));
  for (const Test& test : on_clean_double({TEST(a_gigabyte_on_cuda_takes_few_calls),
                                           TEST(without_super_pages_it_takes_a_call_a_page)})) {
    tests.push_back(test);
  }
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
