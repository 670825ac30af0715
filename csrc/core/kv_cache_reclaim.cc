// The parts of KvCache that give memory back, and those that take it ahead of need.
#include <algorithm>

#include "base/errors.h"
#include "base/log.h"
#include "core/kv_cache.h"
#include "driver/tracing_driver.h"

namespace vattn {

// Those that keep a prefix last; the oldest before the others.
std::vector<size_t> KvCache::idle_rows_by_loss() const {
  std::vector<size_t> rows;
  for (size_t row = 0; row < n_rows_; ++row) {
    if (row_[row].state == RowState::kIdle || row_[row].state == RowState::kRetiring) {
      rows.push_back(row);
    }
  }
  const auto loss = [this](size_t row) {
    return std::pair{row_[row].kept_tokens != 0, row_[row].freed_at};
  };
  std::sort(rows.begin(), rows.end(), [&](size_t a, size_t b) { return loss(a) < loss(b); });
  return rows;
}

bool KvCache::fence_passed(size_t row) {
  Fence& fence = row_[row].fence;
  if (fence == Fence::kNone) return true;
  if (!driver().fence_passed(fence)) return false;
  drop_fence(row);
  return true;
}

void KvCache::wait_for_fence(size_t row) {
  if (row_[row].fence == Fence::kNone) return;
  driver().wait_fence(row_[row].fence);
  drop_fence(row);
}

// Work in `later` from now on comes after the work in `earlier` so far.
void KvCache::order_streams(Stream earlier, Stream later) {
  const Fence fence = driver().record_fence(earlier);
  try {
    driver().stream_wait_fence(later, fence);
  } catch (...) {
    driver().release_fence(fence);
    throw;
  }
  driver().release_fence(fence);
}

void KvCache::drop_fence(size_t row) noexcept {
  if (row_[row].fence != Fence::kNone) driver().release_fence(row_[row].fence);
  row_[row].fence = Fence::kNone;
}

// What a row has beyond `tokens`. Pages that are free now. pre: its fence has passed.
size_t KvCache::unmap_beyond(size_t row, size_t tokens) noexcept {
  const size_t pages = rows_.shrink(row, tokens);
  note_pages(row);
  return pages;
}

// After the pages of a row have changed.
void KvCache::note_pages(size_t row) {
  Row& r = row_[row];
  // Where the driver refused to unmap, what is left is still mapped and can be adopted.
  if (r.state != RowState::kActive) {
    r.state = rows_.mapped_pages(row) == 0 ? RowState::kFree : RowState::kIdle;
    r.kept_tokens = std::min(r.kept_tokens, rows_.mapped_tokens(row));
  }
  refresh(row);
}

// Tokens of a row that no step(seq_lens) may take memory from: those it asks for, and those that
// kernels may still be reading.
size_t KvCache::tokens_to_keep(size_t row, const int64_t* seq_lens) const {
  if (row_[row].state != RowState::kActive) return row_[row].pinned_tokens;
  return static_cast<size_t>(std::max(used_tokens_[row], seq_lens[row]));
}

// Counted until `enough`.
size_t KvCache::reclaimable_pages(const int64_t* seq_lens, size_t enough) const {
  std::vector<size_t> keep;
  keep.reserve(n_rows_);
  for (size_t row = 0; row < n_rows_; ++row) keep.push_back(tokens_to_keep(row, seq_lens));
  return rows_.pages_freed_by(keep, enough);
}

// What a row can lose. Of an idle row that keeps a prefix, only so much of its end that n_pages
// come free. pre: its fence has passed.
size_t KvCache::reclaim_from(size_t row, size_t n_pages, const int64_t* seq_lens) {
  const size_t keep = tokens_to_keep(row, seq_lens);
  if (row_[row].kept_tokens == 0 || row_[row].state == RowState::kActive) {
    return unmap_beyond(row, keep);
  }
  size_t got = 0;
  // More than once if others have the same pages: then none came free.
  for (size_t before = SIZE_MAX; got < n_pages && rows_.mapped_pages(row) < before;) {
    before = rows_.mapped_pages(row);
    got += unmap_beyond(row, std::max(keep, rows_.tokens_without(row, n_pages - got)));
  }
  return got;
}

// Memory that costs least to lose first. Pages given back; less than n_pages if there are no more.
size_t KvCache::reclaim(size_t n_pages, const int64_t* seq_lens) {
  size_t got = 0;
  // First what idle rows have behind the prefix that they keep: nobody can find it again.
  for (const size_t row : idle_rows_by_loss()) {
    if (got >= n_pages) return got;
    const size_t keep = std::max(tokens_to_keep(row, seq_lens), row_[row].kept_tokens);
    if (fence_passed(row)) got += unmap_beyond(row, keep);
  }
  // After the idle rows, what lies beyond the tokens of active ones: no request has touched it,
  // unless it is left over from the request that had the row before and is still on the device.
  std::vector<size_t> rows = idle_rows_by_loss();
  for (size_t row = 0; row < n_rows_; ++row) {
    if (row_[row].state == RowState::kActive) rows.push_back(row);
  }
  bool idle_rows_were_enough = true;
  for (const bool wait : {false, true}) {
    for (const size_t row : rows) {
      if (got >= n_pages) break;
      if (wait ? row_[row].fence == Fence::kNone : !fence_passed(row)) continue;
      if (wait) wait_for_fence(row);
      got += reclaim_from(row, n_pages - got, seq_lens);
      idle_rows_were_enough &= !wait && row_[row].state != RowState::kActive;
    }
  }
  // Or the background thread takes at once what was just made room for.
  if (!idle_rows_were_enough) prefetch_paused_ = true;
  return got;
}

// Unmaps the retiring rows that the device is done with. Bytes given back to the driver.
size_t KvCache::retire_ready() {
  bool any = false, trim = false;
  for (size_t row = 0; row < n_rows_; ++row) {
    if (row_[row].state != RowState::kRetiring || !fence_passed(row)) continue;
    unmap_beyond(row, 0);
    any = true;
    trim |= row_[row].trim;
  }
  if (any) prefetch_paused_ = false;
  return trim ? pool_->trim() : 0;
}

// A row that was adopted for fewer tokens than one of its extents holds. Once it has tokens, what
// that extent has too much is lost to all others until the request ends.
bool KvCache::fits_badly(size_t row) const {
  const size_t hint = row_[row].hint_tokens;
  return lookahead_ != 0 && row_[row].state == RowState::kActive && used_tokens_[row] == 0 &&
         rows_.tokens_in_fitting_extents(row, hint) < hint;
}

// The same in step(), for rows that get their first tokens now. True: some page has come back.
bool KvCache::refit_first_steps(const int64_t* seq_lens) {
  size_t pages = 0;
  for (size_t row = 0; row < n_rows_; ++row) {
    const auto tokens = static_cast<size_t>(seq_lens[row]);
    if (tokens == 0 || used_tokens_[row] != 0 || !fence_passed(row)) continue;
    const size_t fitting = rows_.tokens_in_fitting_extents(row, tokens);
    if (fitting < tokens) pages += unmap_beyond(row, fitting);
  }
  return pages > 0;
}

// Takes extents that are too large out of a row while nothing is in it; smaller ones follow by
// prefetch. True: did so, look again.
bool KvCache::refit_adopted_row() {
  for (size_t row = 0; row < n_rows_; ++row) {
    if (!fits_badly(row) || !fence_passed(row)) continue;
    if (unmap_beyond(row, rows_.tokens_in_fitting_extents(row, row_[row].hint_tokens)) > 0) {
      prefetch_paused_ = false;  // pages have come back
      return true;
    }
  }
  return false;
}

// Tokens that the background thread would map for a row, were it empty.
size_t KvCache::tokens_to_prefetch(size_t row) const {
  if (row_[row].state != RowState::kActive) return 0;
  const auto ahead = static_cast<size_t>(std::max(used_tokens_[row], seq_lens_[row])) + lookahead_;
  return std::min(std::max(ahead, row_[row].hint_tokens), max_seq_len_);
}

// n_pages, or what there is, of one row that has more than prefetch would give it: idle rows first,
// the oldest before the others. False: there is none that the device is done with.
bool KvCache::reclaim_spare(size_t n_pages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return false;
  std::vector<size_t> rows = idle_rows_by_loss();
  for (size_t row = 0; row < n_rows_; ++row) {
    if (row_[row].state == RowState::kActive) rows.push_back(row);
  }
  for (const bool kept_too : {false, true}) {
    for (const size_t row : rows) {
      const size_t kept = kept_too || row_[row].state == RowState::kActive ? tokens_to_prefetch(row)
                                                                           : row_[row].kept_tokens;
      const size_t keep = std::max(kept, rows_.tokens_without(row, n_pages));
      if (rows_.pages_beyond(row, keep) == 0 || !fence_passed(row)) continue;
      const size_t before = rows_.mapped_pages(row);
      unmap_beyond(row, keep);
      // Even if none of them came free, because others have them too: there may be more behind.
      if (rows_.mapped_pages(row) < before) return true;
    }
  }
  return false;
}

// First what alloc() was told to expect, like a step() would map it; then the lookahead, which may
// be asked back at any time: single pages.
std::optional<Growth> KvCache::prefetch_of(size_t row) const {
  if (row_[row].state != RowState::kActive) return std::nullopt;
  const size_t mapped = std::min(mapped_tokens_[row], max_seq_len_);
  if (row_[row].hint_tokens > mapped) return Growth{row, row_[row].hint_tokens};
  const size_t ahead = std::min(static_cast<size_t>(seq_lens_[row]) + lookahead_, max_seq_len_);
  if (ahead > mapped) return Growth{row, ahead, /*largest_order=*/0};
  return std::nullopt;
}

// The active row that will run out of mapped tokens first.
std::optional<Growth> KvCache::next_prefetch() const {
  if (lookahead_ == 0 || prefetch_paused_) return std::nullopt;
  std::optional<Growth> best;
  int64_t best_left = 0;
  for (size_t row = 0; row < n_rows_; ++row) {
    const std::optional<Growth> growth = prefetch_of(row);
    const auto mapped = static_cast<int64_t>(std::min(mapped_tokens_[row], max_seq_len_));
    const int64_t left = mapped - seq_lens_[row];
    if (!growth || (best && left >= best_left)) continue;
    best = growth;
    best_left = left;
  }
  return best;
}

// Until pages come back.
void KvCache::pause_prefetch(uint64_t failures) {
  const std::lock_guard<std::mutex> lock(mutex_);
  prefetch_paused_ = true;
  prefetch_failures_ += failures;
}

BackgroundThread::Next KvCache::background_work() noexcept {
  using Next = BackgroundThread::Next;
  const OriginScope origin(CallOrigin::kBackground);
  while (waiting_steps_.load() > 0) std::this_thread::yield();
  try {
    std::unique_lock<std::mutex> lock(mutex_);
    if (closed_) return Next::kSleep;
    retire_ready();
    if (refit_adopted_row()) return Next::kAgain;
    if (const auto growth = next_prefetch()) {
      const RowMemory::Need need = rows_.next_run(*growth);
      // Creating is the slow part and needs no lock on the rows; look again afterwards.
      lock.unlock();
      if (pool_->prepare(need.n_pages, growth->largest_order, need.last)) return Next::kAgain;
      lock.lock();
      const auto again = closed_ ? std::nullopt : next_prefetch();
      if (!again) return Next::kAgain;
      const RowMemory::Step step = rows_.grow_one_run(*again);
      refresh(again->row);
      ++prefetched_runs_;
      lock.unlock();
      // So that the first touch does not fault in the caller's time.
      driver().populate(step.address, step.bytes);
      return Next::kAgain;
    }
    if (pool_->rebalance()) return Next::kAgain;
    for (size_t row = 0; row < n_rows_; ++row) {
      if (row_[row].state == RowState::kRetiring || fits_badly(row)) return Next::kSoon;
    }
    return Next::kSleep;
  } catch (const OutOfPages& error) {
    // That nobody has spare pages is no failure: step() reclaims, or says so.
    const size_t short_by = error.needed() > error.free() ? error.needed() - error.free() : 1;
    if (!reclaim_spare(short_by)) pause_prefetch(/*failures=*/0);
    return Next::kAgain;
  } catch (const std::exception& error) {
    log_line(LogLevel::kWarning, "prefetch failed: %s", error.what());
    pause_prefetch(/*failures=*/1);
    return Next::kSleep;
  }
}

}  // namespace vattn
