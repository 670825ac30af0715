#include "core/row_choice.h"

#include <tuple>

namespace vattn {
namespace {

// Smaller is better.
using Rank = std::tuple<int, size_t>;

std::optional<Rank> rank_of(const RowCandidate& row, size_t tokens) {
  switch (row.state) {
    case RowState::kIdle:
      if (row.keeps_prefix) return Rank{4, row.freed_at};
      if (row.mapped_tokens >= tokens) return Rank{0, row.mapped_tokens - tokens};
      return Rank{1, tokens - row.mapped_tokens};
    case RowState::kFree:
      return Rank{2, 0};
    case RowState::kRetiring:
      return Rank{3, SIZE_MAX - row.mapped_tokens};
    case RowState::kActive:
      break;
  }
  return std::nullopt;
}

}  // namespace

const char* name_of(RowState state) noexcept {
  switch (state) {
    case RowState::kFree:
      return "free";
    case RowState::kActive:
      return "active";
    case RowState::kIdle:
      return "idle";
    case RowState::kRetiring:
      return "retiring";
  }
  return "unknown";
}

std::optional<size_t> choose_row(const std::vector<RowCandidate>& rows, size_t tokens) {
  std::optional<size_t> best;
  std::optional<Rank> best_rank;
  for (size_t row = 0; row < rows.size(); ++row) {
    const std::optional<Rank> rank = rank_of(rows[row], tokens);
    if (rank && (!best_rank || *rank < *best_rank)) {
      best = row;
      best_rank = rank;
    }
  }
  return best;
}

}  // namespace vattn
