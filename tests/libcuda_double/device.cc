// Start-up, devices, contexts, and the look-up of functions.
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "exported.h"
#include "state.h"

using namespace vattn::cuda;
using cuda_double::Call;
using cuda_double::context_of;
using cuda_double::context_stack;
using cuda_double::Needs;

namespace {

constexpr int kDriverVersion = 13000;

struct ErrorText {
  Result code;
  const char* name;
  const char* text;
};
constexpr ErrorText kErrors[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kErrorInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kErrorOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kErrorNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kErrorDeinitialized, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {kErrorNoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kErrorInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kErrorInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kErrorInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kErrorNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {kErrorNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

const ErrorText* find_error(Result code) {
  for (const ErrorText& error : kErrors) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

}  // namespace

extern "C" {

Result cuInit(unsigned flags) {
  Call call(Needs::kNothing, "cuInit", "flags=%u", flags);
  if (call.refused() != kSuccess) return call.refused();
  if (flags != 0) return call.breach(kErrorInvalidValue, "flags must be 0");
  if (call.state().options.device_count == 0) return kErrorNoDevice;
  if (call.state().pid == 0) call.state().pid = getpid();
  return call.state().pid == getpid() ? kSuccess : kErrorNotInitialized;
}

Result cuDriverGetVersion(int* version) {
  Call call(Needs::kNothing, "cuDriverGetVersion", " ");
  *version = kDriverVersion;
  return call.refused();
}

Result cuGetErrorName(Result error, const char** name) {
  const ErrorText* found = find_error(error);
  *name = found != nullptr ? found->name : nullptr;
  return found != nullptr ? kSuccess : kErrorInvalidValue;
}

Result cuGetErrorString(Result error, const char** text) {
  const ErrorText* found = find_error(error);
  *text = found != nullptr ? found->text : nullptr;
  return found != nullptr ? kSuccess : kErrorInvalidValue;
}

Result cuDeviceGetCount(int* count) {
  Call call(Needs::kInit, "cuDeviceGetCount", " ");
  *count = call.state().options.device_count;
  return call.refused();
}

Result cuDeviceGet(Device* device, int ordinal) {
  Call call(Needs::kInit, "cuDeviceGet", "ordinal=%d", ordinal);
  if (call.refused() != kSuccess) return call.refused();
  if (!call.state().is_device(ordinal)) {
    return call.breach(kErrorInvalidDevice, "the ordinal is not below the device count");
  }
  *device = ordinal;
  return kSuccess;
}

Result cuDeviceGetName(char* name, int bytes, Device device) {
  Call call(Needs::kInit, "cuDeviceGetName", "device=%d", device);
  if (call.refused() != kSuccess) return call.refused();
  if (!call.state().is_device(device)) return call.breach(kErrorInvalidDevice, "no such device");
  std::snprintf(name, static_cast<size_t>(bytes), "test double (memfd)");
  return kSuccess;
}

Result cuDeviceGetAttribute(int* value, int attribute, Device device) {
  Call call(Needs::kInit, "cuDeviceGetAttribute", "attribute=%d device=%d", attribute, device);
  if (call.refused() != kSuccess) return call.refused();
  if (!call.state().is_device(device)) return call.breach(kErrorInvalidDevice, "no such device");
  const auto found = call.state().options.attributes.find(attribute);
  if (found == call.state().options.attributes.end()) {
    return call.breach(kErrorInvalidValue, "the double does not know this attribute");
  }
  *value = found->second;
  return kSuccess;
}

Result cuDevicePrimaryCtxRetain(ContextPtr* context, Device device) {
  Call call(Needs::kInit, "cuDevicePrimaryCtxRetain", "device=%d", device);
  if (call.refused() != kSuccess) return call.refused();
  if (!call.state().is_device(device)) return call.breach(kErrorInvalidDevice, "no such device");
  ++call.state().context_references[device];
  *context = context_of(device);
  return kSuccess;
}

Result cuDevicePrimaryCtxRelease(Device device) {
  Call call(Needs::kInit, "cuDevicePrimaryCtxRelease", "device=%d", device);
  if (call.refused() != kSuccess) return call.refused();
  auto& state = call.state();
  if (!state.is_device(device)) return call.breach(kErrorInvalidDevice, "no such device");
  if (state.context_references[device] == 0) {
    return call.breach(kErrorInvalidContext, "the primary context is not retained");
  }
  --state.context_references[device];
  if (state.context_references[device] == 0 && !state.events.empty()) {
    call.breach(kSuccess, "the last reference went while events live; they die with it");
  }
  return kSuccess;
}

Result cuCtxGetCurrent(ContextPtr* context) {
  Call call(Needs::kInit, "cuCtxGetCurrent", " ");
  if (call.refused() != kSuccess) return call.refused();
  *context = context_stack().empty() ? nullptr : context_stack().back();
  return kSuccess;
}

Result cuCtxPushCurrent(ContextPtr context) {
  Call call(Needs::kInit, "cuCtxPushCurrent", "context=%p", static_cast<void*>(context));
  if (call.refused() != kSuccess) return call.refused();
  context_stack().push_back(context);
  return kSuccess;
}

Result cuCtxPopCurrent(ContextPtr* context) {
  Call call(Needs::kInit, "cuCtxPopCurrent", " ");
  if (call.refused() != kSuccess) return call.refused();
  if (context_stack().empty()) {
    return call.breach(kErrorInvalidContext, "no context is on the stack of the calling thread");
  }
  *context = context_stack().back();
  context_stack().pop_back();
  return kSuccess;
}

VATTN_CUDA_FUNCTIONS(VATTN_DOUBLE_DECLARE)

Result cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags,
                           int* status) {
  Call call(Needs::kNothing, "cuGetProcAddress", "symbol=%s version=%d flags=%llu", symbol, version,
            static_cast<unsigned long long>(flags));
  *function = nullptr;
  *status = 1;  // CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND
  if (call.refused() != kSuccess) return call.refused();
  if (version > kDriverVersion) return kErrorInvalidValue;
  if (flags != 1) {  // CU_GET_PROC_ADDRESS_LEGACY_STREAM, not by the name that the caller used
    call.breach(kSuccess, "the search mode is left to the build, stream 0 could mean two things");
  }
  if (call.state().options.hidden_symbols.count(symbol) != 0) return kSuccess;
#define VATTN_DOUBLE_FIND(name, since, parameters)                                    \
  if (std::strcmp(symbol, #name) == 0) {                                              \
    if (version != since) call.breach(kSuccess, "not the version of the ABI in use"); \
    *function = reinterpret_cast<void*>(&name);                                       \
    *status = kProcAddressSuccess;                                                    \
  }
  VATTN_CUDA_FUNCTIONS(VATTN_DOUBLE_FIND)
#undef VATTN_DOUBLE_FIND
  return kSuccess;
}

}  // extern "C"
