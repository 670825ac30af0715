// Several threads on one cache, and two caches on one pool. Above all to be run under a race
// detector.
#include <atomic>
#include <chrono>
#include <random>
#include <thread>

#include "base/errors.h"
#include "cache_rig.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// The threads of a test. A failed check in one of them fails the test.
class Crew {
 public:
  ~Crew() { join(); }
  void run(const std::function<void()>& body) {
    threads_.emplace_back([this, body] {
      try {
        body();
      } catch (const CheckFailed& check) {
        note(check.text);
      } catch (const std::exception& error) {
        note(error.what());
      }
    });
  }
  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  void finish() {
    join();
    CHECK_EQ(problems_, "");
  }

 private:
  void note(const std::string& text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    problems_ += text + "\n";
  }
  std::vector<std::thread> threads_;
  std::mutex mutex_;  // guards problems_
  std::string problems_;
};

RigOptions busy() {
  RigOptions options;
  options.rows = 6;
  options.tokens_per_page = 2;
  options.budget_pages = 60;
  options.max_extent_pages = 4;
  options.lookahead = 7;
  return options;
}

// A request of its own, from alloc to free, over and over. Memory may be short: then it ends early.
void serve(KvCache& kv, unsigned seed, int requests) {
  std::mt19937 random(seed);
  const auto any = [&](int64_t high) {
    return std::uniform_int_distribution<int64_t>(0, high)(random);
  };
  const auto stream = static_cast<Stream>(0x100 + seed);
  for (int i = 0; i < requests; ++i) {
    int64_t row = -1;
    try {
      row = static_cast<int64_t>(kv.alloc(any(20), stream));
      const auto* first = reinterpret_cast<const unsigned char*>(
          kv.base() + static_cast<size_t>(row) * kv.layout().regions[0].row_stride);
      const size_t token_bytes = kv.layout().regions[0].token_bytes;
      for (int64_t len = 1 + any(5); len < 40; len += 1 + any(6)) {
        kv.step_rows({{row, len}});
        auto* last = const_cast<unsigned char*>(first) + static_cast<size_t>(len - 1) * token_bytes;
        *last = static_cast<unsigned char>(seed);
        CHECK(kv.mapped_tokens(row) >= static_cast<size_t>(len));
        CHECK_EQ(*last, static_cast<unsigned char>(seed));
      }
    } catch (const OutOfPages&) {
    } catch (const OutOfRows&) {
    }
    if (row >= 0) kv.free(row, stream);
  }
}

// A request whose rows share memory, with its own rows and with those of other threads.
class Sharer {
 public:
  Sharer(KvCache& kv, unsigned seed)
      : kv_(kv),
        mark_(static_cast<unsigned char>(seed)),
        random_(seed),
        stream_(static_cast<Stream>(0x100 + seed)) {}

  // Memory and rows may be short: then it ends early.
  void serve() {
    try {
      const int64_t parent = own(kv_.alloc(any(1, 20), stream_));
      grow(parent, any(4, 30));
      for (const BatchIdx child : kv_.fork(parent, length(parent) - 1, 2, stream_)) own(child);
      for (int i = 0; i < 4; ++i) act(rows_[static_cast<size_t>(any(0, 2))]);
      for (const int64_t row : rows_) check(row, mark_);
      find_again();
    } catch (const OutOfPages&) {
    } catch (const OutOfRows&) {
    }
    for (const int64_t row : rows_) {
      if (any(0, 1) == 0 && length(row) > 0) kv_.keep_prefix(row, any(1, length(row)));
      kv_.free(row, stream_);
    }
    rows_.clear();
  }

