#include "driver/tracing_driver.h"

#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <exception>
#include <mutex>
#include <type_traits>

#include "base/fork.h"
#include "base/log.h"

namespace vattn {
namespace {

thread_local CallOrigin t_origin = CallOrigin::kOther;

constexpr size_t kRingSize = 64;
constexpr std::array<const char*, kNumDriverCalls> kCallNames = {
    "reserve",           "unreserve",     "create",
    "release",           "map",           "unmap",
    "populate",          "copy",          "clear",
    "record_fence",      "fence_passed",  "wait_fence",
    "stream_wait_fence", "release_fence", "synchronize",
    "export_handle",     "import_handle"};
constexpr std::array<const char*, kNumCallOrigins> kOriginNames = {"other", "step", "background"};

uint64_t now_ns() noexcept {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

struct Record {
  DriverCall call;
  CallOrigin origin;
  bool failed;
  uint64_t argument;  // address, handle or fence
  uint64_t bytes;
  uint64_t ns;
};

std::string to_line(const Record& record) {
  char text[160];
  std::snprintf(text, sizeof(text),
                "call=%s by=%s at=0x%" PRIx64 " bytes=%" PRIu64 " ns=%" PRIu64 "%s",
                name_of(record.call), kOriginNames[static_cast<size_t>(record.origin)],
                record.argument, record.bytes, record.ns, record.failed ? " failed" : "");
  return text;
}

class Tracer final : public TracingDriver {
 public:
  explicit Tracer(std::shared_ptr<VmmDriver> inner) : inner_(std::move(inner)) {}

  size_t page_bytes() const noexcept override { return inner_->page_bytes(); }
  MemoryInfo memory_info() override { return inner_->memory_info(); }
  std::string describe() const override { return inner_->describe(); }

  uintptr_t reserve(size_t bytes) override {
    return timed(DriverCall::kReserve, 0, bytes, [&] { return inner_->reserve(bytes); });
  }
  void unreserve(uintptr_t base, size_t bytes) noexcept override {
    given_back(DriverCall::kUnreserve, base, bytes, [&] { inner_->unreserve(base, bytes); });
  }
  Handle create_after(Extent last, size_t bytes) override {
    return timed(DriverCall::kCreate, static_cast<uint64_t>(last.handle), bytes,
                 [&] { return inner_->create_after(last, bytes); });
  }
  bool creates_zeroed() const noexcept override { return inner_->creates_zeroed(); }
  bool overcommits() const noexcept override { return inner_->overcommits(); }
  void release(Extent extent) noexcept override {
    given_back(DriverCall::kRelease, static_cast<uint64_t>(extent.handle), extent.bytes,
               [&] { inner_->release(extent); });
  }
  void map(uintptr_t base, const std::vector<Extent>& run) override {
    timed(DriverCall::kMap, base, total_bytes(run), [&] { inner_->map(base, run); });
  }
  bool unmap(uintptr_t base, const std::vector<Extent>& run) noexcept override {
    const uint64_t start = now_ns();
    const bool done = inner_->unmap(base, run);
    record(DriverCall::kUnmap, base, total_bytes(run), start, !done);
    return done;
  }
  void populate(uintptr_t base, size_t bytes) noexcept override {
    given_back(DriverCall::kPopulate, base, bytes, [&] { inner_->populate(base, bytes); });
  }
  void copy(Stream stream, uintptr_t to, uintptr_t from, size_t bytes) override {
    timed(DriverCall::kCopy, to, bytes, [&] { inner_->copy(stream, to, from, bytes); });
  }
  void fill(Stream stream, const std::vector<Extent>& run, uintptr_t to, uintptr_t from,
            size_t bytes) override {
    timed(DriverCall::kCopy, to, bytes, [&] { inner_->fill(stream, run, to, from, bytes); });
  }
  void clear(Stream stream, uintptr_t base, size_t bytes) override {
    timed(DriverCall::kClear, base, bytes, [&] { inner_->clear(stream, base, bytes); });
  }
  Fence record_fence(Stream stream) override {
    return timed(DriverCall::kRecordFence, static_cast<uint64_t>(stream), 0,
                 [&] { return inner_->record_fence(stream); });
  }
  bool fence_passed(Fence fence) override {
    return timed(DriverCall::kFencePassed, static_cast<uint64_t>(fence), 0,
                 [&] { return inner_->fence_passed(fence); });
  }
  void wait_fence(Fence fence) override {
    timed(DriverCall::kWaitFence, static_cast<uint64_t>(fence), 0,
          [&] { inner_->wait_fence(fence); });
  }
  void stream_wait_fence(Stream stream, Fence fence) override {
    timed(DriverCall::kStreamWaitFence, static_cast<uint64_t>(fence), 0,
          [&] { inner_->stream_wait_fence(stream, fence); });
  }
  void release_fence(Fence fence) noexcept override {
    given_back(DriverCall::kReleaseFence, static_cast<uint64_t>(fence), 0,
               [&] { inner_->release_fence(fence); });
  }
  void synchronize() override {
    timed(DriverCall::kSynchronize, 0, 0, [&] { inner_->synchronize(); });
  }
  SharedHandle export_handle(Extent extent) override {
    return timed(DriverCall::kExportHandle, static_cast<uint64_t>(extent.handle), extent.bytes,
                 [&] { return inner_->export_handle(extent); });
  }
  Handle import_handle(SharedHandle shared, size_t bytes) override {
    return timed(DriverCall::kImportHandle, shared.offset, bytes,
                 [&] { return inner_->import_handle(shared, bytes); });
  }

  CallTable counters() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return counters_;
  }

  std::vector<std::string> recent_calls() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::string> lines;
    const uint64_t first = n_calls_ < kRingSize ? 0 : n_calls_ - kRingSize;
    for (uint64_t i = first; i < n_calls_; ++i) lines.push_back(to_line(ring_[i % kRingSize]));
    return lines;
  }

