// One contiguous range of addresses per row, memory under it on demand.
//
//   FREE --alloc--> ACTIVE --free--> IDLE (still mapped) --alloc (adopt)--> ACTIVE
//                                      '--reclaim--> RETIRING --fence passed--> FREE
//
// Thread-safe: one lock. The background thread holds it for one run of pages at a time and lets a
// waiting step() go first. Lock order: cache, pool, driver. In a forked child every call throws
// DriverError, except close() and the destructor, which do nothing.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/fork.h"
#include "core/background_thread.h"
#include "core/row_choice.h"
#include "core/row_memory.h"

namespace vattn {

enum class BatchIdx : int32_t {};  // row of the KV tensors: FlashAttention's cache_batch_idx

struct CacheStats {
  PoolStats pool;
  size_t reserved_bytes;
  size_t used_bytes;         // tokens of active rows
  size_t mapped_bytes;       // pages under the rows of this cache
  size_t reclaimable_bytes;  // of those, what step() may take back: idle rows, and pages ahead
  size_t rows_free, rows_active, rows_idle, rows_retiring;
  uint64_t steps;
  uint64_t steps_with_growth;  // steps that had to map in the caller's time
  uint64_t prefetched_runs;
  uint64_t prefetch_failures;
};

class KvCache {
 public:
  // spec.page_bytes is the pool's. Tokens up to `lookahead` beyond each row's length are mapped by
  // the background thread; 0: none. Throws std::invalid_argument, DriverError.
  KvCache(std::shared_ptr<Pool> pool, const LayoutSpec& spec, size_t lookahead);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // A row for a request that is expected to start with seq_len tokens. Work submitted to `stream`
  // from now on comes after the work that was using the row's memory before.
  // Throws OutOfRows, std::invalid_argument, DriverError; then nothing has changed.
  BatchIdx alloc(int64_t seq_len, Stream stream);
  // The row's memory is reused only after the work in `stream` so far.
  // Throws std::invalid_argument, DriverError; then nothing has changed.
  void free(int64_t row, Stream stream);

  // Backs every row with memory for seq_lens[row] tokens. All or nothing: throws OutOfPages,
  // std::invalid_argument, DriverError; then no active row has changed, but for one without tokens,
  // which may have lost memory that was mapped ahead. May wait for the device
  // when memory is short: for work that uses rows freed before.
  void step(const int64_t* seq_lens, size_t n);
  // The same for some rows; the others keep their length.
  void step_rows(const std::vector<std::pair<int64_t, int64_t>>& row_and_len);

  // Gives the memory of idle rows and free pages back to the driver; rows that the device still
  // uses follow when it is done. Bytes given back so far.
  size_t trim();
  // Waits for the device, then gives everything back but the addresses, which stay reserved until
  // the destructor: tensors may still point there. Idempotent.
  void close();
  // Waits until the background thread has nothing to do. False: it still had after the timeout.
  bool wait_background(int64_t timeout_ms) const;
  // Joins the background thread; the cache works on without it.
  void stop_background();

  bool closed() const;
  const Layout& layout() const noexcept { return rows_.layout(); }
  uintptr_t base() const noexcept { return rows_.base(); }
  std::vector<int64_t> seq_lens() const;
  RowState row_state(int64_t row) const;
  size_t mapped_tokens(int64_t row) const;
  CacheStats stats() const;
  // Throws std::logic_error if an invariant is broken.
  void check() const;

 private:
  struct Row {
    RowState state = RowState::kFree;
    Fence fence = Fence::kNone;  // of the last request that was freed here
    Stream fence_stream{};
    size_t hint_tokens = 0;  // what alloc() was told to expect
    uint64_t freed_at = 0;   // order of the free() calls
  };
  class StepLock;

  void check_usable() const;
  size_t check_row(int64_t row) const;
  void check_lens(const int64_t* seq_lens) const;
  void check_conservation(std::vector<ExtentId> mapped) const;

  template <typename Fill>
  void step_with(Fill fill_scratch_lens);
  [[nodiscard]] bool step_locked(const int64_t* seq_lens);
  void grow_rows(const int64_t* seq_lens);
  void grow_or_reclaim(const std::vector<Growth>& growths, size_t needed, const int64_t* seq_lens);
  void refresh(size_t row);

  size_t tokens_to_keep(size_t row, const int64_t* seq_lens) const;
  size_t reclaimable_pages(const int64_t* seq_lens) const;
  size_t reclaim(size_t n_pages, const int64_t* seq_lens);
  bool fence_passed(size_t row);
  void drop_fence(size_t row) noexcept;
  size_t unmap_beyond(size_t row, size_t tokens) noexcept;
  std::vector<size_t> idle_rows_oldest_first() const;
  size_t retire_ready();

  BackgroundThread::Next background_work() noexcept;
  bool fits_badly(size_t row) const;
  bool refit_adopted_row();
  bool refit_first_steps(const int64_t* seq_lens);
  size_t tokens_to_prefetch(size_t row) const;
  bool reclaim_spare(size_t n_pages);
  void pause_prefetch(uint64_t failures);
  std::optional<Growth> next_prefetch() const;
  std::optional<Growth> prefetch_of(size_t row) const;

  VmmDriver& driver() const noexcept { return rows_.pool().driver(); }

  const ProcessBound process_;
  const std::shared_ptr<Pool> pool_;
  const size_t n_rows_;
  const size_t max_seq_len_;
  const size_t lookahead_;

  mutable std::mutex mutex_;  // guards everything below but the atomics
  bool closed_ = false;
  RowMemory rows_;
  std::vector<Row> row_;
  std::vector<size_t> mapped_tokens_;
  // The steady state of step() touches these four and nothing else.
  std::vector<int64_t> seq_lens_;
  std::vector<int64_t> used_tokens_;  // the most that any step() since alloc() asked for
  std::vector<int64_t> limits_;       // tokens that need no mapping; 0 if the row is not active
  std::vector<int64_t> prefetch_at_;  // beyond this length the background thread has work
  std::vector<int64_t> scratch_lens_;
  uint64_t n_freed_ = 0;
  bool prefetch_paused_ = false;  // no spare pages: until some come back
  uint64_t steps_ = 0, steps_with_growth_ = 0, prefetched_runs_ = 0, prefetch_failures_ = 0;

  std::atomic<int> waiting_steps_{0};
  std::unique_ptr<BackgroundThread> background_;  // last: it uses everything above
};

}  // namespace vattn