 private:
  int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  int64_t own(BatchIdx row) {
    rows_.push_back(static_cast<int64_t>(row));
    return rows_.back();
  }
  int64_t length(int64_t row) const { return kv_.seq_lens()[static_cast<size_t>(row)]; }
  unsigned char* token(int64_t row, int64_t token) const {
    const Region& r = kv_.layout().regions[0];
    return reinterpret_cast<unsigned char*>(kv_.base() + static_cast<size_t>(row) * r.row_stride +
                                            static_cast<size_t>(token) * r.token_bytes);
  }
  void grow(int64_t row, int64_t by) {
    const int64_t before = length(row), after = std::min<int64_t>(64, before + by);
    kv_.step_rows({{row, after}});
    for (int64_t t = before; t < after; ++t) *token(row, t) = mark_;
  }
  void check(int64_t row, unsigned char mark) const {
    for (int64_t t = 0; t < length(row); ++t) CHECK_EQ(int{*token(row, t)}, int{mark});
  }
  void act(int64_t row) {
    switch (any(0, 4)) {
      case 0:
        return kv_.truncate(row, any(0, length(row)));
      case 1:
        return kv_.reorder({rows_[1], rows_[2]}, {rows_[2], rows_[0]}, stream_);
      case 2:
        if (length(row) > 3) kv_.compact(row, {1, length(row) - 1}, 0, stream_);
        return;
      default:
        return grow(row, any(1, 5));
    }
  }
  // Tokens that some thread has kept: all are its.
  void find_again() {
    const std::vector<KeptPrefix> kept = kv_.kept_prefixes();
    for (size_t i = 0; i < kept.size(); ++i) {
      const auto row = static_cast<int64_t>(i), tokens = static_cast<int64_t>(kept[i].tokens);
      if (kept[i].life == 0) continue;
      if (any(0, 1) == 0 && kv_.adopt_prefix(row, kept[i].life, tokens, stream_)) {
        check(row, *token(row, 0));
        kv_.truncate(row, 0);
        own(static_cast<BatchIdx>(row));
      } else if (const auto forked = kv_.fork_prefix(row, kept[i].life, tokens, stream_)) {
        const int64_t child = own(forked->first);
        check(child, *token(child, 0));
      } else {
        kv_.forget_prefix(row, kept[i].life);
      }
      return;
    }
  }

  KvCache& kv_;
  const unsigned char mark_;
  std::mt19937 random_;
  const Stream stream_;
  std::vector<int64_t> rows_;
};

