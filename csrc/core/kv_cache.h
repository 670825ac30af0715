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
#include <functional>
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
  size_t mapped_bytes;       // pages under the rows of this cache, each once
  size_t aliased_bytes;      // what rows have beyond that, because others have it too
  size_t reclaimable_bytes;  // of those, what step() may take back: idle rows, and pages ahead
  size_t rows_free, rows_active, rows_idle, rows_retiring;
  uint64_t steps;
  uint64_t steps_with_growth;  // steps that had to map in the caller's time
  uint64_t prefetched_runs;
  uint64_t prefetch_failures;
};

// The first tokens of a row that somebody may want to find again; see KvCache::keep_prefix().
struct KeptPrefix {
  uint64_t life;  // changes when the row gets other tokens; 0: nothing is kept
  size_t tokens;  // that are still what they were
};

class KvCache {
 public:
  // spec.page_bytes is the pool's. Tokens up to `lookahead` beyond each row's length are mapped by
  // the background thread; 0: none. Throws std::invalid_argument, DriverError.
  KvCache(std::shared_ptr<Pool> pool, const LayoutSpec& spec, size_t lookahead,
          Scrub scrub = Scrub::kNever);
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

  // `n` new rows with the first seq_len tokens of an active row, or all. Memory that is
  // shared is never written: step() makes a row's own what the row's next tokens would overwrite.
  // Throws OutOfRows, OutOfPages, std::invalid_argument, DriverError; then no active row has
  // changed.
  std::vector<BatchIdx> fork(int64_t row, std::optional<int64_t> seq_len, size_t n, Stream stream);
  // The row has only its first seq_len tokens from now on. No driver call.
  // Throws std::invalid_argument; then nothing has changed.
  void truncate(int64_t row, int64_t seq_len);
  // rows[i] gets the tokens that parents[i] has now. Throws as fork().
  void reorder(const std::vector<int64_t>& rows, const std::vector<int64_t>& parents,
               Stream stream);
  // Of the tokens from `start` on, the row keeps those at the positions `keep`, one after the other
  // behind `start`. Throws as fork(). If a copy fails, the row ends where it is still as it was.
  void compact(int64_t row, const std::vector<int64_t>& keep, int64_t start, Stream stream);

  // The row's first `tokens` tokens are worth keeping, also when it is idle: it is adopted by
  // alloc() last, and its memory is taken from the end, oldest row first. Returns the row's life.
  // Throws std::invalid_argument.
  uint64_t keep_prefix(int64_t row, int64_t tokens);
  // By row.
  std::vector<KeptPrefix> kept_prefixes() const;
  // No effect if the row's life is another.
  void forget_prefix(int64_t row, uint64_t life);
  // Makes an idle row active again, with the first tokens that it kept and no others. False: its
  // life is another, it keeps fewer, it is not idle, or it shares memory beyond them. Throws
  // DriverError.
  bool adopt_prefix(int64_t row, uint64_t life, int64_t tokens, Stream stream);
  // A new row with the first tokens of a row that keeps as many, idle or active; fewer than asked
  // for where more than a page in each region would have to be copied, or a page is not to be had.
  // nullopt: its life is another, or it keeps fewer. Throws OutOfRows, DriverError.
  std::optional<std::pair<BatchIdx, size_t>> fork_prefix(int64_t row, uint64_t life, int64_t tokens,
                                                         Stream stream);

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
  // What a row's rings have gone through since it was empty.
  struct RingHistory {
    size_t most_tokens = 0;
    size_t long_chunk_end = 0;  // of a step that added more than a window: it left out some
  };
  struct Row {
    RowState state = RowState::kFree;
    Fence fence = Fence::kNone;  // of the last request that was freed here
    Stream fence_stream{};
    Stream stream{};         // of the request that has the row
    size_t hint_tokens = 0;  // what alloc() was told to expect
    uint64_t freed_at = 0;   // order of the free() calls
    uint64_t life = 0;       // of the tokens that are in it
    size_t kept_tokens = 0;  // that must stay what they are while memory allows; see keep_prefix()
    bool trim = false;       // when it is unmapped, free pages go back to the driver
    size_t pinned_tokens = 0;  // of an idle row that is being forked
    size_t writable_from = 0;  // no token from here on was shared when this was last looked up
    RingHistory rings;
  };
  class StepLock;

