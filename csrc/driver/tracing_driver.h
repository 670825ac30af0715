// Decorator that counts and times every call of a driver, and remembers the last ones, which are
// logged when a call fails. Costs two clock reads a call; every cache runs on one.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "driver/vmm_driver.h"

namespace vattn {

enum class DriverCall : uint8_t {
  kReserve,
  kUnreserve,
  kCreate,
  kRelease,
  kMap,
  kUnmap,
  kPopulate,
  kCopy,
  kClear,
  kRecordFence,
  kFencePassed,
  kWaitFence,
  kStreamWaitFence,
  kReleaseFence,
  kSynchronize,
  kExportHandle,
  kImportHandle,
};
constexpr size_t kNumDriverCalls = 17;
const char* name_of(DriverCall call) noexcept;

// On whose time a call was made: of the caller of step(), of the background thread, of any other.
enum class CallOrigin : uint8_t { kOther, kStep, kBackground };
constexpr size_t kNumCallOrigins = 3;

// Calls of this thread belong to `origin` while this object lives.
class OriginScope {
 public:
  explicit OriginScope(CallOrigin origin) noexcept;
  ~OriginScope();
  OriginScope(const OriginScope&) = delete;
  OriginScope& operator=(const OriginScope&) = delete;

 private:
  CallOrigin outer_;
};

struct CallCounters {
  uint64_t count = 0;
  uint64_t failed = 0;
  uint64_t total_ns = 0;
  std::array<uint64_t, 40> histogram{};  // [i]: calls that took 2^i to 2^(i+1) - 1 ns
};

using CallTable = std::array<std::array<CallCounters, kNumDriverCalls>, kNumCallOrigins>;

class TracingDriver : public VmmDriver {
 public:
  virtual CallTable counters() const = 0;
  // The last calls, oldest first, at most 64, as log lines.
  virtual std::vector<std::string> recent_calls() const = 0;
};

std::shared_ptr<TracingDriver> trace_driver(std::shared_ptr<VmmDriver> inner);

}  // namespace vattn
