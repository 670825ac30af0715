#include "cache_rig.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "base/errors.h"
#include "base/units.h"
#include "double_control.h"
#include "driver/cuda_driver.h"
#include "driver/host_driver.h"

namespace vattn::test {

const Backend& host_backend() {
  static const Backend backend{"host: ", [] { return open_host_driver(4 * kKiB); }, false};
  return backend;
}

const Backend& cuda_backend() {
  static const Backend backend{"cuda: ", [] { return open_cuda_driver(0); }, true};
  return backend;
}

std::vector<Test> over_cuda(const std::vector<BackendTest>& tests) {
  std::vector<Test> bound;
  for (const BackendTest& test : tests) {
    bound.push_back(
        {std::string(cuda_backend().name) + test.name, [run = test.run] { run(cuda_backend()); }});
  }
  return on_clean_double(bound);
}

std::vector<Test> over_all_backends(const std::vector<BackendTest>& tests) {
  std::vector<Test> all;
  for (const BackendTest& test : tests) {
    all.push_back(
        {std::string(host_backend().name) + test.name, [run = test.run] { run(host_backend()); }});
  }
  for (const Test& test : over_cuda(tests)) all.push_back(test);
  return all;
}

LayoutSpec rig_spec(size_t page_bytes, const RigOptions& options) {
  const size_t token_bytes = page_bytes / options.tokens_per_page;
  const bool apart = options.kind == LayoutKind::kPerLayer;
  LayoutSpec spec;
  if (options.heads > 1) spec.order = DimOrder::kHND;
  spec.kind = options.kind;
  spec.item_bytes = 2;
  spec.max_batch_size = options.rows;
  spec.max_seq_len = options.max_tokens;
  spec.page_bytes = page_bytes;
  const size_t head_dim = token_bytes / 2 / (apart ? 1 : 2 * options.layers);
  LayerGroup group{{}, options.heads, head_dim, head_dim};
  if (options.first_layer_full) {
    group.layers = {0};
    spec.groups.push_back(group);
    group.layers.clear();
  }
  for (size_t layer = spec.groups.size(); layer < options.layers; ++layer) {
    group.layers.push_back(layer);
  }
  group.window = options.window;
  group.sink = options.sink;
  spec.groups.push_back(group);
  return spec;
}

Rig::Rig(const Backend& backend, const RigOptions& options)
    : is_cuda(backend.is_cuda),
      ledger(std::make_shared<Ledger>(backend.open())),
      faults(inject_faults(ledger)) {
  page = ledger->page_bytes();
  pool = std::make_shared<Pool>(faults, page, options.max_extent_pages * page,
                                options.budget_pages * page);
  kv = std::make_unique<KvCache>(pool, rig_spec(page, options), options.lookahead, options.scrub);
}

Rig::~Rig() {
  if (!is_cuda) return;
  for (const Stream stream : {kStreamA, kStreamB}) set_busy(stream, false);
}

int64_t Rig::idle_row(int64_t tokens, Stream stream) {
  const int64_t row = alloc(0, stream);
  kv->step_rows({{row, tokens}});
  free(row, stream);
  return row;
}

void Rig::free_while_busy(int64_t row, size_t tokens, Stream stream) {
  set_busy(stream, true);
  const auto start = reinterpret_cast<uintptr_t>(token(row, 0));
  DOUBLE(use_range)(static_cast<uintptr_t>(stream), start, tokens * page);
  free(row, stream);
}

void Rig::start(const std::vector<int64_t>& seq_lens) {
  for (size_t i = 0; i < seq_lens.size(); ++i) CHECK_EQ(alloc(), static_cast<int64_t>(i));
  std::vector<int64_t> all(kv->seq_lens().size(), 0);
  std::copy(seq_lens.begin(), seq_lens.end(), all.begin());
  step(all);
}

unsigned char* Rig::token(int64_t row, size_t token, size_t region) const {
  const Region& r = kv->layout().regions[region];
  return reinterpret_cast<unsigned char*>(
      kv->base() + r.offset + static_cast<size_t>(row) * r.row_stride + r.offset_of(token));
}

void Rig::end() {
  kv.reset();
  pool.reset();
  const LedgerCounts left = ledger->now();
  CHECK_EQ(left.mapped_bytes, 0u);
  CHECK_EQ(left.created_bytes, 0u);
  CHECK_EQ(left.reserved_bytes, 0u);
  CHECK_EQ(left.fences, 0u);
  CHECK_EQ(ledger->violations(), "");
}

void check_out_of_pages(const std::function<void()>& body, size_t needed, size_t free) {
  try {
    body();
  } catch (const OutOfPages& error) {
    CHECK_EQ(error.needed(), needed);
    CHECK_EQ(error.free(), free);
    return;
  }
  fail(__FILE__, __LINE__, "no OutOfPages");
}

bool eventually(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (std::chrono::steady_clock::now() < end) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

void set_busy(Stream stream, bool busy) {
  DOUBLE(set_stream_busy)(static_cast<uintptr_t>(stream), busy ? 1 : 0);
}

bool waits_for(Stream stream, const char* call, const std::function<void()>& body) {
  const size_t before = DOUBLE(calls)(call);
  std::atomic<bool> returned{false}, had_to_wait{false};
  std::thread device([&] {
    had_to_wait = eventually([&] { return returned || DOUBLE(calls)(call) > before; }) && !returned;
    set_busy(stream, false);
  });
  try {
    body();
  } catch (...) {
    returned = true;
    device.join();
    throw;
  }
  returned = true;
  device.join();
  return had_to_wait;
}

}  // namespace vattn::test
