// libcuda.so.1, opened at run time: one build imports and runs where there is no GPU.
#pragma once

#include <string>

#include "base/errors.h"
#include "driver/cuda_abi.h"

namespace vattn::cuda {

constexpr const char* kLibrary = "libcuda.so.1";

// The functions of the driver, under CUDA's own names.
struct Api {
#define VATTN_CUDA_MEMBER(name, version, parameters) Result(*name) parameters = nullptr;
  VATTN_CUDA_FUNCTIONS(VATTN_CUDA_MEMBER)
#undef VATTN_CUDA_MEMBER
};

// Throws DriverError when the library or one of its functions is missing. The library stays open
// for the rest of the process: other users of CUDA in the process hold it anyway.
Api load_api(const char* library = kLibrary);

// "CUDA_ERROR_INVALID_VALUE", also for codes that the driver does not know.
const char* error_name(const Api& api, Result result) noexcept;
// "CUDA_ERROR_INVALID_VALUE: invalid argument".
std::string error_text(const Api& api, Result result);

[[noreturn]] void throw_error(const Api& api, const char* call, Result result,
                              const std::string& remedy = "");

inline void check(const Api& api, const char* call, Result result) {
  if (result != kSuccess) throw_error(api, call, result);
}

}  // namespace vattn::cuda
