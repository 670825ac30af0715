"""Growing one row by 1 GiB: with super-pages, and with one extent for every 2 MiB page."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import vattn
from vattn.bench.common import (
    Distribution,
    Measurement,
    Target,
    at_least,
    expect_calls,
    progress,
)

MIB = 2**20
PAGE = 2 * MIB
TOKEN = 128 * 1024  # Llama-3-8B in bfloat16
SCATTER_ROWS = 8

# Name of a case: the largest extent, and what it is called in the table. None: the default.
CASES = {
    "super_pages": (None, "super-pages (the default)"),
    "single_pages": (PAGE, "one extent per 2 MiB page"),
}


@dataclass
class Samples:
    """Nanoseconds of growing: in all, and of the driver calls in it."""

    total: list[int] = field(default_factory=list)
    create: list[int] = field(default_factory=list)
    map: list[int] = field(default_factory=list)
    give_back: list[int] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


def _cache(device: str, size: int, rows: int, max_extent_bytes: int | None) -> vattn.KVCache:
    config = vattn.CacheConfig(
        num_layers=32,
        num_kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
        max_batch_size=rows,
        max_seq_len=size // TOKEN,
        device=device,
        layout="interleaved",
        memory=size,
        page_bytes=PAGE,
        lookahead=0,  # and so nothing populates: on the host no memory is touched
        max_extent_bytes=max_extent_bytes,
    )
    return vattn.init(config)


def _step_calls(stats: vattn.CacheStats) -> dict[str, tuple[int, int]]:
    return {name: (c.count, c.total_ns) for name, c in stats.driver_calls["step"].items()}


def _timed_growth(cache: vattn.KVCache, row: int, samples: Samples) -> None:
    """Grow a row to its longest, and note what that took."""
    before = _step_calls(cache.stats())
    lengths = {row: cache.config.max_seq_len}
    start = time.perf_counter_ns()
    cache.step(lengths)
    samples.total.append(time.perf_counter_ns() - start)
    after = _step_calls(cache.stats())
    delta = {
        name: (count - before.get(name, (0, 0))[0], ns - before.get(name, (0, 0))[1])
        for name, (count, ns) in after.items()
    }
    samples.calls = {name: count for name, (count, _) in delta.items() if count}
    samples.create.append(delta.get("create", (0, 0))[1])
    samples.map.append(delta.get("map", (0, 0))[1])
    samples.give_back.append(delta.get("unmap", (0, 0))[1])


def _fresh_memory(device: str, size: int, repetitions: int) -> dict[str, Samples]:
    """Both cases in turns; every extent is created anew."""
    caches = {name: _cache(device, size, 1, largest) for name, (largest, _) in CASES.items()}
    samples = {name: Samples() for name in CASES}
    for _ in progress(range(repetitions), "growing a row, fresh memory"):
        for name, cache in caches.items():
            row = cache.alloc()
            _timed_growth(cache, row, samples[name])
            extents = size // min(cache.pool.max_extent_bytes, size)
            expect_calls(samples[name].calls.get("create", 0), extents, f"{name}: create")
            expect_calls(cache.stats().mapped_bytes, size, f"{name}: bytes mapped")
            cache.free(row)
            cache.trim()
            while cache.stats().held_bytes:  # a GPU may still have to pass the fence
                time.sleep(0.001)
                cache.trim()
    for cache in caches.values():
        cache.close()
    return samples


def _scattered(device: str, size: int, repetitions: int) -> dict[str, Samples]:
    """The budget went to many rows, page by page in turns; one row then takes all of it over."""
    samples = {f"{name}_scattered": Samples() for name in CASES}
    for _ in progress(range(repetitions), "growing a row, scattered memory"):
        for name, (largest, _) in CASES.items():
            with _cache(device, size, SCATTER_ROWS, largest) as cache:
                rows = [cache.alloc() for _ in range(SCATTER_ROWS)]
                share = size // TOKEN // SCATTER_ROWS
                page_tokens = PAGE // TOKEN
                for tokens in range(page_tokens, share + 1, page_tokens):
                    for row in rows:
                        cache.step({row: tokens})
                for row in rows:
                    cache.free(row)
                row = cache.alloc(seq_len=cache.config.max_seq_len)
                _timed_growth(cache, row, samples[f"{name}_scattered"])
                expect_calls(cache.stats().mapped_bytes, size, f"{name}: bytes mapped")
    return samples


def _measurements(name: str, what: str, samples: Samples, limit: str | None) -> list[Measurement]:
    parts = {"": samples.total, "_create": samples.create, "_map": samples.map}
    if any(samples.give_back):
        parts["_unmap"] = samples.give_back
    inside = {"": "", "_create": ", in create", "_map": ", in map", "_unmap": ", in unmap"}
    return [
        Measurement(
            name=f"growth_{name}{part}",
            what=f"grow: {what}{inside[part]}",
            ns=Distribution.of(ns),
            calls=samples.calls if part == "" else {},
            limit=limit if part == "" else None,
        )
        for part, ns in parts.items()
        if any(ns)
    ]


def measure(device: str, quick: bool, *, has_floor: bool) -> tuple[list[Measurement], list[Target]]:
    """Grow one row by 1 GiB.

    Expected: 64 times fewer creates. On the host the neighbours in the file are mapped by one call
    either way, so the time goes to creating and to madvise for every extent.
    """
    size, repetitions = (64 * MIB, 2) if quick else (1024 * MIB, 30)
    fresh = _fresh_memory(device, size, repetitions)
    scattered = _scattered(device, size, repetitions)
    measurements: list[Measurement] = []
    for name, (_, what) in CASES.items():
        limit = "mmap_whole" if has_floor else None
        measurements += _measurements(name, f"fresh memory, {what}", fresh[name], limit)
    for name, (_, what) in CASES.items():
        limit = "mmap_scattered" if has_floor else None
        again = f"{name}_scattered"
        measurements += _measurements(
            again,
            f"memory scattered over {SCATTER_ROWS} idle rows, {what}",
            scattered[again],
            limit,
        )
    few, many = fresh["super_pages"], fresh["single_pages"]
    medians = [Distribution.of(s.total).median for s in (few, many)]
    calls = [sum(s.calls.values()) for s in (few, many)]
    suffix = "GPU" if device.startswith("cuda") else "host, without population"
    return measurements, [
        at_least("driver calls saved by super-pages", calls[1] / calls[0], 10.0, "x"),
        at_least(f"time saved by super-pages ({suffix})", medians[1] / medians[0], 5.0, "x"),
    ]
