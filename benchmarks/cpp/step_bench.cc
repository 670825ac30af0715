// What step() costs without Python, and what the machine charges for the calls below it.
//
//   step_bench ROWS SAMPLES GROWTH_BYTES     writes {"steps": n, "samples": {name: [ns, ...]}}
//
// Every sample holds one reading of the clock, whose own cost is the sample "clock".
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <thread>

#include "core/kv_cache.h"
#include "driver/host_driver.h"
#include "driver/tracing_driver.h"

namespace vattn {
namespace {

using Samples = std::map<std::string, std::vector<long>>;

constexpr size_t kPageBytes = size_t{64} << 10;
constexpr size_t kTokenBytes = 256;  // of one region
constexpr int64_t kMaxTokens = 200;  // all in the first page

long now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

template <typename Function>
std::vector<long> time_calls(size_t n, Function function) {
  std::vector<long> samples(n);
  for (size_t i = 0; i < n; ++i) {
    const long start = now_ns();
    function(i);
    samples[i] = now_ns() - start;
  }
  return samples;
}

void must(bool holds, const char* what) {
  if (holds) return;
  std::perror(what);
  std::exit(1);
}

uint64_t count_calls(const CallTable& table) {
  uint64_t count = 0;
  for (const auto& origin : table) {
    for (const CallCounters& call : origin) count += call.count;
  }
  return count;
}

void let_background_finish(const TracingDriver& trace) {
  uint64_t before = 0;
  for (uint64_t now = count_calls(trace.counters()); now != before;) {
    before = now;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    now = count_calls(trace.counters());
  }
}

std::vector<std::vector<int64_t>> random_lens(size_t rows) {
  std::mt19937 random(0);
  std::vector<std::vector<int64_t>> lens(8, std::vector<int64_t>(rows));
  for (auto& of_step : lens) {
    for (auto& n : of_step) n = static_cast<int64_t>(random() % kMaxTokens) + 1;
  }
  return lens;
}

// Fails if a step() was left out, or if a steady one called the driver.
std::vector<long> steady_steps(size_t rows, size_t lookahead, size_t n, uint64_t* steps) {
  const auto trace = trace_driver(open_host_driver(kPageBytes));
  const size_t budget = 2 * rows * 2 * kPageBytes;
  const auto pool = std::make_shared<Pool>(trace, kPageBytes, kPageBytes, budget);
  LayoutSpec spec;
  spec.kind = LayoutKind::kPerLayer;
  spec.item_bytes = 4;
  spec.max_batch_size = rows;
  spec.max_seq_len = 4096;
  spec.page_bytes = kPageBytes;
  spec.groups = {{{0}, 1, kTokenBytes / 4, kTokenBytes / 4}};
  KvCache cache(pool, spec, lookahead);
  for (size_t row = 0; row < rows; ++row) cache.alloc(kMaxTokens, Stream{});
  cache.step(std::vector<int64_t>(rows, kMaxTokens).data(), rows);
  let_background_finish(*trace);
  const auto lens = random_lens(rows);
  const uint64_t steps_before = cache.stats().steps;
  const uint64_t calls_before = count_calls(trace->counters());
  auto samples = time_calls(n, [&](size_t i) { cache.step(lens[i % lens.size()].data(), rows); });
  *steps += cache.stats().steps - steps_before;
  must(count_calls(trace->counters()) == calls_before, "a steady step() called the driver");
  return samples;
}

void without_system_calls(size_t rows, size_t n, Samples& out) {
  std::vector<int64_t> from(rows, 1), to(rows);
  std::mutex mutex;
  out["clock"] = time_calls(n, [](size_t) {});
  out["memcpy"] = time_calls(n, [&](size_t) {
    std::memcpy(to.data(), from.data(), rows * sizeof(int64_t));
    asm volatile("" : : "r"(to.data()) : "memory");
  });
  out["lock"] = time_calls(n, [&](size_t) { const std::lock_guard<std::mutex> lock(mutex); });
}

// Bytes of `file` from `offset` on, at `at`.
void map_at(char* at, size_t bytes, int file, size_t offset) {
  must(mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file,
            static_cast<off_t>(offset)) != MAP_FAILED,
       "mmap");
}

// One gibibyte, mapped whole and in pieces, with nothing but the system calls; then page faults.
void system_calls(size_t total, size_t n, Samples& out) {
  constexpr size_t kPiece = size_t{2} << 20;
  const size_t pieces = total / kPiece;
  const int file = memfd_create("step_bench", MFD_CLOEXEC);
  must(file >= 0 && ftruncate(file, static_cast<off_t>(total)) == 0, "memfd");
  char* base = static_cast<char*>(
      mmap(nullptr, total + kPiece, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  must(base != MAP_FAILED, "mmap");
  base += kPiece - reinterpret_cast<uintptr_t>(base) % kPiece;
  const auto clear = [&] {
    must(mmap(base, total, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
              0) != MAP_FAILED,
         "mmap");
  };
  const auto timed = [&](const char* name, auto function) {
    clear();
    const long start = now_ns();
    function();
    out[name].push_back(now_ns() - start);
  };
  for (size_t i = 0; i < n; ++i) {
    timed("mmap_whole", [&] { map_at(base, total, file, 0); });
    timed("mmap_neighbours", [&] {
      for (size_t p = 0; p < pieces; ++p) map_at(base + p * kPiece, kPiece, file, p * kPiece);
    });
    // Every piece from elsewhere: pieces - 1 boundaries that cannot merge.
    timed("mmap_scattered", [&] {
      for (size_t p = 0; p < pieces; ++p) {
        map_at(base + p * kPiece, kPiece, file, (pieces - 1 - p) * kPiece);
      }
    });
    timed("madvise_pieces", [&] {
      map_at(base, total, file, 0);
      for (size_t p = 0; p < pieces; ++p) {
        static_cast<void>(madvise(base + p * kPiece, kPiece, MADV_HUGEPAGE));
      }
    });
  }
  clear();
  map_at(base, total, file, 0);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t faults = std::min(total / page, size_t{4096});
  out["page_fault"] =
      time_calls(faults, [&](size_t i) { *static_cast<volatile char*>(base + i * page) = 1; });
}

void write_json(const Samples& samples, uint64_t steps, size_t pieces_bytes) {
  std::printf("{\"steps\": %llu, \"system_call_bytes\": %zu, \"samples\": {",
              static_cast<unsigned long long>(steps), pieces_bytes);
  const char* comma = "";
  for (const auto& [name, values] : samples) {
    std::printf("%s\n\"%s\": [", comma, name.c_str());
    for (size_t i = 0; i < values.size(); ++i) std::printf(i == 0 ? "%ld" : ",%ld", values[i]);
    std::printf("]");
    comma = ",";
  }
  std::printf("}}\n");
}

}  // namespace
}  // namespace vattn

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: step_bench ROWS SAMPLES GROWTH_BYTES\n");
    return 2;
  }
  const auto rows = static_cast<size_t>(std::atoll(argv[1]));
  const auto n = static_cast<size_t>(std::atoll(argv[2]));
  const auto bytes = static_cast<size_t>(std::atoll(argv[3]));
  vattn::Samples samples;
  uint64_t steps = 0;
  // In turns, so that what disturbs one disturbs the other.
  for (int round = 0; round < 10; ++round) {
    for (const size_t lookahead : {size_t{0}, size_t{16}}) {
      auto& all = samples["step_lookahead_" + std::to_string(lookahead)];
      const auto some = vattn::steady_steps(rows, lookahead, n / 10, &steps);
      all.insert(all.end(), some.begin(), some.end());
    }
  }
  vattn::without_system_calls(rows, n, samples);
  vattn::system_calls(bytes, std::min(n / 100, size_t{30}), samples);
  vattn::write_json(samples, steps, bytes);
  return 0;
}
