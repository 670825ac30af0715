// Layers with a sliding window: where their tokens lie in a ring that is mapped twice.
#include <algorithm>
#include <random>

#include "base/units.h"
#include "check.h"
#include "core/layout.h"
#include "layout_text.h"

using namespace vattn;
using namespace vattn::test;

namespace {

LayoutSpec windowed(LayoutKind kind, DimOrder order, const std::vector<LayerGroup>& groups) {
  LayoutSpec spec = spec_of(kind, order, groups);
  spec.max_seq_len = 100;
  return spec;
}

// Layers 0 and 3: 16-byte tokens with a window of 6 (2 pages of 64 bytes) and a sink of 1. Layers 1
// and 2 have none.
std::vector<LayerGroup> gemma_like() {
  return {{{0, 3}, 1, 2, 2, 6, 1}, {{1, 2}, 1, 4, 4}};
}

void interleaved_nhd_has_a_region_per_window_the_plain_one_first() {
  const LayoutSpec spec = windowed(LayoutKind::kInterleaved, DimOrder::kNHD, gemma_like());
  const Layout layout = make_layout(spec);
  CHECK_EQ(text(layout.regions), "32@0+3200 16@6400+320(48/64,128)");
  CHECK_EQ(text(layout.layers[1].k), "0 [2,100,1,4] [1600,16,4,1]");
  CHECK_EQ(text(*layout.layers[2].v), "24 [2,100,1,4] [1600,16,4,1]");
  CHECK_EQ(text(layout.layers[0].k), "6448 [2,17,1,2] [160,8,2,1]");
  CHECK_EQ(text(*layout.layers[3].v), "6460 [2,17,1,2] [160,8,2,1]");
  CHECK_EQ(layout.reserved_bytes, 7040u);
  CHECK_EQ(layout.token_bytes, 48u);
}

void groups_with_the_same_window_and_sink_lie_together() {
  const auto regions = [](const LayerGroup& third) {
    const std::vector<LayerGroup> groups = {{{0}, 1, 4, 4, 6, 1}, {{1}, 2, 2, 2, 6, 1}, third};
    return text(make_layout(windowed(LayoutKind::kInterleaved, DimOrder::kNHD, groups)).regions);
  };
  CHECK_EQ(regions({{2}, 1, 4, 4, 6, 1}), "48@0+704(16/64,320)");
  CHECK_EQ(regions({{2}, 1, 4, 4, 6, 0}), "16@0+256(0/0,128) 32@512+448(32/64,192)");
  CHECK_EQ(regions({{2}, 1, 4, 4, 7, 1}), "32@0+448(32/64,192) 16@896+320(48/64,128)");
}

void the_other_layouts_have_a_ring_in_every_region_of_the_layer() {
  const std::vector<LayerGroup> groups = {{{0}, 2, 12, 8, 3, 2}};
  const auto layout_of = [&](LayoutKind kind, DimOrder order) {
    return make_layout(windowed(kind, order, groups));
  };
  const Layout heads = layout_of(LayoutKind::kInterleaved, DimOrder::kHND);
  CHECK_EQ(text(heads.regions), "40@0+768(48/128,128) 40@384+768(48/128,128)");
  CHECK_EQ(text(heads.layers[0].k), "48 [2,2,9,12] [384,192,20,1]");
  CHECK_EQ(text(*heads.layers[0].v), "72 [2,2,9,8] [384,192,20,1]");
  const Layout tensors = layout_of(LayoutKind::kPerLayer, DimOrder::kNHD);
  CHECK_EQ(text(tensors.regions), "48@0+512(32/128,192) 32@1024+320(0/64,128)");
  CHECK_EQ(text(tensors.layers[0].k), "32 [2,10,2,12] [256,24,12,1]");
  CHECK_EQ(text(*tensors.layers[0].v), "1024 [2,10,2,8] [160,16,8,1]");
  const Layout both = layout_of(LayoutKind::kPerLayer, DimOrder::kHND);
  CHECK_EQ(text(both.regions),
           "24@0+640(16/64,128) 24@320+640(16/64,128) 16@1280+384(32/64,64) 16@1472+384(32/64,64)");
}

// 24-byte tokens in a ring of 64 bytes, behind a head of 64 bytes with one sink token at 40.
void a_token_that_does_not_divide_the_ring_starts_elsewhere_in_each_lap() {
  Region region{24, 0, 192};
  region.head_bytes = 64;
  region.ring_bytes = 64;
  region.lead_bytes = 40;
  CHECK_EQ(region.sink(), 1u);
  const size_t offsets[] = {40, 64, 88, 112, 64 + 8, 64 + 32, 64 + 56, 64 + 16};
  for (size_t token = 0; token < 8; ++token) CHECK_EQ(region.offset_of(token), offsets[token]);
  const Region plain{24, 0, 192};
  CHECK_EQ(plain.offset_of(1000), 24000u);
  CHECK_EQ(plain.sink(), 0u);
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
  spec.max_seq_len = any_of(random, 1, 60);
  spec.page_bytes = size_t{8} << any_of(random, 0, 5);
  const size_t n_groups = any_of(random, 1, 3);
  for (size_t g = 0; g < n_groups; ++g) {
    LayerGroup group{{g}, any_of(random, 1, 3), any_of(random, 1, 6), 0};
    group.v_head_dim = any_of(random, 0, 1) * any_of(random, 1, 6);
    group.window = any_of(random, 0, 3) == 0 ? 0 : any_of(random, 1, 9);
    group.sink = group.window == 0 ? 0 : any_of(random, 0, 1) * any_of(random, 1, 5);
    spec.groups.push_back(group);
  }
  return spec;
}

// The memory of a row in one region; remembers which token wrote each byte, and which of its bytes.
class RingMemory {
 public:
  explicit RingMemory(const Region& region)
      : region_(region), bytes_(region.head_bytes + region.ring_bytes) {}

