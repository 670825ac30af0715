#include "control.h"

#include "state.h"

using cuda_double::state;
using vattn::cuda::StreamPtr;

namespace {

using Lock = std::lock_guard<std::mutex>;

std::mutex& mutex() {
  return cuda_double::state_mutex();
}
StreamPtr to_stream(uintptr_t stream) {
  return reinterpret_cast<StreamPtr>(stream);
}

}  // namespace

extern "C" {

size_t vattn_double_breaches() {
  const Lock lock(mutex());
  return state().breaches.size();
}

const char* vattn_double_breach(size_t index) {
  const Lock lock(mutex());
  return index < state().breaches.size() ? state().breaches[index].c_str() : nullptr;
}

void vattn_double_check_leaks() {
  const Lock lock(mutex());
  cuda_double::record_leaks();
}

void vattn_double_reset() {
  const Lock lock(mutex());
  cuda_double::reset_state();
}

void vattn_double_set_device_count(int count) {
  const Lock lock(mutex());
  state().options.device_count =
      count < cuda_double::kMaxDevices ? count : cuda_double::kMaxDevices;
}

void vattn_double_set_attribute(int attribute, int value) {
  const Lock lock(mutex());
  state().options.attributes[attribute] = value;
}

void vattn_double_set_total_memory(size_t bytes) {
  const Lock lock(mutex());
  state().options.total_memory = bytes;
}

void vattn_double_refuse_multi_set_access(int refuse) {
  const Lock lock(mutex());
  state().options.refuse_multi_set_access = refuse != 0;
}

void vattn_double_refuse_multi_unmap(int refuse) {
  const Lock lock(mutex());
  state().options.refuse_multi_unmap = refuse != 0;
}

void vattn_double_refuse_rdma(int refuse) {
  const Lock lock(mutex());
  state().options.refuse_rdma = refuse != 0;
}

void vattn_double_refuse_posix_fd(int refuse) {
  const Lock lock(mutex());
  state().options.refuse_posix_fd = refuse != 0;
}

void vattn_double_leave_leftovers(int leave) {
  const Lock lock(mutex());
  state().options.leave_leftovers = leave != 0;
}

void vattn_double_hide_symbol(const char* symbol) {
  const Lock lock(mutex());
  state().options.hidden_symbols.insert(symbol);
}

void vattn_double_fail(const char* call, int skip, int times, int code) {
  const Lock lock(mutex());
  state().options.faults[call] = {skip, times, code};
}

void vattn_double_deinitialize() {
  const Lock lock(mutex());
  state().options.deinitialized = true;
}

void vattn_double_set_stream_busy(uintptr_t stream, int busy) {
  const Lock lock(mutex());
  state().streams[to_stream(stream)].held_busy = busy != 0;
  state().settle();
}

int vattn_double_stream_busy(uintptr_t stream) {
  const Lock lock(mutex());
  return state().stream_busy(to_stream(stream)) ? 1 : 0;
}

void vattn_double_use_range(uintptr_t stream, uintptr_t base, size_t bytes) {
  const Lock lock(mutex());
  state().note_use(to_stream(stream), base, bytes);
}

size_t vattn_double_live_handles() {
  const Lock lock(mutex());
  return state().live_handles();
}

size_t vattn_double_live_mappings() {
  const Lock lock(mutex());
  return state().mappings.size();
}

size_t vattn_double_live_reservations() {
  const Lock lock(mutex());
  return state().reservations.size();
}

size_t vattn_double_live_events() {
  const Lock lock(mutex());
  return state().events.size();
}

int vattn_double_context_references(int device) {
  const Lock lock(mutex());
  return state().is_device(device) ? state().context_references[device] : 0;
}

size_t vattn_double_calls(const char* call) {
  const Lock lock(mutex());
  const auto found = state().calls.find(call);
  return found != state().calls.end() ? found->second : 0;
}

}  // extern "C"
