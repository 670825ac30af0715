#include "core/layout.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/units.h"

namespace vattn {
namespace {

constexpr size_t kMaxReservedBytes = size_t{64} * 1024 * kGiB;  // half of a 47-bit address space

size_t checked_mul(size_t a, size_t b) {
  size_t product = 0;
  if (__builtin_mul_overflow(a, b, &product) || product > kMaxReservedBytes) {
    throw std::invalid_argument(
        "the rows need more than " + format_bytes(kMaxReservedBytes) +
        " of addresses; lower max_batch_size or max_seq_len, or choose a token size "
        "(num_layers * num_kv_heads * head_dim) with more factors of two");
  }
  return product;
}

// One K or one V tensor of one layer.
struct Member {
  size_t layer;
  bool is_v;
  size_t heads;
  size_t head_dim;
  size_t token_offset;  // bytes from the start of its stripe's token
};

// Tensors whose tokens lie together. Has one region per head in HND order, one in NHD order.
struct Stripe {
  size_t regions;
  size_t token_bytes = 0;
  std::vector<Member> members;
};

class Builder {
 public:
  explicit Builder(const LayoutSpec& spec) : spec_(spec) {}

  Layout build() {
    check_sizes();
    check_groups();
    layout_.layers.resize(num_layers_);
    if (spec_.kind == LayoutKind::kPerLayer) {
      for_each_tensor([&](const Member& member) {
        Stripe stripe = empty_stripe(member.heads);
        append(stripe, member);
        place(stripe);
      });
    } else if (spec_.order == DimOrder::kNHD) {
      Stripe stripe = empty_stripe(1);
      for_each_tensor([&](const Member& member) { append(stripe, member); });
      place(stripe);
    } else {
      for (size_t g = 0; g < spec_.groups.size(); ++g) {
        Stripe stripe = empty_stripe(spec_.groups[g].num_kv_heads);
        for_each_tensor([&](const Member& member) {
          if (group_of_[member.layer] == g) append(stripe, member);
        });
        place(stripe);
      }
    }
    return std::move(layout_);
  }

 private:
  bool heads_apart() const { return spec_.order == DimOrder::kHND; }
  Stripe empty_stripe(size_t heads) const { return {heads_apart() ? heads : 1, 0, {}}; }

  void check_sizes() const {
    const std::pair<const char*, size_t> sizes[] = {{"item_bytes", spec_.item_bytes},
                                                    {"max_batch_size", spec_.max_batch_size},
                                                    {"max_seq_len", spec_.max_seq_len},
                                                    {"page_bytes", spec_.page_bytes}};
    for (const auto& [name, size] : sizes) {
      if (size == 0) throw std::invalid_argument(std::string(name) + " is 0, expected at least 1");
    }
  }

  void check_groups() {
    for (const LayerGroup& group : spec_.groups) num_layers_ += group.layers.size();
    group_of_.assign(num_layers_, spec_.groups.size());
    for (size_t g = 0; g < spec_.groups.size(); ++g) {
      for (const size_t layer : spec_.groups[g].layers) {
        if (layer >= num_layers_ || group_of_[layer] != spec_.groups.size()) {
          throw std::invalid_argument(
              "layer " + std::to_string(layer) + " is in two groups or not below num_layers = " +
              std::to_string(num_layers_) + "; name each layer in exactly one group");
        }
        group_of_[layer] = g;
      }
    }
    if (num_layers_ == 0) throw std::invalid_argument("num_layers is 0, expected at least 1");
  }

  // All K and V tensors, by layer, K before V.
  template <typename Function>
  void for_each_tensor(Function function) const {
    for (size_t layer = 0; layer < num_layers_; ++layer) {
      const LayerGroup& group = spec_.groups[group_of_[layer]];
      function(Member{layer, false, group.num_kv_heads, group.k_head_dim, 0});
      if (group.v_head_dim != 0) {
        function(Member{layer, true, group.num_kv_heads, group.v_head_dim, 0});
      }
    }
  }

  void append(Stripe& stripe, Member member) const {
    member.token_offset = stripe.token_bytes;
    const size_t heads_here = heads_apart() ? 1 : member.heads;
    const size_t elements = checked_mul(heads_here, member.head_dim);
    if (elements == 0) {
      throw std::invalid_argument("layer " + std::to_string(member.layer) +
                                  " has no heads or head_dim 0, expected at least 1");
    }
    stripe.token_bytes += checked_mul(elements, spec_.item_bytes);
    stripe.members.push_back(member);
  }

  // Gives the stripe its addresses, behind those placed before.
  void place(const Stripe& stripe) {
    const size_t token = stripe.token_bytes;
    const size_t unit = checked_mul(token / std::gcd(token, spec_.page_bytes), spec_.page_bytes);
    const size_t region_stride =
        checked_mul(ceil_div(checked_mul(spec_.max_seq_len, token), unit), unit);
    const size_t row_stride = checked_mul(stripe.regions, region_stride);
    const size_t start = layout_.reserved_bytes;
    for (size_t i = 0; i < stripe.regions; ++i) {
      layout_.regions.push_back({token, start + i * region_stride, row_stride});
    }
    for (const Member& member : stripe.members) {
      const TensorView view = view_of(member, token, start, region_stride, row_stride);
      LayerViews& layer = layout_.layers[member.layer];
      if (member.is_v) {
        layer.v = view;
      } else {
        layer.k = view;
      }
    }
    layout_.token_bytes += stripe.regions * token;
    layout_.reserved_bytes = start + checked_mul(row_stride, spec_.max_batch_size);
    checked_mul(layout_.reserved_bytes, 1);
  }

  TensorView view_of(const Member& member, size_t token_bytes, size_t start, size_t region_stride,
                     size_t row_stride) const {
    const auto elements = [&](size_t bytes) {
      return static_cast<int64_t>(bytes / spec_.item_bytes);
    };
    const auto rows = static_cast<int64_t>(spec_.max_batch_size);
    const auto tokens = static_cast<int64_t>(spec_.max_seq_len);
    const auto heads = static_cast<int64_t>(member.heads);
    const auto dim = static_cast<int64_t>(member.head_dim);
    const size_t offset = start + member.token_offset;
    if (heads_apart()) {
      return {offset,
              {rows, heads, tokens, dim},
              {elements(row_stride), elements(region_stride), elements(token_bytes), 1}};
    }
    return {
        offset, {rows, tokens, heads, dim}, {elements(row_stride), elements(token_bytes), dim, 1}};
  }

  const LayoutSpec& spec_;
  size_t num_layers_ = 0;
  std::vector<size_t> group_of_;  // by layer
  Layout layout_;
};

}  // namespace

Layout make_layout(const LayoutSpec& spec) {
  return Builder(spec).build();
}

size_t default_host_page_bytes(const LayoutSpec& spec) {
  LayoutSpec unpaged = spec;
  unpaged.page_bytes = 1;
  size_t token_bytes = SIZE_MAX;
  for (const Region& region : make_layout(unpaged).regions) {
    token_bytes = std::min(token_bytes, region.token_bytes);
  }
  size_t page_bytes = 64 * kKiB;
  while (page_bytes < 2 * kMiB && page_bytes < 64 * token_bytes) page_bytes *= 2;
  return page_bytes;
}

}  // namespace vattn
