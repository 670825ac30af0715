// Events, and streams whose work lasts as long as the test says.
#include <algorithm>

#include "exported.h"
#include "state.h"

using namespace vattn::cuda;
using cuda_double::Call;
using cuda_double::context_of;
using cuda_double::Event;
using cuda_double::Needs;
using cuda_double::Work;

namespace {

Event* find_event(Call& call, EventPtr event) {
  const auto found = call.state().events.find(event);
  if (found != call.state().events.end()) return &found->second;
  call.breach(kErrorInvalidHandle, "unknown or destroyed event");
  return nullptr;
}

}  // namespace

extern "C" {

VATTN_CUDA_FUNCTIONS(VATTN_DOUBLE_DECLARE)

Result cuEventCreate(EventPtr* event, unsigned flags) {
  Call call(Needs::kContext, "cuEventCreate", "flags=%u", flags);
  if (call.refused() != kSuccess) return call.refused();
  if (flags != kEventDisableTiming) {
    call.breach(kSuccess, "an event that only orders must disable timing");
  }
  *event = reinterpret_cast<EventPtr>(call.state().next_event += 16);
  call.state().events.emplace(*event, Event{context_of(call.device()), nullptr});
  return kSuccess;
}

Result cuEventRecord(EventPtr event, StreamPtr stream) {
  Call call(Needs::kContext, "cuEventRecord", "event=%p stream=%p", static_cast<void*>(event),
            static_cast<void*>(stream));
  if (call.refused() != kSuccess) return call.refused();
  Event* found = find_event(call, event);
  if (found == nullptr) return kErrorInvalidHandle;
  if (found->context != context_of(call.device())) {
    return call.breach(kErrorInvalidHandle, "the event belongs to another context");
  }
  found->work = std::make_shared<Work>(Work{stream, !call.state().stream_busy(stream)});
  return kSuccess;
}

Result cuEventQuery(EventPtr event) {
  Call call(Needs::kContext, "cuEventQuery", "event=%p", static_cast<void*>(event));
  if (call.refused() != kSuccess) return call.refused();
  const Event* found = find_event(call, event);
  if (found == nullptr) return kErrorInvalidHandle;
  return found->work == nullptr || found->work->done ? kSuccess : kErrorNotReady;
}

Result cuEventSynchronize(EventPtr event) {
  Call call(Needs::kContext, "cuEventSynchronize", "event=%p", static_cast<void*>(event));
  if (call.refused() != kSuccess) return call.refused();
  const Event* found = find_event(call, event);
  if (found == nullptr) return kErrorInvalidHandle;
  // A copy: the event may be recorded again or destroyed while this thread waits.
  const std::shared_ptr<Work> work = found->work;
  if (work != nullptr) cuda_double::work_done().wait(call.lock(), [&] { return work->done; });
  return kSuccess;
}

Result cuEventDestroy(EventPtr event) {
  Call call(Needs::kContext, "cuEventDestroy", "event=%p", static_cast<void*>(event));
  if (call.refused() != kSuccess) return call.refused();
  if (find_event(call, event) == nullptr) return kErrorInvalidHandle;
  call.state().events.erase(event);
  return kSuccess;
}

Result cuCtxSynchronize() {
  Call call(Needs::kContext, "cuCtxSynchronize", " ");
  if (call.refused() != kSuccess) return call.refused();
  const auto& streams = call.state().streams;
  cuda_double::work_done().wait(call.lock(), [&] {
    return std::none_of(streams.begin(), streams.end(),
                        [&](const auto& entry) { return call.state().stream_busy(entry.first); });
  });
  return kSuccess;
}

Result cuStreamWaitEvent(StreamPtr stream, EventPtr event, unsigned flags) {
  Call call(Needs::kContext, "cuStreamWaitEvent", "stream=%p event=%p flags=%u",
            static_cast<void*>(stream), static_cast<void*>(event), flags);
  if (call.refused() != kSuccess) return call.refused();
  if (flags != 0) return call.breach(kErrorInvalidValue, "flags must be 0");
  const Event* found = find_event(call, event);
  if (found == nullptr) return kErrorInvalidHandle;
  if (found->work != nullptr && !found->work->done) {
    call.state().streams[stream].waits.push_back(found->work);
  }
  return kSuccess;
}

}  // extern "C"