  void write(size_t token) {
    for (size_t i = 0; i < region_.token_bytes; ++i) at(region_.offset_of(token) + i) = {token, i};
  }
  // Whether the tokens [first, last) can be read one behind the other from where the first lies.
  bool holds(size_t first, size_t last) {
    const size_t start = region_.offset_of(first);
    for (size_t i = 0; i < (last - first) * region_.token_bytes; ++i) {
      const std::pair<size_t, size_t> byte{first + i / region_.token_bytes,
                                           i % region_.token_bytes};
      if (at(start + i) != byte) return false;
    }
    return true;
  }

 private:
  // The byte at a virtual offset; those of the second mapping are those of the first.
  std::pair<size_t, size_t>& at(size_t offset) {
    CHECK(offset < region_.head_bytes + 2 * region_.ring_bytes);
    return bytes_.at(offset < bytes_.size() ? offset : offset - region_.ring_bytes);
  }

  const Region region_;
  std::vector<std::pair<size_t, size_t>> bytes_;
};

// What the groups of a spec ask for, as the layout may have it.
std::vector<std::pair<size_t, size_t>> windows_of(const LayoutSpec& spec) {
  std::vector<std::pair<size_t, size_t>> windows;
  for (const LayerGroup& group : spec.groups) {
    windows.emplace_back(std::min(group.window, spec.max_seq_len),
                         std::min(group.sink, spec.max_seq_len));
  }
  return windows;
}

void the_last_tokens_and_the_sink_are_contiguous_at_every_length() {
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    LayoutSpec spec = random_spec(random);
    spec.groups.resize(1);
    const auto [window, sink] = windows_of(spec)[0];
    if (window == 0) continue;
    for (const Region& region : make_layout(spec).regions) {
      RingMemory memory(region);
      for (size_t n = 1; n <= spec.max_seq_len; ++n) {
        memory.write(n - 1);
        CHECK(memory.holds(0, std::min(n, sink)));
        const size_t first = std::max(sink, n - std::min(n, window));
        if (first < n) CHECK(memory.holds(first, n));
        const bool wrapped = n > sink + region.ring_bytes / region.token_bytes;
        if (!wrapped) CHECK(memory.holds(0, n));
      }
    }
  }
}

