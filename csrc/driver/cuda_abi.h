// The part of CUDA's driver ABI that vattn calls, declared here so that building needs no CUDA
// toolkit. tests/cpp/cuda_abi_check.cc compares every line with NVIDIA's own cuda.h.
//
// Enums are plain ints here: a driver newer than these declarations may return any value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vattn::cuda {

using Result = int;
using Device = int;
using DevicePtr = unsigned long long;
using MemHandle = unsigned long long;
using ContextPtr = struct ContextOpaque*;
using EventPtr = struct EventOpaque*;
using StreamPtr = struct StreamOpaque*;

constexpr Result kSuccess = 0;
constexpr Result kErrorInvalidValue = 1;
constexpr Result kErrorOutOfMemory = 2;
constexpr Result kErrorNotInitialized = 3;
constexpr Result kErrorDeinitialized = 4;
constexpr Result kErrorNoDevice = 100;
constexpr Result kErrorInvalidDevice = 101;
constexpr Result kErrorInvalidContext = 201;
constexpr Result kErrorInvalidHandle = 400;
constexpr Result kErrorNotReady = 600;
constexpr Result kErrorNotSupported = 801;

constexpr int kAttributeIntegrated = 18;
constexpr int kAttributeVirtualMemoryManagementSupported = 102;
constexpr int kAttributeHandleTypePosixFdSupported = 103;
constexpr int kAttributeGpuDirectRdmaWithVmmSupported = 110;
constexpr int kAttributeHandleTypeFabricSupported = 128;

constexpr int kMemLocationTypeDevice = 1;
constexpr int kMemAllocationTypePinned = 1;
constexpr int kMemHandleTypeNone = 0;
constexpr int kMemHandleTypePosixFd = 1;
constexpr int kMemHandleTypeFabric = 8;
constexpr int kMemAccessReadWrite = 3;
constexpr int kMemGranularityMinimum = 0;
constexpr int kMemGranularityRecommended = 1;
constexpr unsigned kEventDisableTiming = 2;
// Stream 0 is the legacy default stream, whatever the rest of the process was compiled for.
constexpr uint64_t kProcAddressLegacyStream = 1;
constexpr int kProcAddressSuccess = 0;

struct MemLocation {
  int type;
  int id;
};

struct MemAllocationProp {
  int type;
  int requested_handle_types;
  MemLocation location;
  void* win32_metadata;
  struct {
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};

struct MemAccessDesc {
  MemLocation location;
  int flags;
};

// The two ways to ask for a function: CUDA 12.0 added an argument to the one of CUDA 11.3.
using GetProcAddressV11030 = Result (*)(const char* symbol, void** function, int version,
                                        uint64_t flags);
using GetProcAddressV12000 = Result (*)(const char* symbol, void** function, int version,
                                        uint64_t flags, int* status);

}  // namespace vattn::cuda

// X(name, CUDA version in which this signature appeared, parameters). cuGetProcAddress is asked
// for that version, so a driver with a newer, different signature still hands out this one.
#define VATTN_CUDA_FUNCTIONS(X)                                                                   \
  X(cuInit, 2000, (unsigned flags))                                                               \
  X(cuDriverGetVersion, 2020, (int* version))                                                     \
  X(cuGetErrorName, 6000, (Result error, const char** name))                                      \
  X(cuGetErrorString, 6000, (Result error, const char** text))                                    \
  X(cuDeviceGetCount, 2000, (int* count))                                                         \
  X(cuDeviceGet, 2000, (Device * device, int ordinal))                                            \
  X(cuDeviceGetName, 2000, (char* name, int bytes, Device device))                                \
  X(cuDeviceGetAttribute, 2000, (int* value, int attribute, Device device))                       \
  X(cuDevicePrimaryCtxRetain, 7000, (ContextPtr * context, Device device))                        \
  X(cuDevicePrimaryCtxRelease, 11000, (Device device))                                            \
  X(cuCtxGetCurrent, 4000, (ContextPtr * context))                                                \
  X(cuCtxPushCurrent, 4000, (ContextPtr context))                                                 \
  X(cuCtxPopCurrent, 4000, (ContextPtr * context))                                                \
  X(cuCtxSynchronize, 2000, ())                                                                   \
  X(cuMemGetInfo, 3020, (size_t* free, size_t* total))                                            \
  X(cuMemGetAllocationGranularity, 10020,                                                         \
    (size_t* granularity, const MemAllocationProp* prop, int option))                             \
  X(cuMemAddressReserve, 10020,                                                                   \
    (DevicePtr * base, size_t bytes, size_t alignment, DevicePtr hint, unsigned long long flags)) \
  X(cuMemAddressFree, 10020, (DevicePtr base, size_t bytes))                                      \
  X(cuMemCreate, 10020,                                                                           \
    (MemHandle * handle, size_t bytes, const MemAllocationProp* prop, unsigned long long flags))  \
  X(cuMemRelease, 10020, (MemHandle handle))                                                      \
  X(cuMemMap, 10020,                                                                              \
    (DevicePtr base, size_t bytes, size_t offset, MemHandle handle, unsigned long long flags))    \
  X(cuMemUnmap, 10020, (DevicePtr base, size_t bytes))                                            \
  X(cuMemSetAccess, 10020,                                                                        \
    (DevicePtr base, size_t bytes, const MemAccessDesc* desc, size_t count))                      \
  X(cuMemExportToShareableHandle, 10020,                                                          \
    (void* shareable, MemHandle handle, int type, unsigned long long flags))                      \
  X(cuMemImportFromShareableHandle, 10020, (MemHandle * handle, void* os_handle, int type))       \
  X(cuMemcpyDtoDAsync, 3020, (DevicePtr to, DevicePtr from, size_t bytes, StreamPtr stream))      \
  X(cuMemsetD8Async, 3020, (DevicePtr base, unsigned char value, size_t bytes, StreamPtr stream)) \
  X(cuEventCreate, 2000, (EventPtr * event, unsigned flags))                                      \
  X(cuEventRecord, 2000, (EventPtr event, StreamPtr stream))                                      \
  X(cuEventQuery, 2000, (EventPtr event))                                                         \
  X(cuEventSynchronize, 2000, (EventPtr event))                                                   \
  X(cuEventDestroy, 4000, (EventPtr event))                                                       \
  X(cuStreamWaitEvent, 3020, (StreamPtr stream, EventPtr event, unsigned flags))
