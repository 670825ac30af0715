// Who is whose neighbour in the file of the host driver.
#include "driver/file_offsets.h"

#include <map>
#include <random>

#include "base/errors.h"
#include "check.h"

namespace vattn::test {
namespace {

constexpr size_t kPage = 64 * kKiB;
constexpr size_t kZone = FileOffsets::kZoneBytes;

void what_has_no_neighbour_lies_behind_what_came_before() {
  FileOffsets offsets;
  CHECK_EQ(offsets.take(0, kPage), size_t{0});
  CHECK_EQ(offsets.take(0, kPage), kPage);
  CHECK_EQ(offsets.take(0, 3 * kPage), 2 * kPage);
}

void an_extent_lies_behind_its_neighbour_while_that_place_is_free() {
  FileOffsets offsets;
  offsets.take(0, kPage);
  CHECK_EQ(offsets.take(kPage, kPage), kPage);
  CHECK_EQ(offsets.take(kPage, kPage), kZone);  // taken: a zone of its own
  CHECK_EQ(offsets.take(kZone + kPage, kPage), kZone + kPage);
  CHECK_EQ(offsets.take(2 * kPage, kPage), 2 * kPage);
}

void huge_pages_are_aligned() {
  FileOffsets offsets;
  offsets.take(0, kPage);
  CHECK_EQ(offsets.take(0, 2 * kMiB), 2 * kMiB);
  CHECK_EQ(offsets.take(4 * kMiB, kPage), 4 * kMiB);
  CHECK_EQ(offsets.take(4 * kMiB + kPage, 2 * kMiB), kZone);
}

void an_extent_may_be_larger_than_a_zone() {
  FileOffsets offsets;
  offsets.take(0, kPage);
  CHECK_EQ(offsets.take(0, 2 * kZone + kPage), kZone);
  CHECK_EQ(offsets.take(3 * kZone + kPage, kPage), 3 * kZone + kPage);
  CHECK_EQ(offsets.take(0, kZone), 4 * kZone);
  CHECK_EQ(offsets.take(5 * kZone, kPage), 5 * kZone);  // behind a full zone: a new one
}

void no_offset_is_handed_out_twice() {
  std::mt19937 random(1);
  FileOffsets offsets;
  std::map<size_t, size_t> taken;  // start -> end
  std::vector<size_t> ends{0};
  for (int i = 0; i < 20000; ++i) {
    const size_t bytes = kPage << (random() % 9);
    const size_t after = ends[random() % ends.size()];
    const size_t start = offsets.take(after, bytes);
    const auto next = taken.lower_bound(start);
    CHECK(next == taken.end() || start + bytes <= next->first);
    CHECK(next == taken.begin() || std::prev(next)->second <= start);
    CHECK(bytes < kHugePageBytes || start % kHugePageBytes == 0);
    taken[start] = start + bytes;
    ends.push_back(start + bytes);
  }
}

void a_full_file_is_an_error() {
  FileOffsets offsets;
  offsets.take(0, kPage);
  CHECK_THROWS(DriverError, offsets.take(0, FileOffsets::kLimit), "make a new cache");
  CHECK_EQ(offsets.take(0, kPage), kPage);
}

}  // namespace
}  // namespace vattn::test

int main(int argc, char** argv) {
  using namespace vattn::test;
  return run_tests({TEST(what_has_no_neighbour_lies_behind_what_came_before),
                    TEST(an_extent_lies_behind_its_neighbour_while_that_place_is_free),
                    TEST(huge_pages_are_aligned), TEST(an_extent_may_be_larger_than_a_zone),
                    TEST(no_offset_is_handed_out_twice), TEST(a_full_file_is_an_error)},
                   argc > 1 ? argv[1] : nullptr);
}
