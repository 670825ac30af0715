#include "core/row_memory.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/units.h"

namespace vattn {

RowMemory::RowMemory(std::shared_ptr<Pool> pool, Layout layout, size_t n_rows, Scrub scrub)
    : pool_(std::move(pool)),
      layout_(std::move(layout)),
      n_regions_(layout_.regions.size()),
      scrub_(scrub),
      states_(n_rows * n_regions_) {
  base_ = pool_->driver().reserve(layout_.reserved_bytes);
  pool_->add_user();
}

RowMemory::~RowMemory() {
  pool_->driver().unreserve(base_, layout_.reserved_bytes);
  pool_->remove_user();
}

size_t RowMemory::head_pages(size_t region) const {
  return layout_.regions[region].head_bytes / pool_->page_bytes();
}

// Pages of a region that has a ring, when it is complete.
size_t RowMemory::ring_end(size_t region) const {
  return head_pages(region) + layout_.regions[region].ring_bytes / pool_->page_bytes();
}

size_t RowMemory::pages_for(size_t region, size_t tokens) const {
  if (tokens == 0) return 0;
  const Region& r = layout_.regions[region];
  const size_t pages = ceil_div(r.lead_bytes + tokens * r.token_bytes, pool_->page_bytes());
  return is_ring(region) ? std::min(pages, ring_end(region)) : pages;
}

// Whether the last of these tokens leaves a part of its page empty.
bool RowMemory::ends_in_page(size_t region, size_t tokens) const {
  return !is_ring(region) &&
         tokens * layout_.regions[region].token_bytes % pool_->page_bytes() != 0;
}

uintptr_t RowMemory::address(size_t row, size_t region, size_t page) const {
  const Region& r = layout_.regions[region];
  return base_ + r.offset + row * r.row_stride + page * pool_->page_bytes();
}

size_t RowMemory::tokens_in(size_t region, size_t pages) const {
  const Region& r = layout_.regions[region];
  const size_t bytes = pages * pool_->page_bytes();
  return bytes <= r.lead_bytes ? 0 : (bytes - r.lead_bytes) / r.token_bytes;
}

size_t RowMemory::mapped_tokens(size_t row) const {
  size_t tokens = SIZE_MAX;
  for (size_t g = 0; g < n_regions_; ++g) {
    if (!state(row, g).doubled) tokens = std::min(tokens, tokens_in(g, state(row, g).pages));
  }
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
  const RegionState& s = state(growth.row, region);
  const bool to_double = is_ring(region) && want == ring_end(region) && !s.doubled;
  if (want <= s.pages && !to_double) return std::nullopt;
  const size_t n_pages = want - std::min(want, s.pages);
  return Run{growth.row, region, n_pages, growth.largest_order,
             ends_in_page(region, growth.tokens)};
}

std::optional<RowMemory::Run> RowMemory::first_missing_run(Growth growth) const {
  for (size_t g = 0; g < n_regions_; ++g) {
    auto run = missing_run(growth, g);
    if (!run) continue;
    // Extents are created one by one ahead of this: the last page is a run of its own.
    if (run->last_apart && run->n_pages > 1) --run->n_pages;
    run->last_apart = false;
    return run;
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
      unmap_tail(run.row, run.region, keep, pages);
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

const std::vector<Extent>& RowMemory::run_of(const std::vector<ExtentId>& ids, size_t first) {
  scratch_.clear();
  for (size_t i = first; i < ids.size(); ++i) scratch_.push_back(pool_->extent(ids[i]));
  return scratch_;
}

// Appends a run's extents to `out`. Those of the head of a ring are not of the ring, which is
// mapped once more.
void RowMemory::take(const Run& run, size_t first_page, std::vector<ExtentId>& out, Extent last) {
  const size_t before = out.size();
  const size_t end = first_page + run.n_pages;
  size_t page = first_page;
  try {
    for (const size_t stop : {head_pages(run.region), end - (run.last_apart ? 1 : 0), end}) {
      if (std::min(stop, end) <= page) continue;
      pool_->take(std::min(stop, end) - page, out, run.largest_order, last);
      last = pool_->extent(out.back());
      page = std::min(stop, end);
    }
  } catch (...) {
    give_back(out, before);
    throw;
  }
}

// Takes, maps and commits one run. A failure leaves nothing behind but what was committed of a
// ring.
void RowMemory::map_run(const Run& run) {
  if (run.n_pages != 0) map_new_pages(run);
  if (is_ring(run.region) && state(run.row, run.region).pages == ring_end(run.region)) {
    map_ring_again(run.row, run.region);
  }
}

void RowMemory::map_new_pages(const Run& run) {
  RegionState& s = state(run.row, run.region);
  const size_t extents_before = s.extents.size(), pages_before = s.pages;
  const uintptr_t at = address(run.row, run.region, s.pages);
  take(run, s.pages, s.extents, last_extent(run.row, run.region));
  try {
    // Room for all of the region: unmap_tail() must not allocate.
    scratch_.reserve(s.extents.size());
    pool_->driver().map(at, run_of(s.extents, extents_before));
  } catch (...) {
    give_back(s.extents, extents_before);
    throw;
  }
  s.pages += run.n_pages;
  try {
    if (scrub(at, s.extents, extents_before, Stream{})) wait_for(Stream{});
  } catch (...) {
    unmap_tail(run.row, run.region, extents_before, pages_before);
    throw;
  }
}

// The ring right behind itself.
void RowMemory::map_ring_again(size_t row, size_t region) {
  RegionState& s = state(row, region);
  pool_->driver().map(address(row, region, ring_end(region)),
                      run_of(s.extents, first_of_ring(row, region)));
  s.doubled = true;
}

size_t RowMemory::first_of_ring(size_t row, size_t region) const {
  size_t first = 0;
  for (size_t page = 0; page < head_pages(region); ++first) {
    page += pool_->pages(state(row, region).extents[first]);
  }
  return first;
}

// In the order of their addresses, so that the pool hands neighbours out as neighbours.
void RowMemory::give_back(std::vector<ExtentId>& ids, size_t first) noexcept {
  for (size_t i = first; i < ids.size(); ++i) {
    const size_t pages = pool_->pages(ids[i]);
    if (!pool_->give_back(ids[i])) aliased_pages_ -= pages;
  }
  ids.resize(std::min(first, ids.size()));
}

// Zeros those of the extents mapped at `base` that others had before. True: there were some.
bool RowMemory::scrub(uintptr_t base, const std::vector<ExtentId>& ids, size_t first,
                      Stream stream) {
  bool any = false;
  for (size_t i = first; i < ids.size(); ++i) {
    const size_t bytes = pool_->pages(ids[i]) * pool_->page_bytes();
    if (scrub_ == Scrub::kOnReuse && !pool_->clean(ids[i])) {
      pool_->driver().clear(stream, base, bytes);
      any = true;
    }
    base += bytes;
  }
  return any;
}

void RowMemory::wait_for(Stream stream) {
  VmmDriver& driver = pool_->driver();
  const Fence fence = driver.record_fence(stream);
  try {
    driver.wait_fence(fence);
  } catch (...) {
    driver.release_fence(fence);
    throw;
  }
  driver.release_fence(fence);
}

// Unmaps the extents from `keep_extents` on, which stay the row's. False: the driver refused, and
// they are still mapped; a ring perhaps only once.
bool RowMemory::take_out(size_t row, size_t region, size_t keep_extents,
                         size_t keep_pages) noexcept {
  RegionState& s = state(row, region);
  VmmDriver& driver = pool_->driver();
  if (s.doubled) {
    const uintptr_t again = address(row, region, ring_end(region));
    if (!driver.unmap(again, run_of(s.extents, first_of_ring(row, region)))) return false;
    s.doubled = false;
  }
  return keep_extents == s.extents.size() ||
         driver.unmap(address(row, region, keep_pages), run_of(s.extents, keep_extents));
}

bool RowMemory::unmap_tail(size_t row, size_t region, size_t keep_extents,
                           size_t keep_pages) noexcept {
  if (!take_out(row, region, keep_extents, keep_pages)) return false;
  give_back(state(row, region).extents, keep_extents);
  state(row, region).pages = keep_pages;
  return true;
}

size_t RowMemory::shrink(size_t row, size_t tokens) noexcept {
  const size_t pages_before = mapped_pages(row), aliased_before = aliased_pages_;
  for (size_t g = 0; g < n_regions_; ++g) {
    const auto [keep_extents, keep_pages] = cut(row, g, tokens);
    if (keep_pages != state(row, g).pages) unmap_tail(row, g, keep_extents, keep_pages);
  }
  return pages_before - mapped_pages(row) - (aliased_before - aliased_pages_);
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
    const size_t most =
        is_ring(g) ? ring_end(g) * pool_->page_bytes() : layout_.regions[g].row_stride;
    if (pages != s.pages || pages * pool_->page_bytes() > most) {
      throw std::logic_error("row " + std::to_string(row) + " region " + std::to_string(g) +
                             ": extents of " + std::to_string(pages) + " pages, " +
                             std::to_string(s.pages) + " counted");
    }
    if (s.doubled && (!is_ring(g) || s.pages != ring_end(g))) {
      throw std::logic_error("row " + std::to_string(row) + " region " + std::to_string(g) +
                             ": mapped twice, but no complete ring");
    }
  }
}

}  // namespace vattn
