// Whichever driver call fails, in whatever the cache is doing: no active row changes, it all adds
// up, nothing leaks, and the cache works again when the driver does.
#include "base/errors.h"
#include "cache_rig.h"
#include "double_control.h"

using namespace vattn;
using namespace vattn::test;

namespace {

struct Scenario {
  RigOptions options;
  std::function<void(Rig&)> prepare;
  std::function<void(Rig&)> act;
};

struct Snapshot {
  explicit Snapshot(const Rig& rig) : seq_lens(rig.kv->seq_lens()) {
    for (size_t row = 0; row < seq_lens.size(); ++row) {
      active.push_back(rig.state(static_cast<int64_t>(row)) == RowState::kActive);
    }
  }
  bool operator==(const Snapshot& other) const {
    return seq_lens == other.seq_lens && active == other.active;
  }
  std::vector<int64_t> seq_lens;
  std::vector<bool> active;
};

// True: it threw.
bool fails(Rig& rig, const Scenario& scenario) {
  try {
    scenario.act(rig);
    return false;
  } catch (const DriverError&) {
  } catch (const OutOfPages& error) {
    CHECK(error.free() < error.needed());
  }
  return true;
}

// Runs the scenario with a failure from the nth call on. False: it made fewer calls than that.
bool survives(const Backend& backend, const Scenario& scenario, uint64_t nth, bool persistent) {
  Rig rig(backend, scenario.options);
  rig.kv->stop_background();  // it would take some of the failures
  scenario.prepare(rig);
  const Snapshot before(rig);
  if (persistent) {
    rig.faults->fail_from(nth);
  } else {
    rig.faults->fail_nth(nth);
  }
  const bool threw = fails(rig, scenario);
  const bool injected = rig.faults->injected() != 0;
  rig.faults->disarm();
  CHECK(injected || !threw);
  rig.kv->check();
  if (threw) {
    CHECK(Snapshot(rig) == before);
    scenario.act(rig);
    rig.kv->check();
  }
  rig.end();
  return injected;
}

void sweep(const Backend& backend, const Scenario& scenario, uint64_t at_least) {
  for (const bool persistent : {false, true}) {
    uint64_t nth = 1;
    while (survives(backend, scenario, nth, persistent)) ++nth;
    CHECK(nth > at_least);
  }
}

void growing_rows(const Backend& backend) {
  sweep(backend,
        {{}, [](Rig& rig) { rig.start({1, 0, 2}); }, [](Rig& rig) { rig.step({7, 3, 2, 0}); }}, 11);
}

// Pages of a step that failed go back to the pool, where the next one finds them.
void a_failed_step_keeps_no_page(const Backend& backend) {
  for (uint64_t nth = 1;; ++nth) {
    Rig rig(backend);
    rig.start({1, 0, 2});
    rig.faults->fail_nth(nth);
    try {
      rig.step({7, 0, 9, 0});
      CHECK(nth > 2);
      return;
    } catch (const DriverError&) {
    }
    CHECK_EQ(rig.mapped(0), 1u);
    CHECK_EQ(rig.mapped(2), 2u);
    CHECK_EQ(rig.pages_mapped(), 3u);
    CHECK_EQ(rig.pool->stats().held_bytes - rig.pool->stats().free_bytes, 3 * rig.page);
    rig.faults->disarm();
    rig.end();
  }
}

void growing_many_regions(const Backend& backend) {
  RigOptions options;
  options.kind = LayoutKind::kPerLayer;
  options.layers = 4;
  options.budget_pages = 100;
  options.tokens_per_page = 2;
  sweep(backend,
        {options, [](Rig& rig) { rig.start({1, 3}); }, [](Rig& rig) { rig.step({5, 4, 0, 0}); }},
        24);
}

void growing_by_super_pages(const Backend& backend) {
  RigOptions options;
  options.max_extent_pages = 8;
  sweep(backend,
        {options, [](Rig& rig) { rig.start({3, 5}); }, [](Rig& rig) { rig.step({30, 6, 0, 0}); }},
        6);
}

// 16 pages, all of them under idle rows and ahead of an active one, in extents of other sizes.
void growing_by_what_is_reclaimed(const Backend& backend) {
  RigOptions options;
  options.budget_pages = 16;
  options.max_extent_pages = 4;
  sweep(backend,
        {options,
         [](Rig& rig) {
           rig.start({5, 4, 6});
           rig.free(0, kStreamA);
           rig.free(1, kStreamB);
           rig.free(2, kStreamA);
           CHECK_EQ(rig.alloc(6, kStreamB), 2);
           rig.step({0, 0, 1, 0});
           CHECK_EQ(rig.alloc(0, kStreamA), 1);
         },
         [](Rig& rig) { rig.step({0, 12, 2, 0}); }},
        backend.is_cuda ? 6 : 4);
}

// The idle row has one extent of eight pages; two are wanted.
void growing_by_a_trade(const Backend& backend) {
  RigOptions options;
  options.budget_pages = 9;
  options.max_extent_pages = 8;
  sweep(backend,
        {options,
         [](Rig& rig) {
           rig.start({8, 1});
           rig.free(0, kStreamA);
         },
         [](Rig& rig) { rig.step({0, 3, 0, 0}); }},
        backend.is_cuda ? 4 : 3);
}

void growing_many_regions_by_what_is_reclaimed(const Backend& backend) {
  RigOptions options;
  options.kind = LayoutKind::kPerLayer;
  options.layers = 3;
  options.budget_pages = 40;
  sweep(backend,
        {options,
         [](Rig& rig) {
           rig.start({1, 2, 3});
           rig.free(1, kStreamA);
           rig.free(2, kStreamB);
         },
         [](Rig& rig) { rig.step({6, 0, 0, 0}); }},
        18);
}

void starting_and_ending_requests(const Backend& backend) {
  sweep(backend,
        {{},
         [](Rig& rig) {
           rig.start({2, 3, 4});
           rig.free(2, kStreamA);
         },
         [](Rig& rig) {
           const int64_t row = rig.alloc(4, kStreamB);
           try {
             rig.kv->step_rows({{row, 5}});
             rig.free(row, kStreamA);
           } catch (...) {
             rig.faults->disarm();
             rig.free(row, kStreamB);
             throw;
           }
         }},
        backend.is_cuda ? 4 : 3);
}

void freeing(const Backend& backend) {
  sweep(backend,
        {{},
         [](Rig& rig) {
           rig.start({2, 3});
           rig.free(0, kStreamA);
           CHECK_EQ(rig.alloc(2, kStreamA), 0);
         },
         [](Rig& rig) { rig.free(0, kStreamB); }},
        backend.is_cuda ? 2 : 1);
}

void adopting_while_others_retire(const Backend& backend) {
  sweep(backend,
        {{},
         [&](Rig& rig) {
           rig.start({2, 3, 4});
           if (backend.is_cuda) set_busy(kStreamA, true);
           rig.free(0, kStreamA);
           rig.free(1, kStreamA);
           rig.kv->trim();
           if (backend.is_cuda) set_busy(kStreamA, false);
         },
         [](Rig& rig) { rig.alloc(3, kStreamB); }},
        backend.is_cuda ? 4 : 0);
}

void trimming(const Backend& backend) {
  sweep(backend,
        {{},
         [](Rig& rig) {
           rig.start({2, 3, 4});
           rig.free(0, kStreamA);
           rig.free(2, kStreamB);
         },
         [](Rig& rig) { rig.kv->trim(); }},
        2);
}

void waiting_for_the_device(const Backend& backend) {
  RigOptions options;
  options.budget_pages = 10;
  sweep(backend,
        {options,
         [](Rig& rig) {
           rig.start({6, 2});
           rig.free_while_busy(0, 6, kStreamA);
         },
         [](Rig& rig) {
           waits_for(kStreamA, "cuEventSynchronize", [&] { rig.step({0, 8, 0, 0}); });
         }},
        4);
}

// A cache that was never made leaves nothing.
void making_a_cache(const Backend& backend) {
  Rig rig(backend);
  rig.faults->fail_nth(1);
  CHECK_THROWS(DriverError, KvCache(rig.pool, rig_spec(rig.page, {}), 0), "reserve failed (-1)");
  CHECK_EQ(rig.faults->injected(), 1u);
  CHECK_EQ(rig.pool->users(), 1);
  rig.end();
}

// Waiting may fail: what there is, is unmapped all the same.
void closing_without_waiting(const Backend& backend) {
  Rig rig(backend);
  rig.kv->stop_background();
  rig.start({2, 3});
  rig.free(1, kStreamA);
  rig.faults->fail_nth(1);
  rig.kv->close();
  CHECK_EQ(rig.faults->injected(), 1u);
  CHECK_EQ(rig.ledger->now().created_bytes, 0u);
  rig.kv->check();
  rig.end();
}

// A refused unmap leaves its row mapped; the destructor tries again, before the addresses go.
void closing(const Backend& backend) {
  for (uint64_t nth = 1;; ++nth) {
    Rig rig(backend);
    rig.kv->stop_background();
    rig.start({2, 3, 4});
    rig.free(1, kStreamA);
    rig.faults->fail_nth(nth);
    rig.kv->close();
    const bool injected = rig.faults->injected() != 0;
    rig.faults->disarm();
    CHECK(rig.kv->closed());
    rig.kv->check();
    rig.end();
    if (injected) continue;
    CHECK(nth > 4);
    return;
  }
}

// Prefetching fails in silence: it only means that step() maps itself.
void prefetching(const Backend& backend) {
  RigOptions options;
  options.lookahead = 8;
  for (uint64_t nth = 1; nth < 20; ++nth) {
    Rig rig(backend, options);
    rig.start({1, 2});
    rig.faults->fail_from(nth);
    try {
      rig.step({2, 3, 0, 0});
      rig.step({3, 4, 0, 0});
    } catch (const DriverError&) {
    }
    rig.kv->check();
    rig.faults->disarm();
    rig.step({9, 9, 0, 0});
    rig.kv->check();
    rig.end();
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = over_all_backends(
      {BACKEND_TEST(growing_rows), BACKEND_TEST(a_failed_step_keeps_no_page),
       BACKEND_TEST(growing_many_regions), BACKEND_TEST(growing_by_super_pages),
       BACKEND_TEST(growing_by_what_is_reclaimed), BACKEND_TEST(growing_by_a_trade),
       BACKEND_TEST(growing_many_regions_by_what_is_reclaimed),
       BACKEND_TEST(starting_and_ending_requests), BACKEND_TEST(freeing),
       BACKEND_TEST(adopting_while_others_retire), BACKEND_TEST(trimming),
       BACKEND_TEST(making_a_cache), BACKEND_TEST(closing_without_waiting), BACKEND_TEST(closing),
       BACKEND_TEST(prefetching)});
  for (const Test& test : over_cuda({BACKEND_TEST(waiting_for_the_device)})) tests.push_back(test);
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
