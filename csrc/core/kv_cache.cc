#include "core/kv_cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/errors.h"
#include "base/log.h"
#include "base/units.h"

namespace vattn {

KvCache::KvCache(std::shared_ptr<Pool> pool, const LayoutSpec& spec, size_t lookahead, Scrub scrub)
    : pool_(std::move(pool)),
      n_rows_(spec.max_batch_size),
      max_seq_len_(spec.max_seq_len),
      lookahead_(lookahead),
      scrub_(scrub),
      rows_(pool_, make_layout(spec), spec.max_batch_size, scrub),
      row_(n_rows_),
      mapped_tokens_(n_rows_, 0),
      seq_lens_(n_rows_, 0),
      used_tokens_(n_rows_, 0),
      limits_(n_rows_, 0),
      floors_(n_rows_, 0),
      prefetch_at_(n_rows_, INT64_MAX),
      scratch_lens_(n_rows_, 0) {
  for (const Region& region : rows_.layout().regions) {
    // One of each kind: every step() looks at them for every row.
    const auto is_alike = [&](const Region& ring) {
      return ring.window == region.window && ring.sink() == region.sink() &&
             ring.capacity() == region.capacity();
    };
    if (region.has_window() && std::none_of(rings_.begin(), rings_.end(), is_alike)) {
      rings_.push_back(region);
    }
  }
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
  rows_.unmap_staging();
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

size_t KvCache::check_active(int64_t index) const {
  const size_t row = check_row(index);
  if (row_[row].state != RowState::kActive) {
    throw std::invalid_argument("row " + std::to_string(index) + " is " + name_of(row_[row].state) +
                                ", not active: it was freed before, or never allocated");
  }
  return row;
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
    candidates.push_back(
        {row_[row].state, mapped_tokens_[row], row_[row].kept_tokens != 0, row_[row].freed_at});
  }
  const auto chosen = choose_row(candidates, static_cast<size_t>(seq_len));
  if (!chosen) {
    throw OutOfRows("all " + std::to_string(n_rows_) +
                    " rows are active; free one, or raise max_batch_size");
  }
  make_own(*chosen, stream);
  start(*chosen, /*tokens=*/0, {}, stream);
  row_[*chosen].hint_tokens = static_cast<size_t>(seq_len);
  refresh(*chosen);
  if (next_prefetch() || fits_badly(*chosen)) background_->wake();
  return static_cast<BatchIdx>(*chosen);
}

// What an idle row has is for a new request's work in `stream`.
void KvCache::make_own(size_t row, Stream stream) {
  if (shares_from(row, 0)) {
    // It would have to be unmapped before the first token, so nothing is lost by doing it now.
    wait_for_fence(row);
    unmap_beyond(row, 0);
  } else {
    order_after_fence(row, stream);
  }
  if (scrub_ == Scrub::kOnReuse) scrub_row(row, row_[row].writable_from, stream);
}

// Zeros what an idle row has from `token` on. It stays where it is until that is done.
void KvCache::scrub_row(size_t row, size_t token, Stream stream) {
  if (rows_.mapped_pages(row) == 0) return;
  try {
    rows_.clear(row, token, stream);
    const Fence fence = driver().record_fence(stream);
    drop_fence(row);
    row_[row].fence = fence;
    row_[row].fence_stream = stream;
  } catch (...) {
    rows_.settle(stream);
    throw;
  }
}

// Work in `stream` from now on comes after the work that was using the row before.
void KvCache::order_after_fence(size_t row, Stream stream) {
  const Row& r = row_[row];
  if (r.fence != Fence::kNone && r.fence_stream != stream) {
    driver().stream_wait_fence(stream, r.fence);
  }
}

// A row's life begins, with tokens that another row has written or none.
void KvCache::start(size_t row, size_t tokens, RingHistory rings, Stream stream) noexcept {
  Row& r = row_[row];
  r.state = RowState::kActive;
  r.stream = stream;
  r.life = ++n_lives_;
  r.kept_tokens = 0;
  r.hint_tokens = 0;
  r.rings = rings;
  seq_lens_[row] = used_tokens_[row] = static_cast<int64_t>(tokens);
  refresh(row);
}

void KvCache::free(int64_t index, Stream stream) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t at = check_active(index);
  Row& row = row_[at];
  // A fence of an earlier request is folded into the new one: one fence per row is enough.
  order_after_fence(at, stream);
  const Fence fence = driver().record_fence(stream);
  drop_fence(at);
  row.fence = fence;
  row.fence_stream = stream;
  // Nobody could use shared memory but for what is in it.
  const bool useless = row.kept_tokens == 0 && shares_from(at, 0);
  row.trim = false;
  row.state = useless ? RowState::kRetiring : RowState::kIdle;
  row.freed_at = ++n_freed_;
  row.hint_tokens = 0;
  seq_lens_[at] = 0;
  refresh(at);
  prefetch_paused_ = false;
  if (useless) background_->wake();
}

// After the pages, the state or the length of a row have changed.
void KvCache::refresh(size_t row) {
  mapped_tokens_[row] = rows_.mapped_tokens(row);
  const bool active = row_[row].state == RowState::kActive;
  const size_t tokens = active ? std::min(mapped_tokens_[row], max_seq_len_) : 0;
  const bool may_grow = active && lookahead_ != 0 && tokens < max_seq_len_;
  prefetch_at_[row] =
      may_grow ? static_cast<int64_t>(tokens) - static_cast<int64_t>(lookahead_) : INT64_MAX;
  limits_[row] = static_cast<int64_t>(tokens);
  floors_[row] = 0;
  if (active) note_length(row);
}

// After the length of an active row has changed, unless it only grew beyond what is shared.
void KvCache::note_length(size_t row) {
  Row& r = row_[row];
  if (r.state != RowState::kActive) return;
  const auto length = static_cast<size_t>(seq_lens_[row]);
  r.kept_tokens = std::min(r.kept_tokens, length);
  if (length == 0) r.rings = {};
  r.rings.most_tokens = std::max(r.rings.most_tokens, length);
  // The next token would be seen by others: to be dealt with first.
  const bool shared = length < r.writable_from;
  limits_[row] =
      static_cast<int64_t>(shared ? length : std::min(mapped_tokens_[row], max_seq_len_));
  const size_t floor = std::max(r.kept_tokens, std::min(r.writable_from, length));
  floors_[row] = static_cast<int64_t>(std::max(floor, shortest_in_rings(row)));
}

size_t KvCache::trim() {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  for (const size_t row : idle_rows_by_loss()) {
    row_[row].state = RowState::kRetiring;
    row_[row].trim = true;
  }
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
  rows_.unmap_staging();
  pool_->trim();
}

bool KvCache::closed() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

}  // namespace vattn
