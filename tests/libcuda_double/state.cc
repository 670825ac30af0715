#include "state.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace cuda_double {

using namespace vattn::cuda;

State::State() {
  options.attributes = {{kAttributeIntegrated, 0},
                        {kAttributeVirtualMemoryManagementSupported, 1},
                        {kAttributeHandleTypePosixFdSupported, 1},
                        {kAttributeGpuDirectRdmaWithVmmSupported, 1},
                        {kAttributeHandleTypeFabricSupported, 0}};
}

size_t State::used_memory() const {
  size_t bytes = 0;
  for (const auto& [handle, allocation] : allocations) {
    if (!allocation.imported) bytes += allocation.bytes;
  }
  return bytes;
}

size_t State::live_handles() const {
  return static_cast<size_t>(
      std::count_if(allocations.begin(), allocations.end(),
                    [](const auto& entry) { return !entry.second.released; }));
}

bool State::stream_busy(StreamPtr stream) const {
  const auto found = streams.find(stream);
  if (found == streams.end()) return false;
  const auto& waits = found->second.waits;
  return found->second.held_busy ||
         std::any_of(waits.begin(), waits.end(), [](const auto& work) { return !work->done; });
}

void State::settle() {
  bool changed = true;
  while (changed) {
    changed = false;
    for (auto& [handle, event] : events) {
      if (event.work && !event.work->done && !stream_busy(event.work->stream)) {
        event.work->done = true;
        changed = true;
      }
    }
    // Work whose event was recorded again lives on in the streams that wait for it.
    for (auto& [id, stream] : streams) {
      for (auto& work : stream.waits) {
        if (!work->done && !stream_busy(work->stream)) {
          work->done = true;
          changed = true;
        }
      }
    }
  }
  for (auto& [id, stream] : streams) {
    if (stream_busy(id)) continue;
    stream.waits.clear();
    stream.uses.clear();
  }
  work_done().notify_all();
}

void State::note_use(StreamPtr stream, DevicePtr base, size_t bytes) {
  if (stream_busy(stream)) streams[stream].uses.push_back({base, bytes});
}

const UsedRange* State::busy_use(DevicePtr base, size_t bytes) const {
  for (const auto& [id, stream] : streams) {
    if (!stream_busy(id)) continue;
    for (const UsedRange& use : stream.uses) {
      if (use.base < base + bytes && base < use.base + use.bytes) return &use;
    }
  }
  return nullptr;
}

void State::drop_allocation_if_unused(MemHandle handle) {
  const auto found = allocations.find(handle);
  if (!found->second.released || found->second.mappings > 0) return;
  close(found->second.fd);
  allocations.erase(found);
}

ContextPtr context_of(Device device) {
  return reinterpret_cast<ContextPtr>(uintptr_t{0xc0de0000} + static_cast<uintptr_t>(device) * 16);
}

// All of this is never destroyed: calls come from other libraries' destructors too.
std::mutex& state_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::condition_variable& work_done() {
  static auto* condition = new std::condition_variable;
  return *condition;
}

State& state() {
  static auto* the_state = new State;
  return *the_state;
}

std::vector<ContextPtr>& context_stack() {
  thread_local std::vector<ContextPtr> stack;
  return stack;
}

void reset_state() {
  State& now = state();
  for (const auto& [base, bytes] : now.reservations) munmap(reinterpret_cast<void*>(base), bytes);
  for (const auto& [handle, allocation] : now.allocations) close(allocation.fd);
  // Handles and events of before the reset stay unknown instead of meaning something new.
  State fresh;
  fresh.next_handle = now.next_handle;
  fresh.next_event = now.next_event;
  now = std::move(fresh);
  work_done().notify_all();
}

void record_leaks() {
  State& now = state();
  char text[160];
  const auto leaked = [&](const char* what, unsigned long long id, size_t bytes) {
    std::snprintf(text, sizeof(text), "leaked %s 0x%llx bytes=%zu", what, id, bytes);
    now.breaches.emplace_back(text);
  };
  for (const auto& [base, mapping] : now.mappings) leaked("mapping", base, mapping.bytes);
  for (const auto& [base, bytes] : now.reservations) leaked("reservation", base, bytes);
  for (const auto& [handle, allocation] : now.allocations) {
    if (!allocation.released) leaked("handle", handle, allocation.bytes);
  }
  for (const auto& [event, ignored] : now.events) {
    leaked("event", reinterpret_cast<uintptr_t>(event), 0);
  }
  for (int device = 0; device < kMaxDevices; ++device) {
    if (now.context_references[device] != 0) {
      leaked("reference to the primary context of device", static_cast<unsigned>(device), 0);
    }
  }
}

Call::Call(Needs needs, const char* name, const char* format, ...)
    : lock_(state_mutex()), state_(cuda_double::state()), name_(name) {
  char text[256];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  arguments_ = text;
  ++state_.calls[name];
  refused_ = check(needs);
}

Result Call::breach(Result result, const std::string& sentence) {
  state_.breaches.push_back(std::string(name_) + "(" + arguments_ + "): " + sentence);
  return result;
}

Result Call::check(Needs needs) {
  if (state_.options.deinitialized) return kErrorDeinitialized;
  const auto fault = state_.options.faults.find(name_);
  if (fault != state_.options.faults.end() && fault->second.skip-- <= 0 &&
      fault->second.times-- > 0) {
    return fault->second.code;
  }
  if (needs == Needs::kNothing) return kSuccess;
  if (state_.pid == 0) return breach(kErrorNotInitialized, "used before cuInit");
  if (state_.pid != getpid()) {
    return breach(kErrorNotInitialized, "used in a forked child; CUDA does not survive fork");
  }
  if (needs == Needs::kInit) return kSuccess;
  if (context_stack().empty() || context_stack().back() == nullptr) {
    return breach(kErrorInvalidContext, "no context is current on the calling thread");
  }
  for (int device = 0; device < kMaxDevices; ++device) {
    if (context_stack().back() == context_of(device) && state_.context_references[device] > 0) {
      device_ = device;
      return kSuccess;
    }
  }
  return breach(kErrorInvalidContext, "the current context is not a retained primary context");
}

}  // namespace cuda_double

// Driver objects that the program still holds when it ends are leaks only to a test that says so:
// the real driver takes them back with the process.
[[gnu::destructor]] static void report_at_exit() {
  const std::lock_guard<std::mutex> lock(cuda_double::state_mutex());
  if (std::getenv("VATTN_DOUBLE_STRICT_EXIT") == nullptr) return;
  if (cuda_double::state().pid != getpid()) return;
  cuda_double::record_leaks();
  for (const std::string& breach : cuda_double::state().breaches) {
    std::fprintf(stderr, "libcuda double: %s\n", breach.c_str());
  }
  if (!cuda_double::state().breaches.empty()) _exit(70);
}
