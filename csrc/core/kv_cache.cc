#include "core/kv_cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/errors.h"
#include "base/log.h"
#include "base/units.h"
#include "driver/tracing_driver.h"

namespace vattn {

// Announces itself, so that the background thread lets it go first.
class KvCache::StepLock {
 public:
  explicit StepLock(KvCache& cache) : waiting_(cache.waiting_steps_) {
    waiting_.fetch_add(1);
    lock_ = std::unique_lock<std::mutex>(cache.mutex_);
    waiting_.fetch_sub(1);
  }

 private:
  std::atomic<int>& waiting_;
  std::unique_lock<std::mutex> lock_;
};

KvCache::KvCache(std::shared_ptr<Pool> pool, const LayoutSpec& spec, size_t lookahead)
    : pool_(std::move(pool)),
      n_rows_(spec.max_batch_size),
      max_seq_len_(spec.max_seq_len),
      lookahead_(lookahead),
      rows_(pool_, make_layout(spec), spec.max_batch_size),
      row_(n_rows_),
      mapped_tokens_(n_rows_, 0),
      seq_lens_(n_rows_, 0),
      used_tokens_(n_rows_, 0),
      limits_(n_rows_, 0),
      prefetch_at_(n_rows_, INT64_MAX),
      scratch_lens_(n_rows_, 0) {
  const size_t regions = rows_.layout().regions.size();
  const size_t budget = pool_->stats().budget_bytes;
  if (budget < regions * pool_->page_bytes()) {
    throw std::invalid_argument(
        "memory is " + format_bytes(budget) + ", but one row needs at least one page of " +
        format_bytes(pool_->page_bytes()) + " in each of " + std::to_string(regions) +
        " regions; raise memory, lower page_bytes, or use layout='interleaved'");
  }
  background_ = std::make_unique<BackgroundThread>([this] { return background_work(); });
}

KvCache::~KvCache() {
  if (process_.forked()) {
    // Leaked on purpose, and not even detached: the child lacks the thread, its id may be another's
    // by now, and destroying a condition variable would wait for it.
    static_cast<void>(background_.release());
    return;
  }
  close();
  // What the driver refused to unmap: once more, before the addresses go.
  for (size_t row = 0; row < n_rows_; ++row) unmap_beyond(row, 0);
  pool_->trim();
}

void KvCache::check_usable() const {
  process_.check_not_forked();
  if (closed_) throw std::invalid_argument("the cache is closed; make a new one with vattn.init()");
}

size_t KvCache::check_row(int64_t row) const {
  if (row < 0 || row >= static_cast<int64_t>(n_rows_)) {
    throw std::invalid_argument("row " + std::to_string(row) + " is not in 0.." +
                                std::to_string(n_rows_ - 1) +
                                "; raise max_batch_size for more rows");
  }
  return static_cast<size_t>(row);
}

BatchIdx KvCache::alloc(int64_t seq_len, Stream stream) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  if (seq_len < 0 || seq_len > static_cast<int64_t>(max_seq_len_)) {
    throw std::invalid_argument("seq_len is " + std::to_string(seq_len) + ", expected 0 to " +
                                std::to_string(max_seq_len_) + "; raise max_seq_len");
  }
  retire_ready();
  std::vector<RowCandidate> candidates;
  candidates.reserve(n_rows_);
  for (size_t row = 0; row < n_rows_; ++row) {
    candidates.push_back({row_[row].state, mapped_tokens_[row]});
  }
  const auto chosen = choose_row(candidates, static_cast<size_t>(seq_len));
  if (!chosen) {
    throw OutOfRows("all " + std::to_string(n_rows_) +
                    " rows are active; free one, or raise max_batch_size");
  }
  Row& row = row_[*chosen];
  if (row.fence != Fence::kNone && row.fence_stream != stream) {
    driver().stream_wait_fence(stream, row.fence);
  }
  row.state = RowState::kActive;
  used_tokens_[*chosen] = 0;
  row.hint_tokens = static_cast<size_t>(seq_len);
  refresh(*chosen);
  if (next_prefetch() || fits_badly(*chosen)) background_->wake();
  return static_cast<BatchIdx>(*chosen);
}

void KvCache::free(int64_t index, Stream stream) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t at = check_row(index);
  Row& row = row_[at];
  if (row.state != RowState::kActive) {
    throw std::invalid_argument("row " + std::to_string(index) + " is " + name_of(row.state) +
                                ", not active: it was freed before, or never allocated");
  }
  // A fence of an earlier request is folded into the new one: one fence per row is enough.
  if (row.fence != Fence::kNone && row.fence_stream != stream) {
    driver().stream_wait_fence(stream, row.fence);
  }
  const Fence fence = driver().record_fence(stream);
  drop_fence(at);
  row.fence = fence;
  row.fence_stream = stream;
  row.state = RowState::kIdle;
  row.freed_at = ++n_freed_;
  row.hint_tokens = 0;
  seq_lens_[at] = 0;
  refresh(at);
  prefetch_paused_ = false;
}

void KvCache::step(const int64_t* seq_lens, size_t n) {
  step_with([&] {
    if (n != n_rows_) {
      throw std::invalid_argument("seq_lens has " + std::to_string(n) +
                                  " entries, expected max_batch_size = " + std::to_string(n_rows_));
    }
    // A copy: another thread may write the caller's buffer meanwhile, and what is checked must be
    // what is published.
    std::copy_n(seq_lens, n, scratch_lens_.begin());
  });
}