 private:
  // Records a call on the way out, whichever way that is.
  struct Exit {
    Tracer& tracer;
    DriverCall call;
    uint64_t argument, bytes;
    uint64_t start = now_ns();
    int exceptions = std::uncaught_exceptions();
    ~Exit() {
      tracer.record(call, argument, bytes, start, std::uncaught_exceptions() > exceptions);
    }
  };

  template <typename Function>
  std::invoke_result_t<Function> timed(DriverCall call, uint64_t argument, uint64_t bytes,
                                       Function function) {
    const Exit exit{*this, call, argument, bytes};
    return function();
  }

  template <typename Function>
  void given_back(DriverCall call, uint64_t argument, uint64_t bytes, Function function) noexcept {
    const uint64_t start = now_ns();
    function();
    record(call, argument, bytes, start, /*failed=*/false);
  }

  void record(DriverCall call, uint64_t argument, uint64_t bytes, uint64_t start,
              bool failed) noexcept {
    // The mutex may be held by a thread that a forked child does not have.
    if (process_.forked()) return;
    const uint64_t ns = now_ns() - start;
    const std::lock_guard<std::mutex> lock(mutex_);
    CallCounters& row = counters_[static_cast<size_t>(t_origin)][static_cast<size_t>(call)];
    size_t bucket = 0;
    while (bucket + 1 < row.histogram.size() && (ns >> (bucket + 1)) != 0) ++bucket;
    ++row.count;
    row.failed += failed ? 1 : 0;
    row.total_ns += ns;
    ++row.histogram[bucket];
    ring_[n_calls_++ % kRingSize] = {call, t_origin, failed, argument, bytes, ns};
    // create() fails whenever memory is short; its caller deals with that.
    if (failed && call != DriverCall::kCreate) log_ring();
  }

  void log_ring() const noexcept {
    const uint64_t first = n_calls_ < kRingSize ? 0 : n_calls_ - kRingSize;
    for (uint64_t i = first; i < n_calls_; ++i) {
      const Record& record = ring_[i % kRingSize];
      log_line(LogLevel::kError, "%s -%" PRIu64 " %s", record.failed ? "FAILED" : "before",
               n_calls_ - 1 - i, to_line(record).c_str());
    }
  }

  const std::shared_ptr<VmmDriver> inner_;
  const ProcessBound process_;
  mutable std::mutex mutex_;  // guards everything below
  CallTable counters_{};
  std::array<Record, kRingSize> ring_{};
  uint64_t n_calls_ = 0;
};

}  // namespace

const char* name_of(DriverCall call) noexcept {
  return kCallNames[static_cast<size_t>(call)];
}

OriginScope::OriginScope(CallOrigin origin) noexcept : outer_(t_origin) {
  t_origin = origin;
}
OriginScope::~OriginScope() {
  t_origin = outer_;
}

std::shared_ptr<TracingDriver> trace_driver(std::shared_ptr<VmmDriver> inner) {
  return std::make_shared<Tracer>(std::move(inner));
}

}  // namespace vattn
