// Where in the file of the host driver each extent lies. Offsets are never used again: the file is
// sparse, so all that matters is who is whose neighbour.
#pragma once

#include <cstddef>
#include <vector>

#include "base/units.h"

namespace vattn {

constexpr size_t kHugePageBytes = 2 * kMiB;

// The file consists of zones. Extents that grow in turns are not neighbours, so each such run of
// extents soon gets a zone of its own, where its next extent finds the place behind it free.
class FileOffsets {
 public:
  static constexpr size_t kLimit = size_t{1} << 60;
  static constexpr size_t kZoneBytes = kGiB;

  // An offset for `bytes`: at `after`, the end of an extent, if nobody has that place; else at the
  // start of a new zone. With 0, `after` is the end of what was taken last that way. Extents of
  // 2 MiB and more start at multiples of it. Throws DriverError when the file is used up.
  size_t take(size_t after, size_t bytes);

 private:
  bool is_free(size_t offset, size_t bytes) const;
  size_t add_zones(size_t bytes);

  std::vector<size_t> next_;  // by zone: the first offset from which on nobody has anything
  size_t tail_ = 0;
};

}  // namespace vattn
