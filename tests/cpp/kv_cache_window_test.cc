// Rows that keep a window of their tokens, in a ring that is mapped twice.
#include <cstring>
#include <random>

#include "base/errors.h"
#include "row_contents.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// A ring of 3 pages: 12 tokens, 10 of them readable, in one region.
RigOptions ten_tokens(size_t sink = 0) {
  RigOptions options = ways_to_lay_out().front();
  options.max_tokens = 2000;
  options.window = 10;
  options.sink = sink;
  return options;
}

void a_window_is_readable_at_every_length(const Backend& backend) {
  for (RigOptions options : ways_to_lay_out_windows()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    rows.start(0);
    for (int64_t length = 1; length <= 120; ++length) {
      rows.step(0, length);
      rows.check_row(0);
    }
    rows.check();
    rig.end();
  }
}

void a_window_is_readable_whatever_a_step_adds(const Backend& backend) {
  std::mt19937 random(5);
  for (RigOptions options : ways_to_lay_out_windows()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    rows.start(0);
    for (int64_t length = 0; length <= 200;
         length += std::uniform_int_distribution<int64_t>(1, 25)(random)) {
      rows.step(0, length);
      rows.check();
    }
    rig.end();
  }
}

void memory_ends_with_the_window(const Backend& backend) {
  Rig rig(backend, ten_tokens(/*sink=*/3));
  RowContents rows(rig);
  rows.start(3);
  CHECK_EQ(rig.pages_taken(), 1u);
  rows.step(0, 4);
  CHECK_EQ(rig.pages_taken(), 2u);
  rows.step(0, 40);
  CHECK_EQ(rig.pages_taken(), 1u + 3);
  CHECK_EQ(rig.pages_mapped(), 1u + 2 * 3);
  CHECK_EQ(rig.kv->stats().mapped_bytes, 4 * rig.page);
  CHECK_EQ(rig.kv->stats().aliased_bytes, 0u);
  CHECK_EQ(rig.mapped(0), 2000u);
  const size_t before = rig.ledger->now().calls;
  for (int64_t length = 41; length <= 1000; ++length) rows.step(0, length);
  CHECK_EQ(rig.ledger->now().calls, before);
  rows.check();
  rig.end();
}

void both_mappings_are_the_same_memory(const Backend& backend) {
  for (RigOptions options : ways_to_lay_out_windows()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    rows.start(50);
    for (const Region& r : rig.kv->layout().regions) {
      if (!r.has_window()) continue;
      auto* const ring = reinterpret_cast<unsigned char*>(rig.kv->base() + r.offset + r.head_bytes);
      CHECK(std::memcmp(ring, ring + r.ring_bytes, r.ring_bytes) == 0);
      std::memset(ring, 0x11, r.ring_bytes);
      std::memset(ring + r.ring_bytes, 0x22, r.ring_bytes);
      CHECK(std::memcmp(ring, ring + r.ring_bytes, r.ring_bytes) == 0);
      CHECK_EQ(int{ring[0]}, 0x22);
    }
    rig.end();
  }
}

// The sink has pages of its own, and is not overwritten in the ring.
void a_sink_is_not_in_the_ring(const Backend& backend) {
  Rig rig(backend, ten_tokens(/*sink=*/3));
  rig.start({50});
  const Region& r = rig.kv->layout().regions[0];
  CHECK_EQ(r.sink(), 3u);
  std::memset(rig.token(0, 0), 0x33, 3 * r.token_bytes);
  auto* const ring = reinterpret_cast<unsigned char*>(rig.kv->base() + r.offset + r.head_bytes);
  std::memset(ring, 0x11, 2 * r.ring_bytes);
  for (size_t i = 0; i < 3 * r.token_bytes; ++i) CHECK_EQ(int{rig.token(0, 0)[i]}, 0x33);
  rig.end();
}

// Not more at once than a window has: else the first would never be written.
void grow(RowContents& rows, int64_t row, int64_t length) {
  for (int64_t next = rows.length(row); next < length;) {
    next = std::min(next + 5, length);
    rows.step(row, next);
  }
}

// Of 50 tokens the ring has the last 12: cut by 2, the window of 10 is still whole.
void a_row_is_cut_as_far_as_its_window_is_there(const Backend& backend) {
  for (const size_t sink : {0, 3}) {
    Rig rig(backend, ten_tokens(sink));
    RowContents rows(rig);
    rows.start(0);
    grow(rows, 0, 50);
    rows.truncate(0, 48);
    rows.check();
    const std::string text = " is 47, but the row's window at fewer than 48 tokens is overwritten";
    CHECK_THROWS(std::invalid_argument, rows.truncate(0, 47), "seq_len" + text);
    CHECK_THROWS(std::invalid_argument, rows.step(0, 47), "seq_lens[0]" + text);
    CHECK_THROWS(std::invalid_argument, rows.fork(0, 47), "seq_len" + text);
    rows.check();
    rows.step(0, 49);
    CHECK_THROWS(std::invalid_argument, rows.truncate(0, 47), "fewer than 48");
    rows.step(0, 51);
    CHECK_THROWS(std::invalid_argument, rows.step(0, 48), "fewer than 49");
    rows.check();
    const int64_t child = rows.fork(0, 49);
    CHECK_THROWS(std::invalid_argument, rows.truncate(child, 48), "fewer than 49");
    grow(rows, child, 70);
    rows.check();
    rows.truncate(0, 0);
    grow(rows, 0, 30);
    CHECK_THROWS(std::invalid_argument, rows.truncate(0, 27), "fewer than 28");
    rows.step(0, 28);
    rows.check();
    rig.end();
  }
}

