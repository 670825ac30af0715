#include "row_contents.h"

#include <array>
#include <cstring>

namespace vattn::test {
namespace {

constexpr size_t kMarks = 9;

// Spread over the token, from its first byte to its last.
template <typename Function>
void for_each_mark(size_t token_bytes, uint32_t token, Function function) {
  for (uint32_t i = 0; i < kMarks; ++i) {
    const std::array<uint32_t, 2> mark{token, i};
    function((token_bytes - sizeof(mark)) * i / (kMarks - 1), mark);
  }
}

void write(unsigned char* at, size_t token_bytes, uint32_t token) {
  for_each_mark(token_bytes, token, [&](size_t offset, const std::array<uint32_t, 2>& mark) {
    std::memcpy(at + offset, mark.data(), sizeof(mark));
  });
}

void check_token(const unsigned char* at, size_t token_bytes, uint32_t token,
                 const std::string& where) {
  for_each_mark(token_bytes, token, [&](size_t offset, const std::array<uint32_t, 2>& mark) {
    std::array<uint32_t, 2> found;
    std::memcpy(found.data(), at + offset, sizeof(found));
    if (found == mark) return;
    fail(__FILE__, __LINE__,
         where + " reads " + show(found[0]) + "." + show(found[1]) + ", expected " + show(mark[0]) +
             "." + show(mark[1]));
  });
}

}  // namespace

std::vector<RigOptions> ways_to_lay_out(size_t budget_pages) {
  RigOptions plain;
  plain.rows = 6;
  plain.tokens_per_page = 4;
  plain.budget_pages = budget_pages;
  RigOptions across_pages = plain;  // a token does not divide the page
  across_pages.tokens_per_page = 3;
  RigOptions per_layer = plain;
  per_layer.kind = LayoutKind::kPerLayer;
  per_layer.layers = 2;
  RigOptions by_head = plain;
  by_head.heads = 2;
  RigOptions super_pages = plain;
  super_pages.max_extent_pages = 8;
  return {plain, across_pages, per_layer, by_head, super_pages};
}

std::vector<RigOptions> ways_to_lay_out_windows(size_t budget_pages) {
  std::vector<RigOptions> all;
  for (RigOptions options : ways_to_lay_out(budget_pages)) {
    options.max_tokens = 200;
    options.window = 10;
    all.push_back(options);
    options.sink = 3;
    all.push_back(options);
    options.layers = 2;
    options.first_layer_full = true;
    all.push_back(options);
  }
  return all;
}

int64_t RowContents::start(int64_t tokens) {
  const int64_t row = rig_.alloc(tokens, stream_);
  of(row).clear();
  step(row, tokens);
  return row;
}

void RowContents::step(int64_t row, int64_t length) {
  rig_.kv->step_rows({{row, length}});
  if (static_cast<size_t>(length) < of(row).size()) of(row).resize(static_cast<size_t>(length));
  const auto& regions = rig_.kv->layout().regions;
  while (of(row).size() < static_cast<size_t>(length)) {
    of(row).push_back(++last_);
    for (size_t g = 0; g < regions.size(); ++g) {
      write(rig_.token(row, of(row).size() - 1, g), regions[g].token_bytes, last_);
    }
  }
}

void RowContents::free(int64_t row) {
  rig_.free(row, stream_);
}

std::vector<int64_t> RowContents::fork_n(int64_t row, std::optional<int64_t> length, size_t n) {
  std::vector<int64_t> children;
  const std::vector<BatchIdx> forked = rig_.kv->fork(row, length, n, stream_);
  const auto end = length ? of(row).begin() + *length : of(row).end();
  const std::vector<uint32_t> tokens(of(row).begin(), end);
  for (const BatchIdx child : forked) {
    children.push_back(static_cast<int64_t>(child));
    of(children.back()) = tokens;
  }
  return children;
}

void RowContents::truncate(int64_t row, int64_t length) {
  rig_.kv->truncate(row, length);
  of(row).resize(static_cast<size_t>(length));
}

void RowContents::reorder(const std::vector<int64_t>& rows, const std::vector<int64_t>& parents) {
  rig_.kv->reorder(rows, parents, stream_);
  const auto before = tokens_;
  for (size_t i = 0; i < rows.size(); ++i) of(rows[i]) = before[static_cast<size_t>(parents[i])];
}

void RowContents::compact(int64_t row, const std::vector<int64_t>& keep, int64_t start) {
  rig_.kv->compact(row, keep, start, stream_);
  std::vector<uint32_t> left(of(row).begin(), of(row).begin() + start);
  for (const int64_t token : keep) left.push_back(of(row)[static_cast<size_t>(token)]);
  of(row) = left;
}

bool RowContents::adopt(int64_t row, uint64_t life, int64_t tokens) {
  if (!rig_.kv->adopt_prefix(row, life, tokens, stream_)) return false;
  of(row).resize(static_cast<size_t>(tokens));
  return true;
}

std::pair<int64_t, int64_t> RowContents::fork_prefix(int64_t row, uint64_t life, int64_t tokens) {
  const auto forked = rig_.kv->fork_prefix(row, life, tokens, stream_);
  if (!forked) return {-1, -1};
  const auto child = static_cast<int64_t>(forked->first);
  const auto length = static_cast<std::ptrdiff_t>(forked->second);
  CHECK(length > 0 && length <= tokens);
  of(child).assign(of(row).begin(), of(row).begin() + length);
  return {child, length};
}

void RowContents::check() const {
  rig_.kv->check();
  for (size_t row = 0; row < tokens_.size(); ++row) {
    const auto index = static_cast<int64_t>(row);
    if (rig_.state(index) == RowState::kActive) check_row(index);
  }
}

void RowContents::check_row(int64_t row) const {
  const size_t length = of(row).size();
  CHECK_EQ(rig_.kv->seq_lens()[static_cast<size_t>(row)], static_cast<int64_t>(length));
  const auto& regions = rig_.kv->layout().regions;
  for (size_t g = 0; g < regions.size(); ++g) {
    const Region& r = regions[g];
    if (!r.has_window()) {
      check_range(row, g, 0, length);
      continue;
    }
    const size_t sink = std::min(r.sink(), length);
    check_range(row, g, 0, sink);
    check_range(row, g, std::max(sink, length - std::min(r.window, length)), length);
  }
}

int64_t RowContents::follow_lengths() {
  int64_t lost = 0;
  const std::vector<int64_t> lengths = rig_.kv->seq_lens();
  for (size_t row = 0; row < lengths.size(); ++row) {
    const auto index = static_cast<int64_t>(row);
    if (rig_.state(index) != RowState::kActive) continue;
    CHECK(lengths[row] <= length(index));
    lost += length(index) - lengths[row];
    of(index).resize(static_cast<size_t>(lengths[row]));
  }
  return lost;
}

void RowContents::check_range(int64_t row, size_t region, size_t first, size_t end) const {
  if (first == end) return;
  const size_t token_bytes = rig_.kv->layout().regions[region].token_bytes;
  const unsigned char* at = rig_.token(row, first, region);
  for (size_t token = first; token < end; ++token, at += token_bytes) {
    check_token(at, token_bytes, of(row)[token],
                "row " + show(row) + " token " + show(token) + " region " + show(region));
  }
}

}  // namespace vattn::test
