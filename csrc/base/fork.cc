#include "base/fork.h"

#include <pthread.h>

#include <atomic>

#include "base/errors.h"

namespace vattn {
namespace {

std::atomic<uint64_t> g_generation{0};

[[maybe_unused]] const int g_registered =
    pthread_atfork(nullptr, nullptr, [] { g_generation.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

uint64_t fork_generation() noexcept {
  return g_generation.load(std::memory_order_relaxed);
}

void ProcessBound::throw_forked() {
  throw DriverError("fork", 0,
                    "this process was forked after the cache was made; use the multiprocessing "
                    "start method 'spawn', or make the cache in the child");
}

}  // namespace vattn
