// The ledger notices what it is there to notice in copies, and lets nothing harmful through.
#include "ledger.h"

#include "base/units.h"
#include "check.h"
#include "driver/host_driver.h"

namespace {

using namespace vattn;
using namespace vattn::test;

constexpr size_t kPage = 4 * kKiB;

// Pages 0, 1 and 3 of a range of four are mapped, each an extent of its own.
struct Books {
  Books() : base(ledger.reserve(4 * kPage)) {
    for (int i = 0; i < 3; ++i) pages.push_back({ledger.create(kPage), kPage});
    ledger.map(base, {pages[0], pages[1]});
    ledger.map(base + 3 * kPage, {pages[2]});
  }
  ~Books() {
    if (!ledger.unmap(base, {pages[0], pages[1]}) || !ledger.unmap(base + 3 * kPage, {pages[2]})) {
      return;
    }
    for (const Extent& page : pages) ledger.release(page);
    ledger.unreserve(base, 4 * kPage);
  }
  Books(const Books&) = delete;
  Books& operator=(const Books&) = delete;

  void copy(size_t to, size_t from, size_t bytes) {
    ledger.copy(Stream{}, base + to, base + from, bytes);
  }
  void clear(size_t at, size_t bytes) { ledger.clear(Stream{}, base + at, bytes); }

  Ledger ledger{open_host_driver(kPage)};
  std::vector<Extent> pages;
  const uintptr_t base;
};

void copies_inside_mapped_memory_are_made_and_counted() {
  Books books;
  auto* const bytes = reinterpret_cast<unsigned char*>(books.base);
  bytes[3 * kPage + 1] = 7;
  books.copy(kPage - 1, 3 * kPage, 3);  // over the border of two extents
  CHECK_EQ(int{bytes[kPage]}, 7);
  books.clear(kPage - 2, kPage + 2);
  CHECK_EQ(int{bytes[kPage]}, 0);
  const LedgerCounts counts = books.ledger.now();
  CHECK_EQ(counts.copies, 1u);
  CHECK_EQ(counts.copied_bytes, 3u);
  CHECK_EQ(counts.clears, 1u);
  CHECK_EQ(counts.cleared_bytes, kPage + 2);
  CHECK_EQ(books.ledger.violations(), "");
}

void ranges_that_are_not_mapped_throughout_are_violations() {
  struct Range {
    size_t at, bytes;
  };
  constexpr Range kOutside[] = {{2 * kPage, 8},
                                {2 * kPage - 4, 8},
                                {kPage, 3 * kPage},
                                {3 * kPage - 1, 2},
                                {4 * kPage - 1, 2}};
  for (const Range& range : kOutside) {
    Books from, to, cleared;
    from.copy(0, range.at, range.bytes);
    CHECK_EQ(from.ledger.violations().find("copy: not mapped\n"), 0u);
    to.copy(range.at, 0, range.bytes);
    CHECK_EQ(to.ledger.violations().find("copy: not mapped\n"), 0u);
    cleared.clear(range.at, range.bytes);
    CHECK_EQ(cleared.ledger.violations(), "clear: not mapped\n");
  }
}

void ranges_that_overlap_are_violations() {
  Books books;
  books.copy(0, 8, 8);
  CHECK_EQ(books.ledger.violations(), "");
  books.copy(0, 8, 9);
  CHECK_EQ(books.ledger.violations(), "copy: the ranges overlap\n");
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests({TEST(copies_inside_mapped_memory_are_made_and_counted),
                    TEST(ranges_that_are_not_mapped_throughout_are_violations),
                    TEST(ranges_that_overlap_are_violations)},
                   argc > 1 ? argv[1] : nullptr);
}