void what_a_long_chunk_leaves_out_cannot_be_gone_back_to(const Backend& backend) {
  Rig rig(backend, ten_tokens());
  RowContents rows(rig);
  rows.start(11);
  CHECK_THROWS(std::invalid_argument, rows.truncate(0, 10), "fewer than 11");
  rows.step(0, 13);
  CHECK_THROWS(std::invalid_argument, rows.truncate(0, 10), "fewer than 11");
  rows.truncate(0, 12);
  rows.check();
  rows.truncate(0, 0);
  rows.step(0, 10);
  rows.truncate(0, 1);
  rows.check();
  rig.end();
}

void before_the_first_lap_any_length_is_there(const Backend& backend) {
  Rig rig(backend, ten_tokens(/*sink=*/3));
  RowContents rows(rig);
  rows.start(0);
  grow(rows, 0, 15);
  for (const int64_t length : {9, 2, 0}) {
    rows.truncate(0, length);
    grow(rows, 0, 15);
    rows.check();
  }
  rig.end();
}

// Nothing of a ring can be shared: it is written in a circle.
void a_fork_has_a_ring_of_its_own(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out_windows()) {
    for (const int64_t length : {0, 2, 7, 13, 16, 60}) {
      Rig rig(backend, options);
      RowContents rows(rig);
      rows.start(length);
      const std::vector<int64_t> children = rows.fork_n(0, std::nullopt, 2);
      rows.check();
      for (int64_t more = 1; more <= 30; more += 3) {
        rows.step(0, length + more);
        rows.step(children[0], length + 2 * more);
        rows.check();
      }
      rig.end();
    }
  }
}

void rings_change_places(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out_windows()) {
    Rig rig(backend, options);
    RowContents rows(rig);
    for (const int64_t length : {60, 7, 0, 15}) rows.start(length);
    rows.reorder({0, 1, 2, 3}, {1, 0, 3, 0});
    rows.check();
    for (int64_t row = 0; row < 4; ++row) rows.step(row, 61);
    rows.check();
    rows.reorder({2, 0}, {0, 1});
    rows.check();
    rig.end();
  }
}

void a_complete_ring_serves_the_next_request(const Backend& backend) {
  for (const size_t lookahead : {0, 4}) {
    for (RigOptions options : ways_to_lay_out_windows()) {
      options.lookahead = lookahead;
      Rig rig(backend, options);
      RowContents rows(rig);
      rows.start(60);
      rows.free(0);
      CHECK_EQ(rows.start(2), 0);
      rows.check();
      for (int64_t length = 3; length < 60; ++length) rows.step(0, length);
      rows.check();
      rows.truncate(0, 0);
      rows.step(0, 5);
      rows.check();
      rig.end();
    }
  }
}

void an_idle_ring_gives_its_memory_to_others(const Backend& backend) {
  RigOptions options = ten_tokens(/*sink=*/3);
  options.budget_pages = 4 + 3;
  Rig rig(backend, options);
  RowContents rows(rig);
  rows.start(60);
  rows.start(8);
  rows.free(0);
  rows.step(1, 60);
  CHECK_EQ(rig.mapped(1), 2000u);
  CHECK(rig.mapped(0) < 60);
  rows.check();
  CHECK_EQ(rows.start(3), 0);
  check_out_of_pages([&] { rows.step(0, 20); }, 3, 2);
  rows.check();
  rows.free(1);
  rows.step(0, 60);
  rows.check();
  rig.end();
}

void rings_cannot_be_compacted_or_kept(const Backend& backend) {
  Rig rig(backend, ten_tokens());
  rig.start({8});
  CHECK_THROWS(std::invalid_argument, rig.kv->compact(0, {1}, 0, {}),
               "compact() cannot move tokens of a sliding window");
  CHECK_THROWS(std::invalid_argument, rig.kv->keep_prefix(0, 4),
               "a cache with a sliding window cannot keep prefixes");
  CHECK(rig.kv->seq_lens() == std::vector<int64_t>({8, 0, 0, 0, 0, 0}));
  rig.end();
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      over_all_backends(
          {BACKEND_TEST(a_window_is_readable_at_every_length),
           BACKEND_TEST(a_window_is_readable_whatever_a_step_adds),
           BACKEND_TEST(memory_ends_with_the_window),
           BACKEND_TEST(both_mappings_are_the_same_memory), BACKEND_TEST(a_sink_is_not_in_the_ring),
           BACKEND_TEST(a_row_is_cut_as_far_as_its_window_is_there),
           BACKEND_TEST(what_a_long_chunk_leaves_out_cannot_be_gone_back_to),
           BACKEND_TEST(before_the_first_lap_any_length_is_there),
           BACKEND_TEST(a_fork_has_a_ring_of_its_own), BACKEND_TEST(rings_change_places),
           BACKEND_TEST(a_complete_ring_serves_the_next_request),
           BACKEND_TEST(an_idle_ring_gives_its_memory_to_others),
           BACKEND_TEST(rings_cannot_be_compacted_or_kept)}),
      argc > 1 ? argv[1] : nullptr);
}
