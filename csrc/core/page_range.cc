#include "core/page_range.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "base/errors.h"
#include "base/log.h"
#include "base/units.h"

namespace vattn {
namespace {

std::string name_of(PageRun run) {
  return "(" + std::to_string(run.first) + ", " + std::to_string(run.count) + ")";
}

PageRun checked_run(int64_t first, int64_t count, size_t n_pages) {
  const auto limit = static_cast<int64_t>(n_pages);
  if (first < 0 || count < 1 || first >= limit || count > limit - first) {
    throw std::invalid_argument("run (" + std::to_string(first) + ", " + std::to_string(count) +
                                ") is not in the range of " + std::to_string(n_pages) +
                                " pages; pass the first page and a count of at least 1");
  }
  return {static_cast<size_t>(first), static_cast<size_t>(count)};
}

// In order of their addresses, neighbours as one: one driver call each.
std::vector<PageRun> joined(const PageRange::Runs& runs, size_t n_pages) {
  std::vector<PageRun> sorted;
  sorted.reserve(runs.size());
  for (const auto& [first, count] : runs) sorted.push_back(checked_run(first, count, n_pages));
  std::sort(sorted.begin(), sorted.end(), [](PageRun a, PageRun b) { return a.first < b.first; });
  std::vector<PageRun> result;
  for (const PageRun run : sorted) {
    const size_t end = result.empty() ? 0 : result.back().first + result.back().count;
    if (run.first < end) {
      throw std::invalid_argument("run " + name_of(run) + " overlaps run " +
                                  name_of(result.back()) + "; name every page once");
    }
    if (result.empty() || run.first > end) {
      result.push_back(run);
    } else {
      result.back().count += run.count;
    }
  }
  return result;
}

size_t total_pages(const std::vector<PageRun>& runs) {
  size_t pages = 0;
  for (const PageRun run : runs) pages += run.count;
  return pages;
}

void expect(bool holds, const char* invariant) {
  if (!holds) throw std::logic_error(std::string("page range invariant broken: ") + invariant);
}

struct HeldFence {
  VmmDriver& driver;
  const Fence fence;
  ~HeldFence() { driver.release_fence(fence); }
};

}  // namespace

PageRange::PageRange(std::shared_ptr<Pool> pool, size_t n_pages)
    : pool_(std::move(pool)), pages_(n_pages, kNone) {
  if (n_pages == 0) throw std::invalid_argument("n_pages is 0, expected at least 1");
  base_ = driver().reserve(n_pages * pool_->page_bytes());
  pool_->add_user();
}

PageRange::~PageRange() {
  // In a forked child the mutex may be held by a thread that is not there.
  if (process_.forked()) return;
  close();
  // What the driver refused to unmap: once more, before the addresses go.
  for (size_t page = 0; n_mapped_ != 0 && page < pages_.size(); ++page) {
    if (has_memory(page)) take_out({page, 1});
  }
  pool_->trim();
  driver().unreserve(base_, pages_.size() * pool_->page_bytes());
  pool_->remove_user();
}

void PageRange::check_usable() const {
  if (closed_) throw std::invalid_argument("the range is closed; make a new vattn.PageRange");
}

// The runs, joined, if all their pages are mapped, or none is.
std::vector<PageRun> PageRange::checked(const Runs& runs, bool mapped) const {
  check_usable();
  std::vector<PageRun> result = joined(runs, pages_.size());
  for (const PageRun run : result) {
    for (size_t page = run.first; page < run.first + run.count; ++page) {
      if (has_memory(page) == mapped) continue;
      throw std::invalid_argument("page " + std::to_string(page) +
                                  (mapped ? " is not mapped; mapped_runs() tells which pages are"
                                          : " is mapped already; unmap it first"));
    }
  }
  return result;
}

void PageRange::map(const Runs& runs) {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<PageRun> missing = checked(runs, /*mapped=*/false);
  make_room_to_unmap(total_pages(missing));
  const std::vector<ExtentId> ids = take(missing);
  // Every run is committed as it is mapped; these say how far to go back.
  size_t done = 0, done_pages = 0;
  try {
    for (; done < missing.size(); done_pages += missing[done++].count) {
      put_in(missing[done], &ids[done_pages]);
    }
  } catch (...) {
    for (size_t i = done_pages; i < ids.size(); ++i) pool_->give_back(ids[i]);
    while (done-- > 0) take_out(missing[done]);
    pool_->trim();
    throw;
  }
}

// Without the lock, for it takes long; so a page may be unmapped meanwhile.
void PageRange::populate(const Runs& runs) {
  process_.check_not_forked();
  for (const PageRun run : joined(runs, pages_.size())) {
    driver().populate(address(run.first), run.count * pool_->page_bytes());
  }
}

void PageRange::alias(int64_t first, int64_t count) {
  process_.check_not_forked();
  PageRun run{};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    run = checked({{first, count}}, /*mapped=*/false).front();
    make_room_to_unmap(run.count);
    const ExtentId page = take({{run.first, 1}}).front();
    try {
      put_in(run, std::vector<ExtentId>(run.count, page).data());
    } catch (...) {
      pool_->give_back(page);
      pool_->trim();
      throw;
    }
    for (size_t i = 1; i < run.count; ++i) pool_->add_reference(page);
    n_physical_ -= run.count - 1;
  }
  driver().populate(address(run.first), pool_->page_bytes());
}

