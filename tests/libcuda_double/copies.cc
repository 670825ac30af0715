// Copies between the host and mapped memory, and work of vattn on the device. The latter is done at
// once, but a busy stream uses the ranges until it is idle.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <optional>

#include "exported.h"
#include "state.h"

using namespace vattn::cuda;
using cuda_double::Call;
using cuda_double::Needs;
using cuda_double::State;

namespace {

// Part of a range that lies in one mapping: where in which physical memory.
struct Piece {
  MemHandle handle;
  size_t offset;
  size_t bytes;
};

// What lies under a range. Null unless `device` has access to all of it.
std::optional<std::vector<Piece>> pieces_of(const State& state, Device device, DevicePtr base,
                                            size_t bytes) {
  std::vector<Piece> pieces;
  auto next = state.mappings.upper_bound(base);
  if (next == state.mappings.begin()) return std::nullopt;
  --next;
  for (DevicePtr at = base; at < base + bytes; ++next) {
    if (next == state.mappings.end() || next->first > at) return std::nullopt;
    const auto& [start, mapping] = *next;
    const DevicePtr end = std::min(base + bytes, start + mapping.bytes);
    if (end <= at || mapping.access != device) return std::nullopt;
    pieces.push_back({mapping.handle, at - start, end - at});
    at = end;
  }
  return pieces;
}

bool overlap(const std::vector<Piece>& some, const std::vector<Piece>& others) {
  for (const Piece& a : some) {
    for (const Piece& b : others) {
      if (a.handle == b.handle && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes) {
        return true;
      }
    }
  }
  return false;
}

void* pointer(DevicePtr address) {
  return reinterpret_cast<void*>(address);
}

}  // namespace

extern "C" {

VATTN_CUDA_FUNCTIONS(VATTN_DOUBLE_DECLARE)

// A range that the host asks for and that is not there is refused but is no breach: asking is how
// a test finds out.
Result cuMemcpyHtoD_v2(DevicePtr to, const void* from, size_t bytes) {
  Call call(Needs::kContext, "cuMemcpyHtoD", "to=0x%llx, bytes=%zu",
            static_cast<unsigned long long>(to), bytes);
  if (call.refused() != kSuccess) return call.refused();
  if (!pieces_of(call.state(), call.device(), to, bytes)) return kErrorInvalidValue;
  std::memcpy(pointer(to), from, bytes);
  return kSuccess;
}

Result cuMemcpyDtoH_v2(void* to, DevicePtr from, size_t bytes) {
  Call call(Needs::kContext, "cuMemcpyDtoH", "from=0x%llx, bytes=%zu",
            static_cast<unsigned long long>(from), bytes);
  if (call.refused() != kSuccess) return call.refused();
  if (!pieces_of(call.state(), call.device(), from, bytes)) return kErrorInvalidValue;
  std::memcpy(to, pointer(from), bytes);
  return kSuccess;
}

Result cuMemcpyDtoDAsync(DevicePtr to, DevicePtr from, size_t bytes, StreamPtr stream) {
  Call call(Needs::kContext, "cuMemcpyDtoDAsync", "to=0x%llx from=0x%llx bytes=%zu stream=%p", to,
            from, bytes, static_cast<void*>(stream));
  if (call.refused() != kSuccess) return call.refused();
  if (bytes == 0) return call.breach(kSuccess, "a copy of nothing (legal in CUDA, not in vattn)");
  const auto target = pieces_of(call.state(), call.device(), to, bytes);
  const auto source = pieces_of(call.state(), call.device(), from, bytes);
  if (!target) return call.breach(kErrorInvalidValue, "the device has no access to the target");
  if (!source) return call.breach(kErrorInvalidValue, "the device has no access to the source");
  if (overlap(*target, *source)) {
    return call.breach(kSuccess, "target and source overlap: the result is undefined");
  }
  std::memcpy(pointer(to), pointer(from), bytes);
  call.state().note_use(stream, to, bytes);
  call.state().note_use(stream, from, bytes);
  return kSuccess;
}

Result cuMemsetD8Async(DevicePtr base, unsigned char value, size_t bytes, StreamPtr stream) {
  Call call(Needs::kContext, "cuMemsetD8Async", "base=0x%llx value=%u bytes=%zu stream=%p", base,
            unsigned{value}, bytes, static_cast<void*>(stream));
  if (call.refused() != kSuccess) return call.refused();
  if (bytes == 0) return call.breach(kSuccess, "a fill of nothing (legal in CUDA, not in vattn)");
  if (!pieces_of(call.state(), call.device(), base, bytes)) {
    return call.breach(kErrorInvalidValue, "the device has no access to the range");
  }
  std::memset(pointer(base), value, bytes);
  call.state().note_use(stream, base, bytes);
  return kSuccess;
}

}  // extern "C"
