#include "base/units.h"

#include <cstdio>

namespace vattn {

std::string format_bytes(size_t bytes) {
  struct Unit {
    size_t bytes;
    const char* name;
  };
  constexpr Unit kUnits[] = {{kTiB, "TiB"}, {kGiB, "GiB"}, {kMiB, "MiB"}, {kKiB, "KiB"}};
  for (const Unit& unit : kUnits) {
    if (bytes < unit.bytes) continue;
    const double value = static_cast<double>(bytes) / static_cast<double>(unit.bytes);
    char text[32];
    std::snprintf(text, sizeof(text), "%.*f %s", bytes % unit.bytes == 0 ? 0 : 2, value, unit.name);
    return text;
  }
  return std::to_string(bytes) + " bytes";
}

}  // namespace vattn
