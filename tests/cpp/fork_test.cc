// A forked child can do nothing with its parent's cache, and no harm either.
#include <unistd.h>

#include <cstring>
#include <thread>

#include "base/errors.h"
#include "cache_rig.h"
#include "driver_contract.h"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr const char* kSentence = "this process was forked after the cache was made";

// A child that hangs is ended by SIGALRM, and has then not held.
bool holds_in_child_soon(const std::function<bool()>& body) {
  return holds_in_child([&] {
    alarm(20);
    return body();
  });
}

RigOptions with_prefetch() {
  RigOptions options;
  options.lookahead = 4;
  options.max_extent_pages = 4;
  return options;
}

void fill(Rig& rig) {
  std::memset(rig.token(0, 0), 0x11, 3 * rig.page);
  std::memset(rig.token(1, 0), 0x22, 5 * rig.page);
}

bool filled(Rig& rig) {
  for (size_t i = 0; i < 3 * rig.page; ++i) {
    if (rig.token(0, 0)[i] != 0x11) return false;
  }
  for (size_t i = 0; i < 5 * rig.page; ++i) {
    if (rig.token(1, 0)[i] != 0x22) return false;
  }
  return true;
}

void every_call_in_a_child_is_refused(const Backend& backend) {
  Rig rig(backend, with_prefetch());
  rig.start({3, 5});
  fill(rig);
  CHECK(holds_in_child_soon([&] {
    CHECK_THROWS(DriverError, rig.alloc(), kSentence);
    CHECK_THROWS(DriverError, rig.free(0), kSentence);
    CHECK_THROWS(DriverError, rig.step({3, 5, 0, 0}), kSentence);
    CHECK_THROWS(DriverError, rig.kv->step_rows({{0, 4}}), kSentence);
    CHECK_THROWS(DriverError, rig.kv->trim(), kSentence);
    CHECK_THROWS(DriverError, rig.kv->seq_lens(), kSentence);
    CHECK_THROWS(DriverError, rig.state(0), kSentence);
    CHECK_THROWS(DriverError, rig.mapped(0), kSentence);
    CHECK_THROWS(DriverError, rig.kv->stats(), kSentence);
    CHECK_THROWS(DriverError, rig.kv->check(), kSentence);
    CHECK_THROWS(DriverError, rig.kv->closed(), kSentence);
    rig.kv->stop_background();
    rig.kv->close();
    return true;
  }));
  CHECK(filled(rig));
  rig.step({4, 6, 0, 0});
  rig.kv->check();
  rig.end();
}

void destroying_in_a_child_leaves_the_parent_alone(const Backend& backend) {
  Rig rig(backend, with_prefetch());
  rig.start({3, 5});
  rig.free(1);
  CHECK_EQ(rig.alloc(5), 1);
  rig.step({3, 5, 0, 0});
  fill(rig);
  CHECK(holds_in_child_soon([&] {
    rig.kv.reset();
    rig.pool.reset();
    return true;
  }));
  CHECK(filled(rig));
  rig.step({9, 9, 0, 0});
  rig.kv->check();
  rig.end();
}

// The fork may come while the background thread is in the middle of anything.
void destroying_in_a_child_does_not_wait_for_a_thread_it_lacks(const Backend& backend) {
  Rig rig(backend, with_prefetch());
  rig.start({3, 5});
  CHECK(eventually([&] { return rig.mapped(0) >= 7 && rig.mapped(1) >= 9; }));
  std::atomic<bool> inside{false}, go_on{false};
  rig.ledger->in_create = [&] {
    inside = true;
    while (!go_on) std::this_thread::yield();
  };
  CHECK_EQ(rig.alloc(20), 2);  // the background thread makes and maps it
  CHECK(eventually([&] { return inside.load(); }));
  const bool held = holds_in_child_soon([&] {
    CHECK_THROWS(DriverError, rig.kv->stats(), kSentence);
    rig.kv.reset();
    rig.pool.reset();
    return true;
  });
  go_on = true;
  CHECK(held);
  rig.step({4, 6, 20, 0});
  rig.kv->check();
  rig.end();
}

#ifndef __SANITIZE_THREAD__
// Host memory only: CUDA itself does not work in a forked child.
void a_child_can_make_a_cache_of_its_own() {
  Rig rig(host_backend(), with_prefetch());
  rig.start({3, 5});
  fill(rig);
  CHECK(holds_in_child_soon([&] {
    Rig own(host_backend(), with_prefetch());
    own.start({1, 2});
    // The thread of the new cache may have the stack and the id of the one that is not there.
    rig.kv.reset();
    rig.pool.reset();
    own.step({9, 9, 0, 0});
    own.kv->check();
    own.end();
    return true;
  }));
  CHECK(filled(rig));
  rig.end();
}
#endif

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests =
      over_all_backends({BACKEND_TEST(every_call_in_a_child_is_refused),
                         BACKEND_TEST(destroying_in_a_child_leaves_the_parent_alone),
                         BACKEND_TEST(destroying_in_a_child_does_not_wait_for_a_thread_it_lacks)});
#ifndef __SANITIZE_THREAD__  // which forbids new threads in a child of several
  tests.push_back(TEST(a_child_can_make_a_cache_of_its_own));
#endif
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
