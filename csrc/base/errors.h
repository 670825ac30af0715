// The errors of the library, named for what the caller does next.
//
//   std::invalid_argument   fix the call                                       -> ValueError
//   OutOfPages              preempt a request, call again                      -> MemoryError
//   OutOfRows               wait for a request to end, call again              -> MemoryError
//   DriverError             log it and stop using this cache                   -> RuntimeError
//
// Whatever is thrown, no active row has changed.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace vattn {

// A call of the driver (CUDA's, or the kernel's on the host) failed.
class DriverError : public std::runtime_error {
 public:
  // `call` is the driver's own name of the function; `code` its status (CUresult or errno).
  DriverError(std::string call, int code, const std::string& text)
      : std::runtime_error(call + " failed (" + std::to_string(code) + "): " + text),
        call_(std::move(call)),
        code_(code) {}
  const std::string& call() const noexcept { return call_; }
  int code() const noexcept { return code_; }

 private:
  std::string call_;
  int code_;
};

// create() found no physical memory. Below the budget this means someone else holds the memory.
class OutOfDeviceMemory : public DriverError {
 public:
  using DriverError::DriverError;
};

// The physical pool cannot back the request. No state changed; the engine may preempt and retry.
class OutOfPages : public std::runtime_error {
 public:
  OutOfPages(size_t needed, size_t free, const std::string& remedy)
      : std::runtime_error("need " + std::to_string(needed) + " pages, " + std::to_string(free) +
                           " free; " + remedy),
        needed_(needed),
        free_(free) {}
  size_t needed() const noexcept { return needed_; }
  size_t free() const noexcept { return free_; }

 private:
  size_t needed_;
  size_t free_;
};

// Every row holds a request.
class OutOfRows : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace vattn
