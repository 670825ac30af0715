// Where tokens lie: exact numbers for every layout, and properties over random ones.
#include "core/layout.h"

#include <random>

#include "base/units.h"
#include "check.h"
#include "driver_contract.h"
#include "layout_text.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// Layers 0 and 2 have two heads of 4; layer 1 has one latent stripe of 8 and no V, as MLA does.
std::vector<LayerGroup> mixed_groups() {
  return {{{0, 2}, 2, 4, 4}, {{1}, 1, 8, 0}};
}

void interleaved_nhd_has_all_layers_of_a_token_together() {
  const Layout layout =
      make_layout(spec_of(LayoutKind::kInterleaved, DimOrder::kNHD, mixed_groups()));
  CHECK_EQ(text(layout.regions), "80@0+320");
  CHECK_EQ(text(layout.layers[0].k), "0 [2,4,2,4] [160,40,4,1]");
  CHECK_EQ(text(*layout.layers[0].v), "16 [2,4,2,4] [160,40,4,1]");
  CHECK_EQ(text(layout.layers[1].k), "32 [2,4,1,8] [160,40,8,1]");
  CHECK(!layout.layers[1].v);
  CHECK_EQ(text(layout.layers[2].k), "48 [2,4,2,4] [160,40,4,1]");
  CHECK_EQ(text(*layout.layers[2].v), "64 [2,4,2,4] [160,40,4,1]");
  CHECK_EQ(layout.reserved_bytes, 640u);
  CHECK_EQ(layout.token_bytes, 80u);
}

void interleaved_hnd_has_a_region_per_head_of_a_group() {
  const Layout layout =
      make_layout(spec_of(LayoutKind::kInterleaved, DimOrder::kHND, mixed_groups()));
  CHECK_EQ(text(layout.regions), "32@0+256 32@128+256 16@512+64");
  CHECK_EQ(text(layout.layers[0].k), "0 [2,2,4,4] [128,64,16,1]");
  CHECK_EQ(text(*layout.layers[0].v), "8 [2,2,4,4] [128,64,16,1]");
  CHECK_EQ(text(layout.layers[1].k), "512 [2,1,4,8] [32,32,8,1]");
  CHECK(!layout.layers[1].v);
  CHECK_EQ(text(layout.layers[2].k), "16 [2,2,4,4] [128,64,16,1]");
  CHECK_EQ(text(*layout.layers[2].v), "24 [2,2,4,4] [128,64,16,1]");
  CHECK_EQ(layout.reserved_bytes, 640u);
  CHECK_EQ(layout.token_bytes, 80u);
}

void per_layer_nhd_has_a_region_per_tensor() {
  const Layout layout = make_layout(spec_of(LayoutKind::kPerLayer, DimOrder::kNHD, mixed_groups()));
  CHECK_EQ(text(layout.regions), "16@0+64 16@128+64 16@256+64 16@384+64 16@512+64");
  CHECK_EQ(text(layout.layers[0].k), "0 [2,4,2,4] [32,8,4,1]");
  CHECK_EQ(text(*layout.layers[0].v), "128 [2,4,2,4] [32,8,4,1]");
  CHECK_EQ(text(layout.layers[1].k), "256 [2,4,1,8] [32,8,8,1]");
  CHECK(!layout.layers[1].v);
  CHECK_EQ(text(layout.layers[2].k), "384 [2,4,2,4] [32,8,4,1]");
  CHECK_EQ(text(*layout.layers[2].v), "512 [2,4,2,4] [32,8,4,1]");
  CHECK_EQ(layout.reserved_bytes, 640u);
}

