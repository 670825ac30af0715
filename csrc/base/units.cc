#include "base/units.h"

namespace vattn {

std::string format_bytes(size_t bytes) {
  struct Unit {
    size_t bytes;
    const char* name;
  };
  for (const Unit& unit : {Unit{kGiB, " GiB"}, Unit{kMiB, " MiB"}, Unit{kKiB, " KiB"}}) {
    if (bytes != 0 && bytes % unit.bytes == 0)
      return std::to_string(bytes / unit.bytes) + unit.name;
  }
  return std::to_string(bytes) + " bytes";
}

}  // namespace vattn
