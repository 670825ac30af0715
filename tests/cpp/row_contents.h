// A caller that writes every token once, with a number of its own, and knows what each row is to
// read: the model of a cache whose rows share memory.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "cache_rig.h"

namespace vattn::test {

// Layouts in which the tokens of a row lie differently.
std::vector<RigOptions> ways_to_lay_out(size_t budget_pages = 128);
// The same with a window of 10 tokens, on its own, with a sink, and beside a layer without one.
std::vector<RigOptions> ways_to_lay_out_windows(size_t budget_pages = 256);

// Each function calls the cache's of the same name; if that throws, nothing changes here either.
class RowContents {
 public:
  explicit RowContents(Rig& rig, Stream stream = Stream{}) : rig_(rig), stream_(stream) {
    tokens_.resize(rig.kv->seq_lens().size());
  }

  // A new row with so many tokens.
  int64_t start(int64_t tokens);
  // The row's length is `length` from now on; what is new is written.
  void step(int64_t row, int64_t length);
  void free(int64_t row);
  int64_t fork(int64_t row, std::optional<int64_t> length = std::nullopt) {
    return fork_n(row, length, 1).front();
  }
  std::vector<int64_t> fork_n(int64_t row, std::optional<int64_t> length, size_t n);
  void truncate(int64_t row, int64_t length);
  void reorder(const std::vector<int64_t>& rows, const std::vector<int64_t>& parents);
  void compact(int64_t row, const std::vector<int64_t>& keep, int64_t start = 0);
  // What keeps a prefix; see KvCache.
  bool adopt(int64_t row, uint64_t life, int64_t tokens);
  // The new row and its length; -1: there is none.
  std::pair<int64_t, int64_t> fork_prefix(int64_t row, uint64_t life, int64_t tokens);

  int64_t length(int64_t row) const { return static_cast<int64_t>(of(row).size()); }
  // Fails unless the cache adds up, has these lengths, and every row reads its tokens: all of them,
  // but of those in a ring the sink and the window, both one contiguous range.
  void check() const;
  void check_row(int64_t row) const;
  // After a failure that may cost tokens: the model has the cache's lengths. Tokens lost.
  int64_t follow_lengths();

 private:
  std::vector<uint32_t>& of(int64_t row) { return tokens_[static_cast<size_t>(row)]; }
  const std::vector<uint32_t>& of(int64_t row) const { return tokens_[static_cast<size_t>(row)]; }
  void check_range(int64_t row, size_t region, size_t first, size_t end) const;

  Rig& rig_;
  const Stream stream_;
  std::vector<std::vector<uint32_t>> tokens_;  // by row; of an idle one what it had
  uint32_t last_ = 0;
};

}  // namespace vattn::test
