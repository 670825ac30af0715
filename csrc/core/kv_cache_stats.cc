// The parts of KvCache that only look.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/kv_cache.h"

namespace vattn {
namespace {

void expect(bool holds, size_t row, const char* invariant) {
  if (!holds) {
    throw std::logic_error("row " + std::to_string(row) + " invariant broken: " + invariant);
  }
}

}  // namespace

std::vector<int64_t> KvCache::seq_lens() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  return seq_lens_;
}

RowState KvCache::row_state(int64_t row) const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  return row_[check_row(row)].state;
}

size_t KvCache::mapped_tokens(int64_t row) const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t tokens = rows_.mapped_tokens(check_row(row));
  return tokens == SIZE_MAX ? max_seq_len_ : tokens;
}

CacheStats KvCache::stats() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  CacheStats stats{};
  stats.pool = pool_->stats();
  stats.reserved_bytes = rows_.layout().reserved_bytes;
  for (size_t row = 0; row < n_rows_; ++row) {
    stats.used_bytes += static_cast<size_t>(seq_lens_[row]) * rows_.layout().token_bytes;
    stats.mapped_bytes += rows_.mapped_pages(row) * pool_->page_bytes();
    const RowState state = row_[row].state;
    stats.rows_free += state == RowState::kFree ? 1 : 0;
    stats.rows_active += state == RowState::kActive ? 1 : 0;
    stats.rows_idle += state == RowState::kIdle ? 1 : 0;
    stats.rows_retiring += state == RowState::kRetiring ? 1 : 0;
  }
  stats.aliased_bytes = rows_.aliased_pages() * pool_->page_bytes();
  stats.mapped_bytes -= stats.aliased_bytes;
  stats.reclaimable_bytes = reclaimable_pages(seq_lens_.data(), SIZE_MAX) * pool_->page_bytes();
  stats.steps = steps_;
  stats.steps_with_growth = steps_with_growth_;
  stats.prefetched_runs = prefetched_runs_;
  stats.prefetch_failures = prefetch_failures_;
  return stats;
}

void KvCache::check() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  pool_->check();
  std::vector<ExtentId> mapped;
  for (size_t row = 0; row < n_rows_; ++row) {
    rows_.check(row);
    rows_.list_extents(row, mapped);
    const Row& r = row_[row];
    const auto length = static_cast<size_t>(seq_lens_[row]);
    const bool active = r.state == RowState::kActive;
    expect(active || length == 0, row, "only an active row has tokens");
    expect(length <= rows_.mapped_tokens(row), row, "every token has memory");
    expect(!active || seq_lens_[row] <= used_tokens_[row], row,
           "used_tokens is the longest length so far");
    expect(mapped_tokens_[row] == rows_.mapped_tokens(row), row, "mapped_tokens is up to date");
    expect(r.state != RowState::kFree || rows_.mapped_pages(row) == 0, row,
           "a free row has no pages");
    expect(r.writable_from >= rows_.writable_from(row), row, "shared pages are known");
    const size_t writable = length < r.writable_from ? length : max_seq_len_;
    const size_t limit = active ? std::min(rows_.mapped_tokens(row), writable) : 0;
    expect(limits_[row] == static_cast<int64_t>(limit), row, "limits are up to date");
    expect(r.kept_tokens <= rows_.mapped_tokens(row), row, "what is kept has memory");
    expect(!active || r.kept_tokens <= length, row, "what is kept has tokens");
    expect(r.pinned_tokens == 0, row, "nothing is pinned");
  }
  rows_.list_staged_extents(mapped);
  check_conservation(mapped);
}

// What the pool gave out is what is mapped. Other caches of the pool, if any, hold the rest.
void KvCache::check_conservation(std::vector<ExtentId> mapped) const {
  std::sort(mapped.begin(), mapped.end());
  // The sums first: another cache registers before it takes anything.
  const PoolStats pool = pool_->stats();
  const bool alone = pool_->users() == 1;
  size_t bytes = 0;
  for (auto it = mapped.begin(); it != mapped.end();) {
    const auto next = std::upper_bound(it, mapped.end(), *it);
    const auto places = static_cast<size_t>(next - it);
    const size_t references = pool_->references(*it);
    if (alone ? references != places : references < places) {
      throw std::logic_error("conservation broken: an extent with " + std::to_string(references) +
                             " references is mapped " + std::to_string(places) + " times");
    }
    bytes += pool_->extent(*it).bytes;
    it = next;
  }
  const size_t taken = pool.held_bytes - pool.free_bytes;
  if (alone ? bytes != taken : bytes > taken) {
    throw std::logic_error("conservation broken: " + std::to_string(bytes) + " bytes mapped, " +
                           std::to_string(taken) + " taken from the pool");
  }
}

}  // namespace vattn
