#include "check.h"

#include <cstdio>

namespace vattn::test {

void fail(const char* file, int line, const std::string& text) {
  throw CheckFailed{std::string(file) + ":" + std::to_string(line) + ": " + text};
}

int run_tests(const std::vector<Test>& tests, const char* only) {
  int passed = 0;
  int failed = 0;
  for (const Test& test : tests) {
    if (only != nullptr && test.name.find(only) == std::string::npos) continue;
    std::string problem;
    try {
      test.run();
    } catch (const CheckFailed& check) {
      problem = check.text;
    } catch (const std::exception& error) {
      problem = std::string("unexpected exception: ") + error.what();
    }
    std::printf("%s %s\n", problem.empty() ? "ok  " : "FAIL", test.name.c_str());
    if (!problem.empty()) std::printf("      %s\n", problem.c_str());
    std::fflush(stdout);  // a fork in the next test must not print this again
    ++(problem.empty() ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace vattn::test
