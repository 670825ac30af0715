// What is in the memory: each row sees what was written for it, and nobody else's.
#include <cstring>
#include <random>

#include "base/errors.h"
#include "cache_rig.h"
#include "driver_contract.h"

using namespace vattn;
using namespace vattn::test;

namespace {

bool all_zero(const unsigned char* bytes, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    if (bytes[i] != 0) return false;
  }
  return true;
}

// A caller that writes every token once, with a number of its own, and reads all of them back.
class Requests {
 public:
  explicit Requests(Rig& rig) : rig_(rig), lens_(rig.kv->seq_lens().size(), -1) {}

  void start(int64_t row) {
    lens_[static_cast<size_t>(row)] = 0;
    ++next_id_;
    ids_[row] = next_id_;
  }
  void end(int64_t row) { lens_[static_cast<size_t>(row)] = -1; }
  bool active(size_t row) const { return lens_[row] >= 0; }
  int64_t length(size_t row) const { return lens_[row]; }

  void grew(const std::vector<int64_t>& seq_lens) {
    for (size_t row = 0; row < lens_.size(); ++row) {
      if (!active(row)) continue;
      for (int64_t token = lens_[row]; token < seq_lens[row]; ++token) {
        each_region(row, token, [&](unsigned char* at, size_t bytes) {
          std::memcpy(at, mark(row, token).data(), 8);
          std::memcpy(at + bytes - 8, mark(row, token).data(), 8);
        });
      }
      lens_[row] = seq_lens[row];
    }
  }
  void check() {
    for (size_t row = 0; row < lens_.size(); ++row) {
      for (int64_t token = 0; token < lens_[row]; ++token) {
        each_region(row, token, [&](unsigned char* at, size_t bytes) {
          CHECK(std::memcmp(at, mark(row, token).data(), 8) == 0);
          CHECK(std::memcmp(at + bytes - 8, mark(row, token).data(), 8) == 0);
        });
      }
    }
  }

 private:
  std::array<unsigned char, 8> mark(size_t row, int64_t token) {
    const uint64_t value =
        (uint64_t{ids_[static_cast<int64_t>(row)]} << 32) + static_cast<uint64_t>(token) + 1;
    std::array<unsigned char, 8> bytes;
    std::memcpy(bytes.data(), &value, 8);
    return bytes;
  }
  template <typename Function>
  void each_region(size_t row, int64_t token, Function function) {
    const auto& regions = rig_.kv->layout().regions;
    for (size_t g = 0; g < regions.size(); ++g) {
      function(rig_.token(static_cast<int64_t>(row), static_cast<size_t>(token), g),
               regions[g].token_bytes);
    }
  }

  Rig& rig_;
  std::vector<int64_t> lens_;  // -1: no request
  std::map<int64_t, uint32_t> ids_;
  uint32_t next_id_ = 0;
};