void per_layer_hnd_has_a_region_per_tensor_and_head() {
  const Layout layout = make_layout(spec_of(LayoutKind::kPerLayer, DimOrder::kHND, mixed_groups()));
  CHECK_EQ(
      text(layout.regions),
      "8@0+128 8@64+128 8@256+128 8@320+128 16@512+64 8@640+128 8@704+128 8@896+128 8@960+128");
  CHECK_EQ(text(layout.layers[0].k), "0 [2,2,4,4] [64,32,4,1]");
  CHECK_EQ(text(*layout.layers[0].v), "256 [2,2,4,4] [64,32,4,1]");
  CHECK_EQ(text(layout.layers[1].k), "512 [2,1,4,8] [32,32,8,1]");
  CHECK(!layout.layers[1].v);
  CHECK_EQ(text(*layout.layers[2].v), "896 [2,2,4,4] [64,32,4,1]");
  CHECK_EQ(layout.reserved_bytes, 1152u);
}

void k_and_v_may_differ_in_head_dim() {
  const Layout layout =
      make_layout(spec_of(LayoutKind::kInterleaved, DimOrder::kNHD, {{{0}, 2, 6, 2}}));
  CHECK_EQ(text(layout.regions), "32@0+128");
  CHECK_EQ(text(layout.layers[0].k), "0 [2,4,2,6] [64,16,6,1]");
  CHECK_EQ(text(*layout.layers[0].v), "24 [2,4,2,2] [64,16,2,1]");
}

// 48-byte tokens on 64-byte pages: token 1 lies on pages 0 and 1. A row of 10 tokens is 480 bytes;
// the next whole number of tokens and of pages is 576 = 12 * 48 = 9 * 64.
void a_token_may_straddle_two_pages() {
  LayoutSpec spec = spec_of(LayoutKind::kInterleaved, DimOrder::kNHD, {{{0}, 1, 12, 12}});
  spec.max_seq_len = 10;
  const Layout layout = make_layout(spec);
  CHECK_EQ(text(layout.regions), "48@0+576");
  CHECK_EQ(text(layout.layers[0].k), "0 [2,10,1,12] [288,24,12,1]");
  CHECK_EQ(layout.reserved_bytes, 1152u);
}

size_t any_of(std::mt19937& random, size_t low, size_t high) {
  return std::uniform_int_distribution<size_t>(low, high)(random);
}

LayoutSpec random_spec(std::mt19937& random) {
  LayoutSpec spec;
  spec.kind = any_of(random, 0, 1) == 0 ? LayoutKind::kInterleaved : LayoutKind::kPerLayer;
  spec.order = any_of(random, 0, 1) == 0 ? DimOrder::kNHD : DimOrder::kHND;
  spec.item_bytes = size_t{1} << any_of(random, 0, 2);
  spec.max_batch_size = any_of(random, 1, 3);
  spec.max_seq_len = any_of(random, 1, 9);
  spec.page_bytes = size_t{8} << any_of(random, 0, 5);
  const size_t n_groups = any_of(random, 1, 3);
  for (size_t g = 0; g < n_groups; ++g) {
    spec.groups.push_back({{},
                           any_of(random, 1, 3),
                           any_of(random, 1, 6),
                           any_of(random, 0, 1) * any_of(random, 1, 6)});
  }
  const size_t n_layers = any_of(random, n_groups, 5);
  for (size_t layer = 0; layer < n_layers; ++layer) {
    spec.groups[layer % n_groups].layers.push_back(layer);
  }
  return spec;
}

// Marks the bytes of every element; fails where two elements, or an element and another token's
// region, meet.
class ByteMap {
 public:
  ByteMap(const LayoutSpec& spec, const Layout& layout)
      : spec_(spec), layout_(layout), taken_(layout.reserved_bytes, false) {}

  void mark(const TensorView& view) {
    const auto at = [&](size_t dim) { return static_cast<size_t>(view.shape[dim]); };
    const bool nhd = spec_.order == DimOrder::kNHD;
    for (size_t row = 0; row < at(0); ++row) {
      for (size_t i = 0; i < at(1); ++i) {
        for (size_t j = 0; j < at(2); ++j) {
          for (size_t d = 0; d < at(3); ++d) mark(view, {row, i, j, d}, row, nhd ? i : j);
        }
      }
    }
  }
  size_t marked() const {
    size_t n = 0;
    for (const bool taken : taken_) n += taken ? 1 : 0;
    return n;
  }

