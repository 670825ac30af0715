#include "driver/cuda_api.h"

#include <dlfcn.h>

namespace vattn::cuda {
namespace {

constexpr const char* kRemedy =
    "; install an NVIDIA driver for CUDA 11.3 or newer, or use device=\"cpu\"";

// Asks the driver for the function that had our signature in CUDA `version`.
class Resolver {
 public:
  Resolver(void* library, const char* path)
      : v12_(reinterpret_cast<GetProcAddressV12000>(dlsym(library, "cuGetProcAddress_v2"))),
        v11_(reinterpret_cast<GetProcAddressV11030>(dlsym(library, "cuGetProcAddress"))) {
    if (v12_ == nullptr && v11_ == nullptr) {
      throw DriverError("dlsym", 0, std::string(path) + " has no cuGetProcAddress" + kRemedy);
    }
  }

  template <typename Function>
  void resolve(Function* function, const char* name, int version) const {
    void* found = nullptr;
    int status = kProcAddressSuccess;
    const Result result = v12_ != nullptr
                              ? v12_(name, &found, version, kProcAddressLegacyStream, &status)
                              : v11_(name, &found, version, kProcAddressLegacyStream);
    // CUDA 12 answers "success" with a null pointer for a function it does not have.
    if (result != kSuccess || found == nullptr) {
      throw DriverError("cuGetProcAddress", result,
                        std::string("the driver has no ") + name + " of CUDA " +
                            std::to_string(version / 1000) + "." +
                            std::to_string(version % 1000 / 10) + " (status " +
                            std::to_string(status) + ")" + kRemedy);
    }
    *function = reinterpret_cast<Function>(found);
  }

 private:
  GetProcAddressV12000 v12_;
  GetProcAddressV11030 v11_;
};

}  // namespace

Api load_api(const char* library) {
  void* opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) {
    const char* reason = dlerror();
    throw DriverError("dlopen", 0, std::string(reason != nullptr ? reason : library) + kRemedy);
  }
  const Resolver resolver(opened, library);
  Api api;
#define VATTN_CUDA_RESOLVE(name, version, parameters) resolver.resolve(&api.name, #name, version);
  VATTN_CUDA_FUNCTIONS(VATTN_CUDA_RESOLVE)
#undef VATTN_CUDA_RESOLVE
  return api;
}

const char* error_name(const Api& api, Result result) noexcept {
  const char* name = nullptr;
  if (api.cuGetErrorName(result, &name) != kSuccess || name == nullptr) return "unknown CUDA error";
  return name;
}

std::string error_text(const Api& api, Result result) {
  const char* text = nullptr;
  if (api.cuGetErrorString(result, &text) != kSuccess || text == nullptr) {
    return error_name(api, result);
  }
  return std::string(error_name(api, result)) + ": " + text;
}

void throw_error(const Api& api, const char* call, Result result, const std::string& remedy) {
  const std::string text = error_text(api, result) + (remedy.empty() ? "" : "; " + remedy);
  throw DriverError(call, result, text);
}

}  // namespace vattn::cuda
