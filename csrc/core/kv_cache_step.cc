// The parts of KvCache that are a step: lengths checked, memory under them, lengths published.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/errors.h"
#include "core/kv_cache.h"
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
  bool fits = true, ahead = false, above = true;
  for (size_t row = 0; row < n_rows_; ++row) {
    // As unsigned numbers, negative lengths are too long.
    fits &= static_cast<uint64_t>(seq_lens[row]) <= static_cast<uint64_t>(limits_[row]);
    above &= seq_lens[row] >= floors_[row];
    ahead |= seq_lens[row] > prefetch_at_[row];
  }
  if (!fits || !above) check_lens(seq_lens);
  if (!fits) {
    grow_rows(seq_lens);
    ++steps_with_growth_;
    ahead = true;
  }
  if (!rings_.empty()) note_long_chunks(seq_lens);
  for (size_t row = 0; row < n_rows_; ++row) {
    seq_lens_[row] = seq_lens[row];
    used_tokens_[row] = std::max(used_tokens_[row], seq_lens[row]);
  }
  if (!fits || !above || !rings_.empty()) {
    for (size_t row = 0; row < n_rows_; ++row) note_length(row);
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
    if (n < seq_lens_[row]) check_in_rings(row, static_cast<size_t>(n), name);
  }
}

// The shortest length, but 0, whose window no ring has overwritten.
size_t KvCache::shortest_in_rings(size_t row) const {
  const RingHistory& history = row_[row].rings;
  size_t shortest = history.long_chunk_end;
  for (const Region& ring : rings_) {
    shortest = std::max(shortest, ring.shortest_after(history.most_tokens));
  }
  return shortest;
}

// Of more tokens than a window, the first are never written.
void KvCache::note_long_chunks(const int64_t* seq_lens) {
  for (size_t row = 0; row < n_rows_; ++row) {
    const auto before = static_cast<size_t>(seq_lens_[row]);
    const auto after = static_cast<size_t>(seq_lens[row]);
    for (const Region& ring : rings_) {
      if (after > std::max(before, ring.sink()) + ring.window) {
        row_[row].rings.long_chunk_end = after;
      }
    }
  }
}

void KvCache::check_in_rings(size_t row, size_t tokens, const std::string& name) const {
  const size_t shortest = shortest_in_rings(row);
  if (tokens != 0 && tokens < shortest) {
    throw std::invalid_argument(name + ", but the row's window at fewer than " +
                                std::to_string(shortest) +
                                " tokens is overwritten; use a larger window, or free the row");
  }
}

// Decide -> reclaim if short -> act. Lengths are published by the caller, who cannot fail any more.
void KvCache::grow_rows(const int64_t* seq_lens) {
  const OriginScope origin(CallOrigin::kStep);
  std::vector<Growth> growths;
  std::vector<Share> own;  // what the next tokens would overwrite, and others see
  size_t needed = 0;
  for (size_t row = 0; row < n_rows_; ++row) {
    if (seq_lens[row] <= limits_[row]) continue;
    const auto tokens = static_cast<size_t>(seq_lens[row]);
    const auto now = static_cast<size_t>(seq_lens_[row]);
    growths.push_back({row, tokens});
    if (shares_from(row, now)) {
      own.push_back({row, row, now, now});
      needed += rows_.pages_to_share({row, row, now, tokens});
    } else {
      needed += rows_.pages_to_grow(row, tokens);
    }
  }
  if (!has_room(needed, seq_lens) &&
      (refit_first_steps(seq_lens) || (!own.empty() && drop_idle_sharers()))) {
    return grow_rows(seq_lens);
  }
  try {
    with_room(needed, seq_lens, [&] {
      for (const Share& share : own) {
        // Of two rows that share pages, the second has them to itself when the first has its own.
        if (shares_from(share.to, share.tokens)) share_rows({share}, row_[share.to].stream);
      }
      rows_.grow(growths);
    });
  } catch (...) {
    // A run that the driver refused to take back stays mapped, as if it had been prefetched.
    for (const Growth& growth : growths) refresh(growth.row);
    throw;
  }
  for (const Growth& growth : growths) refresh(growth.row);
}

bool KvCache::has_room(size_t n_pages, const int64_t* seq_lens) const {
  const size_t available = pool_->available_pages();
  return n_pages <= available ||
         n_pages - available <= reclaimable_pages(seq_lens, n_pages - available);
}

// Takes memory back until n_pages are available, then acts. Throws OutOfPages, before anything has
// changed, and what `act` throws. pre: `act` is all or nothing, or can be repeated.
void KvCache::with_room(size_t n_pages, const int64_t* seq_lens, const std::function<void()>& act) {
  const size_t available = pool_->available_pages();
  if (!has_room(n_pages, seq_lens)) {
    throw OutOfPages(n_pages, available + reclaimable_pages(seq_lens, SIZE_MAX),
                     "free a request or raise memory");
  }
  if (n_pages > available) reclaim(n_pages - available, seq_lens);
  try {
    act();
  } catch (const OutOfPages&) {
    // The driver has less memory than the budget allows. Idle rows may have enough.
    if (reclaim(n_pages, seq_lens) == 0) throw;
    act();
  }
}

}  // namespace vattn