 private:
  void mark(const TensorView& view, const std::array<size_t, 4>& index, size_t row, size_t token) {
    size_t first = view.offset;
    for (size_t dim = 0; dim < 4; ++dim) {
      first += index[dim] * static_cast<size_t>(view.strides[dim]) * spec_.item_bytes;
    }
    CHECK(in_a_region(first, row, token));
    CHECK(in_a_region(first + spec_.item_bytes - 1, row, token));
    for (size_t byte = first; byte < first + spec_.item_bytes; ++byte) {
      CHECK(!taken_.at(byte));
      taken_[byte] = true;
    }
  }
  bool in_a_region(size_t byte, size_t row, size_t token) const {
    for (const Region& region : layout_.regions) {
      const size_t start = region.offset + row * region.row_stride + token * region.token_bytes;
      if (byte >= start && byte < start + region.token_bytes) return true;
    }
    return false;
  }

  const LayoutSpec& spec_;
  const Layout& layout_;
  std::vector<bool> taken_;
};

void no_two_elements_overlap_and_each_lies_with_its_token() {
  std::mt19937 random(1);
  for (int round = 0; round < 400; ++round) {
    const LayoutSpec spec = random_spec(random);
    const Layout layout = make_layout(spec);
    ByteMap bytes(spec, layout);
    for (const LayerViews& layer : layout.layers) {
      bytes.mark(layer.k);
      if (layer.v) bytes.mark(*layer.v);
    }
    CHECK_EQ(bytes.marked(), layout.token_bytes * spec.max_batch_size * spec.max_seq_len);
  }
}

void rows_and_regions_share_no_page_and_rows_are_whole_tokens_and_pages() {
  std::mt19937 random(2);
  for (int round = 0; round < 400; ++round) {
    const LayoutSpec spec = random_spec(random);
    const Layout layout = make_layout(spec);
    std::vector<bool> page_taken(layout.reserved_bytes / spec.page_bytes, false);
    for (const Region& region : layout.regions) {
      CHECK_EQ(region.row_stride % region.token_bytes, 0u);
      CHECK_EQ(region.row_stride % spec.page_bytes, 0u);
      CHECK_EQ(region.offset % spec.page_bytes, 0u);
      for (size_t row = 0; row < spec.max_batch_size; ++row) {
        const size_t start = (region.offset + row * region.row_stride) / spec.page_bytes;
        const size_t pages = ceil_div(spec.max_seq_len * region.token_bytes, spec.page_bytes);
        for (size_t page = start; page < start + pages; ++page) {
          CHECK(!page_taken.at(page));
          page_taken[page] = true;
        }
      }
    }
    CHECK_EQ(layout.reserved_bytes % spec.page_bytes, 0u);
  }
}

void layers_must_be_named_once_each() {
  const auto with = [](const std::vector<LayerGroup>& groups) {
    make_layout(spec_of(LayoutKind::kInterleaved, DimOrder::kNHD, groups));
  };
  CHECK_THROWS(std::invalid_argument, with({{{0, 0}, 1, 4, 4}}), "layer 0 is in two groups");
  CHECK_THROWS(std::invalid_argument, with({{{0, 1}, 1, 4, 4}, {{1}, 1, 4, 4}}),
               "layer 1 is in two groups");
  CHECK_THROWS(std::invalid_argument, with({{{0, 2}, 1, 4, 4}}),
               "layer 2 is in two groups or not below num_layers = 2");
  CHECK_THROWS(std::invalid_argument, with({{{}, 1, 4, 4}}), "num_layers is 0");
  CHECK_THROWS(std::invalid_argument, with({}), "num_layers is 0");
}

