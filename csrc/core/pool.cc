#include "core/pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/errors.h"
#include "base/units.h"

namespace vattn {
namespace {

size_t log2_floor(size_t value) {
  size_t log = 0;
  while ((value >> (log + 1)) != 0) ++log;
  return log;
}

size_t checked_max_order(size_t page_bytes, size_t max_extent_bytes) {
  if (!is_power_of_two(max_extent_bytes) || max_extent_bytes < page_bytes ||
      log2_floor(max_extent_bytes / page_bytes) >= kMaxOrders) {
    throw std::invalid_argument(
        "max_extent_bytes is " + std::to_string(max_extent_bytes) +
        ", expected a power of two of at least page_bytes = " + std::to_string(page_bytes));
  }
  return log2_floor(max_extent_bytes / page_bytes);
}

size_t checked_page_bytes(size_t page_bytes, const VmmDriver& driver) {
  if (!is_power_of_two(page_bytes) || page_bytes % driver.page_bytes() != 0) {
    throw std::invalid_argument("page_bytes is " + std::to_string(page_bytes) +
                                ", expected a power of two and a multiple of " +
                                std::to_string(driver.page_bytes()) +
                                ", the driver's granularity; leave it out to use that");
  }
  return page_bytes;
}

// reserve(n) alone would reallocate for every single extent.
void reserve_for(std::vector<ExtentId>& ids, size_t n) {
  if (ids.capacity() < n) ids.reserve(std::max(n, 2 * ids.capacity()));
}

void expect(bool holds, const char* invariant) {
  if (!holds) throw std::logic_error(std::string("pool invariant broken: ") + invariant);
}

}  // namespace

Pool::Pool(std::shared_ptr<VmmDriver> driver, size_t page_bytes, size_t max_extent_bytes,
           size_t budget_bytes)
    : driver_(std::move(driver)),
      page_bytes_(checked_page_bytes(page_bytes, *driver_)),
      max_order_(checked_max_order(page_bytes, max_extent_bytes)),
      budget_bytes_(budget_bytes / page_bytes * page_bytes),
      free_(max_order_ + 1) {
  const MemoryInfo memory = driver_->memory_info();
  if (budget_bytes > memory.total_bytes) {
    throw std::invalid_argument("memory is " + format_bytes(budget_bytes) +
                                ", but there are only " + format_bytes(memory.total_bytes) +
                                " in all (" + driver_->describe() + "); lower memory");
  }
}

Pool::~Pool() {
  // In a forked child the mutex may be held by a thread that is not there.
  if (!process_.forked()) trim();
}

void Pool::take(size_t n_pages, std::vector<ExtentId>& out, size_t largest_order, Extent last) {
  if (n_pages == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  const PoolCounts now = counts();
  const auto plan = plan_take(n_pages, now, largest_order);
  if (!plan) {
    throw OutOfPages(n_pages, now.available_pages(), "free a request or raise memory");
  }
  try {
    execute(*plan, out, last);
  } catch (const OutOfDeviceMemory&) {
    take_from_held(n_pages, out, largest_order, last);
  }
}

// The driver has less than the budget allows: make do with what is created, or can be in its place.
void Pool::take_from_held(size_t n_pages, std::vector<ExtentId>& out, size_t largest_order,
                          Extent last) {
  PoolCounts held = counts();
  held.creatable_pages = 0;
  size_t free_pages = held.available_pages();
  if (const auto plan = plan_take(n_pages, held, largest_order)) {
    try {
      execute(*plan, out, last);
      return;
    } catch (const OutOfDeviceMemory&) {
      // Someone else was faster to get what a trade gave back.
      free_pages = n_pages - 1;
    }
  }
  throw OutOfPages(n_pages, free_pages,
                   "the driver has no memory left below the budget: lower memory, or free what "
                   "others hold");
}

// Decide (the plan) -> act (create; what it made stays, as free extents, if a later one fails) ->
// commit (cannot throw).
void Pool::execute(const TakePlan& plan, std::vector<ExtentId>& out, Extent last) {
  size_t n_extents = 0;
  for (size_t order = 0; order <= max_order_; ++order)
    n_extents += plan.reuse[order] + plan.create[order];
  reserve_for(out, out.size() + n_extents);
  for (size_t order = 0; order <= max_order_; ++order) {
    for (size_t i = 0; i < plan.release[order]; ++i) release_free(order);
  }
  for (size_t order = max_order_ + 1; order-- > 0;) {
    for (size_t i = 0; i < plan.create[order]; ++i) last = record(create_free(order, last)).extent;
  }
  for (size_t order = max_order_ + 1; order-- > 0;) {
    const size_t n = plan.reuse[order] + plan.create[order];
    // In the order of creation: on the host, neighbours in the file become one mapping.
    for (auto it = free_[order].end() - static_cast<std::ptrdiff_t>(n); it != free_[order].end();
         ++it) {
      record(*it).references = 1;
      free_bytes_ -= record(*it).extent.bytes;
      out.push_back(*it);
    }
    free_[order].resize(free_[order].size() - n);
  }
  peak_taken_bytes_ = std::max(peak_taken_bytes_, held_bytes_ - free_bytes_);
}

bool Pool::prepare(size_t n_pages, size_t largest_order, Extent last) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto plan = plan_take(n_pages, counts(), largest_order);
  if (!plan) return false;
  for (size_t order = max_order_ + 1; order-- > 0;) {
    // A trade needs its release first; take() does both.
    if (plan->release[order] != 0) return false;
  }
  for (size_t order = max_order_ + 1; order-- > 0;) {
    if (plan->create[order] == 0) continue;
    try {
      create_free(order, last);
      return true;
    } catch (const OutOfDeviceMemory&) {
      return false;
    }
  }
  return false;
}

void Pool::add_reference(ExtentId id) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++record(id).references;
}

