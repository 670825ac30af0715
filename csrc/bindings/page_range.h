#pragma once

#include <pybind11/pybind11.h>

namespace vattn {

// vattn._C.PageRange: core/page_range.h.
void define_page_range(pybind11::module_& m);

}  // namespace vattn
