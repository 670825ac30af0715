"""The calls under vattn, made directly: mmap through ctypes, CUDA through cuda.bindings."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, Protocol

import numpy as np

_FIXED, _NORESERVE = 0x10, 0x4000  # MAP_* that Python's mmap module does not name
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # FALLOC_FL_*
_POPULATE_WRITE = 23  # MADV_*


class RawVmm(Protocol):
    """One method for one call of the driver; sizes are multiples of ``page_bytes``."""

    page_bytes: int
    has_access: bool  # whether set_access is a call of its own

    def reserve(self, size: int) -> int: ...
    def create(self, size: int) -> Any: ...
    def map(self, address: int, size: int, handle: Any) -> None: ...
    def set_access(self, address: int, size: int) -> None: ...
    def unmap(self, address: int, size: int) -> None: ...
    def release(self, handle: Any, size: int) -> None: ...
    def free(self, address: int, size: int) -> None: ...

    # What is no call of the same kind, but is needed to measure those.

    def attach(self) -> None:
        """Let the calling thread make the others."""

    def floor(self) -> None:
        """Make a call of the driver, or the system, that does next to nothing."""

    def populate(self, address: int, size: int) -> None:
        """Fault in what is mapped; CUDA has no such call, its handles have all their memory."""

    def touch(self, address: int, size: int) -> None:
        """Write to every page, and wait until it is done."""


class HostVmm:
    """memfd and mmap. A handle is an offset in the file: creating one is no system call."""

    page_bytes = 64 * 1024
    has_access = False
    file_name = "raw_vmm"  # what its mappings are called in /proc/self/maps

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        size_t, off_t = ctypes.c_size_t, ctypes.c_int64
        number = ctypes.c_int
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [ctypes.c_void_p, size_t, number, number, number, off_t]
        self._munmap = libc.munmap
        self._munmap.argtypes = [ctypes.c_void_p, size_t]
        self._madvise = libc.madvise
        self._madvise.argtypes = [ctypes.c_void_p, size_t, number]
        self._fallocate = libc.fallocate
        self._fallocate.argtypes = [number, number, off_t, off_t]
        self._getpid = libc.getpid
        self._file = os.memfd_create(self.file_name)
        os.ftruncate(self._file, 2**50)
        self._next_offset = 0

    def __del__(self) -> None:
        os.close(self._file)

    def _map(self, address: int | None, size: int, protection: int, flags: int, *file: int) -> int:
        got = self._mmap(address, size, protection, flags, *(file or (-1, 0)))
        if got == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"mmap of {size} bytes")
        return int(got)

    @staticmethod
    def _check(status: int, call: str) -> None:
        if status != 0:
            raise OSError(ctypes.get_errno(), call)

    def reserve(self, size: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        return self._map(None, size, mmap.PROT_READ, flags)

    def create(self, size: int) -> int:
        # A gap behind each: the kernel would make one mapping of neighbours.
        self._next_offset += size + self.page_bytes
        return self._next_offset - size

    def map(self, address: int, size: int, handle: int) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self._map(address, size, protection, mmap.MAP_SHARED | _FIXED, self._file, handle)

    def set_access(self, address: int, size: int) -> None:
        raise NotImplementedError("mmap sets the access")

    def populate(self, address: int, size: int) -> None:
        """Fault all pages in: what cuMemCreate does, as it hands out physical memory."""
        self._check(self._madvise(address, size, _POPULATE_WRITE), "madvise(MADV_POPULATE_WRITE)")

    def unmap(self, address: int, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
        self._map(address, size, mmap.PROT_READ, flags)

    def release(self, handle: int, size: int) -> None:
        status = self._fallocate(self._file, _KEEP_SIZE | _PUNCH_HOLE, handle, size)
        self._check(status, "fallocate(FALLOC_FL_PUNCH_HOLE)")

    def free(self, address: int, size: int) -> None:
        self._check(self._munmap(address, size), "munmap")

    def attach(self) -> None:
        """Any thread may."""

    def floor(self) -> None:
        self._getpid()

    def touch(self, address: int, size: int) -> None:
        memory = (ctypes.c_uint8 * size).from_address(address)
        np.ctypeslib.as_array(memory)[:: mmap.PAGESIZE] = 1


class CudaVmm:
    """``cuda.bindings.driver``. Raises ImportError where cuda-python is not installed."""

    has_access = True

    def __init__(self, ordinal: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._call(driver.cuInit(0))
        self._device = self._call(driver.cuDeviceGet(ordinal))
        # The context that torch and vattn use.
        self._context = self._call(driver.cuDevicePrimaryCtxRetain(self._device))
        self.attach()
        kind = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._prop = driver.CUmemAllocationProp()
        self._prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._prop.location.type = kind
        self._prop.location.id = ordinal
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = kind
        self._access.location.id = ordinal
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.page_bytes = int(self._call(driver.cuMemGetAllocationGranularity(self._prop, minimum)))

    def _call(self, result: tuple[Any, ...]) -> Any:
        if result[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver answered {result[0]}")
        return result[1] if len(result) > 1 else None

    def reserve(self, size: int) -> int:
        return int(self._call(self._driver.cuMemAddressReserve(size, self.page_bytes, 0, 0)))

    def create(self, size: int) -> Any:
        return self._call(self._driver.cuMemCreate(size, self._prop, 0))

    def map(self, address: int, size: int, handle: Any) -> None:
        self._call(self._driver.cuMemMap(address, size, 0, handle, 0))

    def set_access(self, address: int, size: int) -> None:
        self._call(self._driver.cuMemSetAccess(address, size, [self._access], 1))

    def unmap(self, address: int, size: int) -> None:
        self._call(self._driver.cuMemUnmap(address, size))

    def release(self, handle: Any, size: int) -> None:
        self._call(self._driver.cuMemRelease(handle))

    def free(self, address: int, size: int) -> None:
        self._call(self._driver.cuMemAddressFree(address, size))

    def attach(self) -> None:
        self._call(self._driver.cuCtxSetCurrent(self._context))

    def floor(self) -> None:
        self._call(self._driver.cuDriverGetVersion())

    def populate(self, address: int, size: int) -> None:
        raise NotImplementedError("cuMemCreate hands out physical memory")

    def touch(self, address: int, size: int) -> None:
        self._call(self._driver.cuMemsetD8(address, 1, size))
        self._call(self._driver.cuCtxSynchronize())
