// A test is a function without arguments that returns, or fails a CHECK. Exit status 0: all passed.
//
//   static void pages_are_counted() { CHECK(count() == 3); }
//   int main() { return vattn::test::run_tests({TEST(pages_are_counted)}); }
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace vattn::test {

// Not a std::exception: code under test that catches those must not swallow a failed check.
struct CheckFailed {
  std::string text;
};

[[noreturn]] void fail(const char* file, int line, const std::string& text);

struct Test {
  std::string name;
  std::function<void()> run;
};

// One line per test, then "N passed, M failed". Returns the exit status of the program. An argument
// limits the run to tests whose name contains it.
int run_tests(const std::vector<Test>& tests, const char* only = nullptr);

inline std::string show(const std::string& value) {
  return value;
}
inline std::string show(const char* value) {
  return value;
}
template <typename Number>
std::string show(Number value) {
  return std::to_string(value);
}

template <typename Left, typename Right>
void check_equal(const char* file, int line, const char* text, const Left& left,
                 const Right& right) {
  if (left == right) return;
  fail(file, line, std::string(text) + " is " + show(left) + ", expected " + show(right));
}

template <typename Error, typename Body>
void check_throws(const char* file, int line, const char* text, const std::string& substring,
                  Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    if (std::string(error.what()).find(substring) != std::string::npos) return;
    fail(file, line, std::string(text) + " said: " + error.what() + "\n      not: " + substring);
  } catch (const std::exception& error) {
    fail(file, line, std::string(text) + " threw another type: " + error.what());
  }
  fail(file, line, std::string(text) + " did not throw");
}

}  // namespace vattn::test

#define TEST(function)  \
  ::vattn::test::Test { \
    #function, function \
  }

#define CHECK(expression)                                                    \
  do {                                                                       \
    if (!(expression)) ::vattn::test::fail(__FILE__, __LINE__, #expression); \
  } while (false)

// Fails with the text of both sides. For integers and strings.
#define CHECK_EQ(left, right) ::vattn::test::check_equal(__FILE__, __LINE__, #left, left, right)

#define CHECK_THROWS(Error, expression, substring)                               \
  ::vattn::test::check_throws<Error>(__FILE__, __LINE__, #expression, substring, \
                                     [&] { static_cast<void>(expression); })
