// Compiles only where csrc/driver/cuda_abi.h agrees with NVIDIA's cuda.h and cudaTypedefs.h: every
// size, offset, constant and signature. tests/test_cuda_abi.py finds the headers and compiles it.
// Needs headers of CUDA 12.0 or newer, the first with both forms of cuGetProcAddress.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <type_traits>

#include "driver/cuda_abi.h"

namespace ours = vattn::cuda;

#define SAME_VALUE(mine, theirs) static_assert(static_cast<long>(mine) == static_cast<long>(theirs))

SAME_VALUE(ours::kSuccess, CUDA_SUCCESS);
SAME_VALUE(ours::kErrorInvalidValue, CUDA_ERROR_INVALID_VALUE);
SAME_VALUE(ours::kErrorOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(ours::kErrorNotInitialized, CUDA_ERROR_NOT_INITIALIZED);
SAME_VALUE(ours::kErrorDeinitialized, CUDA_ERROR_DEINITIALIZED);
SAME_VALUE(ours::kErrorNoDevice, CUDA_ERROR_NO_DEVICE);
SAME_VALUE(ours::kErrorInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
SAME_VALUE(ours::kErrorInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
SAME_VALUE(ours::kErrorInvalidHandle, CUDA_ERROR_INVALID_HANDLE);
SAME_VALUE(ours::kErrorNotReady, CUDA_ERROR_NOT_READY);
SAME_VALUE(ours::kErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED);
SAME_VALUE(ours::kAttributeIntegrated, CU_DEVICE_ATTRIBUTE_INTEGRATED);
SAME_VALUE(ours::kAttributeVirtualMemoryManagementSupported,
           CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
SAME_VALUE(ours::kAttributeHandleTypePosixFdSupported,
           CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
SAME_VALUE(ours::kAttributeGpuDirectRdmaWithVmmSupported,
           CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
#if CUDA_VERSION >= 12030
SAME_VALUE(ours::kAttributeHandleTypeFabricSupported,
           CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED);
SAME_VALUE(ours::kMemHandleTypeFabric, CU_MEM_HANDLE_TYPE_FABRIC);
#endif
SAME_VALUE(ours::kMemLocationTypeDevice, CU_MEM_LOCATION_TYPE_DEVICE);
SAME_VALUE(ours::kMemAllocationTypePinned, CU_MEM_ALLOCATION_TYPE_PINNED);
SAME_VALUE(ours::kMemHandleTypeNone, CU_MEM_HANDLE_TYPE_NONE);
SAME_VALUE(ours::kMemHandleTypePosixFd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
SAME_VALUE(ours::kMemAccessReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME_VALUE(ours::kMemGranularityMinimum, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
SAME_VALUE(ours::kMemGranularityRecommended, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
SAME_VALUE(ours::kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
SAME_VALUE(ours::kProcAddressLegacyStream, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
SAME_VALUE(ours::kProcAddressSuccess, CU_GET_PROC_ADDRESS_SUCCESS);

#define SAME_SIZE(mine, theirs)                  \
  static_assert(sizeof(mine) == sizeof(theirs)); \
  static_assert(alignof(mine) == alignof(theirs))
#define SAME_FIELD(mine, my_field, theirs, their_field)                     \
  static_assert(offsetof(mine, my_field) == offsetof(theirs, their_field)); \
  static_assert(sizeof(mine::my_field) == sizeof(theirs::their_field))

SAME_SIZE(ours::Result, CUresult);
SAME_SIZE(ours::Device, CUdevice);
SAME_SIZE(ours::DevicePtr, CUdeviceptr);
SAME_SIZE(ours::MemHandle, CUmemGenericAllocationHandle);
SAME_SIZE(ours::ContextPtr, CUcontext);
SAME_SIZE(ours::EventPtr, CUevent);
SAME_SIZE(ours::StreamPtr, CUstream);

SAME_SIZE(ours::MemLocation, CUmemLocation);
SAME_FIELD(ours::MemLocation, type, CUmemLocation, type);
SAME_FIELD(ours::MemLocation, id, CUmemLocation, id);

SAME_SIZE(ours::MemAllocationProp, CUmemAllocationProp);
SAME_FIELD(ours::MemAllocationProp, type, CUmemAllocationProp, type);
SAME_FIELD(ours::MemAllocationProp, requested_handle_types, CUmemAllocationProp,
           requestedHandleTypes);
SAME_FIELD(ours::MemAllocationProp, location, CUmemAllocationProp, location);
SAME_FIELD(ours::MemAllocationProp, win32_metadata, CUmemAllocationProp, win32HandleMetaData);
SAME_FIELD(ours::MemAllocationProp, flags, CUmemAllocationProp, allocFlags);
SAME_FIELD(ours::MemAllocationProp, flags.compression_type, CUmemAllocationProp,
           allocFlags.compressionType);
SAME_FIELD(ours::MemAllocationProp, flags.gpu_direct_rdma_capable, CUmemAllocationProp,
           allocFlags.gpuDirectRDMACapable);
SAME_FIELD(ours::MemAllocationProp, flags.usage, CUmemAllocationProp, allocFlags.usage);
SAME_FIELD(ours::MemAllocationProp, flags.reserved, CUmemAllocationProp, allocFlags.reserved);

SAME_SIZE(ours::MemAccessDesc, CUmemAccessDesc);
SAME_FIELD(ours::MemAccessDesc, location, CUmemAccessDesc, location);
SAME_FIELD(ours::MemAccessDesc, flags, CUmemAccessDesc, flags);

// Types have our names on our side, so two of them agree when a register cannot tell them apart:
// the same opaque object, pointers to types that agree, or numbers of the same size.
template <typename Mine, typename Theirs>
constexpr bool same_type() {
  if constexpr (std::is_same_v<Mine, ours::ContextPtr>) {
    return std::is_same_v<Theirs, CUcontext>;
  } else if constexpr (std::is_same_v<Mine, ours::EventPtr>) {
    return std::is_same_v<Theirs, CUevent>;
  } else if constexpr (std::is_same_v<Mine, ours::StreamPtr>) {
    return std::is_same_v<Theirs, CUstream>;
  } else if constexpr (std::is_void_v<Mine> || std::is_void_v<Theirs>) {
    return std::is_void_v<Mine> && std::is_void_v<Theirs>;
  } else if constexpr (std::is_pointer_v<Mine> && std::is_pointer_v<Theirs>) {
    using MyTarget = std::remove_pointer_t<Mine>;
    using TheirTarget = std::remove_pointer_t<Theirs>;
    return std::is_const_v<MyTarget> == std::is_const_v<TheirTarget> &&
           same_type<std::remove_const_t<MyTarget>, std::remove_const_t<TheirTarget>>();
  } else {
    return std::is_pointer_v<Mine> == std::is_pointer_v<Theirs> && sizeof(Mine) == sizeof(Theirs);
  }
}

template <typename Mine, typename Theirs>
struct SameSignature : std::false_type {};
template <typename MyResult, typename... Mine, typename TheirResult, typename... Theirs>
struct SameSignature<MyResult (*)(Mine...), TheirResult (*)(Theirs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Mine) != sizeof...(Theirs))
      return false;
    else
      return same_type<MyResult, TheirResult>() && (same_type<Mine, Theirs>() && ...);
  }();
};

// PFN_cuX_vN exists only where CUDA N introduced a signature of cuX, so the version is checked too.
#define SAME_FUNCTION(name, version, parameters)                                           \
  static_assert(SameSignature<ours::Result(*) parameters, PFN_##name##_v##version>::value, \
                #name " has another signature");
namespace vattn::cuda {
VATTN_CUDA_FUNCTIONS(SAME_FUNCTION)
}  // namespace vattn::cuda
static_assert(SameSignature<ours::GetProcAddressV11030, PFN_cuGetProcAddress_v11030>::value);
static_assert(SameSignature<ours::GetProcAddressV12000, PFN_cuGetProcAddress_v12000>::value);
