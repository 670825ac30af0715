// The part of the contract of VmmDriver that is on copy(), clear() and what memory holds at first.
#include "driver_contract.h"

namespace vattn::test {
namespace {

using Run = std::vector<Extent>;

constexpr Stream kDefault = static_cast<Stream>(0);
constexpr Stream kPerThread = static_cast<Stream>(2);  // predefined by CUDA, as the one above

// Two runs of four pages in three extents, mapped one behind the other.
struct TwoRuns {
  explicit TwoRuns(const Subject& s) : s(s), page(s.driver.page_bytes()) {
    for (const size_t pages : {1, 2, 1, 1, 2, 1}) run.push_back(make_extent(s.driver, pages));
    first = s.driver.reserve(8 * page);
    second = first + 4 * page;
    s.driver.map(first, run);
  }
  ~TwoRuns() {
    if (!s.driver.unmap(first, run)) return;
    for (const Extent& extent : run) s.driver.release(extent);
    s.driver.unreserve(first, 8 * page);
  }
  TwoRuns(const TwoRuns&) = delete;
  TwoRuns& operator=(const TwoRuns&) = delete;

  const Subject& s;
  const size_t page;
  Run run;
  uintptr_t first = 0;
  uintptr_t second = 0;
};

void wait_for(VmmDriver& driver, Stream stream) {
  const Fence fence = driver.record_fence(stream);
  driver.wait_fence(fence);
  driver.release_fence(fence);
}

// Some bytes of a range, its first and its last among them, not at regular places in pages.
std::vector<size_t> samples(const Subject& s, size_t bytes) {
  std::vector<size_t> offsets;
  for (size_t at = 0; at < bytes - 1; at += s.driver.page_bytes() / 16 + 1) offsets.push_back(at);
  offsets.push_back(bytes - 1);
  return offsets;
}

// Never 0, and different for neighbouring samples.
unsigned char mark(size_t offset, size_t seed) {
  return static_cast<unsigned char>(1 + (seed + offset) % 251);
}

void write_marks(const Subject& s, uintptr_t base, size_t bytes, size_t seed) {
  for (const size_t at : samples(s, bytes)) CHECK(s.memory.write(base + at, mark(at, seed)));
}

bool has_marks(const Subject& s, uintptr_t base, size_t bytes, size_t seed) {
  for (const size_t at : samples(s, bytes)) {
    unsigned char found = 0;
    if (!s.memory.read(base + at, &found) || found != mark(at, seed)) return false;
  }
  return true;
}

bool is_zero(const Subject& s, uintptr_t base, size_t bytes) {
  for (const size_t at : samples(s, bytes)) {
    unsigned char found = 1;
    if (!s.memory.read(base + at, &found) || found != 0) return false;
  }
  return true;
}

bool holds(const Subject& s, uintptr_t address, unsigned char value) {
  unsigned char found = 0;
  return s.memory.read(address, &found) && found == value;
}

void memory_is_zeroed_where_that_is_said(const Subject& s) {
  VmmDriver& driver = s.driver;
  const size_t bytes = 2 * driver.page_bytes();
  const uintptr_t base = driver.reserve(bytes);
  for (int round = 0; round < 2; ++round) {
    const Extent extent = make_extent(driver, 2);
    driver.map(base, {extent});
    CHECK(!driver.creates_zeroed() || is_zero(s, base, bytes));
    write_marks(s, base, bytes, 7);
    CHECK(driver.unmap(base, {extent}));
    driver.release(extent);
  }
  driver.unreserve(base, bytes);
}

// Borders of pages and extents, of either side, mean nothing to a copy.
void a_copy_takes_any_addresses_and_size(const Subject& s) {
  const TwoRuns runs(s);
  const size_t bytes = 2 * runs.page + 11;
  const uintptr_t from = runs.first + 3;
  const uintptr_t to = runs.second + runs.page - 5;
  write_marks(s, from, bytes, 1);
  for (const uintptr_t beside : {to - 1, to + bytes}) CHECK(s.memory.write(beside, 0x77));
  s.driver.copy(kDefault, to, from, bytes);
  wait_for(s.driver, kDefault);
  CHECK(has_marks(s, to, bytes, 1));
  CHECK(has_marks(s, from, bytes, 1));
  CHECK(holds(s, to - 1, 0x77) && holds(s, to + bytes, 0x77));
  // Neighbours share no byte.
  CHECK(s.memory.write(runs.first + 9, 0x33));
  s.driver.copy(kDefault, runs.first, runs.first + 9, 9);
  wait_for(s.driver, kDefault);
  CHECK(holds(s, runs.first, 0x33));
}

// From anywhere, over the borders of extents; what lies behind stays.
void a_run_is_filled_from_its_start(const Subject& s) {
  const TwoRuns runs(s);
  const size_t bytes = 3 * runs.page + 11;
  const Run second(runs.run.begin() + 3, runs.run.end());
  write_marks(s, runs.first + 3, bytes, 2);
  CHECK(s.memory.write(runs.second + bytes, 0x77));
  s.driver.fill(kDefault, second, runs.second, runs.first + 3, bytes);
  wait_for(s.driver, kDefault);
  CHECK(has_marks(s, runs.second, bytes, 2));
  CHECK(has_marks(s, runs.first + 3, bytes, 2));
  CHECK(holds(s, runs.second + bytes, 0x77));
}

void a_clear_takes_any_address_and_size(const Subject& s) {
  const TwoRuns runs(s);
  const size_t bytes = 2 * runs.page + 11;
  const uintptr_t base = runs.first + runs.page - 5;
  write_marks(s, base, bytes, 1);
  for (const uintptr_t beside : {base - 1, base + bytes}) CHECK(s.memory.write(beside, 0x77));
  s.driver.clear(kDefault, base, bytes);
  wait_for(s.driver, kDefault);
  CHECK(is_zero(s, base, bytes));
  CHECK(holds(s, base - 1, 0x77) && holds(s, base + bytes, 0x77));
}

// As fork() needs it: the page is written at one address and read at another.
void copies_show_at_every_address_of_a_page(const Subject& s) {
  VmmDriver& driver = s.driver;
  const size_t page = driver.page_bytes();
  const Extent source = make_extent(driver, 1);
  const Extent twice = make_extent(driver, 1);
  const uintptr_t base = driver.reserve(3 * page);
  driver.map(base, {source, twice, twice});
  write_marks(s, base, page, 5);
  driver.copy(kDefault, base + page, base, page);
  wait_for(driver, kDefault);
  CHECK(has_marks(s, base + 2 * page, page, 5));
  driver.clear(kDefault, base, page);
  driver.copy(kDefault, base, base + 2 * page, page);
  driver.clear(kDefault, base + 2 * page, page);
  wait_for(driver, kDefault);
  CHECK(has_marks(s, base, page, 5));
  CHECK(is_zero(s, base + page, page));
  CHECK(driver.unmap(base, {source, twice, twice}));
  driver.release(source);
  driver.release(twice);
  driver.unreserve(base, 3 * page);
}

void work_in_a_stream_is_done_in_order(const Subject& s) {
  const TwoRuns runs(s);
  const size_t bytes = 2 * runs.page;
  for (const Stream stream : {kDefault, kPerThread}) {
    const size_t seed = 11 + static_cast<size_t>(stream);
    write_marks(s, runs.first, bytes, seed);
    s.driver.clear(stream, runs.second, bytes);
    s.driver.copy(stream, runs.second, runs.first, bytes);
    s.driver.clear(stream, runs.first, bytes);
    s.driver.copy(stream, runs.first + bytes, runs.first, bytes);
    wait_for(s.driver, stream);
    CHECK(has_marks(s, runs.second, bytes, seed));
    CHECK(is_zero(s, runs.first, 2 * bytes));
  }
}

void work_in_two_streams_is_ordered_by_a_fence(const Subject& s) {
  const TwoRuns runs(s);
  const size_t bytes = 4 * runs.page;
  write_marks(s, runs.first, bytes, 3);
  s.driver.copy(kPerThread, runs.second, runs.first, bytes);
  const Fence copied = s.driver.record_fence(kPerThread);
  s.driver.stream_wait_fence(kDefault, copied);
  s.driver.release_fence(copied);
  s.driver.clear(kDefault, runs.first, bytes);
  wait_for(s.driver, kDefault);
  CHECK(has_marks(s, runs.second, bytes, 3));
  CHECK(is_zero(s, runs.first, bytes));
}

}  // namespace

std::vector<Clause> copy_clauses() {
  return {{"memory_is_zeroed_where_that_is_said", memory_is_zeroed_where_that_is_said},
          {"a_copy_takes_any_addresses_and_size", a_copy_takes_any_addresses_and_size},
          {"a_run_is_filled_from_its_start", a_run_is_filled_from_its_start},
          {"a_clear_takes_any_address_and_size", a_clear_takes_any_address_and_size},
          {"copies_show_at_every_address_of_a_page", copies_show_at_every_address_of_a_page},
          {"work_in_a_stream_is_done_in_order", work_in_a_stream_is_done_in_order},
          {"work_in_two_streams_is_ordered_by_a_fence", work_in_two_streams_is_ordered_by_a_fence}};
}

}  // namespace vattn::test
