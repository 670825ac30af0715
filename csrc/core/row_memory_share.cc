// The parts of RowMemory that map an extent in more than one row.
#include <algorithm>
#include <unordered_map>

#include "base/errors.h"
#include "base/log.h"
#include "base/units.h"
#include "core/row_memory.h"

namespace vattn {

std::pair<size_t, size_t> RowMemory::whole_extents(size_t row, size_t region, size_t tokens) const {
  if (is_ring(region)) return {0, 0};
  const auto& extents = state(row, region).extents;
  const size_t whole = tokens * layout_.regions[region].token_bytes / pool_->page_bytes();
  size_t index = 0, pages = 0;
  for (; index < extents.size(); ++index) {
    const size_t end = pages + pool_->pages(extents[index]);
    if (end > whole) break;
    pages = end;
  }
  return {index, pages};
}

bool RowMemory::shares_behind(size_t row, size_t region, size_t tokens) const {
  const auto& extents = state(row, region).extents;
  const size_t next = whole_extents(row, region, tokens).first;
  return !is_ring(region) && next < extents.size() && pool_->references(extents[next]) > 1;
}

size_t RowMemory::writable_from(size_t row) const {
  if (aliased_pages_ == 0) return 0;
  size_t token = 0;
  for (size_t g = 0; g < n_regions_; ++g) {
    size_t pages = 0;
    for (const ExtentId id : state(row, g).extents) {
      if (pool_->references(id) == 1) break;
      pages += pool_->pages(id);
    }
    token = std::max(token, ceil_div(pages * pool_->page_bytes(), layout_.regions[g].token_bytes));
  }
  return token;
}

size_t RowMemory::tokens_to_share(size_t row, size_t tokens, size_t copied_pages) const {
  // Again, because fewer tokens of one region may be a part of an extent in another.
  for (size_t before = SIZE_MAX; tokens < before;) {
    before = tokens;
    for (size_t g = 0; g < n_regions_; ++g) {
      if (is_ring(g)) continue;
      const size_t pages = whole_extents(row, g, tokens).second + copied_pages;
      tokens = std::min(tokens, tokens_in(g, pages));
    }
  }
  return tokens;
}

size_t RowMemory::pages_to_share(const Share& share) const {
  size_t pages = 0;
  for (size_t g = 0; g < n_regions_; ++g) {
    const size_t want = pages_for(g, share.tokens);
    const bool own = share.from == share.to && !shares_behind(share.to, g, share.aliased);
    pages += want - (own ? std::min(want, state(share.to, g).pages)
                         : whole_extents(share.from, g, share.aliased).second);
  }
  return pages;
}

size_t RowMemory::pages_freed_by(const std::vector<size_t>& keep, size_t enough) const {
  size_t pages = 0;
  std::unordered_map<uint32_t, size_t> dropped;  // references of extents that others have too
  for (size_t row = 0; row < keep.size() && pages < enough; ++row) {
    if (aliased_pages_ == 0) {
      pages += pages_beyond(row, keep[row]);
      continue;
    }
    for (size_t g = 0; g < n_regions_; ++g) {
      const auto& extents = state(row, g).extents;
      for (size_t i = cut(row, g, keep[row]).first; i < extents.size(); ++i) {
        const size_t references = pool_->references(extents[i]);
        if (references == 1 || ++dropped[static_cast<uint32_t>(extents[i])] == references) {
          pages += pool_->pages(extents[i]);
        }
      }
    }
  }
  return pages;
}

// Decides what a region gets and takes the pages. nullopt: it has that already.
std::optional<RowMemory::Splice> RowMemory::splice_of(const Share& share, size_t region) {
  if (share.from == share.to && !shares_behind(share.to, region, share.aliased)) {
    return std::nullopt;
  }
  const auto& from = state(share.from, region).extents;
  const auto& to = state(share.to, region).extents;
  const auto [n_shared, shared_pages] = whole_extents(share.from, region, share.aliased);
  Splice splice;
  splice.row = share.to;
  splice.region = region;
  while (splice.keep < std::min(n_shared, to.size()) && from[splice.keep] == to[splice.keep]) {
    splice.keep_pages += pool_->pages(from[splice.keep++]);
  }
  splice.pages = pages_for(region, share.tokens);
  const size_t n_fresh = splice.pages - shared_pages;
  if (n_fresh == 0 && splice.keep == n_shared && splice.keep == to.size()) return std::nullopt;

  const auto end = from.begin() + static_cast<std::ptrdiff_t>(n_shared);
  splice.extents.assign(from.begin(), end);
  scratch_.reserve(std::max(to.size(), n_shared + n_fresh));
  if (n_fresh != 0) {
    const Run run{share.to, region, n_fresh, kMaxOrders - 1, ends_in_page(region, share.tokens)};
    take(run, shared_pages, splice.extents,
         n_shared == 0 ? Extent{} : pool_->extent(from[n_shared - 1]));
    const Region& r = layout_.regions[region];
    const size_t last =
        is_ring(region) ? splice.pages * pool_->page_bytes() : share.tokens * r.token_bytes;
    splice.copy_from = address(share.from, region, shared_pages);
    splice.copy_bytes = last - shared_pages * pool_->page_bytes();
  }
  splice.fresh = n_shared;
  splice.fresh_page = shared_pages;
  for (size_t i = splice.keep; i < n_shared; ++i) {
    pool_->add_reference(splice.extents[i]);
    aliased_pages_ += pool_->pages(splice.extents[i]);
  }
  return splice;
}

void RowMemory::share(const std::vector<Share>& shares, Stream stream) {
  unmap_staging();
  std::vector<Splice> splices;
  splices.reserve(shares.size() * n_regions_);
  lost_.clear();
  lost_.reserve(shares.size() * n_regions_);
  try {
    // A row in use cannot be filled where it is: a copy may come from what it has now.
    bool in_use = false;
    for (const Share& share : shares) {
      for (size_t g = 0; g < n_regions_; ++g) {
        auto splice = splice_of(share, g);
        if (!splice) continue;
        in_use |= state(share.to, g).extents.size() > splice->keep;
        splices.push_back(std::move(*splice));
      }
    }
    if (in_use) fill_staged(splices, stream);
    replace(splices);
    if (!in_use) fill_in_place(splices, stream);
  } catch (...) {
    for (Splice& splice : splices) give_back(splice.extents, splice.keep);
    throw;
  }
  for (Splice& splice : splices) give_back(splice.extents, splice.keep);
}

void RowMemory::fill(const Splice& splice, uintptr_t at, Stream stream) {
  const auto& extents = splice.put_in ? state(splice.row, splice.region).extents : splice.extents;
  scrub(at, extents, splice.fresh, stream);
  if (splice.copy_bytes != 0) {
    pool_->driver().fill(stream, run_of(extents, splice.fresh), at, splice.copy_from,
                         splice.copy_bytes);
  }
}

void RowMemory::fill_in_place(std::vector<Splice>& splices, Stream stream) {
  try {
    for (const Splice& splice : splices) {
      fill(splice, address(splice.row, splice.region, splice.fresh_page), stream);
    }
  } catch (...) {
    settle(stream);
    for (Splice& splice : splices) put_back(splice);
    throw;
  }
}

// Ends when the work in `stream` is done, so that what it read can be unmapped.
void RowMemory::fill_staged(const std::vector<Splice>& splices, Stream stream) {
  Staging staging;
  for (const Splice& splice : splices) {
    for (size_t i = splice.fresh; i < splice.extents.size(); ++i) {
      staging.ids.push_back(splice.extents[i]);
      staging.run.push_back(pool_->extent(splice.extents[i]));
    }
  }
  if (staging.run.empty()) return wait_for(stream);
  stuck_.reserve(stuck_.size() + 1);
  VmmDriver& driver = pool_->driver();
  staging.base = driver.reserve(total_bytes(staging.run));
  try {
    driver.map(staging.base, staging.run);
  } catch (...) {
    driver.unreserve(staging.base, total_bytes(staging.run));
    throw;
  }
  try {
    uintptr_t at = staging.base;
    for (const Splice& splice : splices) {
      fill(splice, at, stream);
      at += (splice.pages - splice.fresh_page) * pool_->page_bytes();
    }
    wait_for(stream);
  } catch (...) {
    settle(stream);
    leave(staging);
    throw;
  }
  leave(staging);
}

void RowMemory::settle(Stream stream) noexcept {
  try {
    wait_for(stream);
  } catch (const DriverError& error) {
    log_line(LogLevel::kError, "could not wait for a copy: %s", error.what());
  }
}

void RowMemory::leave(Staging& staging) noexcept {
  VmmDriver& driver = pool_->driver();
  if (driver.unmap(staging.base, staging.run)) {
    driver.unreserve(staging.base, total_bytes(staging.run));
    return;
  }
  for (const ExtentId id : staging.ids) {
    pool_->add_reference(id);
    aliased_pages_ += pool_->pages(id);
  }
  stuck_.push_back(std::move(staging));
}

void RowMemory::unmap_staging() noexcept {
  VmmDriver& driver = pool_->driver();
  while (!stuck_.empty() && driver.unmap(stuck_.back().base, stuck_.back().run)) {
    driver.unreserve(stuck_.back().base, total_bytes(stuck_.back().run));
    give_back(stuck_.back().ids, 0);
    stuck_.pop_back();
  }
}

void RowMemory::list_staged_extents(std::vector<ExtentId>& out) const {
  for (const Staging& staging : stuck_) {
    out.insert(out.end(), staging.ids.begin(), staging.ids.end());
  }
}

// All old tails out, then all new ones in: an extent may go from one row to another.
void RowMemory::replace(std::vector<Splice>& splices) {
  try {
    for (Splice& splice : splices) {
      if (!take_out(splice.row, splice.region, splice.keep, splice.keep_pages)) {
        throw DriverError("unmap", -1,
                          "refused to take pages out of row " + std::to_string(splice.row));
      }
      splice.taken_out = true;
    }
    for (Splice& splice : splices) put_in(splice);
  } catch (...) {
    for (Splice& splice : splices) put_back(splice);
    throw;
  }
}

void RowMemory::put_in(Splice& splice) {
  exchange(splice);
  splice.put_in = true;
  RegionState& s = state(splice.row, splice.region);
  if (splice.keep < s.extents.size()) {
    try {
      pool_->driver().map(address(splice.row, splice.region, splice.keep_pages),
                          run_of(s.extents, splice.keep));
    } catch (...) {
      exchange(splice);
      splice.put_in = false;
      throw;
    }
  }
  if (is_ring(splice.region) && s.pages == ring_end(splice.region)) {
    map_ring_again(splice.row, splice.region);
  }
}

void RowMemory::exchange(Splice& splice) noexcept {
  RegionState& s = state(splice.row, splice.region);
  s.extents.swap(splice.extents);
  std::swap(s.pages, splice.pages);
}

// What the driver refuses to take out again stays, and what it refuses to put in again is lost.
void RowMemory::put_back(Splice& splice) noexcept {
  if (splice.put_in) {
    if (!take_out(splice.row, splice.region, splice.keep, splice.keep_pages)) {
      return note_lost(splice, "the driver refused to unmap");
    }
    exchange(splice);
    splice.put_in = false;
  }
  RegionState& s = state(splice.row, splice.region);
  try {
    if (splice.taken_out && splice.keep < s.extents.size()) {
      pool_->driver().map(address(splice.row, splice.region, splice.keep_pages),
                          run_of(s.extents, splice.keep));
    }
  } catch (const DriverError& error) {
    give_back(s.extents, splice.keep);
    s.pages = splice.keep_pages;
    return note_lost(splice, error.what());
  }
  try {
    if (is_ring(splice.region) && s.pages == ring_end(splice.region) && !s.doubled) {
      map_ring_again(splice.row, splice.region);
    }
  } catch (const DriverError& error) {
    note_lost(splice, error.what());
  }
}

void RowMemory::note_lost(const Splice& splice, const char* what) noexcept {
  const size_t token = is_ring(splice.region) ? 0 : tokens_in(splice.region, splice.keep_pages);
  log_line(LogLevel::kError, "tokens lost row=%zu from=%zu: %s", splice.row, token, what);
  lost_.emplace_back(splice.row, token);
}

size_t RowMemory::first_lost_token(size_t row) const {
  size_t first = SIZE_MAX;
  for (const auto& [lost_row, token] : lost_) {
    if (lost_row == row) first = std::min(first, token);
  }
  return first;
}

void RowMemory::move_tokens(size_t row, size_t to, size_t from, size_t n, Stream stream) {
  for (const Region& r : layout_.regions) {
    const uintptr_t start = base_ + r.offset + row * r.row_stride;
    pool_->driver().copy(stream, start + r.offset_of(to), start + r.offset_of(from),
                         n * r.token_bytes);
  }
}

void RowMemory::clear(size_t row, size_t token, Stream stream) {
  for (size_t g = 0; g < n_regions_; ++g) {
    const size_t start = token == 0 ? 0 : layout_.regions[g].offset_of(token);
    const size_t end = state(row, g).pages * pool_->page_bytes();
    if (start < end) pool_->driver().clear(stream, address(row, g, 0) + start, end - start);
  }
}

}  // namespace vattn
