// How a test reads and writes the memory of a driver, a byte at a time.
#pragma once

#include <cstdint>
#include <functional>

namespace vattn::test {

struct Memory {
  // False, and nothing happens, where there is no memory.
  std::function<bool(uintptr_t address, unsigned char* value)> read;
  std::function<bool(uintptr_t address, unsigned char value)> write;
  bool works_in_forked_child;
};

// What this process can reach by itself: host memory, and that of the libcuda double.
Memory host_memory();
// By copies of libcuda, in the primary context of device 0. On a GPU there is no other way.
Memory device_memory();

}  // namespace vattn::test
