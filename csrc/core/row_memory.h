// Which extents lie under which row: the mapped prefix of every region of every row, and what rows
// share of it.
//
// Extents are shared from the first one on: if two rows share one, they share all before it. An
// extent is shared whole or not at all, because a driver maps it whole. Rings are never shared:
// they are written in a circle.
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

// Row `to` is to have the first `tokens` tokens of row `from` and no others. Extents that lie
// wholly in the first `aliased` of them, it reads where they are; what else there is is copied.
// from == to: what lies beyond `aliased` becomes its own.
struct Share {
  size_t from;
  size_t to;
  size_t aliased;
  size_t tokens;
};

// Whether memory that was used is zeroed before another row can read it.
enum class Scrub : uint8_t { kNever, kOnReuse };

class RowMemory {
 public:
  // Reserves the addresses of all rows. Throws DriverError.
  RowMemory(std::shared_ptr<Pool> pool, Layout layout, size_t n_rows, Scrub scrub);
  // Gives the addresses back. pre: nothing is mapped, or this is a forked child.
  ~RowMemory();
  RowMemory(const RowMemory&) = delete;
  RowMemory& operator=(const RowMemory&) = delete;

  const Layout& layout() const noexcept { return layout_; }
  Pool& pool() const noexcept { return *pool_; }
  uintptr_t base() const noexcept { return base_; }

  // Tokens that are mapped in every region of the row; SIZE_MAX if all are complete rings.
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

  // Unmaps the extents that lie wholly beyond `tokens` and gives them to the pool. Pages that are
  // free now: not those that other rows share. A run that the driver refuses to unmap stays as it
  // is. pre: no device work that touches those tokens is in flight.
  size_t shrink(size_t row, size_t tokens) noexcept;
  // Pages that would be free if every row were shrunk to keep[row] tokens; counted until `enough`.
  size_t pages_freed_by(const std::vector<size_t>& keep, size_t enough) const;

  // First token that lies in no shared extent: writing from here on is seen by no other row.
  size_t writable_from(size_t row) const;
  // Pages that rows have beyond what exists physically, because others have them too.
  size_t aliased_pages() const noexcept { return aliased_pages_; }
  // The most tokens up to `tokens` that share() can give with at most so many pages copied in each
  // region.
  size_t tokens_to_share(size_t row, size_t tokens, size_t copied_pages) const;
  // Pages that share() would have to take.
  size_t pages_to_share(const Share& share) const;
  // All at once: a row may be `from` in one and `to` in another. Copies are in the order of
  // `stream`. If a row `to` has memory, waits for the work in `stream`. All or nothing: throws
  // OutOfPages or DriverError. Only if the driver refuses to undo what it did, a row loses
  // tokens: first_lost_token() says from where on. pre: where `to` has memory, only work in
  // `stream` uses it.
  void share(const std::vector<Share>& shares, Stream stream);
  // First token that the row lost in the last share(), which failed; SIZE_MAX if none.
  size_t first_lost_token(size_t row) const;
  // Copies tokens [from, from + n) to `to`, in the order of `stream`. Throws DriverError.
  // pre: to + n <= from, everything is mapped, and nothing before `to` + n is shared from `to` on.
  void move_tokens(size_t row, size_t to, size_t from, size_t n, Stream stream);
  // Zeros what the row has from `token` on, in the order of `stream`. Throws DriverError.
  // pre: nothing of it is shared.
  void clear(size_t row, size_t token, Stream stream);
  // Waits for the work in `stream`, or logs that it could not: after a failure, so that no copy
  // writes to memory that is about to go.
  void settle(Stream stream) noexcept;
  // Tries again to unmap what the driver refused to take out of a staging range.
  void unmap_staging() noexcept;

  // Appends every extent of the row, once per place where it is mapped, or of the staging ranges
  // that could not be unmapped.
  void list_extents(size_t row, std::vector<ExtentId>& out) const;
  void list_staged_extents(std::vector<ExtentId>& out) const;
  // Throws std::logic_error if the pages of a row do not add up.
  void check(size_t row) const;

