// All physical memory of a budget: free extents per order, and reference counts, because an extent
// may be mapped in several rows. One pool can serve several caches.
//
// Thread-safe. Lock order: cache, pool, driver.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "base/fork.h"
#include "core/take_plan.h"
#include "driver/vmm_driver.h"

namespace vattn {

enum class ExtentId : uint32_t {};

struct PoolStats {
  size_t budget_bytes;
  size_t held_bytes;        // created: mapped or free
  size_t free_bytes;        // created, mapped nowhere
  size_t peak_taken_bytes;  // largest value of held_bytes - free_bytes so far
};

class Pool {
 public:
  // pre: page_bytes and max_extent_bytes are powers of two, page_bytes a multiple of the driver's.
  // Throws std::invalid_argument, with the names of the public options.
  Pool(std::shared_ptr<VmmDriver> driver, size_t page_bytes, size_t max_extent_bytes,
       size_t budget_bytes);
  // pre: no extent is mapped.
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Appends extents of n_pages in all to `out`, largest first, each with one reference.
  // No extent is above `largest_order`; new ones are for the place behind `last`, see
  // create_after(). All or nothing: throws OutOfPages or DriverError.
  void take(size_t n_pages, std::vector<ExtentId>& out, size_t largest_order = kMaxOrders - 1,
            Extent last = {});
  // How many caches map extents of this pool.
  void add_user() noexcept { ++users_; }
  void remove_user() noexcept { --users_; }
  int users() const noexcept { return users_; }

  // Creates at most one of the extents that take() would have to create. True: did so, there
  // may be more. False too when the driver has no memory left: take() deals with that. For the
  // background thread: nobody waits for longer than one driver call.
  bool prepare(size_t n_pages, size_t largest_order = kMaxOrders - 1, Extent last = {});

  void add_reference(ExtentId id) noexcept;
  // Drops a reference. True: it was the last one, the extent is free.
  // pre: it is no longer mapped for this reference.
  bool give_back(ExtentId id) noexcept;

  // Returns all free extents to the driver. Bytes returned.
  size_t trim() noexcept;
  // Returns one small free extent to the driver if many of them keep the budget from a large one.
  // True: did so, call again.
  bool rebalance() noexcept;

  // Free, or still to be created. Others may take them before you do.
  size_t available_pages() const;
  size_t page_bytes() const noexcept { return page_bytes_; }
  size_t max_extent_bytes() const noexcept { return page_bytes_ << max_order_; }
  VmmDriver& driver() const noexcept { return *driver_; }

  Extent extent(ExtentId id) const;
  size_t pages(ExtentId id) const;
  size_t references(ExtentId id) const;
  // Whether nobody has had the extent since it was created with zeros in it.
  bool clean(ExtentId id) const;
  PoolStats stats() const;
  // Throws std::logic_error if a free list, a reference count or the budget does not add up.
  void check() const;

 private:
  struct Record {
    Extent extent{};  // bytes == 0: the id is unused
    size_t order = 0;
    size_t references = 0;
    bool clean = false;
  };

  PoolCounts counts() const;
  ExtentId create_free(size_t order, Extent last);
  void release_free(size_t order) noexcept;
  void execute(const TakePlan& plan, std::vector<ExtentId>& out, Extent last);
  void take_from_held(size_t n_pages, std::vector<ExtentId>& out, size_t largest_order,
                      Extent last);
  const Record& record(ExtentId id) const { return records_[static_cast<size_t>(id)]; }
  Record& record(ExtentId id) { return records_[static_cast<size_t>(id)]; }

  const ProcessBound process_;
  const std::shared_ptr<VmmDriver> driver_;
  const size_t page_bytes_;
  const size_t max_order_;

  std::atomic<int> users_{0};
  mutable std::mutex mutex_;  // guards everything below
  size_t budget_bytes_;
  size_t held_bytes_ = 0;
  size_t free_bytes_ = 0;
  size_t peak_taken_bytes_ = 0;
  std::vector<Record> records_;              // by ExtentId
  std::vector<ExtentId> unused_ids_;         // capacity for all ids: giving back allocates nothing
  std::vector<std::vector<ExtentId>> free_;  // by order; capacity for all of that order
  OrderCounts created_{};
};

}  // namespace vattn
