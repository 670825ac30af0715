// Where every token of every row lies. Pure arithmetic in bytes, never in tokens per page: a token
// may straddle two pages.
//
// A row owns one contiguous range of addresses per region; each region holds token_bytes of every
// token, so a region of n tokens is n * token_bytes long whatever the layout:
//
//   layout       order   regions of a row
//   interleaved  NHD     1: a token's K and V of all layers lie together
//   interleaved  HND     one per head of each layer group
//   per_layer    NHD     2 per layer (1 where there is no V)
//   per_layer    HND     2 per layer and head
//
// Layers with a sliding window keep their tokens in a ring, so their regions are of another length.
// Tokens with different windows cannot lie together: interleaved NHD has 1 region for all layers
// without a window and 1 for each distinct pair of window and sink.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace vattn {

enum class LayoutKind : uint8_t { kInterleaved, kPerLayer };
enum class DimOrder : uint8_t { kNHD, kHND };

// Layers with tensors of one shape.
struct LayerGroup {
  std::vector<size_t> layers;
  size_t num_kv_heads;
  size_t k_head_dim;
  size_t v_head_dim;  // 0: no V, one latent stripe (MLA)
  size_t window = 0;  // tokens that stay readable, at most max_seq_len; 0: all
  size_t sink = 0;    // first tokens, which stay readable beside the window
};

struct LayoutSpec {
  LayoutKind kind = LayoutKind::kInterleaved;
  DimOrder order = DimOrder::kNHD;
  size_t item_bytes = 0;
  size_t max_batch_size = 1;
  size_t max_seq_len = 1;
  size_t page_bytes = 1;
  std::vector<LayerGroup> groups;
};

// A row's range of a region. Plain (ring_bytes 0): token t at t * token_bytes, without end. With a
// window it is head_bytes + 2 * ring_bytes long, all three whole pages:
//
//   | lead_bytes unused | sink tokens | ring | the same ring, mapped again |
//   0                                 ^ head_bytes
//
// Tokens behind the sink run through the ring, and over its end into the second mapping, which is
// the same memory. So any window of them is one contiguous range wherever it starts, and until the
// first lap is full all tokens lie in a row from lead_bytes on. (The "magic ring buffer"; the sinks
// are those of StreamingLLM, arXiv 2309.17453.) A token need not divide the ring, so it need not
// lie at the same place in each lap.
struct Region {
  size_t token_bytes;
  size_t offset;      // of row 0, from the start of the reservation
  size_t row_stride;  // bytes from one row to the next: whole pages; whole tokens if plain
  size_t head_bytes = 0;
  size_t ring_bytes = 0;  // of one mapping; 0: no window
  size_t lead_bytes = 0;  // unused at the start of the head, so that the sink ends with it
  size_t window = 0;      // tokens that stay readable behind the sink

  bool has_window() const { return ring_bytes != 0; }
  // Tokens that stay beside the window.
  size_t sink() const { return (head_bytes - lead_bytes) / token_bytes; }
  // The shortest length, but 0, that a row which had `written` tokens can be cut to: its window
  // must not reach back to tokens that others have overwritten.
  size_t shortest_after(size_t written) const {
    return written <= sink() + capacity() ? 0 : written - capacity() + window;
  }
  // Tokens of the ring.
  size_t capacity() const { return ring_bytes / token_bytes; }
  // Bytes from the start of the row's range to the token.
  size_t offset_of(size_t token) const {
    if (!has_window() || token < sink()) return lead_bytes + token * token_bytes;
    return head_bytes + (token - sink()) * token_bytes % ring_bytes;
  }
};

// A [row, token, head, dim] (NHD) or [row, head, token, dim] (HND) tensor. With a window its tokens
// are the sink and both mappings of the ring; the last may reach over the end, so that every window
// lies inside, also one that starts between two tokens of the first lap.
struct TensorView {
  size_t offset;                   // bytes from the start of the reservation
  std::array<int64_t, 4> shape;    // elements
  std::array<int64_t, 4> strides;  // elements
};

struct LayerViews {
  TensorView k;
  std::optional<TensorView> v;
};

struct Layout {
  std::vector<Region> regions;
  std::vector<LayerViews> layers;
  size_t reserved_bytes = 0;
  size_t token_bytes = 0;  // of all regions together
};

// Throws std::invalid_argument if the layers are not exactly 0..n-1, each once, if a size is zero,
// if there is a sink without a window, or if the row ranges do not fit the address space.
Layout make_layout(const LayoutSpec& spec);

// A page for host memory: what 64 tokens of the smallest region need, or its window if that is
// less, but at least 64 KiB, so that vm.max_map_count (65,530 mappings) is enough for gigabytes,
// and at most 2 MiB, a huge page. Reads the spec's layout, order, element size and groups. Throws
// as make_layout() about those.
size_t default_host_page_bytes(const LayoutSpec& spec);

}  // namespace vattn
