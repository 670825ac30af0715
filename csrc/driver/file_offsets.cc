#include "driver/file_offsets.h"

#include <cerrno>

#include "base/errors.h"

namespace vattn {

size_t FileOffsets::take(size_t after, size_t bytes) {
  const size_t alignment = bytes < kHugePageBytes ? 1 : kHugePageBytes;
  size_t offset = after == 0 ? round_up(tail_, alignment) : after;
  if (offset % alignment != 0 || !is_free(offset, bytes)) offset = add_zones(bytes);
  const size_t end = offset + bytes;
  next_[(end - 1) / kZoneBytes] = end;
  if (after == 0) tail_ = end;
  return offset;
}

bool FileOffsets::is_free(size_t offset, size_t bytes) const {
  const size_t zone = offset / kZoneBytes;
  return zone < next_.size() && next_[zone] <= offset && offset + bytes <= (zone + 1) * kZoneBytes;
}

size_t FileOffsets::add_zones(size_t bytes) {
  const size_t offset = next_.size() * kZoneBytes;
  if (offset + bytes > kLimit) {
    throw DriverError("create", EFBIG, "all 2^60 file offsets were handed out; make a new cache");
  }
  // Those that the extent fills stay full; take() sets the last.
  next_.resize(next_.size() + ceil_div(bytes, kZoneBytes), kLimit);
  return offset;
}

}  // namespace vattn
