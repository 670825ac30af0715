// The real library exports these functions under a name with _v2, because their ABI once changed;
// cuGetProcAddress finds them under the name without.
#pragma once

#include "driver/cuda_abi.h"

#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuCtxPushCurrent cuCtxPushCurrent_v2
#define cuCtxPopCurrent cuCtxPopCurrent_v2
#define cuMemGetInfo cuMemGetInfo_v2
#define cuEventDestroy cuEventDestroy_v2
#define cuMemcpyDtoDAsync cuMemcpyDtoDAsync_v2

// For VATTN_CUDA_FUNCTIONS, inside extern "C".
#define VATTN_DOUBLE_DECLARE(name, version, parameters) vattn::cuda::Result name parameters;