void a_row_can_be_cut_to_the_lengths_whose_window_is_not_overwritten() {
  std::mt19937 random(7);
  for (int round = 0; round < 100; ++round) {
    LayoutSpec spec = random_spec(random);
    spec.groups.resize(1);
    const auto [window, sink] = windows_of(spec)[0];
    if (window == 0) continue;
    for (const Region& region : make_layout(spec).regions) {
      CHECK_EQ(region.window, window);
      RingMemory memory(region);
      for (size_t n = 1; n <= spec.max_seq_len; ++n) {
        memory.write(n - 1);
        for (size_t cut = sink + 1; cut <= n; ++cut) {
          const size_t first = std::max(sink, cut - std::min(cut, window));
          CHECK_EQ(cut >= region.shortest_after(n), memory.holds(first, cut));
        }
      }
    }
  }
}

void head_and_ring_are_no_larger_than_the_pages_they_need() {
  std::mt19937 random(4);
  for (int round = 0; round < 300; ++round) {
    LayoutSpec spec = random_spec(random);
    spec.groups.resize(1);
    const auto [window, sink] = windows_of(spec)[0];
    for (const Region& region : make_layout(spec).regions) {
      CHECK_EQ(region.has_window(), window != 0);
      CHECK_EQ(region.head_bytes, round_up(sink * region.token_bytes, spec.page_bytes));
      CHECK_EQ(region.ring_bytes, round_up(window * region.token_bytes, spec.page_bytes));
      CHECK_EQ(region.sink(), sink);
    }
  }
}

size_t bytes_of_a_row(const LayoutSpec& spec, const Region& region) {
  if (region.has_window()) return region.head_bytes + 2 * region.ring_bytes;
  return spec.max_seq_len * region.token_bytes;
}

void rows_and_regions_share_no_page() {
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    const LayoutSpec spec = random_spec(random);
    const Layout layout = make_layout(spec);
    CHECK_EQ(layout.reserved_bytes % spec.page_bytes, 0u);
    std::vector<bool> page_taken(layout.reserved_bytes / spec.page_bytes, false);
    for (const Region& region : layout.regions) {
      CHECK_EQ(region.row_stride % spec.page_bytes, 0u);
      CHECK_EQ(region.offset % spec.page_bytes, 0u);
      for (size_t row = 0; row < spec.max_batch_size; ++row) {
        const size_t start = (region.offset + row * region.row_stride) / spec.page_bytes;
        const size_t pages = ceil_div(bytes_of_a_row(spec, region), spec.page_bytes);
        for (size_t page = start; page < start + pages; ++page) {
          CHECK(!page_taken.at(page));
          page_taken[page] = true;
        }
      }
    }
  }
}

// The region that a view's head 0 lies in.
const Region& region_of(const Layout& layout, const TensorView& view) {
  const Region* found = nullptr;
  for (const Region& region : layout.regions) {
    if (region.offset <= view.offset && (!found || region.offset > found->offset)) found = &region;
  }
  CHECK(found != nullptr);
  return *found;
}

// A framework refuses a view that goes beyond the storage that its shape and strides span.
void a_view_spans_every_window_and_starts_with_token_0() {
  std::mt19937 random(6);
  for (int round = 0; round < 300; ++round) {
    const LayoutSpec spec = random_spec(random);
    const Layout layout = make_layout(spec);
    for (size_t layer = 0; layer < layout.layers.size(); ++layer) {
      const TensorView& view = layout.layers[layer].k;
      const Region& region = region_of(layout, view);
      const auto [window, sink] = windows_of(spec)[layer];
      CHECK_EQ(region.sink(), sink);
      CHECK(view.offset - region.offset - region.lead_bytes < region.token_bytes);
      const size_t dim = spec.order == DimOrder::kNHD ? 1 : 2;
      CHECK_EQ(static_cast<size_t>(view.strides[dim]) * spec.item_bytes, region.token_bytes);
      if (window == 0) continue;
      const size_t spanned = static_cast<size_t>(view.shape[dim]) * region.token_bytes;
      for (size_t n = sink + 1; n <= spec.max_seq_len; ++n) {
        const size_t first = std::max(sink, n - std::min(n, window));
        const size_t end = region.offset_of(first) + (n - first) * region.token_bytes;
        CHECK(end - region.lead_bytes <= spanned);
      }
    }
  }
}

