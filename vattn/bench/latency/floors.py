"""What physics, or at least the system, allows: the least that a call or a write can cost."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence

import numpy as np

from vattn.bench.common import Distribution, Measurement, time_calls
from vattn.bench.latency.calls import MIB
from vattn.bench.latency.raw import RawVmm
from vattn.units import format_bytes

CALL = "floor/call"  # the measurement that every driver call is held against
FAULTS = 2048  # pages of one sample
PROBE_BYTES = 8 * MIB


def _measurement(name: str, what: str, samples: Sequence[float], **calls: int) -> Measurement:
    return Measurement(name=name, what=what, ns=Distribution.of(samples), calls=calls)


def fill_name(size: int) -> str:
    """Name the measurement of writing ``size`` bytes at the speed of memory."""
    return f"floor/fill/{size}"


def _fault_in() -> float:
    """Write once to each page of memory that no page is under yet."""
    memory = mmap.mmap(-1, FAULTS * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages does not know the advice
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
    (ns,) = time_calls(pages.fill, [1], 1)
    return ns / FAULTS


def _fills(sizes: Sequence[int], n: int) -> list[Measurement]:
    memory = np.ones(max(sizes), np.uint8)  # resident from here on
    found = []
    for size in sizes:
        part = memory[:size]
        part.fill(0)
        repetitions = max(3, min(n, 4 * 2**30 // size))
        samples = time_calls(part.fill, [1], repetitions)
        found.append(
            _measurement(fill_name(size), f"write {format_bytes(size)} of memory", samples)
        )
    return found


def _host_floors(sizes: Sequence[int], n: int) -> list[Measurement]:
    absolute = ctypes.CDLL(None).abs
    return [
        _measurement("floor/foreign_call", "abs through ctypes", time_calls(absolute, [1], 10 * n)),
        _measurement(
            "floor/page_fault",
            "first write to a page of 4 KiB, mean of 2,048 in a sample",
            [_fault_in() for _ in range(max(3, n // 5))],
        ),
        *_fills(sizes, n),
    ]


def _cuda_fills(raw: RawVmm, sizes: Sequence[int], n: int) -> list[Measurement]:
    largest = max(sizes)
    base, handle = raw.reserve(largest), raw.create(largest)
    raw.map(base, largest, handle)
    raw.set_access(base, largest)
    found = []
    for size in sizes:
        raw.touch(base, size)
        samples = time_calls(lambda size: raw.touch(base, size), [size], n)
        what = f"cuMemsetD8 and synchronize, {format_bytes(size)}"
        found.append(_measurement(fill_name(size), what, samples))
    raw.unmap(base, largest)
    raw.release(handle, largest)
    raw.free(base, largest)
    return found


def measure(kind: str, raw: RawVmm | None, sizes: Sequence[int], n: int) -> list[Measurement]:
    """Measure the floors that the other measurements name as their limit.

    Expected: a call of the driver costs as much as a system call where it enters the kernel, as
    mapping does, and a fraction where it does not.
    """
    found = _host_floors(sizes, n) if kind == "cpu" else []
    if raw is None:
        return found
    what = "getpid through ctypes" if kind == "cpu" else "cuDriverGetVersion through cuda.bindings"
    found.insert(0, _measurement(CALL, what, time_calls(lambda _: raw.floor(), [None], 10 * n)))
    if kind == "cuda":
        found += _cuda_fills(raw, sizes, n)
    return found


def bandwidth_gb_s(floors: Sequence[Measurement]) -> dict[str, float]:
    """Bytes a nanosecond for each size that was written."""
    return {
        m.name.rpartition("/")[2]: int(m.name.rpartition("/")[2]) / m.ns.median
        for m in floors
        if m.name.startswith("floor/fill/")
    }
