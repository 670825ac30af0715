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

struct Region {
  size_t token_bytes;
  size_t offset;      // of row 0, from the start of the reservation
  size_t row_stride;  // bytes from one row to the next: whole tokens and whole pages
};

// A [row, token, head, dim] (NHD) or [row, head, token, dim] (HND) tensor.
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
// or if the row ranges do not fit the address space.
Layout make_layout(const LayoutSpec& spec);

// A page for host memory: what 64 tokens of the smallest region need, but at least 64 KiB, so that
// vm.max_map_count (65,530 mappings) is enough for gigabytes, and at most 2 MiB, a huge page.
// Reads all of the spec but its page_bytes. Throws as make_layout().
size_t default_host_page_bytes(const LayoutSpec& spec);

}  // namespace vattn
