// One range of addresses of which any page may have memory, page by page: for engines that have
// block tables of their own.
//
// Every page is an extent of its own, so that each can be taken out alone. Memory that is taken out
// goes back to the driver at once: the pool keeps none of it.
//
// Thread-safe: one lock. Lock order: range, pool, driver. In a forked child every call throws
// DriverError, except close() and the destructor, which do nothing.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/fork.h"
#include "core/pool.h"

namespace vattn {

// Neighbouring pages.
struct PageRun {
  size_t first;
  size_t count;
};

class PageRange {
 public:
  // First page and count of each run, in any order; no page twice.
  using Runs = std::vector<std::pair<int64_t, int64_t>>;

  // Reserves the addresses of n_pages of the pool's page_bytes() and maps nothing.
  // Throws std::invalid_argument, DriverError.
  PageRange(std::shared_ptr<Pool> pool, size_t n_pages);
  ~PageRange();
  PageRange(const PageRange&) = delete;
  PageRange& operator=(const PageRange&) = delete;

  // Puts memory under pages that have none. All or nothing: throws std::invalid_argument,
  // OutOfPages, DriverError; then nothing has changed. Only if the driver also refuses to undo what
  // it did, pages stay mapped, and are counted.
  void map(const Runs& runs);
  // On the host, faults pages in that were mapped, ahead of first use. A hint: pages that have been
  // unmapped meanwhile are left alone. Throws std::invalid_argument for what is outside.
  void populate(const Runs& runs);
  // Puts one physical page under all `count` pages, which read and write the same memory.
  // Throws as map().
  void alias(int64_t first, int64_t count);
  // Waits for the work in `stream` so far, takes the memory out and returns it to the driver. Pages
  // that were taken out: a run that the driver refuses to unmap stays mapped, and is counted.
  // Throws std::invalid_argument, DriverError; then nothing has changed.
  // pre: no other work that touches the pages is in flight.
  size_t unmap(const Runs& runs, Stream stream);

  // Waits for the device, then gives everything back but the addresses, which stay reserved until
  // the destructor: tensors may still point there. Idempotent.
  void close();

  bool closed() const;
  size_t n_pages() const noexcept { return pages_.size(); }
  uintptr_t base() const noexcept { return base_; }
  const Pool& pool() const noexcept { return *pool_; }
  bool is_mapped(int64_t page) const;
  // In order, as long as can be.
  std::vector<PageRun> mapped_runs() const;
  // Physical pages under the range: aliases of one count once.
  size_t mapped_pages() const;
  // Throws std::logic_error if an invariant is broken.
  void check() const;

 private:
  static constexpr ExtentId kNone = static_cast<ExtentId>(UINT32_MAX);

  VmmDriver& driver() const noexcept { return pool_->driver(); }
  uintptr_t address(size_t page) const noexcept { return base_ + page * pool_->page_bytes(); }
  bool has_memory(size_t page) const noexcept { return pages_[page] != kNone; }
  void check_usable() const;
  std::vector<PageRun> checked(const Runs& runs, bool mapped) const;
  // The first run at or behind a page; count 0: there is none.
  PageRun next_mapped(size_t page) const noexcept;
  std::vector<ExtentId> take(const std::vector<PageRun>& runs);
  size_t touchable_pages() const;
  void make_room_to_unmap(size_t n_more);
  const std::vector<Extent>& run_of(const ExtentId* ids, size_t count);
  void put_in(PageRun run, const ExtentId* ids);
  size_t take_out(PageRun run) noexcept;

  const ProcessBound process_;
  const std::shared_ptr<Pool> pool_;
  uintptr_t base_ = 0;

  mutable std::mutex mutex_;  // guards everything below, but the size of pages_
  bool closed_ = false;
  std::vector<ExtentId> pages_;  // by page; kNone: no memory
  size_t n_mapped_ = 0;          // pages that have memory
  size_t n_physical_ = 0;        // extents under them
  std::vector<Extent> scratch_;  // a run for the driver; room for all that is mapped
};

}  // namespace vattn
