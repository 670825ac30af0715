// Mappings kept back for the rest of the process.
//
// A process may have vm.max_map_count mappings. One that has them all cannot allocate memory for
// anything, not even for the error that says so. So a driver holds a few hundred mappings that it
// does not need, and lets go of them when the kernel refuses another.
#pragma once

#include <mutex>

namespace vattn {

class MappingReserve {
 public:
  ~MappingReserve() { release(); }

  // False: the kernel refuses, and the process has what is left to itself. Cheap when held.
  bool acquire() noexcept;
  void release() noexcept;

 private:
  std::mutex mutex_;  // guards base_
  void* base_ = nullptr;
};

}  // namespace vattn