  void check_usable() const;
  size_t check_row(int64_t row) const;
  void check_lens(const int64_t* seq_lens) const;
  size_t check_active(int64_t row) const;
  size_t shortest_in_rings(size_t row) const;
  void note_long_chunks(const int64_t* seq_lens);
  void check_in_rings(size_t row, size_t tokens, const std::string& name) const;
  void check_conservation(std::vector<ExtentId> mapped) const;

  template <typename Fill>
  void step_with(Fill fill_scratch_lens);
  [[nodiscard]] bool step_locked(const int64_t* seq_lens);
  void grow_rows(const int64_t* seq_lens);
  bool has_room(size_t n_pages, const int64_t* seq_lens) const;
  void with_room(size_t n_pages, const int64_t* seq_lens, const std::function<void()>& act);
  void refresh(size_t row);
  void note_length(size_t row);
  void note_pages(size_t row);

  void make_own(size_t row, Stream stream);
  void scrub_row(size_t row, size_t token, Stream stream);
  void order_after_fence(size_t row, Stream stream);
  void order_after_work(size_t row, Stream stream);
  void order_streams(Stream earlier, Stream later);
  void start(size_t row, size_t tokens, RingHistory rings, Stream stream) noexcept;
  bool shares_from(size_t row, size_t token);
  void share_rows(const std::vector<Share>& shares, Stream stream);
  std::vector<size_t> empty_rows(size_t n, size_t source);
  std::vector<BatchIdx> fork_rows(size_t from, size_t tokens, size_t n, Stream stream);
  void note_copy(size_t from, const std::vector<Share>& shares, Stream stream);
  bool drop_idle_sharers();
  size_t check_shorter(int64_t row, int64_t seq_len) const;
  std::vector<Share> plan_reorder(const std::vector<int64_t>& rows,
                                  const std::vector<int64_t>& parents) const;
  size_t first_to_move(size_t row, const std::vector<int64_t>& keep, int64_t start) const;
  void move_kept(size_t row, const std::vector<int64_t>& from, size_t to, Stream stream);
  bool keeps(size_t row, uint64_t life, int64_t tokens) const;

  size_t tokens_to_keep(size_t row, const int64_t* seq_lens) const;
  size_t reclaimable_pages(const int64_t* seq_lens, size_t enough) const;
  size_t reclaim_from(size_t row, size_t n_pages, const int64_t* seq_lens);
  size_t reclaim(size_t n_pages, const int64_t* seq_lens);
  bool fence_passed(size_t row);
  void wait_for_fence(size_t row);
  void drop_fence(size_t row) noexcept;
  size_t unmap_beyond(size_t row, size_t tokens) noexcept;
  std::vector<size_t> idle_rows_by_loss() const;
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
  const Scrub scrub_;
  std::vector<Region> rings_;  // one region of each kind that has a window

  mutable std::mutex mutex_;  // guards everything below but the atomics
  bool closed_ = false;
  RowMemory rows_;
  std::vector<Row> row_;
  std::vector<size_t> mapped_tokens_;
  // The steady state of step() touches these five and nothing else.
  std::vector<int64_t> seq_lens_;
  std::vector<int64_t> used_tokens_;  // the most that any step() since alloc() asked for
  std::vector<int64_t> limits_;       // tokens that need no work; 0 if the row is not active
  std::vector<int64_t> floors_;       // with fewer tokens than these there is something to do
  std::vector<int64_t> prefetch_at_;  // beyond this length the background thread has work
  std::vector<int64_t> scratch_lens_;
  uint64_t n_freed_ = 0, n_lives_ = 0;
  bool prefetch_paused_ = false;  // no spare pages: until some come back
  uint64_t steps_ = 0, steps_with_growth_ = 0, prefetched_runs_ = 0, prefetch_failures_ = 0;

  std::atomic<int> waiting_steps_{0};
  std::unique_ptr<BackgroundThread> background_;  // last: it uses everything above
};

}  // namespace vattn
