#include "core/background_thread.h"

#include "base/scheduling.h"

namespace vattn {

BackgroundThread::BackgroundThread(std::function<Next()> work)
    : work_(std::move(work)), thread_([this] { run(); }) {}

BackgroundThread::~BackgroundThread() {
  stop();
}

void BackgroundThread::wake() {
  if (woken_.exchange(true)) return;
  // The lock: the thread may be between its look at woken_ and its sleep.
  const std::lock_guard<std::mutex> lock(mutex_);
  condition_.notify_one();
}

bool BackgroundThread::wait_asleep(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  return fell_asleep_.wait_for(lock, timeout, [this] { return stop_ || (asleep_ && !woken_); });
}

void BackgroundThread::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    condition_.notify_one();
    fell_asleep_.notify_all();
  }
  const std::lock_guard<std::mutex> lock(join_mutex_);
  if (thread_.joinable()) thread_.join();
}

void BackgroundThread::run() {
  yield_to_wakers();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    woken_ = false;
    lock.unlock();
    const Next next = work_();
    lock.lock();
    const auto must_go_on = [this] { return stop_ || woken_; };
    if (next == Next::kSleep) {
      asleep_ = true;
      fell_asleep_.notify_all();
      condition_.wait(lock, must_go_on);
      asleep_ = false;
    } else if (next == Next::kSoon) {
      condition_.wait_for(lock, std::chrono::milliseconds(1), must_go_on);
    }
  }
}

}  // namespace vattn
