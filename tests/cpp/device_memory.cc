#include "device_memory.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "driver/cuda_api.h"
#include "driver_contract.h"

namespace vattn::test {
namespace {

// The primary context, current on this thread while the object lives.
class PrimaryContext {
 public:
  explicit PrimaryContext(const cuda::Api& api) : api_(api) {
    cuda::ContextPtr context = nullptr;
    cuda::check(api_, "cuDevicePrimaryCtxRetain", api_.cuDevicePrimaryCtxRetain(&context, 0));
    cuda::check(api_, "cuCtxPushCurrent", api_.cuCtxPushCurrent(context));
  }
  ~PrimaryContext() {
    cuda::ContextPtr context = nullptr;
    api_.cuCtxPopCurrent(&context);
    api_.cuDevicePrimaryCtxRelease(0);
  }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

 private:
  const cuda::Api& api_;
};

template <typename Function>
Function* libcuda_symbol(const char* name) {
  void* const library = dlopen(cuda::kLibrary, RTLD_NOW | RTLD_LOCAL);
  void* const symbol = library == nullptr ? nullptr : dlsym(library, name);
  if (symbol == nullptr) throw std::runtime_error(std::string("libcuda has no ") + name);
  return reinterpret_cast<Function*>(symbol);
}

}  // namespace

Memory host_memory() {
  return {[](uintptr_t address, unsigned char* value) {
            if (!readable(address)) return false;
            *value = *reinterpret_cast<unsigned char*>(address);
            return true;
          },
          [](uintptr_t address, unsigned char value) {
            if (!writable(address)) return false;
            *reinterpret_cast<unsigned char*>(address) = value;
            return true;
          },
          /*works_in_forked_child=*/true};
}

Memory device_memory() {
  using CopyIn = cuda::Result(cuda::DevicePtr, const void*, size_t);
  using CopyOut = cuda::Result(void*, cuda::DevicePtr, size_t);
  const cuda::Api api = cuda::load_api();
  auto* const copy_in = libcuda_symbol<CopyIn>("cuMemcpyHtoD_v2");
  auto* const copy_out = libcuda_symbol<CopyOut>("cuMemcpyDtoH_v2");
  return {[api, copy_out](uintptr_t address, unsigned char* value) {
            const PrimaryContext context(api);
            return copy_out(value, address, 1) == cuda::kSuccess;
          },
          [api, copy_in](uintptr_t address, unsigned char value) {
            const PrimaryContext context(api);
            return copy_in(address, &value, 1) == cuda::kSuccess;
          },
          /*works_in_forked_child=*/false};
}

}  // namespace vattn::test
