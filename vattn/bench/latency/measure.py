"""Every call by size: one handle or many, access per run or per page, vattn's driver and raw."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import vattn
from vattn.bench import common
from vattn.bench.common import Distribution, Measurement
from vattn.bench.latency import floors
from vattn.bench.latency.calls import (
    GIB,
    KIB,
    MANY_HANDLES,
    MIB,
    ONE_HANDLE,
    POPULATED,
    Cycle,
    Manner,
    OwnCycle,
    RawCycle,
    free_bytes,
    kind_of,
    repeat,
)
from vattn.bench.latency.raw import CudaVmm, HostVmm, RawVmm

SIZES = {
    "cpu": [4 * KIB, 64 * KIB, 512 * KIB, *(n * MIB for n in (2, 8, 32, 128, 256)), GIB],
    "cuda": [*(n * MIB for n in (2, 8, 32, 128, 256)), GIB],
}
LARGEST_POPULATED = 256 * MIB
BUDGET_S = 3.0  # for the repetitions of one size in one manner


def manners(kind: str) -> list[Manner]:
    """List what is compared on a kind of device."""
    many = MANY_HANDLES[kind]
    if kind == "cpu":
        return [ONE_HANDLE, POPULATED, many]
    per_page = Manner("2 MiB handles, access per page", many.piece, access_per_run=False)
    return [ONE_HANDLE, many, per_page]


def open_raw(device: str) -> tuple[RawVmm | None, str]:
    """The calls under vattn, or a sentence why there are none to compare with."""
    if device == "cpu":
        return HostVmm(), "mmap through ctypes"
    ordinal = vattn.CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=1, max_batch_size=1, max_seq_len=1, device=device
    ).device_index
    try:
        return CudaVmm(ordinal), "cuda.bindings.driver"
    except ImportError:
        return None, "cuda-python is not installed (pip install cuda-bindings): only vattn's own"
    except RuntimeError as error:
        return None, f"cuda-python does not work here ({error}): only vattn's own"


def cases(kind: str, sizes: list[int], memory: int) -> list[tuple[int, Manner]]:
    """Pair sizes with manners, as far as physical memory of ``memory`` bytes allows."""
    found = []
    for size in sizes:
        for manner in manners(kind):
            takes_memory = kind == "cuda" or manner.populate
            too_large = manner.populate and size > LARGEST_POPULATED
            # The vattn cycle follows the raw one, which may not have been given back for good yet.
            if too_large or (takes_memory and 2 * size > memory):
                continue
            if manner.piece is None or manner.piece < size:
                found.append((size, manner))
    return found


def _limit(backend: str, manner: Manner, size: int, call: str, has_raw: bool) -> str | None:
    if backend == "vattn":
        return f"raw/{manner.name}/{size}/{call}" if has_raw else None
    return floors.fill_name(size) if call == "populate" else floors.CALL


def _measurements(
    backend: str, size: int, manner: Manner, cycle: Cycle, has_raw: bool
) -> list[Measurement]:
    return [
        Measurement(
            name=f"{backend}/{manner.name}/{size}/{call}",
            what=f"{call} of {size} bytes, {manner.name}, {backend}",
            ns=Distribution.of(ns),
            calls={call: cycle.counts[call]},
            limit=_limit(backend, manner, size, call, has_raw),
        )
        for call, ns in cycle.samples.items()
        if cycle.counts[call]
    ]


def _each_once(cycles: Iterable[Cycle]) -> None:
    for cycle in cycles:
        cycle.once()


def measure(
    device: str, raw: RawVmm | None, sizes: list[int], n: int, budget_s: float = BUDGET_S
) -> list[Measurement]:
    """Run every size in every manner ``n`` times, vattn's driver and the raw calls in turns.

    Expected: on CUDA the cost follows the number of handles, so one handle of 256 MiB is two orders
    cheaper than 128. On the host, mapping costs the same at any size until memory is touched, and
    vattn makes one mapping of handles that are neighbours in its file.
    """
    kind = kind_of(device)
    measurements: list[Measurement] = []
    chosen = cases(kind, sizes, free_bytes(device))
    for size, manner in common.progress(chosen, f"driver calls on {device}"):
        cycles: dict[str, Cycle] = {}
        if raw:
            cycles["raw"] = RawCycle(raw, size, manner)
        # vattn populates on its background thread only, and knows best how to set access.
        if manner.access_per_run and not manner.populate:
            cycles["vattn"] = OwnCycle(device, size, manner)
        repeat(partial(_each_once, cycles.values()), n, budget_s)
        for backend, cycle in cycles.items():
            measurements += _measurements(backend, size, manner, cycle, raw is not None)
            cycle.close()
    return measurements
