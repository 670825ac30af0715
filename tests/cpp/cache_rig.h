// A cache with everything under it, for tests that run over every kind of memory.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/kv_cache.h"
#include "driver/fault_driver.h"
#include "ledger.h"

namespace vattn::test {

struct Backend {
  const char* name;
  std::shared_ptr<VmmDriver> (*open)();
  bool is_cuda;  // on the libcuda double
};

const Backend& host_backend();  // pages of 4 KiB
const Backend& cuda_backend();  // pages of 2 MiB

struct BackendTest {
  const char* name;
  void (*run)(const Backend&);
};

// Every test over every backend. On CUDA also: the double saw no breach, and nothing is left.
std::vector<Test> over_all_backends(const std::vector<BackendTest>& tests);
// The same over CUDA only: what needs streams that can be busy.
std::vector<Test> over_cuda(const std::vector<BackendTest>& tests);

struct RigOptions {
  size_t rows = 4;
  size_t max_tokens = 64;
  size_t budget_pages = 64;
  size_t tokens_per_page = 1;   // of a region
  size_t max_extent_pages = 1;  // more: super-pages
  size_t lookahead = 0;
  LayoutKind kind = LayoutKind::kInterleaved;
  size_t layers = 1;
  size_t heads = 1;  // in HND order if there is more than one
  size_t window = 0, sink = 0;
  bool first_layer_full = false;  // the window is of the others
  Scrub scrub = Scrub::kNever;
};

// Where every layer's K and V of a token together take a page / tokens_per_page (interleaved), or
// each of them does (per layer).
LayoutSpec rig_spec(size_t page_bytes, const RigOptions& options);

// pool -> fault injection -> ledger -> driver
struct Rig {
  explicit Rig(const Backend& backend, const RigOptions& options = {});
  // Lets the streams go idle: after a failed check, close() must not wait for them.
  ~Rig();
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;

  int64_t alloc(int64_t seq_len = 0, Stream stream = Stream{}) {
    return static_cast<int64_t>(kv->alloc(seq_len, stream));
  }
  void free(int64_t row, Stream stream = Stream{}) { kv->free(row, stream); }
  void step(const std::vector<int64_t>& seq_lens) { kv->step(seq_lens.data(), seq_lens.size()); }
  // Frees a row of `tokens` tokens whose work is still on the device: unmapping it before the
  // stream goes idle is then a breach.
  void free_while_busy(int64_t row, size_t tokens, Stream stream);
  // A row that ended with `tokens` tokens mapped.
  int64_t idle_row(int64_t tokens, Stream stream = Stream{});
  // Rows of these lengths, in order, from row 0 on.
  void start(const std::vector<int64_t>& seq_lens);
  size_t mapped(int64_t row) const { return kv->mapped_tokens(row); }
  RowState state(int64_t row) const { return kv->row_state(row); }
  // First byte of a token in a region; of a ring in its first mapping.
  unsigned char* token(int64_t row, size_t token, size_t region = 0) const;
  size_t pages_mapped() const { return ledger->now().mapped_bytes / page; }
  // Pages that exist under rows, each once.
  size_t pages_taken() const {
    const PoolStats stats = pool->stats();
    return (stats.held_bytes - stats.free_bytes) / page;
  }
  // Gives the cache and the pool back, and fails if anything is left of them.
  void end();

  bool is_cuda;
  size_t page;
  std::shared_ptr<Ledger> ledger;
  std::shared_ptr<FaultDriver> faults;
  std::shared_ptr<Pool> pool;
  std::unique_ptr<KvCache> kv;
};

// Fails unless `body` throws OutOfPages with these numbers.
void check_out_of_pages(const std::function<void()>& body, size_t needed, size_t free);

// Polls for 10 seconds.
bool eventually(const std::function<bool()>& condition);

constexpr Stream kStreamA = static_cast<Stream>(0x10);
constexpr Stream kStreamB = static_cast<Stream>(0x20);
void set_busy(Stream stream, bool busy);
// Runs `body`, which is to wait for the stream in the CUDA function `call`; the stream goes idle as
// soon as it does. False: `body` came back without that.
bool waits_for(Stream stream, const char* call, const std::function<void()>& body);

}  // namespace vattn::test

#define BACKEND_TEST(function) \
  ::vattn::test::BackendTest { \
    #function, function        \
  }
