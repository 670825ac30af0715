// Which extents lie under which row: the mapped prefix of every region of every row.
//
// Not thread-safe: the cache's lock guards it.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/layout.h"
#include "core/pool.h"

namespace vattn {

// Row `row` is to have memory for at least `tokens` tokens.
struct Growth {
  size_t row;
  size_t tokens;
  // Extents up to this order. 0: single pages, any of which can be taken back again.
  size_t largest_order = kMaxOrders - 1;
};

class RowMemory {
 public:
  // Reserves the addresses of all rows. Throws DriverError.
  RowMemory(std::shared_ptr<Pool> pool, Layout layout, size_t n_rows);
  // Gives the addresses back. pre: nothing is mapped, or this is a forked child.
  ~RowMemory();
  RowMemory(const RowMemory&) = delete;
  RowMemory& operator=(const RowMemory&) = delete;

  const Layout& layout() const noexcept { return layout_; }
  Pool& pool() const noexcept { return *pool_; }
  uintptr_t base() const noexcept { return base_; }

  // Tokens that are mapped in every region of the row.
  size_t mapped_tokens(size_t row) const;
  size_t mapped_pages(size_t row) const;
  // Pages of all regions that lie wholly beyond `tokens`: what shrink() takes out.
  size_t pages_beyond(size_t row, size_t tokens) const;
  // `tokens`, or fewer where an extent reaches further than they need: so many that shrink() to
  // them takes it out. With `tokens` in it, what it has too much could not be given to anyone.
  size_t tokens_in_fitting_extents(size_t row, size_t tokens) const;
  // The most tokens that are left when n_pages or more are taken out at the end; 0 if there are not
  // so many.
  size_t tokens_without(size_t row, size_t n_pages) const;
  // Pages that grow() would have to take.
  size_t pages_to_grow(size_t row, size_t tokens) const;

  // Maps what is missing. All or nothing: throws OutOfPages or DriverError.
  void grow(const std::vector<Growth>& growths);

  // A part of grow() that is one contiguous run, for the background thread.
  struct Step {
    uintptr_t address = 0;
    size_t bytes = 0;  // 0: nothing was missing
  };
  // The next run of a growth, before it is mapped: its pages, 0 when there is none, and the extent
  // that it will lie behind.
  struct Need {
    size_t n_pages = 0;
    Extent last{};
  };
  Need next_run(Growth growth) const;
  // Maps the next run of a growth. Throws as grow().
  Step grow_one_run(Growth growth);

  // Unmaps the extents that lie wholly beyond `tokens` and gives them to the pool. Pages given
  // back; a run that the driver refuses to unmap stays as it is. pre: no device work that touches
  // those tokens is in flight.
  size_t shrink(size_t row, size_t tokens) noexcept;

  // Appends every extent of the row, once per place where it is mapped.
  void list_extents(size_t row, std::vector<ExtentId>& out) const;
  // Throws std::logic_error if the pages of a row do not add up.
  void check(size_t row) const;

 private:
  struct RegionState {
    std::vector<ExtentId> extents;
    size_t pages = 0;
  };
  // Pages to add at the end of one region.
  struct Run {
    size_t row;
    size_t region;
    size_t n_pages;
    size_t largest_order;
  };

  RegionState& state(size_t row, size_t region) { return states_[row * n_regions_ + region]; }
  const RegionState& state(size_t row, size_t region) const {
    return states_[row * n_regions_ + region];
  }
  size_t pages_for(size_t region, size_t tokens) const;
  size_t tokens_in(size_t region, size_t pages) const;
  uintptr_t address(size_t row, size_t region, size_t page) const;
  // First extent of the region that lies wholly beyond `tokens`, and the page it starts at.
  std::pair<size_t, size_t> cut(size_t row, size_t region, size_t tokens) const;
  Extent last_extent(size_t row, size_t region) const;
  void map_run(const Run& run);
  bool unmap_tail(size_t row, size_t region, size_t keep_extents, size_t keep_pages) noexcept;
  // What a growth lacks in one region; in the first region that lacks something; in all.
  std::optional<Run> missing_run(Growth growth, size_t region) const;
  std::optional<Run> first_missing_run(Growth growth) const;
  std::vector<Run> plan(const std::vector<Growth>& growths) const;

  const std::shared_ptr<Pool> pool_;
  const Layout layout_;
  const size_t n_regions_;
  uintptr_t base_;
  std::vector<RegionState> states_;  // [row][region]
  std::vector<Extent> scratch_;      // a run for the driver; room for the extents of any region
};

}  // namespace vattn
