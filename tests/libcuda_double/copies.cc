// Copies between the host and mapped memory. A range that is not mapped is refused but is no
// breach: asking is how a test finds out.
#include <cstring>
#include <iterator>

#include "state.h"

using namespace vattn::cuda;
using cuda_double::Call;
using cuda_double::Needs;
using cuda_double::State;

namespace {

bool is_mapped(const State& state, DevicePtr base, size_t bytes) {
  const auto next = state.mappings.upper_bound(base);
  if (next == state.mappings.begin()) return false;
  const auto& [start, mapping] = *std::prev(next);
  return base + bytes <= start + mapping.bytes;
}

}  // namespace

extern "C" {

Result cuMemcpyHtoD_v2(DevicePtr to, const void* from, size_t bytes) {
  Call call(Needs::kContext, "cuMemcpyHtoD", "to=0x%llx, bytes=%zu",
            static_cast<unsigned long long>(to), bytes);
  if (call.refused() != kSuccess) return call.refused();
  if (!is_mapped(call.state(), to, bytes)) return kErrorInvalidValue;
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}

Result cuMemcpyDtoH_v2(void* to, DevicePtr from, size_t bytes) {
  Call call(Needs::kContext, "cuMemcpyDtoH", "from=0x%llx, bytes=%zu",
            static_cast<unsigned long long>(from), bytes);
  if (call.refused() != kSuccess) return call.refused();
  if (!is_mapped(call.state(), from, bytes)) return kErrorInvalidValue;
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}

}  // extern "C"
