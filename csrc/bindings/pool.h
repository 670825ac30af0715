#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "core/pool.h"
#include "driver/fault_driver.h"
#include "driver/tracing_driver.h"

namespace vattn {

// A pool and the decorators of its driver. faults is null unless asked for.
struct PyPool {
  std::shared_ptr<Pool> pool;
  std::shared_ptr<TracingDriver> trace;
  std::shared_ptr<FaultDriver> faults;

  FaultDriver& checked_faults() const;
};

// vattn._C.Pool, and open_page_pool(), which makes one for a page range.
void define_pool(pybind11::module_& m);

}  // namespace vattn