// Fresh extents for all pages of the runs, each behind the page before its run.
std::vector<ExtentId> PageRange::take(const std::vector<PageRun>& runs) {
  const size_t needed = total_pages(runs), available = pool_->available_pages();
  if (needed > available) {
    throw OutOfPages(needed, available, "unmap pages that are not in use");
  }
  const size_t touchable = touchable_pages();
  if (needed > touchable) {
    throw OutOfPages(needed, touchable,
                     "the machine has no more memory free: unmap pages, or end other programs");
  }
  std::vector<ExtentId> ids;
  ids.reserve(needed);
  const auto undo = [&] {
    for (const ExtentId id : ids) pool_->give_back(id);
    pool_->trim();
  };
  try {
    for (const PageRun run : runs) {
      const bool behind = run.first != 0 && has_memory(run.first - 1);
      pool_->take(run.count, ids, /*largest_order=*/0,
                  behind ? pool_->extent(pages_[run.first - 1]) : Extent{});
    }
  } catch (const OutOfPages& error) {
    undo();
    throw OutOfPages(needed, ids.size() + error.free(),
                     "the driver has no memory left: unmap pages, or free what others hold");
  } catch (...) {
    undo();
    throw;
  }
  return ids;
}

// Pages that can be touched without taking the last memory of the machine: 1/64 of it is left for
// what others take at the same moment. SIZE_MAX where create() itself says that there is no more.
size_t PageRange::touchable_pages() const {
  if (!driver().overcommits()) return SIZE_MAX;
  const MemoryInfo memory = driver().memory_info();
  const size_t kept = std::min(memory.free_bytes, memory.total_bytes / 64);
  return (memory.free_bytes - kept) / pool_->page_bytes();
}

// Giving back must not allocate.
void PageRange::make_room_to_unmap(size_t n_more) {
  const size_t n = n_mapped_ + n_more;
  if (scratch_.capacity() < n) scratch_.reserve(std::max(n, 2 * scratch_.capacity()));
}

const std::vector<Extent>& PageRange::run_of(const ExtentId* ids, size_t count) {
  scratch_.clear();
  for (size_t i = 0; i < count; ++i) scratch_.push_back(pool_->extent(ids[i]));
  return scratch_;
}