void watch(KvCache& kv, const std::atomic<bool>& done, bool trims) {
  while (!done) {
    kv.check();
    const CacheStats stats = kv.stats();
    CHECK(stats.pool.held_bytes <= stats.pool.budget_bytes);
    CHECK(stats.mapped_bytes <= stats.pool.held_bytes);
    if (trims) kv.trim();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

void threads_share_a_cache(const Backend& backend) {
  Rig rig(backend, busy());
  std::atomic<bool> done{false};
  Crew watchers, servers;
  watchers.run([&] { watch(*rig.kv, done, /*trims=*/true); });
  for (unsigned seed = 1; seed <= 4; ++seed) servers.run([&, seed] { serve(*rig.kv, seed, 60); });
  servers.join();
  done = true;
  servers.finish();
  watchers.finish();
  CHECK_EQ(rig.kv->stats().rows_active, 0u);
  rig.kv->check();
  rig.end();
}

void threads_share_rows(const Backend& backend) {
  const int rounds = backend.is_cuda ? 3 : 60;  // its pages are large, and every one is copied
  for (const Scrub scrub : {Scrub::kNever, Scrub::kOnReuse}) {
    RigOptions options = busy();
    options.rows = 14;
    options.budget_pages = 90;
    options.scrub = scrub;
    Rig rig(backend, options);
    std::atomic<bool> done{false};
    Crew watchers, servers;
    watchers.run([&] { watch(*rig.kv, done, /*trims=*/true); });
    for (unsigned seed = 1; seed <= 4; ++seed) {
      servers.run([&, seed] {
        Sharer sharer(*rig.kv, seed);
        for (int i = 0; i < rounds; ++i) sharer.serve();
      });
    }
    servers.join();
    done = true;
    servers.finish();
    watchers.finish();
    CHECK_EQ(rig.kv->stats().rows_active, 0u);
    rig.kv->check();
    rig.end();
  }
}

void caches_of_two_threads_share_a_pool(const Backend& backend) {
  Rig rig(backend, busy());
  KvCache other(rig.pool, rig_spec(rig.page, busy()), busy().lookahead);
  std::atomic<bool> done{false};
  Crew watchers, servers;
  for (KvCache* kv : {rig.kv.get(), &other}) {
    watchers.run([&, kv] { watch(*kv, done, /*trims=*/false); });
  }
  servers.run([&] { serve(*rig.kv, 1, 80); });
  servers.run([&] { serve(other, 2, 80); });
  servers.join();
  done = true;
  servers.finish();
  watchers.finish();
  rig.pool->check();
  other.close();
  rig.kv->check();
}

// Until it is closed the cache works; after that it says so.
void closing_under_load_is_an_error_to_the_others(const Backend& backend) {
  for (int round = 0; round < 10; ++round) {
    Rig rig(backend, busy());
    std::atomic<int> steps{0};
    Crew crew;
    for (unsigned seed = 1; seed <= 2; ++seed) {
      crew.run([&, seed] {
        try {
          const int64_t row = rig.alloc(0, static_cast<Stream>(seed));
          for (int64_t len = 0;; ++len) {
            rig.kv->step_rows({{row, len % 20}});
            ++steps;
          }
        } catch (const std::invalid_argument& error) {
          CHECK_EQ(error.what(),
                   std::string("the cache is closed; make a new one with vattn.init()"));
        }
      });
    }
    while (steps < 30) std::this_thread::yield();
    crew.run([&] { rig.kv->close(); });
    crew.run([&] { rig.kv->close(); });
    crew.finish();
    CHECK(rig.kv->closed());
    rig.kv->check();
    rig.end();
  }
}

void several_threads_may_stop_the_background_thread(const Backend& backend) {
  for (int round = 0; round < 20; ++round) {
    Rig rig(backend, busy());
    rig.start({1, 2});
    Crew crew;
    for (int i = 0; i < 3; ++i) crew.run([&] { rig.kv->stop_background(); });
    crew.run([&] { rig.step({9, 9, 0, 0, 0, 0}); });
    crew.finish();
    rig.step({15, 15, 0, 0, 0, 0});
    rig.kv->check();
    rig.end();
  }
}

void a_cache_can_go_while_the_background_thread_works(const Backend& backend) {
  for (int round = 0; round < 40; ++round) {
    Rig rig(backend, busy());
    rig.start({1, 2, 3});
    rig.step({4, 4, 4, 0, 0, 0});
    rig.end();
  }
}

void the_background_thread_maps_ahead(const Backend& backend) {
  Rig rig(backend, busy());
  rig.start({1});
  CHECK(eventually([&] { return rig.mapped(0) >= 8; }));
  const uint64_t grown = rig.kv->stats().steps_with_growth;
  for (int64_t len = 2; len < 40; ++len) {
    CHECK(eventually([&] { return rig.mapped(0) >= static_cast<size_t>(len); }));
    rig.kv->step_rows({{0, len}});
  }
  const CacheStats stats = rig.kv->stats();
  CHECK_EQ(stats.steps_with_growth, grown);
  CHECK(stats.prefetched_runs > 0);
  CHECK_EQ(stats.prefetch_failures, 0u);
  rig.end();
}

void what_alloc_was_told_to_expect_is_mapped_before_the_first_step(const Backend& backend) {
  Rig rig(backend, busy());
  CHECK_EQ(rig.alloc(20), 0);
  CHECK(eventually([&] { return rig.mapped(0) >= 20; }));
  rig.step({20, 0, 0, 0, 0, 0});
  CHECK_EQ(rig.kv->stats().steps_with_growth, 0u);
  rig.end();
}

void waiting_for_the_background_thread_waits_for_all_its_work(const Backend& backend) {
  Rig rig(backend, busy());
  rig.start({1, 1, 1});
  for (int64_t len = 2; len < 30; ++len) {
    rig.step({len, len, len, 0, 0, 0});
    CHECK(rig.kv->wait_background(10'000));
    const size_t ahead = static_cast<size_t>(len) + busy().lookahead;
    for (int64_t row = 0; row < 3; ++row) CHECK(rig.mapped(row) >= ahead);
  }
  rig.kv->stop_background();
  CHECK(rig.kv->wait_background(0));
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      over_all_backends(
          {BACKEND_TEST(threads_share_a_cache), BACKEND_TEST(threads_share_rows),
           BACKEND_TEST(caches_of_two_threads_share_a_pool),
           BACKEND_TEST(closing_under_load_is_an_error_to_the_others),
           BACKEND_TEST(several_threads_may_stop_the_background_thread),
           BACKEND_TEST(a_cache_can_go_while_the_background_thread_works),
           BACKEND_TEST(the_background_thread_maps_ahead),
           BACKEND_TEST(waiting_for_the_background_thread_waits_for_all_its_work),
           BACKEND_TEST(what_alloc_was_told_to_expect_is_mapped_before_the_first_step)}),
      argc > 1 ? argv[1] : nullptr);
}