bool Pool::give_back(ExtentId id) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  Record& r = record(id);
  if (--r.references != 0) return false;
  r.clean = false;
  free_[r.order].push_back(id);
  free_bytes_ += r.extent.bytes;
  return true;
}

size_t Pool::trim() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t before = held_bytes_;
  for (size_t order = 0; order <= max_order_; ++order) {
    while (!free_[order].empty()) release_free(order);
  }
  return before - held_bytes_;
}

bool Pool::rebalance() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const PoolCounts now = counts();
  const size_t wanted = size_t{1} << max_order_;
  if (now.free[max_order_] != 0 || now.creatable_pages >= wanted) return false;
  if (now.available_pages() < wanted) return false;
  for (size_t order = 0; order < max_order_; ++order) {
    if (free_[order].empty()) continue;
    release_free(order);
    return true;
  }
  return false;
}

ExtentId Pool::create_free(size_t order, Extent last) {
  // Room for the records first: after create() nothing may throw.
  reserve_for(free_[order], created_[order] + 1);
  if (unused_ids_.empty()) {
    reserve_for(unused_ids_, records_.size() + 1);
    records_.emplace_back();
    unused_ids_.push_back(static_cast<ExtentId>(records_.size() - 1));
  }
  const size_t bytes = page_bytes_ << order;
  const Handle handle = driver_->create_after(last, bytes);
  const ExtentId id = unused_ids_.back();
  unused_ids_.pop_back();
  record(id) = {{handle, bytes}, order, 0, driver_->creates_zeroed()};
  free_[order].push_back(id);
  ++created_[order];
  held_bytes_ += bytes;
  free_bytes_ += bytes;
  return id;
}

void Pool::release_free(size_t order) noexcept {
  const ExtentId id = free_[order].back();
  free_[order].pop_back();
  driver_->release(record(id).extent);
  held_bytes_ -= record(id).extent.bytes;
  free_bytes_ -= record(id).extent.bytes;
  --created_[order];
  record(id) = {};
  unused_ids_.push_back(id);
}

PoolCounts Pool::counts() const {
  PoolCounts counts;
  counts.max_order = max_order_;
  for (size_t order = 0; order <= max_order_; ++order) counts.free[order] = free_[order].size();
  counts.creatable_pages = (budget_bytes_ - std::min(budget_bytes_, held_bytes_)) / page_bytes_;
  return counts;
}

size_t Pool::available_pages() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return counts().available_pages();
}

Extent Pool::extent(ExtentId id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return record(id).extent;
}

size_t Pool::pages(ExtentId id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return size_t{1} << record(id).order;
}

size_t Pool::references(ExtentId id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return record(id).references;
}

bool Pool::clean(ExtentId id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return record(id).clean;
}

PoolStats Pool::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {budget_bytes_, held_bytes_, free_bytes_, peak_taken_bytes_};
}

void Pool::check() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t held = 0, unused = 0, free = 0;
  for (const Record& r : records_) {
    held += r.extent.bytes;
    unused += r.extent.bytes == 0 ? 1 : 0;
    free += r.extent.bytes != 0 && r.references == 0 ? 1 : 0;
    expect(r.extent.bytes == 0 || r.extent.bytes == page_bytes_ << r.order, "bytes follow order");
    expect(r.extent.bytes != 0 || r.references == 0, "an unused id has no references");
  }
  expect(held == held_bytes_, "held_bytes is the sum of all extents");
  expect(held_bytes_ <= budget_bytes_, "held_bytes is within the budget");
  expect(unused == unused_ids_.size(), "every unused id is listed once");
  std::vector<bool> seen(records_.size(), false);
  size_t listed = 0, listed_bytes = 0;
  for (size_t order = 0; order <= max_order_; ++order) {
    for (const ExtentId id : free_[order]) {
      const auto index = static_cast<size_t>(id);
      expect(!seen[index], "a free extent is listed once");
      expect(record(id).order == order, "a free extent is listed under its order");
      expect(record(id).references == 0, "a free extent has no references");
      seen[index] = true;
      ++listed;
      listed_bytes += record(id).extent.bytes;
    }
  }
  expect(listed_bytes == free_bytes_, "free_bytes is the sum of the free lists");
  expect(listed == free, "an extent without references is in a free list");
}

}  // namespace vattn
