// Whichever driver call fails while rows share memory: every row reads what it did, it all adds up,
// nothing leaks, and the cache works again when the driver does.
#include "base/errors.h"
#include "row_contents.h"
#include "stderr_text.h"

using namespace vattn;
using namespace vattn::test;

namespace {

struct Scenario {
  RigOptions options;
  std::function<void(Rig&, RowContents&)> prepare;
  std::function<void(Rig&, RowContents&)> act;
  // What moves within a row is certain only when all of it has moved.
  bool moves_in_place = false;
};

std::vector<int64_t> active_rows(const Rig& rig) {
  std::vector<int64_t> active;
  const auto n_rows = static_cast<int64_t>(rig.kv->seq_lens().size());
  for (int64_t row = 0; row < n_rows; ++row) {
    if (rig.state(row) == RowState::kActive) active.push_back(row);
  }
  return active;
}

// True: it threw.
bool fails(Rig& rig, RowContents& rows, const Scenario& scenario) {
  try {
    scenario.act(rig, rows);
    return false;
  } catch (const DriverError&) {
  } catch (const OutOfPages& error) {
    CHECK(error.free() < error.needed());
  }
  return true;
}

// Runs the scenario with a failure from the nth call on. False: it made fewer calls than that.
bool survives(const Backend& backend, const Scenario& scenario, uint64_t nth, bool persistent) {
  Rig rig(backend, scenario.options);
  rig.kv->stop_background();  // it would take some of the failures
  RowContents rows(rig, kStreamA);
  scenario.prepare(rig, rows);
  const std::vector<int64_t> active = active_rows(rig);
  if (persistent) {
    rig.faults->fail_from(nth);
  } else {
    rig.faults->fail_nth(nth);
  }
  bool threw = false;
  const std::string log = stderr_text([&] { threw = fails(rig, rows, scenario); });
  const bool injected = rig.faults->injected() != 0;
  rig.faults->disarm();
  CHECK(injected || !threw);
  if (threw) {
    CHECK(active_rows(rig) == active);
    // Only a driver that refuses to undo what it did costs tokens, and the log says so.
    const bool lost = rows.follow_lengths() != 0;
    const bool told = log.find("tokens lost row=") != std::string::npos;
    CHECK(!lost || scenario.moves_in_place || (persistent && told));
    rows.check();
    scenario.act(rig, rows);
  }
  rows.check();
  rig.end();
  return injected;
}

void sweep(const Backend& backend, const Scenario& scenario, uint64_t at_least) {
  for (const bool persistent : {false, true}) {
    uint64_t nth = 1;
    const auto where = [&] { return (persistent ? "from call " : "call ") + show(nth) + ": "; };
    try {
      while (survives(backend, scenario, nth, persistent)) ++nth;
    } catch (const CheckFailed& check) {
      throw CheckFailed{where() + check.text};
    } catch (const std::exception& error) {
      throw CheckFailed{where() + error.what()};
    }
    CHECK(nth > at_least);
  }
}

// The double clears pages of 2 MiB for every rig: one layout of each scenario, the others on the
// host.
std::vector<RigOptions> some_of(std::vector<RigOptions> ways, const Backend& backend) {
  if (backend.is_cuda) ways.resize(1);
  return ways;
}

// The idle rows have to give their memory.
void forking(const Backend& backend) {
  for (RigOptions options : some_of(ways_to_lay_out(13), backend)) {
    options.rows = 4;
    if (options.kind == LayoutKind::kPerLayer) options.budget_pages *= 4;
    if (options.heads > 1) options.budget_pages *= 2;
    sweep(backend,
          {options,
           [](Rig&, RowContents& rows) {
             rows.start(18);
             rows.start(8);
             rows.start(8);
             rows.free(1);
             rows.free(2);
           },
           [](Rig&, RowContents& rows) { rows.fork_n(0, 13, 2); }},
          4);
  }
}

void growing_into_shared_pages(const Backend& backend) {
  for (const RigOptions& options : some_of(ways_to_lay_out(), backend)) {
    sweep(backend,
          {options,
           [](Rig&, RowContents& rows) {
             rows.start(24);
             rows.fork_n(0, std::nullopt, 2);
             rows.truncate(0, 10);
             rows.truncate(1, 12);
           },
           [](Rig& rig, RowContents& rows) {
             rig.kv->step_rows({{0, rows.length(0) + 7}, {1, rows.length(1) + 1}});
             rows.truncate(0, rows.length(0));
             rows.truncate(1, rows.length(1));
           }},
          8);
  }
}

void reordering(const Backend& backend) {
  for (const RigOptions& options : some_of(ways_to_lay_out(), backend)) {
    sweep(backend,
          {options,
           [](Rig&, RowContents& rows) {
             rows.start(22);
             rows.fork_n(0, 17, 2);
             rows.step(1, 19);
             rows.start(5);
           },
           [](Rig&, RowContents& rows) { rows.reorder({0, 1, 2, 3}, {1, 0, 3, 1}); }},
          12);
  }
}

void reordering_rings(const Backend& backend) {
  for (const RigOptions& options : some_of(ways_to_lay_out_windows(), backend)) {
    sweep(backend,
          {options,
           [](Rig&, RowContents& rows) {
             for (const int64_t length : {60, 40, 2, 7}) rows.start(length);
           },
           [](Rig&, RowContents& rows) { rows.reorder({0, 1, 2}, {1, 0, 3}); }},
          10);
  }
}

void forking_rings(const Backend& backend) {
  for (const RigOptions& options : some_of(ways_to_lay_out_windows(), backend)) {
    sweep(backend,
          {options, [](Rig&, RowContents& rows) { rows.start(60); },
           [](Rig&, RowContents& rows) { rows.fork_n(0, std::nullopt, 2); }},
          6);
  }
}

void growing_rings(const Backend& backend) {
  for (const RigOptions& options : some_of(ways_to_lay_out_windows(), backend)) {
    sweep(backend,
          {options, [](Rig&, RowContents& rows) { rows.start(2); },
           [](Rig&, RowContents& rows) { rows.step(0, 60); }},
          3);
  }
}

void compacting(const Backend& backend) {
  for (const RigOptions& options : some_of(ways_to_lay_out(), backend)) {
    sweep(backend,
          {options,
           [](Rig&, RowContents& rows) {
             rows.start(24);
             rows.fork(0);
           },
           [](Rig&, RowContents& rows) {
             if (rows.length(1) < 24) rows.step(1, 24);
             rows.compact(1, {10, 12, 13, 18}, 9);
           },
           /*moves_in_place=*/true},
          5);
  }
}

void adopting_what_is_kept(const Backend& backend) {
  RigOptions options = ways_to_lay_out().front();
  options.scrub = Scrub::kOnReuse;
  sweep(backend,
        {options,
         [](Rig& rig, RowContents& rows) {
           rows.start(24);
           rig.kv->keep_prefix(0, 10);
           rig.free(0, kStreamB);
         },
         [](Rig& rig, RowContents& rows) {
           CHECK(rows.adopt(0, rig.kv->kept_prefixes()[0].life, 10));
         }},
        backend.is_cuda ? 2 : 1);
}

// 7 pages: one is free, and one comes from the end of the source.
void forking_what_is_kept(const Backend& backend) {
  RigOptions options = ways_to_lay_out(7).front();
  sweep(backend,
        {options,
         [](Rig& rig, RowContents& rows) {
           rows.start(24);
           rows.start(4);
           rig.kv->keep_prefix(0, 24);
           rig.free(0, kStreamB);
         },
         [](Rig& rig, RowContents& rows) {
           const KeptPrefix kept = rig.kv->kept_prefixes()[0];
           CHECK(rows.fork_prefix(0, kept.life, 18).second >= 16);
         }},
        backend.is_cuda ? 5 : 3);
}

void scrubbing(const Backend& backend) {
  RigOptions options = ways_to_lay_out(8).front();
  options.scrub = Scrub::kOnReuse;
  sweep(backend,
        {options,
         [](Rig&, RowContents& rows) {
           rows.start(16);
           rows.start(8);
           rows.start(8);
           rows.free(0);
         },
         [](Rig&, RowContents& rows) { rows.step(2, 24); }},
        4);
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      over_all_backends({BACKEND_TEST(forking), BACKEND_TEST(growing_into_shared_pages),
                         BACKEND_TEST(reordering), BACKEND_TEST(reordering_rings),
                         BACKEND_TEST(forking_rings), BACKEND_TEST(growing_rings),
                         BACKEND_TEST(compacting), BACKEND_TEST(adopting_what_is_kept),
                         BACKEND_TEST(forking_what_is_kept), BACKEND_TEST(scrubbing)}),
      argc > 1 ? argv[1] : nullptr);
}
