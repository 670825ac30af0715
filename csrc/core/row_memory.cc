#include "core/row_memory.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/units.h"

namespace vattn {

RowMemory::RowMemory(std::shared_ptr<Pool> pool, Layout layout, size_t n_rows)
    : pool_(std::move(pool)),
      layout_(std::move(layout)),
      n_regions_(layout_.regions.size()),
      states_(n_rows * n_regions_) {
  base_ = pool_->driver().reserve(layout_.reserved_bytes);
  pool_->add_user();
}

RowMemory::~RowMemory() {
  pool_->driver().unreserve(base_, layout_.reserved_bytes);
  pool_->remove_user();
}

size_t RowMemory::pages_for(size_t region, size_t tokens) const {
  return ceil_div(tokens * layout_.regions[region].token_bytes, pool_->page_bytes());
}

uintptr_t RowMemory::address(size_t row, size_t region, size_t page) const {
  const Region& r = layout_.regions[region];
  return base_ + r.offset + row * r.row_stride + page * pool_->page_bytes();
}

size_t RowMemory::tokens_in(size_t region, size_t pages) const {
  return pages * pool_->page_bytes() / layout_.regions[region].token_bytes;
}

size_t RowMemory::mapped_tokens(size_t row) const {
  size_t tokens = SIZE_MAX;
  for (size_t g = 0; g < n_regions_; ++g)
    tokens = std::min(tokens, tokens_in(g, state(row, g).pages));
  return tokens;
}

size_t RowMemory::mapped_pages(size_t row) const {
  size_t pages = 0;
  for (size_t g = 0; g < n_regions_; ++g) pages += state(row, g).pages;
  return pages;
}

std::pair<size_t, size_t> RowMemory::cut(size_t row, size_t region, size_t tokens) const {
  const RegionState& s = state(row, region);
  const size_t keep = pages_for(region, tokens);
  size_t index = s.extents.size();
  size_t page = s.pages;
  while (index > 0) {
    const size_t start = page - pool_->pages(s.extents[index - 1]);
    if (start < keep) break;
    page = start;
    --index;
  }
  return {index, page};
}

size_t RowMemory::pages_beyond(size_t row, size_t tokens) const {
  size_t pages = 0;
  for (size_t g = 0; g < n_regions_; ++g) pages += state(row, g).pages - cut(row, g, tokens).second;
  return pages;
}

size_t RowMemory::tokens_in_fitting_extents(size_t row, size_t tokens) const {
  size_t fitting = tokens;
  for (size_t g = 0; g < n_regions_; ++g) {
    const auto [index, end] = cut(row, g, tokens);
    if (end <= pages_for(g, tokens)) continue;
    const size_t start = end - pool_->pages(state(row, g).extents[index - 1]);
    fitting = std::min(fitting, tokens_in(g, start));
  }
  return fitting;
}

size_t RowMemory::tokens_without(size_t row, size_t n_pages) const {
  size_t tokens = SIZE_MAX;
  for (size_t g = 0; g < n_regions_; ++g) {
    const RegionState& s = state(row, g);
    size_t index = s.extents.size(), page = s.pages;
    while (index > 0 && s.pages - page < ceil_div(n_pages, n_regions_)) {
      page -= pool_->pages(s.extents[--index]);
    }
    tokens = std::min(tokens, tokens_in(g, page));
  }
  return tokens;
}

size_t RowMemory::pages_to_grow(size_t row, size_t tokens) const {
  size_t pages = 0;
  for (size_t g = 0; g < n_regions_; ++g) {
    if (const auto run = missing_run({row, tokens}, g)) pages += run->n_pages;
  }
  return pages;
}

std::optional<RowMemory::Run> RowMemory::missing_run(Growth growth, size_t region) const {
  const size_t want = pages_for(region, growth.tokens);
  const size_t have = state(growth.row, region).pages;
  if (want <= have) return std::nullopt;
  return Run{growth.row, region, want - have, growth.largest_order};
}

std::optional<RowMemory::Run> RowMemory::first_missing_run(Growth growth) const {
  for (size_t g = 0; g < n_regions_; ++g) {
    if (const auto run = missing_run(growth, g)) return run;
  }
  return std::nullopt;
}

std::vector<RowMemory::Run> RowMemory::plan(const std::vector<Growth>& growths) const {
  std::vector<Run> runs;
  for (const Growth& growth : growths) {
    for (size_t g = 0; g < n_regions_; ++g) {
      if (const auto run = missing_run(growth, g)) runs.push_back(*run);
    }
  }
  return runs;
}

void RowMemory::grow(const std::vector<Growth>& growths) {
  const std::vector<Run> runs = plan(growths);
  // Every run is committed as it is mapped; `done` says how far to go back.
  size_t done = 0;
  try {
    for (; done < runs.size(); ++done) map_run(runs[done]);
  } catch (...) {
    while (done-- > 0) {
      const Run& run = runs[done];
      const size_t pages = state(run.row, run.region).pages - run.n_pages;
      // A run that cannot be unmapped stays, as if it had been prefetched.
      const auto& extents = state(run.row, run.region).extents;
      size_t keep = extents.size();
      for (size_t left = run.n_pages; left > 0; --keep) left -= pool_->pages(extents[keep - 1]);
      static_cast<void>(unmap_tail(run.row, run.region, keep, pages));
    }
    throw;
  }
}

RowMemory::Need RowMemory::next_run(Growth growth) const {
  const auto run = first_missing_run(growth);
  if (!run) return {};
  return {run->n_pages, last_extent(run->row, run->region)};
}

Extent RowMemory::last_extent(size_t row, size_t region) const {
  const auto& extents = state(row, region).extents;
  return extents.empty() ? Extent{} : pool_->extent(extents.back());
}

RowMemory::Step RowMemory::grow_one_run(Growth growth) {
  const auto run = first_missing_run(growth);
  if (!run) return {};
  const uintptr_t at = address(run->row, run->region, state(run->row, run->region).pages);
  map_run(*run);
  return {at, run->n_pages * pool_->page_bytes()};
}

// Takes, maps and commits one run. A failure leaves nothing behind.
void RowMemory::map_run(const Run& run) {
  RegionState& s = state(run.row, run.region);
  const size_t before = s.extents.size();
  pool_->take(run.n_pages, s.extents, run.largest_order, last_extent(run.row, run.region));
  try {
    // Room for all of the region: unmap_tail() must not allocate.
    scratch_.reserve(s.extents.size());
    scratch_.clear();
    for (size_t i = before; i < s.extents.size(); ++i) {
      scratch_.push_back(pool_->extent(s.extents[i]));
    }
    pool_->driver().map(address(run.row, run.region, s.pages), scratch_);
  } catch (...) {
    for (size_t i = before; i < s.extents.size(); ++i) pool_->give_back(s.extents[i]);
    s.extents.resize(before);
    throw;
  }
  s.pages += run.n_pages;
}

bool RowMemory::unmap_tail(size_t row, size_t region, size_t keep_extents,
                           size_t keep_pages) noexcept {
  RegionState& s = state(row, region);
  scratch_.clear();
  for (size_t i = keep_extents; i < s.extents.size(); ++i) {
    scratch_.push_back(pool_->extent(s.extents[i]));
  }
  if (!pool_->driver().unmap(address(row, region, keep_pages), scratch_)) return false;
  // In the order of their addresses, so that the pool hands neighbours out as neighbours.
  for (size_t i = keep_extents; i < s.extents.size(); ++i) pool_->give_back(s.extents[i]);
  s.extents.resize(keep_extents);
  s.pages = keep_pages;
  return true;
}

size_t RowMemory::shrink(size_t row, size_t tokens) noexcept {
  size_t pages = 0;
  for (size_t g = 0; g < n_regions_; ++g) {
    const auto [keep_extents, keep_pages] = cut(row, g, tokens);
    const size_t beyond = state(row, g).pages - keep_pages;
    if (beyond != 0 && unmap_tail(row, g, keep_extents, keep_pages)) pages += beyond;
  }
  return pages;
}

void RowMemory::list_extents(size_t row, std::vector<ExtentId>& out) const {
  for (size_t g = 0; g < n_regions_; ++g) {
    const auto& extents = state(row, g).extents;
    out.insert(out.end(), extents.begin(), extents.end());
  }
}

void RowMemory::check(size_t row) const {
  for (size_t g = 0; g < n_regions_; ++g) {
    const RegionState& s = state(row, g);
    size_t pages = 0;
    for (const ExtentId id : s.extents) pages += pool_->pages(id);
    if (pages != s.pages || pages * pool_->page_bytes() > layout_.regions[g].row_stride) {
      throw std::logic_error("row " + std::to_string(row) + " region " + std::to_string(g) +
                             ": extents of " + std::to_string(pages) + " pages, " +
                             std::to_string(s.pages) + " counted");
    }
  }
}

}  // namespace vattn
