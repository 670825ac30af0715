#include "core/layout.h"

#include <algorithm>
#include <map>
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
  size_t window;
  size_t sink;
  size_t token_bytes = 0;
  std::vector<Member> members = {};
};

class Builder {
 public:
  explicit Builder(const LayoutSpec& spec) : spec_(spec) {}

  Layout build() {
    check_sizes();
    const std::vector<Stripe> all = stripes();
    layout_.layers.resize(num_layers_);
    for (const Stripe& stripe : all) place(stripe);
    return std::move(layout_);
  }

  // Which tensors lie together, in the order of their addresses.
  std::vector<Stripe> stripes() {
    check_groups();
    std::vector<Stripe> all;
    if (spec_.kind == LayoutKind::kPerLayer) {
      for_each_tensor([&](const Member& member) {
        all.push_back(empty_stripe(spec_.groups[group_of_[member.layer]]));
        append(all.back(), member);
      });
    } else if (heads_apart()) {
      for (const LayerGroup& group : spec_.groups) all.push_back(empty_stripe(group));
      for_each_tensor([&](const Member& member) { append(all[group_of_[member.layer]], member); });
    } else {
      std::map<std::pair<size_t, size_t>, Stripe> by_window;  // the one without a window first
      for_each_tensor([&](const Member& member) {
        const LayerGroup& group = spec_.groups[group_of_[member.layer]];
        const std::pair<size_t, size_t> key{group.window, group.sink};
        append(by_window.try_emplace(key, empty_stripe(group)).first->second, member);
      });
      for (auto& [key, stripe] : by_window) all.push_back(std::move(stripe));
    }
    return all;
  }

 private:
  bool heads_apart() const { return spec_.order == DimOrder::kHND; }
  Stripe empty_stripe(const LayerGroup& group) const {
    return {heads_apart() ? group.num_kv_heads : 1, group.window, group.sink};
  }

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
      if (spec_.groups[g].sink != 0 && spec_.groups[g].window == 0) {
        throw std::invalid_argument("sink is " + std::to_string(spec_.groups[g].sink) +
                                    " without a window; set window too");
      }
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

  size_t whole_pages(size_t bytes) const {
    return checked_mul(ceil_div(bytes, spec_.page_bytes), spec_.page_bytes);
  }

  // A row's range of one of the stripe's regions: all but its place.
  Region region_of(const Stripe& stripe) const {
    Region region{stripe.token_bytes, 0, 0};
    if (stripe.window == 0) return region;
    const size_t sink_bytes =
        checked_mul(std::min(stripe.sink, spec_.max_seq_len), stripe.token_bytes);
    region.window = std::min(stripe.window, spec_.max_seq_len);
    region.head_bytes = whole_pages(sink_bytes);
    region.lead_bytes = region.head_bytes - sink_bytes;
    region.ring_bytes = whole_pages(checked_mul(region.window, stripe.token_bytes));
    return region;
  }

  // Bytes from one of the stripe's regions to the next.
  size_t stride_of(const Region& region) const {
    if (region.has_window()) return region.head_bytes + 2 * region.ring_bytes;
    const size_t token = region.token_bytes;
    const size_t unit = checked_mul(token / std::gcd(token, spec_.page_bytes), spec_.page_bytes);
    return checked_mul(ceil_div(checked_mul(spec_.max_seq_len, token), unit), unit);
  }

  // Gives the stripe its addresses, behind those placed before.
  void place(const Stripe& stripe) {
    Region region = region_of(stripe);
    const size_t region_stride = stride_of(region);
    region.row_stride = checked_mul(stripe.regions, region_stride);
    region.offset = layout_.reserved_bytes;
    for (const Member& member : stripe.members) {
      const TensorView view = view_of(member, region, region_stride);
      LayerViews& layer = layout_.layers[member.layer];
      if (member.is_v) {
        layer.v = view;
      } else {
        layer.k = view;
      }
    }
    layout_.token_bytes += stripe.regions * stripe.token_bytes;
    layout_.reserved_bytes += checked_mul(region.row_stride, spec_.max_batch_size);
    checked_mul(layout_.reserved_bytes, 1);
    for (size_t i = 0; i < stripe.regions; ++i, region.offset += region_stride) {
      layout_.regions.push_back(region);
    }
  }

  // `region` is the first of the stripe's.
  TensorView view_of(const Member& member, const Region& region, size_t region_stride) const {
    const auto elements = [&](size_t bytes) {
      return static_cast<int64_t>(bytes / spec_.item_bytes);
    };
    const auto rows = static_cast<int64_t>(spec_.max_batch_size);
    const auto tokens = static_cast<int64_t>(
        region.has_window() ? region.sink() + ceil_div(2 * region.ring_bytes, region.token_bytes)
                            : spec_.max_seq_len);
    const auto heads = static_cast<int64_t>(member.heads);
    const auto dim = static_cast<int64_t>(member.head_dim);
    const size_t offset = region.offset + region.lead_bytes + member.token_offset;
    const int64_t row = elements(region.row_stride);
    const int64_t token = elements(region.token_bytes);
    if (heads_apart()) {
      return {offset, {rows, heads, tokens, dim}, {row, elements(region_stride), token, 1}};
    }
    return {offset, {rows, tokens, heads, dim}, {row, token, dim, 1}};
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
  size_t wanted_bytes = SIZE_MAX;
  for (const Stripe& stripe : Builder(spec).stripes()) {
    const size_t tokens = stripe.window == 0 ? 64 : std::min<size_t>(stripe.window, 64);
    wanted_bytes = std::min(wanted_bytes, checked_mul(tokens, stripe.token_bytes));
  }
  size_t page_bytes = 64 * kKiB;
  while (page_bytes < 2 * kMiB && page_bytes < wanted_bytes) page_bytes *= 2;
  return page_bytes;
}

}  // namespace vattn
