"""The CUDA driver's virtual memory calls through ctypes, which lets other threads run meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PINNED, DEVICE, READ_WRITE, MINIMUM = 1, 1, 3, 0  # CU_MEM_* of cuda.h


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProp(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("alloc_flags", ctypes.c_ubyte * 8),
    )


class _AccessDesc(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_U64, _SIZE = ctypes.c_uint64, ctypes.c_size_t
_PARAMETERS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuMemGetAllocationGranularity": (
        *(ctypes.POINTER(_SIZE), ctypes.POINTER(_AllocationProp), ctypes.c_int),
    ),
    "cuMemAddressReserve": (ctypes.POINTER(_U64), _SIZE, _SIZE, _U64, _U64),
    "cuMemAddressFree": (_U64, _SIZE),
    "cuMemCreate": (ctypes.POINTER(_U64), _SIZE, ctypes.POINTER(_AllocationProp), _U64),
    "cuMemRelease": (_U64,),
    "cuMemMap": (_U64, _SIZE, _SIZE, _U64, _U64),
    "cuMemSetAccess": (_U64, _SIZE, ctypes.POINTER(_AccessDesc), _SIZE),
    "cuMemUnmap": (_U64, _SIZE),
    "cuMemcpyHtoD_v2": (_U64, ctypes.c_void_p, _SIZE),
    "cuMemcpyDtoH_v2": (ctypes.c_void_p, _U64, _SIZE),
}


class Refused(RuntimeError):
    """The driver answered something else than CUDA_SUCCESS."""


class Driver:
    """One device. Its primary context, which torch and vattn use, becomes current here."""

    def __init__(self, ordinal: int = 0) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, parameters in _PARAMETERS.items():
            getattr(self._library, name).argtypes = parameters
        self.call("cuInit", 0)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.use_here()
        self._prop = _AllocationProp(type=PINNED, location=_Location(DEVICE, ordinal))
        self._access = _AccessDesc(location=_Location(DEVICE, ordinal), flags=READ_WRITE)
        page = _SIZE()
        self.call("cuMemGetAllocationGranularity", ctypes.byref(page), self._prop, MINIMUM)
        self.page_bytes = page.value

    def use_here(self) -> None:
        """Make the context current in this thread."""
        self.call("cuCtxPushCurrent_v2", self._context)

    def result(self, name: str, *arguments: Any) -> str:
        """Call a function; returns the name of its result, such as "CUDA_SUCCESS"."""
        code = getattr(self._library, name)(*arguments)
        if code == 0:
            return "CUDA_SUCCESS"
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or f"error {code}".encode()).decode()

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that must succeed."""
        result = self.result(name, *arguments)
        if result != "CUDA_SUCCESS":
            raise Refused(f"{name} answered {result}")

    def reserve(self, size: int) -> int:
        base = _U64()
        self.call("cuMemAddressReserve", ctypes.byref(base), size, self.page_bytes, 0, 0)
        return base.value

    def create(self, size: int) -> int:
        handle = _U64()
        self.call("cuMemCreate", ctypes.byref(handle), size, self._prop, 0)
        return handle.value

    def map(self, address: int, size: int, handle: int) -> None:
        """cuMemMap from the start of the handle, and cuMemSetAccess."""
        self.call("cuMemMap", address, size, 0, handle, 0)
        self.set_access(address, size)

    def set_access(self, address: int, size: int) -> None:
        self.call("cuMemSetAccess", address, size, self._access, 1)

    @contextmanager
    def mapped(self, size: int) -> Iterator[int]:
        """Memory of its own, as long as the block lasts."""
        base, handle = self.reserve(size), self.create(size)
        self.map(base, size, handle)
        yield base
        self.call("cuMemUnmap", base, size)
        self.call("cuMemRelease", handle)
        self.call("cuMemAddressFree", base, size)

    def write(self, address: int, data: bytes) -> None:
        self.call("cuMemcpyHtoD_v2", address, ctypes.c_char_p(data), len(data))

    def read(self, address: int, size: int) -> bytes:
        data = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", data, address, size)
        return data.raw
