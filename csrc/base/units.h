// Units and the little arithmetic that goes with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace vattn {

constexpr size_t kKiB = size_t{1} << 10;
constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kGiB = size_t{1} << 30;
constexpr size_t kTiB = size_t{1} << 40;

constexpr size_t ceil_div(size_t value, size_t by) {
  return (value + by - 1) / by;
}
constexpr size_t round_up(size_t value, size_t to) {
  return ceil_div(value, to) * to;
}
constexpr bool is_power_of_two(size_t value) {
  return value != 0 && (value & (value - 1)) == 0;
}

// "2 MiB", "23.54 GiB", "512 bytes".
std::string format_bytes(size_t bytes);

}  // namespace vattn
