// The parts of KvCache in which rows get tokens of other rows, or fewer of their own.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

#include "base/errors.h"
#include "core/kv_cache.h"

namespace vattn {
namespace {

std::string text(int64_t number) {
  return std::to_string(number);
}

}  // namespace

// Whether other rows see what the row would write from `token` on.
bool KvCache::shares_from(size_t row, size_t token) {
  size_t& writable_from = row_[row].writable_from;
  // Others may have gone meanwhile.
  if (writable_from > token) writable_from = rows_.writable_from(row);
  return writable_from > token;
}

// All or nothing, unless the driver refuses to undo what it did: then tokens are lost.
void KvCache::share_rows(const std::vector<Share>& shares, Stream stream) {
  const auto note = [&] {
    for (const Share& share : shares) {
      for (const size_t row : {share.from, share.to}) {
        row_[row].writable_from = rows_.writable_from(row);
        note_pages(row);
      }
    }
  };
  try {
    rows_.share(shares, stream);
  } catch (...) {
    for (const Share& share : shares) {
      const size_t intact = std::min<size_t>(rows_.first_lost_token(share.to), INT64_MAX);
      seq_lens_[share.to] = std::min(seq_lens_[share.to], static_cast<int64_t>(intact));
    }
    note();
    throw;
  }
  note();
}

// Rows without memory, for tokens of others: free ones, or idle ones that lose theirs, oldest first
// and those that keep a prefix last. They are free afterwards.
std::vector<size_t> KvCache::empty_rows(size_t n, size_t source) {
  retire_ready();
  std::vector<size_t> rows;
  for (size_t row = 0; row < n_rows_; ++row) {
    if (row != source && row_[row].state != RowState::kActive) rows.push_back(row);
  }
  if (rows.size() < n) {
    throw OutOfRows(std::to_string(n) + " rows wanted, but only " + std::to_string(rows.size()) +
                    " of " + std::to_string(n_rows_) +
                    " are not in use; free some, or raise max_batch_size");
  }
  const auto cost = [this](size_t row) {
    const Row& r = row_[row];
    return std::make_tuple(r.state != RowState::kFree, r.kept_tokens != 0, r.freed_at);
  };
  std::stable_sort(rows.begin(), rows.end(), [&](size_t a, size_t b) { return cost(a) < cost(b); });
  rows.resize(n);
  for (const size_t row : rows) {
    wait_for_fence(row);
    unmap_beyond(row, 0);
    if (rows_.mapped_pages(row) != 0) {
      throw DriverError("unmap", -1, "refused to empty row " + std::to_string(row));
    }
  }
  return rows;
}

std::vector<BatchIdx> KvCache::fork_rows(size_t from, size_t tokens, size_t n, Stream stream) {
  // Nothing may be taken from an idle row while it is read.
  size_t& pinned = row_[from].pinned_tokens;
  pinned = tokens;
  std::vector<BatchIdx> children;
  children.reserve(n);
  try {
    std::vector<Share> shares;
    size_t needed = 0;
    for (const size_t row : empty_rows(n, from)) {
      shares.push_back({from, row, tokens, tokens});
      needed += rows_.pages_to_share(shares.back());
    }
    with_room(needed, seq_lens_.data(), [&] { share_rows(shares, stream); });
    if (needed != 0) note_copy(from, shares, stream);
    for (const Share& share : shares) {
      start(share.to, tokens, row_[from].rings, stream);
      children.push_back(static_cast<BatchIdx>(share.to));
    }
  } catch (...) {
    pinned = 0;
    throw;
  }
  pinned = 0;
  if (next_prefetch()) background_->wake();
  return children;
}

// The row's memory must stay where it is until what `stream` copies from it has been read.
void KvCache::note_copy(size_t from, const std::vector<Share>& shares, Stream stream) {
  Row& row = row_[from];
  const bool active = row.state == RowState::kActive;
  // What frees the row comes later in its own stream.
  if (active && row.stream == stream) return;
  try {
    if (active) return order_streams(/*earlier=*/stream, /*later=*/row.stream);
    const Fence fence = driver().record_fence(stream);
    drop_fence(from);
    row.fence = fence;
    row.fence_stream = stream;
  } catch (...) {
    rows_.settle(stream);
    for (const Share& share : shares) unmap_beyond(share.to, 0);
    throw;
  }
}

// Where there are no pages for copies of what active rows share with idle ones, the idle ones go:
// then there is nothing to copy. True: some did.
bool KvCache::drop_idle_sharers() {
  bool any = false;
  for (const size_t row : idle_rows_by_loss()) {
    if (!shares_from(row, 0)) continue;
    wait_for_fence(row);
    const size_t before = rows_.mapped_pages(row);
    unmap_beyond(row, 0);
    any |= rows_.mapped_pages(row) < before;
  }
  return any;
}

// A length that the row has or had, and can have again.
size_t KvCache::check_shorter(int64_t row, int64_t seq_len) const {
  const size_t at = check_active(row);
  if (seq_len < 0 || seq_len > seq_lens_[at]) {
    throw std::invalid_argument("seq_len is " + text(seq_len) + ", but row " + text(row) + " has " +
                                text(seq_lens_[at]) + " tokens; pass 0 to as many");
  }
  check_in_rings(at, static_cast<size_t>(seq_len), "seq_len is " + text(seq_len));
  return at;
}

std::vector<BatchIdx> KvCache::fork(int64_t row, std::optional<int64_t> seq_len, size_t n,
                                    Stream stream) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const int64_t tokens = seq_len ? *seq_len : seq_lens_[check_active(row)];
  const size_t from = check_shorter(row, tokens);
  order_after_work(from, stream);
  return fork_rows(from, static_cast<size_t>(tokens), n, stream);
}

