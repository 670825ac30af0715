// The parts of KvCache that find the tokens of earlier requests again.
#include <stdexcept>
#include <string>

#include "base/errors.h"
#include "core/kv_cache.h"

namespace vattn {

uint64_t KvCache::keep_prefix(int64_t index, int64_t tokens) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t row = check_active(index);
  if (!rings_.empty()) {
    throw std::invalid_argument(
        "a cache with a sliding window cannot keep prefixes: their tokens are overwritten");
  }
  if (tokens < 1 || tokens > seq_lens_[row]) {
    throw std::invalid_argument("a prefix of " + std::to_string(tokens) + " tokens, but row " +
                                std::to_string(index) + " has " + std::to_string(seq_lens_[row]) +
                                "; keep 1 to as many");
  }
  Row& r = row_[row];
  // Whoever was promised more before than is left must not take the new tokens for the old ones.
  if (static_cast<size_t>(tokens) > r.kept_tokens) r.life = ++n_lives_;
  r.kept_tokens = static_cast<size_t>(tokens);
  note_length(row);
  return r.life;
}

std::vector<KeptPrefix> KvCache::kept_prefixes() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  std::vector<KeptPrefix> kept;
  kept.reserve(n_rows_);
  for (const Row& row : row_) {
    const bool there = row.kept_tokens != 0 && row.state != RowState::kRetiring;
    kept.push_back(there ? KeptPrefix{row.life, row.kept_tokens} : KeptPrefix{0, 0});
  }
  return kept;
}

// Whether the row's first tokens are still those of that life.
bool KvCache::keeps(size_t row, uint64_t life, int64_t tokens) const {
  const Row& r = row_[row];
  return (r.state == RowState::kIdle || r.state == RowState::kActive) && r.life == life &&
         tokens > 0 && static_cast<size_t>(tokens) <= r.kept_tokens;
}

void KvCache::forget_prefix(int64_t index, uint64_t life) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t row = check_row(index);
  if (!keeps(row, life, 1)) return;
  row_[row].kept_tokens = 0;
  if (row_[row].state == RowState::kActive) return note_length(row);
  if (!shares_from(row, 0)) return;
  row_[row].state = RowState::kRetiring;
  row_[row].trim = false;
  background_->wake();
}

bool KvCache::adopt_prefix(int64_t index, uint64_t life, int64_t seq_len, Stream stream) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t row = check_row(index);
  const auto tokens = static_cast<size_t>(seq_len);
  Row& r = row_[row];
  if (!keeps(row, life, seq_len) || r.state != RowState::kIdle || shares_from(row, tokens)) {
    return false;
  }
  order_after_fence(row, stream);
  if (scrub_ == Scrub::kOnReuse) scrub_row(row, tokens, stream);
  start(row, tokens, {}, stream);
  r.life = life;
  r.kept_tokens = tokens;
  note_length(row);
  if (next_prefetch()) background_->wake();
  return true;
}

// Work in `stream` from now on comes after the work that has written the row's tokens.
void KvCache::order_after_work(size_t row, Stream stream) {
  if (row_[row].state != RowState::kActive) return order_after_fence(row, stream);
  if (row_[row].stream != stream) order_streams(/*earlier=*/row_[row].stream, /*later=*/stream);
}

std::optional<std::pair<BatchIdx, size_t>> KvCache::fork_prefix(int64_t index, uint64_t life,
                                                                int64_t seq_len, Stream stream) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t row = check_row(index);
  if (!keeps(row, life, seq_len)) return std::nullopt;
  order_after_work(row, stream);
  for (const size_t copied_pages : {1, 0}) {
    const size_t tokens = rows_.tokens_to_share(row, static_cast<size_t>(seq_len), copied_pages);
    if (tokens == 0) break;
    try {
      return std::pair{fork_rows(row, tokens, 1, stream).front(), tokens};
    } catch (const OutOfPages&) {
      continue;  // without a page for a copy, what needs none
    }
  }
  return std::nullopt;
}

}  // namespace vattn
