// The control functions of the libcuda double that the tests run on:  DOUBLE(set_device_count)(2)
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "libcuda_double/control.h"

namespace vattn::test {

// Address of an exported function. Throws when libcuda.so.1 is not the double: no test may run on,
// or be reported for, a real GPU by accident.
void* double_symbol(const char* name);

// All breaches, one per line.
std::string breaches();
// Fails unless the last recorded breach contains `substring`.
void check_breach(const std::string& substring);
// Fails on any breach, and on anything that is still held.
void check_clean();
// The same tests, each on a double that was just reset, and check_clean() after it.
std::vector<Test> on_clean_double(const std::vector<Test>& tests);

}  // namespace vattn::test

#define DOUBLE(name)                                 \
  (reinterpret_cast<decltype(&vattn_double_##name)>( \
      ::vattn::test::double_symbol("vattn_double_" #name)))