 private:
  struct RegionState {
    std::vector<ExtentId> extents;
    size_t pages = 0;
    bool doubled = false;  // a ring that is complete and mapped twice
  };
  // Pages to add at the end of one region. None: the ring is complete, but not mapped twice.
  struct Run {
    size_t row;
    size_t region;
    size_t n_pages;
    size_t largest_order;
    bool last_apart;  // the last page in an extent of its own, or it could not be shared
  };
  // A region's extents, and others for those from `keep` on.
  struct Splice {
    size_t row = 0, region = 0;
    size_t keep = 0, keep_pages = 0;
    std::vector<ExtentId> extents;  // the new ones, all of the region; once put in, the old ones
    size_t pages = 0;
    size_t fresh = 0, fresh_page = 0;  // the first extent that no row has, and its place
    uintptr_t copy_from = 0;           // what the fresh ones are to contain
    size_t copy_bytes = 0;
    bool taken_out = false, put_in = false;
  };
  // Fresh extents while they are filled, before they are mapped in a row.
  struct Staging {
    uintptr_t base = 0;
    std::vector<ExtentId> ids;
    std::vector<Extent> run;
  };

  RegionState& state(size_t row, size_t region) { return states_[row * n_regions_ + region]; }
  const RegionState& state(size_t row, size_t region) const {
    return states_[row * n_regions_ + region];
  }
  bool is_ring(size_t region) const { return layout_.regions[region].ring_bytes != 0; }
  size_t head_pages(size_t region) const;
  size_t ring_end(size_t region) const;
  size_t pages_for(size_t region, size_t tokens) const;
  size_t tokens_in(size_t region, size_t pages) const;
  bool ends_in_page(size_t region, size_t tokens) const;
  uintptr_t address(size_t row, size_t region, size_t page) const;
  // First extent of the region that lies wholly beyond `tokens`, and the page it starts at.
  std::pair<size_t, size_t> cut(size_t row, size_t region, size_t tokens) const;
  // Leading extents of the region that lie wholly within `tokens`, and their pages.
  std::pair<size_t, size_t> whole_extents(size_t row, size_t region, size_t tokens) const;
  // Whether others have the extent that the token after `tokens` lies in. Of rings nobody has.
  bool shares_behind(size_t row, size_t region, size_t tokens) const;
  Extent last_extent(size_t row, size_t region) const;
  const std::vector<Extent>& run_of(const std::vector<ExtentId>& ids, size_t first);
  void take(const Run& run, size_t first_page, std::vector<ExtentId>& out, Extent last);
  void give_back(std::vector<ExtentId>& ids, size_t first) noexcept;
  void map_run(const Run& run);
  void map_new_pages(const Run& run);
  void map_ring_again(size_t row, size_t region);
  size_t first_of_ring(size_t row, size_t region) const;
  // False: the driver refused, and nothing was given back.
  bool unmap_tail(size_t row, size_t region, size_t keep_extents, size_t keep_pages) noexcept;
  bool scrub(uintptr_t base, const std::vector<ExtentId>& ids, size_t first, Stream stream);
  void wait_for(Stream stream);
  // What a growth lacks in one region; in the first region that lacks something; in all.
  std::optional<Run> missing_run(Growth growth, size_t region) const;
  std::optional<Run> first_missing_run(Growth growth) const;
  std::vector<Run> plan(const std::vector<Growth>& growths) const;

  bool take_out(size_t row, size_t region, size_t keep_extents, size_t keep_pages) noexcept;
  std::optional<Splice> splice_of(const Share& share, size_t region);
  void fill(const Splice& splice, uintptr_t at, Stream stream);
  void fill_in_place(std::vector<Splice>& splices, Stream stream);
  void fill_staged(const std::vector<Splice>& splices, Stream stream);
  void leave(Staging& staging) noexcept;
  void replace(std::vector<Splice>& splices);
  void put_in(Splice& splice);
  void put_back(Splice& splice) noexcept;
  void note_lost(const Splice& splice, const char* what) noexcept;
  void exchange(Splice& splice) noexcept;

  const std::shared_ptr<Pool> pool_;
  const Layout layout_;
  const size_t n_regions_;
  const Scrub scrub_;
  uintptr_t base_;
  std::vector<RegionState> states_;  // [row][region]
  std::vector<Extent> scratch_;      // a run for the driver; room for the extents of any region
  std::vector<Staging> stuck_;       // what the driver refused to unmap; a reference each
  std::vector<std::pair<size_t, size_t>> lost_;  // rows, and from which token on
  size_t aliased_pages_ = 0;
};

}  // namespace vattn