void sizes_of_zero_are_refused() {
  const LayoutSpec good = spec_of(LayoutKind::kInterleaved, DimOrder::kNHD, mixed_groups());
  LayoutSpec spec = good;
  spec.groups[0].num_kv_heads = 0;
  CHECK_THROWS(std::invalid_argument, make_layout(spec), "layer 0 has no heads or head_dim 0");
  spec = good;
  spec.groups[1].k_head_dim = 0;
  CHECK_THROWS(std::invalid_argument, make_layout(spec), "layer 1 has no heads or head_dim 0");
  const auto is_refused = [&](size_t LayoutSpec::* field) {
    spec = good;
    spec.*field = 0;
    // In a child: a division by zero must not take the other tests along.
    return holds_in_child(
        [&] { return throws<std::invalid_argument>([&] { make_layout(spec); }); });
  };
  CHECK(is_refused(&LayoutSpec::item_bytes));
  CHECK(is_refused(&LayoutSpec::max_batch_size));
  CHECK(is_refused(&LayoutSpec::max_seq_len));
  CHECK(is_refused(&LayoutSpec::page_bytes));
}

void more_than_the_address_space_is_refused() {
  const auto with = [](size_t rows, size_t tokens, size_t heads) {
    LayoutSpec spec =
        spec_of(LayoutKind::kInterleaved, DimOrder::kNHD, {{{0, 1}, heads, 128, 128}});
    spec.max_batch_size = rows;
    spec.max_seq_len = tokens;
    return make_layout(spec);
  };
  // 1,024 bytes a token and head: 64 TiB are 2^36 of them.
  CHECK_EQ(with(1024, size_t{1} << 26, 1).reserved_bytes, size_t{64} << 40);
  CHECK_THROWS(std::invalid_argument, with(1025, size_t{1} << 26, 1),
               "the rows need more than 64 TiB of addresses; lower max_batch_size");
  CHECK_THROWS(std::invalid_argument, with(1, SIZE_MAX / 8, 1), "of addresses");
  CHECK_THROWS(std::invalid_argument, with(1, size_t{1} << 54, 1), "of addresses");  // 2^64 bytes
  CHECK_THROWS(std::invalid_argument, with(SIZE_MAX / 8, 1, 1), "of addresses");
  CHECK_THROWS(std::invalid_argument, with(1, 1, SIZE_MAX / 8), "of addresses");
}

void default_host_pages_hold_64_tokens_within_limits() {
  const auto page_for = [](size_t token_bytes) {
    return default_host_page_bytes(spec_of(LayoutKind::kInterleaved, DimOrder::kNHD,
                                           {{{0}, 1, token_bytes / 4, token_bytes / 4}}));
  };
  CHECK_EQ(page_for(4), 64 * kKiB);
  CHECK_EQ(page_for(1 * kKiB), 64 * kKiB);
  CHECK_EQ(page_for(1 * kKiB + 4), 128 * kKiB);
  CHECK_EQ(page_for(32 * kKiB), 2 * kMiB);
  CHECK_EQ(page_for(1 * kMiB), 2 * kMiB);
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests({TEST(interleaved_nhd_has_all_layers_of_a_token_together),
                    TEST(interleaved_hnd_has_a_region_per_head_of_a_group),
                    TEST(per_layer_nhd_has_a_region_per_tensor),
                    TEST(per_layer_hnd_has_a_region_per_tensor_and_head),
                    TEST(k_and_v_may_differ_in_head_dim), TEST(a_token_may_straddle_two_pages),
                    TEST(no_two_elements_overlap_and_each_lies_with_its_token),
                    TEST(rows_and_regions_share_no_page_and_rows_are_whole_tokens_and_pages),
                    TEST(layers_must_be_named_once_each), TEST(sizes_of_zero_are_refused),
                    TEST(more_than_the_address_space_is_refused),
                    TEST(default_host_pages_hold_64_tokens_within_limits)},
                   argc > 1 ? argv[1] : nullptr);
}
