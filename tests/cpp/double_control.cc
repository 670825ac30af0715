#include "double_control.h"

#include <dlfcn.h>

#include <stdexcept>

namespace vattn::test {

void* double_symbol(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("no libcuda double: ") + dlerror());
  void* const found = dlsym(library, name);
  if (found == nullptr) {
    throw std::runtime_error(std::string("libcuda.so.1 is not the double, it has no ") + name);
  }
  return found;
}

std::string breaches() {
  std::string text;
  for (size_t i = 0; i < DOUBLE(breaches)(); ++i) text += DOUBLE(breach)(i) + std::string("\n");
  return text;
}

void check_breach(const std::string& substring) {
  const size_t count = DOUBLE(breaches)();
  if (count == 0) fail(__FILE__, __LINE__, "no breach recorded, expected: " + substring);
  const std::string last = DOUBLE(breach)(count - 1);
  if (last.find(substring) == std::string::npos) {
    fail(__FILE__, __LINE__, "last breach is: " + last + "\n      not: " + substring);
  }
}

void check_clean() {
  DOUBLE(check_leaks)();
  CHECK_EQ(breaches(), "");
}

std::vector<Test> on_clean_double(const std::vector<Test>& tests) {
  std::vector<Test> wrapped;
  for (const Test& test : tests) {
    wrapped.push_back({test.name, [run = test.run] {
                         DOUBLE(reset)();
                         run();
                         check_clean();
                       }});
  }
  return wrapped;
}

}  // namespace vattn::test
