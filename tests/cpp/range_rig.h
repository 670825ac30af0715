// A page range with everything under it, for tests that run over every kind of memory.
#pragma once

#include "cache_rig.h"
#include "core/page_range.h"
#include "double_control.h"

namespace vattn::test {

// range -> pool -> fault injection -> ledger -> driver
struct RangeRig {
  explicit RangeRig(const Backend& backend, size_t n_pages = 32, size_t budget_pages = 16)
      : is_cuda(backend.is_cuda),
        ledger(std::make_shared<Ledger>(backend.open())),
        faults(inject_faults(ledger)),
        page(ledger->page_bytes()),
        pool(std::make_shared<Pool>(faults, page, page, budget_pages * page)),
        range(std::make_unique<PageRange>(pool, n_pages)) {}
  // After a failed check, close() must not wait for the stream.
  ~RangeRig() {
    if (is_cuda) set_busy(kStreamA, false);
  }
  RangeRig(const RangeRig&) = delete;
  RangeRig& operator=(const RangeRig&) = delete;

  size_t unmap(const PageRange::Runs& runs, Stream stream = Stream{}) {
    return range->unmap(runs, stream);
  }
  unsigned char* at(size_t index) const {
    return reinterpret_cast<unsigned char*>(range->base() + index * page);
  }
  std::string runs() const {
    std::string text;
    for (const PageRun run : range->mapped_runs()) {
      text += std::to_string(run.first) + "+" + std::to_string(run.count) + " ";
    }
    return text;
  }
  // Pages that the driver has, and places where they are mapped.
  size_t created() const { return ledger->now().created_bytes / page; }
  size_t places() const { return ledger->now().mapped_bytes / page; }
  // Work that is now in the stream uses these pages: unmapping them before it ends is a breach.
  void use(size_t first, size_t count) {
    set_busy(kStreamA, true);
    DOUBLE(use_range)(static_cast<uintptr_t>(kStreamA), range->base() + first * page, count * page);
  }
  void end() {
    range.reset();
    CHECK_EQ(created(), 0u);
    CHECK_EQ(pool->users(), 0);
    pool.reset();
    const LedgerCounts left = ledger->now();
    CHECK_EQ(left.mapped_bytes, 0u);
    CHECK_EQ(left.created_bytes, 0u);
    CHECK_EQ(left.reserved_bytes, 0u);
    CHECK_EQ(left.fences, 0u);
    CHECK_EQ(ledger->violations(), "");
  }

  bool is_cuda;
  std::shared_ptr<Ledger> ledger;
  std::shared_ptr<FaultDriver> faults;
  size_t page;
  std::shared_ptr<Pool> pool;
  std::unique_ptr<PageRange> range;
};

}  // namespace vattn::test
