// The contract of VmmDriver (csrc/driver/vmm_driver.h), once, for every implementation.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "device_memory.h"
#include "driver/vmm_driver.h"

namespace vattn::test {

using DriverFactory = std::function<std::shared_ptr<VmmDriver>()>;
using MemoryFactory = std::function<Memory()>;

// A driver, and how to reach its memory.
struct Subject {
  VmmDriver& driver;
  const Memory& memory;

  bool writable(uintptr_t address) const;  // true: the byte is now 0x5a
  bool readable(uintptr_t address) const;
};

struct Clause {
  const char* name;
  void (*run)(const Subject&);
};
// Those on copy(), clear() and what memory holds at first.
std::vector<Clause> copy_clauses();

Extent make_extent(VmmDriver& driver, size_t pages);

// One test per clause; each makes its own driver and leaves nothing behind. `prefix` goes in front
// of the names.
std::vector<Test> driver_contract(const std::string& prefix, const DriverFactory& open,
                                  const MemoryFactory& memory = host_memory);

// Whether the calling process could read or write a byte there, without trying it the hard way.
bool readable(uintptr_t address);
bool writable(uintptr_t address);  // true: the byte is now 0x5a

// Waits for a child process. -1 when it did not exit by itself.
int exit_status_of(int child);

// Runs `body` in a forked child; true when it returned true there.
bool holds_in_child(const std::function<bool()>& body);

// Whether `body` throws E.
template <typename E>
bool throws(const std::function<void()>& body) {
  try {
    body();
  } catch (const E&) {
    return true;
  }
  return false;
}

}  // namespace vattn::test
