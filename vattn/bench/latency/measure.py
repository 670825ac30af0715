"""What each driver call costs: by size, one handle or many, access set per run or per page.

Through vattn's own driver, and side by side through mmap (ctypes) or the CUDA driver (cuda-python).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

import vattn
from vattn.bench import common
from vattn.bench.common import Distribution, Measurement, expect_calls
from vattn.bench.latency.raw import CudaVmm, HostVmm, RawVmm

KIB, MIB = 1024, 2**20
CALLS = ("reserve", "create", "map", "set_access", "populate", "unmap", "release", "free")
SIZES = {
    "cpu": [64 * KIB, 512 * KIB, 2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB, 256 * MIB],
    "cuda": [2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB, 256 * MIB],
}
PIECE = {"cpu": 64 * KIB, "cuda": 2 * MIB}  # of the rows with many handles
TOKEN = 1024

# vAttention, arXiv 2405.04437v3, Table 3, column 2M: microseconds a call on an A100.
PUBLISHED_2M_US = {
    "reserve": 2,
    "create": 29,
    "map": 2,
    "set_access": 38,
    "unmap": 34,
    "release": 23,
    "free": 1,
}

Samples = dict[str, list[int]]


@dataclass(frozen=True)
class Manner:
    """How a range is backed: handles of ``piece`` bytes (None: one), access per run or piece."""

    name: str
    piece: int | None = None
    access_per_run: bool = True
    populate: bool = False


def manners(kind: str) -> list[Manner]:
    """List what is compared on a kind of device."""
    piece = PIECE[kind]
    if kind == "cpu":
        populated = Manner("one handle, populated", populate=True)
        return [Manner("one handle"), populated, Manner("64 KiB handles", piece)]
    return [
        Manner("one handle"),
        Manner("2 MiB handles, access per run", piece),
        Manner("2 MiB handles, access per page", piece, access_per_run=False),
    ]


def _timed(samples: Samples, call: str, action: Callable[[], Any]) -> Any:
    start = time.perf_counter_ns()
    result = action()
    samples[call][-1] += time.perf_counter_ns() - start
    return result


def raw_once(
    raw: RawVmm, size: int, manner: Manner, samples: Samples, counts: dict[str, int]
) -> None:
    """Reserve, back and give back a range of ``size`` bytes. Adds one sample for each call."""
    piece = manner.piece or size
    offsets = range(0, size, piece)
    for call in CALLS:
        samples[call].append(0)
        counts[call] = 0

    def timed(call: str, action: Callable[[], Any]) -> Any:
        counts[call] += 1
        return _timed(samples, call, action)

    base = timed("reserve", lambda: raw.reserve(size))
    handles = [timed("create", lambda: raw.create(piece)) for _ in offsets]
    for offset, handle in zip(offsets, handles, strict=True):
        timed("map", partial(raw.map, base + offset, piece, handle))
    runs = [(base, size)] if manner.access_per_run else [(base + o, piece) for o in offsets]
    for at, length in runs if raw.has_access else []:
        timed("set_access", partial(raw.set_access, at, length))
    if manner.populate:
        assert isinstance(raw, HostVmm)
        timed("populate", lambda: raw.populate(base, size))
    for at, length in runs:
        timed("unmap", partial(raw.unmap, at, length))
    for handle in handles:
        timed("release", partial(raw.release, handle, piece))
    timed("free", lambda: raw.free(base, size))


def _totals(pool: Any) -> dict[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for by_name in pool.driver_calls().values():
        for name, entry in by_name.items():
            count, ns = totals[name]
            totals[name] = count + entry["count"], ns + entry["total_ns"]
    return totals


class OwnDriver:
    """The same through a cache of one row: its tracing says what each call took."""

    def __init__(self, device: str, size: int, manner: Manner) -> None:
        piece = manner.piece or size
        self._pieces = size // piece
        shape: dict[str, Any] = {
            "num_layers": 1,
            "num_kv_heads": 1,
            "head_dim": TOKEN,
            "v_head_dim": 0,  # one tensor, so one region
            "dtype": "uint8",
            "max_batch_size": 1,
            "layout": "interleaved",
            "device": device,
            "lookahead": 0,
        }
        self._config = vattn.CacheConfig(**shape, max_seq_len=size // TOKEN)
        # Keeps the pool, and on CUDA the context, while caches come and go.
        self._keeper = vattn.init(
            vattn.CacheConfig(
                **shape, max_seq_len=1, memory=size, page_bytes=piece, max_extent_bytes=piece
            )
        )

    def once(self, samples: Samples, counts: dict[str, int]) -> None:
        """Back a row of ``size`` bytes and give it back."""
        pool = self._keeper.pool
        before = _totals(pool)
        cache = vattn.init(self._config, share_pool_with=self._keeper)
        row = cache.alloc()
        cache.step({row: self._config.max_seq_len})
        cache.free(row)
        cache.close()
        del cache
        after = _totals(pool)
        for call in CALLS:
            name = "unreserve" if call == "free" else call
            counts[call] = after[name][0] - before[name][0]
            samples[call].append(after[name][1] - before[name][1])
        for call in ("reserve", "map", "free"):
            expect_calls(counts[call], 1, f"vattn: {call}")
        for call in ("create", "release"):
            expect_calls(counts[call], self._pieces, f"vattn: {call}")

    def close(self) -> None:
        self._keeper.close()


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


def _measurements(
    backend: str, size: int, manner: Manner, samples: Samples, counts: dict[str, int]
) -> list[Measurement]:
    return [
        Measurement(
            name=f"{backend}/{manner.name}/{size}/{call}",
            what=f"{call} of {size} bytes, {manner.name}, {backend}",
            ns=Distribution.of(ns),
            calls={call: counts[call]},
            limit=None if backend == "raw" else f"raw/{manner.name}/{size}/{call}",
        )
        for call, ns in samples.items()
        if counts[call]
    ]


def measure(device: str, raw: RawVmm | None, sizes: list[int], n: int) -> list[Measurement]:
    """Run every size in every manner ``n`` times, vattn's driver and the raw calls in turns.

    Expected: on CUDA the cost follows the number of handles, so one handle of 256 MiB is two orders
    cheaper than 128. On the host, mapping costs the same at any size until memory is touched.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    cases = [(size, manner) for size in sizes for manner in manners(kind)]
    measurements: list[Measurement] = []
    for size, manner in common.progress(cases, f"driver calls on {device}"):
        if manner.piece and manner.piece >= size:
            continue
        # vattn populates on its background thread only, and knows best how to set access.
        ours = (
            None
            if manner.populate or not manner.access_per_run
            else OwnDriver(device, size, manner)
        )
        samples: dict[str, Samples] = {"raw": defaultdict(list), "vattn": defaultdict(list)}
        counts: dict[str, dict[str, int]] = {"raw": {}, "vattn": {}}
        for _ in range(n):
            if raw:
                raw_once(raw, size, manner, samples["raw"], counts["raw"])
            if ours:
                ours.once(samples["vattn"], counts["vattn"])
        if ours:
            ours.close()
        for backend in ("raw", "vattn"):
            measurements += _measurements(backend, size, manner, samples[backend], counts[backend])
    return measurements


def print_table(title: str, measurements: list[Measurement], published: bool) -> None:
    """Print medians, one line for each size, manner and backend."""
    lines: dict[tuple[str, str, int], dict[str, Measurement]] = defaultdict(dict)
    for m in measurements:
        backend, manner, size_text, call = m.name.split("/")
        lines[backend, manner, int(size_text)][call] = m
    table = Table(title=title, title_justify="left")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("manner")
    table.add_column("by", no_wrap=True)
    for call in CALLS:
        table.add_column(call, justify="right", no_wrap=True)
    for (backend, manner, size), by_call in sorted(lines.items(), key=lambda item: item[0][2]):
        cells = [
            common.duration(by_call[call].ns.median) if call in by_call else "" for call in CALLS
        ]
        name = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
        table.add_row(name, manner, backend, *cells)
    if published:
        cells = [f"{PUBLISHED_2M_US[c]} us" if c in PUBLISHED_2M_US else "" for c in CALLS]
        table.add_row("2 MiB", "vAttention, Table 3 (A100)", "paper", *cells)
    common.console.print(table)
