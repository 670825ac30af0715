// A forked child has no background thread, no usable CUDA context, and shares host pages with its
// parent. The library refuses to work there instead of corrupting the parent.
#pragma once

#include <cstdint>

namespace vattn {

// Number of forks between the process that loaded the library and this one. Costs one load: cheap
// enough for step().
uint64_t fork_generation() noexcept;

// A member of everything that belongs to the process that made it.
class ProcessBound {
 public:
  bool forked() const noexcept { return made_in_ != fork_generation(); }
  // Throws DriverError in a forked child.
  void check_not_forked() const {
    if (forked()) throw_forked();
  }

 private:
  [[noreturn]] static void throw_forked();

  uint64_t made_in_ = fork_generation();
};

}  // namespace vattn
