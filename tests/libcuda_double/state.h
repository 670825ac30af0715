// What the double knows: every object that CUDA would hold, and the rules that were broken.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "driver/cuda_abi.h"

namespace cuda_double {

using vattn::cuda::ContextPtr;
using vattn::cuda::Device;
using vattn::cuda::DevicePtr;
using vattn::cuda::EventPtr;
using vattn::cuda::MemHandle;
using vattn::cuda::Result;
using vattn::cuda::StreamPtr;

constexpr size_t kGranularity = size_t{2} << 20;
constexpr size_t kPageBytes = 4096;  // of the host; reservations are in these
constexpr size_t kDefaultMemory = size_t{16} << 30;
constexpr int kMaxDevices = 16;

// Physical memory: a memfd. Lives until it is released and unmapped everywhere.
struct Allocation {
  int fd;
  size_t bytes;
  Device device;
  bool exportable;
  bool imported;  // another allocation of this or another process; counts no memory
  bool released = false;
  size_t mappings = 0;
};

struct Mapping {
  size_t bytes;
  MemHandle handle;
  Device access = -1;  // the device that may use it; -1: none yet
};

// What an event captured. Shared with the streams that wait for it: recording the event again
// starts a new one.
struct Work {
  StreamPtr stream;
  bool done;
};

struct Event {
  ContextPtr context;
  std::shared_ptr<Work> work;  // null: never recorded, counts as passed
};

struct UsedRange {
  DevicePtr base;
  size_t bytes;
};

struct StreamState {
  bool held_busy = false;  // by the test
  std::vector<std::shared_ptr<Work>> waits;
  std::vector<UsedRange> uses;
};

struct Fault {
  int skip;
  int times;
  Result code;
};

struct Options {
  int device_count = 1;
  std::map<int, int> attributes;
  size_t total_memory = kDefaultMemory;
  bool refuse_multi_set_access = false;
  bool refuse_multi_unmap = false;
  bool refuse_rdma = false;
  bool refuse_posix_fd = false;
  bool leave_leftovers = false;
  bool deinitialized = false;
  std::set<std::string> hidden_symbols;
  std::map<std::string, Fault> faults;
};

struct State {
  State();

  Options options;
  int pid = 0;                       // of the process that called cuInit; 0: nobody has
  std::deque<std::string> breaches;  // a deque: growing moves no text
  std::map<std::string, size_t> calls;

  int context_references[kMaxDevices] = {};
  std::map<DevicePtr, size_t> reservations;
  std::map<DevicePtr, Mapping> mappings;
  std::unordered_map<MemHandle, Allocation> allocations;
  MemHandle next_handle = 0x1000;
  std::map<EventPtr, Event> events;
  uintptr_t next_event = 0x2000;
  std::map<StreamPtr, StreamState> streams;

  size_t used_memory() const;
  size_t live_handles() const;
  bool stream_busy(StreamPtr stream) const;
  // Completes all work whose stream has nothing left to wait for.
  void settle();
  // Work that is put into `stream` now, and so ends with it, uses the range.
  void note_use(StreamPtr stream, DevicePtr base, size_t bytes);
  // The start of the stream's range that overlaps, or null when none is in use.
  const UsedRange* busy_use(DevicePtr base, size_t bytes) const;
  void drop_allocation_if_unused(MemHandle handle);
  bool is_device(Device device) const { return device >= 0 && device < options.device_count; }
};

// The context that stands for `device`, and back. Contexts have no content.
ContextPtr context_of(Device device);

// Guards the one State. Held through every call.
std::mutex& state_mutex();
std::condition_variable& work_done();
State& state();
// Per thread, innermost last.
std::vector<ContextPtr>& context_stack();
// Unmaps and closes what is left. pre: the mutex is held.
void reset_state();
void record_leaks();

enum class Needs { kNothing, kInit, kContext };

// One call of the driver: takes the lock, counts, and makes the checks that all calls share.
class Call {
 public:
  [[gnu::format(printf, 4, 5)]] Call(Needs needs, const char* name, const char* format, ...);

  // Not kSuccess: the call must return this at once.
  Result refused() const { return refused_; }
  // Of the current context. pre: Needs::kContext, not refused.
  Device device() const { return device_; }
  // Records that the caller broke a rule; returns what the real driver would answer.
  Result breach(Result result, const std::string& sentence);
  std::unique_lock<std::mutex>& lock() { return lock_; }
  State& state() { return state_; }

 private:
  Result check(Needs needs);

  std::unique_lock<std::mutex> lock_;
  State& state_;
  const char* name_;
  std::string arguments_;
  Device device_ = -1;
  Result refused_;
};

}  // namespace cuda_double
