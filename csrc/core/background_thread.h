// One joined thread that works when there is work and sleeps otherwise.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace vattn {

class BackgroundThread {
 public:
  enum class Next {
    kAgain,  // there may be more to do at once
    kSoon,   // waiting for the device: call again in a millisecond
    kSleep,  // until wake()
  };

  // `work` runs on the thread, one short piece per call, and must not throw.
  explicit BackgroundThread(std::function<Next()> work);
  ~BackgroundThread();
  BackgroundThread(const BackgroundThread&) = delete;
  BackgroundThread& operator=(const BackgroundThread&) = delete;

  // Costs one atomic exchange if a wake-up is pending already.
  void wake();
  // Waits until the thread sleeps and nobody has woken it, or has ended. False: not in time.
  bool wait_asleep(std::chrono::milliseconds timeout);
  // Waits for the piece of work in progress and joins. Idempotent, from any thread but this one.
  void stop();

 private:
  void run();

  const std::function<Next()> work_;
  std::atomic<bool> woken_{false};
  std::mutex mutex_;  // guards stop_ and asleep_
  std::condition_variable condition_;
  std::condition_variable fell_asleep_;
  bool stop_ = false;
  bool asleep_ = false;
  std::mutex join_mutex_;  // two threads may call stop()
  std::thread thread_;     // last: it starts when everything above is there
};

}  // namespace vattn