void windows_and_sinks_beyond_the_longest_row_cost_no_more_than_it() {
  const auto regions = [](size_t window, size_t sink) {
    return text(
        make_layout(windowed(LayoutKind::kPerLayer, DimOrder::kNHD, {{{0}, 1, 8, 0, window, sink}}))
            .regions);
  };
  CHECK_EQ(regions(100, 0), "16@0+3200(0/0,1600)");
  CHECK_EQ(regions(101, 0), regions(100, 0));
  CHECK_EQ(regions(SIZE_MAX, SIZE_MAX), regions(100, 100));
}

void a_sink_without_a_window_is_refused() {
  CHECK_THROWS(std::invalid_argument,
               make_layout(windowed(LayoutKind::kPerLayer, DimOrder::kNHD, {{{0}, 1, 8, 8, 0, 4}})),
               "sink is 4 without a window; set window too");
}

void rings_that_do_not_fit_the_address_space_are_refused() {
  LayoutSpec spec =
      windowed(LayoutKind::kPerLayer, DimOrder::kNHD, {{{0}, 1, 512, 0, size_t{1} << 33, 0}});
  spec.page_bytes = 4096;
  spec.max_batch_size = 4;
  spec.max_seq_len = size_t{1} << 33;  // 8 TiB in 1 KiB tokens, mapped twice
  CHECK_EQ(make_layout(spec).reserved_bytes, size_t{64} * kTiB);
  spec.max_batch_size = 5;
  CHECK_THROWS(std::invalid_argument, make_layout(spec), "the rows need more than 64 TiB");
  spec.max_batch_size = 1;
  spec.max_seq_len = spec.groups[0].window = SIZE_MAX / 8;
  CHECK_THROWS(std::invalid_argument, make_layout(spec), "the rows need more than 64 TiB");
  spec.groups[0].window = 1;
  spec.groups[0].sink = SIZE_MAX / 8;
  CHECK_THROWS(std::invalid_argument, make_layout(spec), "the rows need more than 64 TiB");
}

void default_host_pages_are_no_larger_than_a_window() {
  const auto page_for = [](const std::vector<LayerGroup>& groups) {
    LayoutSpec spec = spec_of(LayoutKind::kInterleaved, DimOrder::kNHD, groups);
    spec.max_seq_len = 1;  // the caller need not know it
    return default_host_page_bytes(spec);
  };
  const size_t token = 8 * kKiB;  // of one layer; 64 of them are 512 KiB
  const auto layer = [&](size_t index, size_t window) {
    return LayerGroup{{index}, 1, token / 4, token / 4, window, 0};
  };
  CHECK_EQ(page_for({layer(0, 0)}), 512 * kKiB);
  CHECK_EQ(page_for({layer(0, 4096)}), 512 * kKiB);
  CHECK_EQ(page_for({layer(0, 64)}), 512 * kKiB);
  CHECK_EQ(page_for({layer(0, 32)}), 256 * kKiB);
  CHECK_EQ(page_for({layer(0, 1)}), 64 * kKiB);
  // The layers without a window lie together, as do those with the same.
  CHECK_EQ(page_for({layer(0, 0), layer(1, 0), layer(2, 4096), layer(3, 4096)}), 1 * kMiB);
  CHECK_EQ(page_for({layer(0, 0), layer(1, 0), layer(2, 16)}), 128 * kKiB);
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests({TEST(interleaved_nhd_has_a_region_per_window_the_plain_one_first),
                    TEST(groups_with_the_same_window_and_sink_lie_together),
                    TEST(the_other_layouts_have_a_ring_in_every_region_of_the_layer),
                    TEST(a_token_that_does_not_divide_the_ring_starts_elsewhere_in_each_lap),
                    TEST(the_last_tokens_and_the_sink_are_contiguous_at_every_length),
                    TEST(a_row_can_be_cut_to_the_lengths_whose_window_is_not_overwritten),
                    TEST(head_and_ring_are_no_larger_than_the_pages_they_need),
                    TEST(rows_and_regions_share_no_page),
                    TEST(a_view_spans_every_window_and_starts_with_token_0),
                    TEST(windows_and_sinks_beyond_the_longest_row_cost_no_more_than_it),
                    TEST(a_sink_without_a_window_is_refused),
                    TEST(rings_that_do_not_fit_the_address_space_are_refused),
                    TEST(default_host_pages_are_no_larger_than_a_window)},
                   argc > 1 ? argv[1] : nullptr);
}
