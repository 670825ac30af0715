// Rows that share memory, against a model that stores what each of them is to read.
#include <random>

#include "base/errors.h"
#include "row_contents.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// A caller that does anything it may, in any order.
class Caller {
 public:
  Caller(Rig& rig, const RigOptions& options, unsigned seed)
      : rig_(rig),
        rows_(rig),
        random_(seed),
        max_tokens_(static_cast<int64_t>(options.max_tokens)),
        has_window_(options.window != 0) {}

  // True: nothing stood in the way.
  bool act() {
    try {
      act_now();
      return true;
    } catch (const OutOfPages& error) {
      CHECK(error.needed() > error.free());
    } catch (const OutOfRows&) {
    } catch (const std::invalid_argument&) {
      CHECK(has_window_);  // the window of so few tokens is overwritten
    }
    return false;
  }
  void check() { rows_.check(); }
  void free_one() {
    const std::vector<int64_t> active = active_rows();
    if (!active.empty()) rows_.free(any_of(active));
  }

 private:
  int64_t any(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  int64_t any_of(const std::vector<int64_t>& rows) {
    return rows[static_cast<size_t>(any(0, static_cast<int64_t>(rows.size()) - 1))];
  }
  std::vector<int64_t> active_rows() const {
    std::vector<int64_t> active;
    const auto n_rows = static_cast<int64_t>(rig_.kv->seq_lens().size());
    for (int64_t row = 0; row < n_rows; ++row) {
      if (rig_.state(row) == RowState::kActive) active.push_back(row);
    }
    return active;
  }

  void act_now() {
    const std::vector<int64_t> active = active_rows();
    const int64_t choice = active.empty() ? 0 : any(0, 13);
    if (choice <= 1) {
      rows_.start(any(0, 20));
      return;
    }
    const int64_t row = any_of(active);
    switch (choice) {
      case 2:
        return rows_.free(row);
      case 3:
        static_cast<void>(
            rows_.fork_n(row, any(0, rows_.length(row)), static_cast<size_t>(any(1, 2))));
        return;
      case 4:
        return rows_.truncate(row, any(0, rows_.length(row)));
      case 5:
        return reorder(active);
      case 6:
        return compact(row);
      case 7:
        if (rows_.length(row) > 0) keep(row);
        return;
      case 8:
      case 9:
        return reuse();
      default:
        return rows_.step(row, std::min(max_tokens_, rows_.length(row) + any(1, 9)));
    }
  }

  void reorder(const std::vector<int64_t>& active) {
    std::vector<int64_t> rows, parents;
    for (const int64_t row : active) {
      if (any(0, 2) == 0) continue;
      rows.push_back(row);
      parents.push_back(any_of(active));
    }
    rows_.reorder(rows, parents);
  }
  void compact(int64_t row) {
    const int64_t start = any(0, rows_.length(row));
    std::vector<int64_t> kept;
    for (int64_t token = start; token < rows_.length(row); ++token) {
      if (any(0, 2) != 0) kept.push_back(token);
    }
    rows_.compact(row, kept, start);
  }
  void keep(int64_t row) { rig_.kv->keep_prefix(row, any(1, rows_.length(row))); }
  // A row that keeps a prefix: adopted, forked or forgotten.
  void reuse() {
    const std::vector<KeptPrefix> kept = rig_.kv->kept_prefixes();
    for (size_t at = 0; at < kept.size(); ++at) {
      const auto row = static_cast<int64_t>(at);
      const auto tokens = static_cast<int64_t>(kept[at].tokens);
      if (kept[at].life == 0 || any(0, 1) == 0) continue;
      const int64_t choice = any(0, 6);
      if (choice == 0) return rig_.kv->forget_prefix(row, kept[at].life);
      if (choice <= 3 && rows_.adopt(row, kept[at].life, tokens)) return;
      rows_.fork_prefix(row, kept[at].life, any(1, tokens));
      return;
    }
  }

  Rig& rig_;
  RowContents rows_;
  std::mt19937 random_;
  const int64_t max_tokens_;
  const bool has_window_;
};

void serve(const Backend& backend, const RigOptions& options, int actions) {
  // The double clears pages of 2 MiB: there one history will do.
  const unsigned seeds = backend.is_cuda ? 1 : 3;
  for (unsigned seed = 1; seed <= seeds; ++seed) {
    Rig rig(backend, options);
    Caller caller(rig, options, seed);
    for (int i = 0; i < actions; ++i) {
      if (!caller.act()) caller.free_one();
      caller.check();
    }
    rig.end();
  }
}

void every_row_reads_what_the_model_says(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out()) serve(backend, options, 300);
}

void every_row_reads_what_the_model_says_when_memory_is_short(const Backend& backend) {
  for (RigOptions options : ways_to_lay_out(24)) {
    if (options.kind == LayoutKind::kPerLayer) options.budget_pages *= 4;
    serve(backend, options, 300);
  }
}

void every_window_reads_what_the_model_says(const Backend& backend) {
  for (const RigOptions& options : ways_to_lay_out_windows()) serve(backend, options, 200);
}

void every_window_reads_what_the_model_says_when_memory_is_short(const Backend& backend) {
  for (RigOptions options : ways_to_lay_out_windows(24)) {
    if (options.kind == LayoutKind::kPerLayer || options.heads > 1) options.budget_pages *= 4;
    options.lookahead = 3;
    serve(backend, options, 200);
  }
}

void every_row_reads_what_the_model_says_with_prefetch_and_scrubbing(const Backend& backend) {
  for (RigOptions options : ways_to_lay_out(60)) {
    options.lookahead = 6;
    options.scrub = Scrub::kOnReuse;
    serve(backend, options, 200);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests(
      over_all_backends(
          {BACKEND_TEST(every_row_reads_what_the_model_says),
           BACKEND_TEST(every_row_reads_what_the_model_says_when_memory_is_short),
           BACKEND_TEST(every_window_reads_what_the_model_says),
           BACKEND_TEST(every_window_reads_what_the_model_says_when_memory_is_short),
           BACKEND_TEST(every_row_reads_what_the_model_says_with_prefetch_and_scrubbing)}),
      argc > 1 ? argv[1] : nullptr);
}
