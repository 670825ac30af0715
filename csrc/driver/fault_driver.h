// Decorator for tests: makes the nth call of a driver fail, whichever call that is.
//
// Calls that give something back cannot fail by contract and are not counted, except unmap, which
// says so by returning false.
#pragma once

#include <memory>

#include "driver/vmm_driver.h"

namespace vattn {

class FaultDriver : public VmmDriver {
 public:
  // The nth call from now on fails, counted from 1; nothing after it.
  virtual void fail_nth(uint64_t nth) = 0;
  // As fail_nth, and every call after it fails too: a broken device.
  virtual void fail_from(uint64_t nth) = 0;
  virtual void disarm() = 0;
  // Failures injected since the last fail_nth() or fail_from().
  virtual uint64_t injected() const = 0;
};

std::shared_ptr<FaultDriver> inject_faults(std::shared_ptr<VmmDriver> inner);

}  // namespace vattn
