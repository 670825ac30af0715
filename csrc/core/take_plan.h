// Which extents to take for a growth. Pure: counts in, counts out.
//
// Cost follows the number of extents mapped, not their bytes, so a growth takes few large extents
// and ends with small ones. An extent cannot be split.
#pragma once

#include <array>
#include <cstddef>
#include <optional>

namespace vattn {

constexpr size_t kMaxOrders = 32;                    // an extent of order o is 2^o pages
using OrderCounts = std::array<size_t, kMaxOrders>;  // [order]: extents

struct PoolCounts {
  OrderCounts free{};          // created, mapped nowhere
  size_t creatable_pages = 0;  // what the budget still allows
  size_t max_order = 0;

  // Pages that plan_take() can provide.
  size_t available_pages() const;
};

struct TakePlan {
  OrderCounts release{};  // give back to the driver first: too large, their budget is needed
  OrderCounts reuse{};    // take from the free lists
  OrderCounts create{};   // make new
};

// From the largest order down: what is free, else new ones while the budget allows, else smaller
// ones. What is free only in larger extents is traded: one is released and made anew in pieces.
// Takes no extent above `largest_order`. nullopt: fewer than n_pages are available.
std::optional<TakePlan> plan_take(size_t n_pages, PoolCounts counts,
                                  size_t largest_order = kMaxOrders - 1);

}  // namespace vattn
