// A driver of CUDA 11.3 to 11.8: it has the first form of cuGetProcAddress only. Built as a library
// of its own; everything behind the look-up is the double.
#include <dlfcn.h>

#include "driver/cuda_abi.h"

extern "C" vattn::cuda::Result cuGetProcAddress(const char* symbol, void** function, int version,
                                                uint64_t flags) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return vattn::cuda::kErrorNotInitialized;
  const auto look_up =
      reinterpret_cast<vattn::cuda::GetProcAddressV12000>(dlsym(library, "cuGetProcAddress_v2"));
  int status = vattn::cuda::kProcAddressSuccess;
  return look_up(symbol, function, version, flags, &status);
}