int64_t any_of(std::mt19937& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// One iteration of an engine that preempts the first active row when memory is short.
void iterate(Rig& rig, Requests& requests, std::mt19937& random, int64_t max_tokens) {
  if (any_of(random, 0, 2) == 0) {
    try {
      requests.start(rig.alloc(any_of(random, 0, max_tokens)));
    } catch (const OutOfRows&) {
    }
  }
  std::vector<int64_t> seq_lens(rig.kv->seq_lens().size(), 0);
  for (size_t row = 0; row < seq_lens.size(); ++row) {
    if (!requests.active(row)) continue;
    if (any_of(random, 0, 12) == 0) {
      rig.free(static_cast<int64_t>(row));
      requests.end(static_cast<int64_t>(row));
      continue;
    }
    seq_lens[row] = std::min(max_tokens, requests.length(row) + any_of(random, 0, 6));
  }
  if (any_of(random, 0, 20) == 0) rig.kv->trim();
  for (size_t row = 0; row < seq_lens.size(); ++row) {
    try {
      rig.step(seq_lens);
      requests.grew(seq_lens);
      return;
    } catch (const OutOfPages& error) {
      CHECK(error.needed() > error.free());
      requests.check();
      if (!requests.active(row)) continue;
      rig.free(static_cast<int64_t>(row));
      requests.end(static_cast<int64_t>(row));
      seq_lens[row] = 0;
    }
  }
}

void serve(const Backend& backend, const RigOptions& options, int iterations) {
  Rig rig(backend, options);
  std::mt19937 random(11);
  Requests requests(rig);
  for (int i = 0; i < iterations; ++i) {
    iterate(rig, requests, random, static_cast<int64_t>(options.max_tokens));
    requests.check();
    rig.kv->check();
  }
  rig.end();
}

void no_row_sees_another_rows_bytes(const Backend& backend) {
  RigOptions options;
  options.budget_pages = 90;
  serve(backend, options, 400);
}

void no_row_sees_another_rows_bytes_with_super_pages_and_prefetch(const Backend& backend) {
  RigOptions options;
  options.tokens_per_page = 2;
  options.budget_pages = 50;
  options.max_extent_pages = 8;
  options.lookahead = 5;
  serve(backend, options, 400);
}

void no_row_sees_another_rows_bytes_per_layer(const Backend& backend) {
  RigOptions options;
  options.kind = LayoutKind::kPerLayer;
  options.layers = 2;
  options.tokens_per_page = 4;
  options.budget_pages = 120;
  options.max_extent_pages = 4;
  serve(backend, options, 200);
}

void only_what_was_asked_for_is_mapped(const Backend& backend) {
  Rig rig(backend);
  rig.start({3});
  const auto writes = [&](size_t token) {
    return writable(reinterpret_cast<uintptr_t>(rig.token(0, token)));
  };
  CHECK(writes(2));
  CHECK(!writes(3));
  CHECK(!writable(reinterpret_cast<uintptr_t>(rig.token(1, 0))));
  rig.end();
}

void tokens_without_memory_read_as_zeros_on_the_host() {
  Rig rig(host_backend());
  rig.start({3});
  CHECK(all_zero(rig.token(0, 0), 64 * rig.page));
  CHECK(all_zero(rig.token(3, 0), 64 * rig.page));
  std::memset(rig.token(0, 0), 0xff, 3 * rig.page);
  rig.free(0);
  rig.kv->trim();
  CHECK(all_zero(rig.token(0, 0), 64 * rig.page));
  rig.end();
}

void after_close_everything_reads_as_zeros_on_the_host() {
  Rig rig(host_backend());
  rig.start({3, 5});
  std::memset(rig.token(0, 0), 0xff, 3 * rig.page);
  std::memset(rig.token(1, 0), 0xff, 5 * rig.page);
  rig.kv->close();
  for (int64_t row = 0; row < 4; ++row) CHECK(all_zero(rig.token(row, 0), 64 * rig.page));
  rig.end();
}

// What went back to the system is new when it comes again.
void trimmed_memory_comes_back_as_zeros_on_the_host() {
  Rig rig(host_backend());
  rig.start({3});
  std::memset(rig.token(0, 0), 0xff, 3 * rig.page);
  rig.free(0);
  rig.kv->trim();
  rig.start({3});
  CHECK(all_zero(rig.token(0, 0), 3 * rig.page));
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests =
      over_all_backends({BACKEND_TEST(no_row_sees_another_rows_bytes),
                         BACKEND_TEST(no_row_sees_another_rows_bytes_with_super_pages_and_prefetch),
                         BACKEND_TEST(no_row_sees_another_rows_bytes_per_layer),
                         BACKEND_TEST(only_what_was_asked_for_is_mapped)});
  tests.push_back(TEST(tokens_without_memory_read_as_zeros_on_the_host));
  tests.push_back(TEST(after_close_everything_reads_as_zeros_on_the_host));
  tests.push_back(TEST(trimmed_memory_comes_back_as_zeros_on_the_host));
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