// Maps and commits one run.
void PageRange::put_in(PageRun run, const ExtentId* ids) {
  driver().map(address(run.first), run_of(ids, run.count));
  std::copy(ids, ids + run.count, pages_.begin() + static_cast<std::ptrdiff_t>(run.first));
  n_mapped_ += run.count;
  n_physical_ += run.count;
}

// Pages that were taken out: all, or none if the driver refuses.
size_t PageRange::take_out(PageRun run) noexcept {
  if (!driver().unmap(address(run.first), run_of(&pages_[run.first], run.count))) return 0;
  for (size_t page = run.first; page < run.first + run.count; ++page) {
    if (pool_->give_back(pages_[page])) --n_physical_;
    pages_[page] = kNone;
  }
  n_mapped_ -= run.count;
  return run.count;
}

size_t PageRange::unmap(const Runs& runs, Stream stream) {
  process_.check_not_forked();
  {
    // A wrong call does not wait for the device.
    const std::lock_guard<std::mutex> lock(mutex_);
    checked(runs, /*mapped=*/true);
  }
  // Without the lock: who maps other pages need not wait for the device.
  const HeldFence held{driver(), driver().record_fence(stream)};
  driver().wait_fence(held.fence);
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t pages = 0;
  for (const PageRun run : checked(runs, /*mapped=*/true)) pages += take_out(run);
  pool_->trim();
  return pages;
}

void PageRange::close() {
  if (process_.forked()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return;
  closed_ = true;
  try {
    driver().synchronize();
  } catch (const DriverError& error) {
    // The device is lost. What it had is unmapped all the same.
    log_line(LogLevel::kError, "close could not wait for the device: %s", error.what());
  }
  // No list of them, which would have to be allocated.
  for (PageRun run = next_mapped(0); run.count != 0; run = next_mapped(run.first + run.count)) {
    take_out(run);
  }
  pool_->trim();
}

bool PageRange::closed() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

bool PageRange::is_mapped(int64_t page) const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (page < 0 || page >= static_cast<int64_t>(pages_.size())) {
    throw std::invalid_argument("page " + std::to_string(page) + " is not in 0.." +
                                std::to_string(pages_.size() - 1));
  }
  return has_memory(static_cast<size_t>(page));
}

std::vector<PageRun> PageRange::mapped_runs() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<PageRun> runs;
  for (PageRun run = next_mapped(0); run.count != 0; run = next_mapped(run.first + run.count)) {
    runs.push_back(run);
  }
  return runs;
}

PageRun PageRange::next_mapped(size_t page) const noexcept {
  while (page < pages_.size() && !has_memory(page)) ++page;
  size_t end = page;
  while (end < pages_.size() && has_memory(end)) ++end;
  return {page, end - page};
}

size_t PageRange::mapped_pages() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  return n_physical_;
}

void PageRange::check() const {
  process_.check_not_forked();
  const std::lock_guard<std::mutex> lock(mutex_);
  pool_->check();
  std::vector<ExtentId> ids;
  std::copy_if(pages_.begin(), pages_.end(), std::back_inserter(ids),
               [](ExtentId id) { return id != kNone; });
  expect(ids.size() == n_mapped_, "pages with memory are counted");
  std::sort(ids.begin(), ids.end());
  size_t physical = 0;
  for (auto it = ids.begin(); it != ids.end(); ++physical) {
    const auto next = std::upper_bound(it, ids.end(), *it);
    expect(pool_->pages(*it) == 1, "an extent is one page");
    expect(pool_->references(*it) == static_cast<size_t>(next - it), "every place is a reference");
    it = next;
  }
  expect(physical == n_physical_, "physical pages are counted");
  expect(scratch_.capacity() >= n_mapped_, "there is room to unmap all");
  if (pool_->users() != 1) return;
  const PoolStats stats = pool_->stats();
  expect(stats.held_bytes - stats.free_bytes == physical * pool_->page_bytes(),
         "what was taken from the pool is mapped");
  expect(stats.free_bytes == 0, "what is not mapped went back to the driver");
}

}  // namespace vattn
