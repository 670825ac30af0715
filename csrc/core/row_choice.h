// Which row a new request gets. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace vattn {

// kFree: nothing mapped. kIdle: its request ended, its memory is still mapped. kRetiring: idle, and
// to be unmapped when the device is done with it.
enum class RowState : uint8_t { kFree, kActive, kIdle, kRetiring };

const char* name_of(RowState state) noexcept;

struct RowCandidate {
  RowState state;
  size_t mapped_tokens;
  bool keeps_prefix = false;
  uint64_t freed_at = 0;  // order of time
};

// The idle row with the least memory that is enough for `tokens`; else the idle row with the most
// memory; else a free row; else the retiring row with the most memory; else, of the idle rows that
// keep a prefix, the one freed first; else none.
std::optional<size_t> choose_row(const std::vector<RowCandidate>& rows, size_t tokens);

}  // namespace vattn