void KvCache::truncate(int64_t row, int64_t seq_len) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t at = check_shorter(row, seq_len);
  seq_lens_[at] = seq_len;
  note_length(at);
}

// The rows that get another parent, and from whom.
std::vector<Share> KvCache::plan_reorder(const std::vector<int64_t>& rows,
                                         const std::vector<int64_t>& parents) const {
  if (rows.size() != parents.size()) {
    throw std::invalid_argument("rows has " + std::to_string(rows.size()) +
                                " entries and parents " + std::to_string(parents.size()) +
                                "; give each row one parent");
  }
  std::vector<Share> shares;
  std::vector<bool> named(n_rows_, false);
  for (size_t i = 0; i < rows.size(); ++i) {
    const size_t to = check_active(rows[i]), from = check_active(parents[i]);
    if (named[to]) {
      throw std::invalid_argument("row " + text(rows[i]) + " is in rows twice; name it once");
    }
    named[to] = true;
    const auto tokens = static_cast<size_t>(seq_lens_[from]);
    if (from != to) shares.push_back({from, to, tokens, tokens});
  }
  return shares;
}

void KvCache::reorder(const std::vector<int64_t>& rows, const std::vector<int64_t>& parents,
                      Stream stream) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const std::vector<Share> shares = plan_reorder(rows, parents);
  if (shares.empty()) return;
  size_t needed = 0;
  std::vector<RingHistory> rings;
  for (const Share& share : shares) {
    needed += rows_.pages_to_share(share);
    rings.push_back(row_[share.from].rings);
  }
  with_room(needed, seq_lens_.data(), [&] { share_rows(shares, stream); });
  for (size_t i = 0; i < shares.size(); ++i) {
    start(shares[i].to, shares[i].tokens, rings[i], stream);
  }
}

// Where the tokens at the positions `keep` stop lying where they belong: one after the other from
// `start` on.
size_t KvCache::first_to_move(size_t row, const std::vector<int64_t>& keep, int64_t start) const {
  const int64_t length = seq_lens_[row];
  if (start < 0 || start > length) {
    throw std::invalid_argument("start is " + text(start) + ", expected 0 to " + text(length) +
                                ", the length of row " + std::to_string(row));
  }
  int64_t least = start;
  size_t in_place = 0;
  for (size_t i = 0; i < keep.size(); ++i) {
    if (keep[i] < least || keep[i] >= length) {
      throw std::invalid_argument("keep_token_indices[" + std::to_string(i) + "] is " +
                                  text(keep[i]) + ", expected ascending positions from " +
                                  text(start) + " to " + text(length - 1));
    }
    least = keep[i] + 1;
    if (keep[i] == start + static_cast<int64_t>(i)) ++in_place;
  }
  return in_place;
}

void KvCache::compact(int64_t index, const std::vector<int64_t>& keep, int64_t start,
                      Stream stream) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const size_t row = check_active(index);
  if (!rings_.empty()) {
    throw std::invalid_argument(
        "compact() cannot move tokens of a sliding window; fork() a row for each branch");
  }
  const size_t in_place = first_to_move(row, keep, start);
  const size_t first = static_cast<size_t>(start) + in_place;
  if (in_place < keep.size()) {
    const Share own{row, row, first, static_cast<size_t>(seq_lens_[row])};
    if (!has_room(rows_.pages_to_share(own), seq_lens_.data())) drop_idle_sharers();
    if (shares_from(row, first)) {
      with_room(rows_.pages_to_share(own), seq_lens_.data(), [&] { share_rows({own}, stream); });
    }
    // Until the last copy only what is before them is certain.
    seq_lens_[row] = static_cast<int64_t>(first);
    note_length(row);
    move_kept(row, {keep.begin() + static_cast<std::ptrdiff_t>(in_place), keep.end()}, first,
              stream);
  }
  seq_lens_[row] = start + static_cast<int64_t>(keep.size());
  note_length(row);
}

// Moves the tokens at the ascending positions `from` together, the first to `to`.
void KvCache::move_kept(size_t row, const std::vector<int64_t>& from, size_t to, Stream stream) {
  for (size_t i = 0; i < from.size();) {
    const auto source = static_cast<size_t>(from[i]);
    size_t n = 1;
    // Neighbours in one copy, which may not reach into what it copies.
    while (i + n < from.size() && n < source - to &&
           from[i + n] == from[i] + static_cast<int64_t>(n)) {
      ++n;
    }
    rows_.move_tokens(row, to, source, n, stream);
    to += n;
    i += n;
  }
}

}  // namespace vattn
