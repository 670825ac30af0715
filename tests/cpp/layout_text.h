// Small layouts for tests, and layouts as text.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "core/layout.h"

namespace vattn::test {

inline std::string text(const std::array<int64_t, 4>& values) {
  std::string out;
  for (const int64_t value : values) out += (out.empty() ? "" : ",") + std::to_string(value);
  return "[" + out + "]";
}

// "16 [rows,...] [strides]"
inline std::string text(const TensorView& view) {
  return std::to_string(view.offset) + " " + text(view.shape) + " " + text(view.strides);
}

// "token_bytes@offset+row_stride ..."; with a window "(lead/head,ring)" behind it.
inline std::string text(const std::vector<Region>& regions) {
  std::string out;
  for (const Region& region : regions) {
    out += (out.empty() ? "" : " ") + std::to_string(region.token_bytes) + "@" +
           std::to_string(region.offset) + "+" + std::to_string(region.row_stride);
    if (region.has_window()) {
      out += "(" + std::to_string(region.lead_bytes) + "/" + std::to_string(region.head_bytes) +
             "," + std::to_string(region.ring_bytes) + ")";
    }
  }
  return out;
}

inline LayoutSpec spec_of(LayoutKind kind, DimOrder order, const std::vector<LayerGroup>& groups) {
  LayoutSpec spec;
  spec.kind = kind;
  spec.order = order;
  spec.item_bytes = 2;
  spec.max_batch_size = 2;
  spec.max_seq_len = 4;
  spec.page_bytes = 64;
  spec.groups = groups;
  return spec;
}

}  // namespace vattn::test