void KvCache::step_rows(const std::vector<std::pair<int64_t, int64_t>>& row_and_len) {
  step_with([&] {
    scratch_lens_ = seq_lens_;
    for (const auto& [row, seq_len] : row_and_len) scratch_lens_[check_row(row)] = seq_len;
  });
}

template <typename Fill>
void KvCache::step_with(Fill fill_scratch_lens) {
  process_.check_not_forked();
  bool work = false;
  {
    const StepLock lock(*this);
    check_usable();
    fill_scratch_lens();
    work = step_locked(scratch_lens_.data());
  }
  // After unlocking, or the thread wakes up only to wait for the lock.
  if (work) background_->wake();
}

// True: there is something to prefetch.
bool KvCache::step_locked(const int64_t* seq_lens) {
  bool fits = true, ahead = false;
  for (size_t row = 0; row < n_rows_; ++row) {
    // As unsigned numbers, negative lengths are too long.
    fits &= static_cast<uint64_t>(seq_lens[row]) <= static_cast<uint64_t>(limits_[row]);
    ahead |= seq_lens[row] > prefetch_at_[row];
  }
  if (!fits) {
    check_lens(seq_lens);
    grow_rows(seq_lens);
    ++steps_with_growth_;
    ahead = true;
  }
  for (size_t row = 0; row < n_rows_; ++row) {
    seq_lens_[row] = seq_lens[row];
    used_tokens_[row] = std::max(used_tokens_[row], seq_lens[row]);
  }
  ++steps_;
  return ahead && lookahead_ != 0 && !prefetch_paused_;
}

void KvCache::check_lens(const int64_t* seq_lens) const {
  for (size_t row = 0; row < n_rows_; ++row) {
    const int64_t n = seq_lens[row];
    const std::string name = "seq_lens[" + std::to_string(row) + "] is " + std::to_string(n);
    if (n < 0 || n > static_cast<int64_t>(max_seq_len_)) {
      throw std::invalid_argument(name +
                                  ", expected 0 to max_seq_len = " + std::to_string(max_seq_len_));
    }
    if (n > 0 && row_[row].state != RowState::kActive) {
      throw std::invalid_argument(name + ", but the row is " + name_of(row_[row].state) +
                                  "; alloc() it first, or pass 0");
    }
  }
}

// Decide -> reclaim if short -> act. Lengths are published by the caller, who cannot fail any more.
void KvCache::grow_rows(const int64_t* seq_lens) {
  const OriginScope origin(CallOrigin::kStep);
  std::vector<Growth> growths;
  size_t needed = 0;
  for (size_t row = 0; row < n_rows_; ++row) {
    if (seq_lens[row] <= limits_[row]) continue;
    growths.push_back({row, static_cast<size_t>(seq_lens[row])});
    needed += rows_.pages_to_grow(row, growths.back().tokens);
  }
  const size_t available = pool_->available_pages();
  if (needed > available) {
    const size_t reclaimable = reclaimable_pages(seq_lens);
    if (needed > available + reclaimable) {
      if (refit_first_steps(seq_lens)) return grow_rows(seq_lens);
      throw OutOfPages(needed, available + reclaimable, "free a request or raise memory");
    }
    reclaim(needed - available, seq_lens);
  }
  try {
    grow_or_reclaim(growths, needed, seq_lens);
  } catch (...) {
    // A run that the driver refused to take back stays mapped, as if it had been prefetched.
    for (const Growth& growth : growths) refresh(growth.row);
    throw;
  }
  for (const Growth& growth : growths) refresh(growth.row);
}

void KvCache::grow_or_reclaim(const std::vector<Growth>& growths, size_t needed,
                              const int64_t* seq_lens) {
  try {
    rows_.grow(growths);
  } catch (const OutOfPages&) {
    // The driver has less memory than the budget allows. Idle rows may have enough.
    if (reclaim(needed, seq_lens) == 0) throw;
    rows_.grow(growths);
  }
}

// After the pages or the state of a row have changed.
void KvCache::refresh(size_t row) {
  mapped_tokens_[row] = rows_.mapped_tokens(row);
  const bool active = row_[row].state == RowState::kActive;
  const size_t tokens = active ? std::min(mapped_tokens_[row], max_seq_len_) : 0;
  limits_[row] = static_cast<int64_t>(tokens);
  const bool may_grow = active && lookahead_ != 0 && tokens < max_seq_len_;
  prefetch_at_[row] =
      may_grow ? static_cast<int64_t>(tokens) - static_cast<int64_t>(lookahead_) : INT64_MAX;
}

size_t KvCache::trim() {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  for (const size_t row : idle_rows_oldest_first()) row_[row].state = RowState::kRetiring;
  const size_t returned = pool_->trim() + retire_ready();
  prefetch_paused_ = false;
  background_->wake();
  return returned;
}

bool KvCache::wait_background(int64_t timeout_ms) const {
  process_.check_not_forked();
  return background_->wait_asleep(std::chrono::milliseconds(timeout_ms));
}

void KvCache::stop_background() {
  if (!process_.forked()) background_->stop();
}

void KvCache::close() {
  if (process_.forked()) return;
  background_->stop();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  closed_ = true;
  try {
    driver().synchronize();
  } catch (const DriverError& error) {
    // The device is lost. What it had is unmapped all the same.
    log_line(LogLevel::kError, "close could not wait for the device: %s", error.what());
  }
  for (size_t row = 0; row < n_rows_; ++row) {
    drop_fence(row);
    row_[row] = {};
    seq_lens_[row] = 0;
    unmap_beyond(row, 0);
  }
  pool_->trim();
}

bool KvCache::closed() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

}  // namespace vattn
