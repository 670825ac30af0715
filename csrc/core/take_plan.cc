#include "core/take_plan.h"

#include <algorithm>

namespace vattn {
namespace {

// Moves what it can from `counts` to `plan`; returns the pages it could not cover.
size_t cover(size_t n_pages, size_t largest_order, PoolCounts& counts, TakePlan& plan) {
  for (size_t order = largest_order + 1; order-- > 0;) {
    const size_t reused = std::min(n_pages >> order, counts.free[order]);
    counts.free[order] -= reused;
    plan.reuse[order] += reused;
    n_pages -= reused << order;

    const size_t created = std::min(n_pages, counts.creatable_pages) >> order;
    counts.creatable_pages -= created << order;
    plan.create[order] += created;
    n_pages -= created << order;
  }
  return n_pages;
}

}  // namespace

size_t PoolCounts::available_pages() const {
  size_t pages = creatable_pages;
  for (size_t order = 0; order <= max_order; ++order) pages += free[order] << order;
  return pages;
}

std::optional<TakePlan> plan_take(size_t n_pages, PoolCounts counts, size_t largest_order) {
  const size_t top = std::min(counts.max_order, largest_order);
  TakePlan plan;
  size_t missing = cover(n_pages, top, counts, plan);
  while (missing != 0) {
    // What is still free is too large to be taken whole. Trade the smallest.
    size_t order = 0;
    while (order <= counts.max_order && counts.free[order] == 0) ++order;
    if (order > counts.max_order) return std::nullopt;
    --counts.free[order];
    ++plan.release[order];
    counts.creatable_pages += size_t{1} << order;
    missing = cover(missing, top, counts, plan);
  }
  return plan;
}

}  // namespace vattn
