"""vAttention's own loop: 6,400 mappings of 2 MiB, beside what its authors published."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import vattn
from vattn.bench import common
from vattn.bench.common import Distribution, Measurement, expect_calls
from vattn.bench.latency import floors
from vattn.bench.latency.calls import GIB, MIB, Samples, driver_totals, kind_of
from vattn.bench.latency.published import CALL_NS, MAP_NS, PAGE_BYTES
from vattn.bench.latency.raw import HostVmm, RawVmm

REQUESTS = 100
LAYERS = 32
REGIONS = 2 * LAYERS  # of a request: K and V of each layer
TOKENS = 1024  # of 8 heads of 128 bfloat16: 2 MiB a region
ROUNDS = 3
SPARE_BYTES = 2 * GIB  # left alone
SHOWN = ("reserve", "create", "map", "set_access", "map+set_access", "unmap", "release", "free")
MANNERS = {  # of vattn's cache: layout, largest extent
    "per_layer": ("per_layer", PAGE_BYTES),
    "interleaved": ("interleaved", 128 * MIB),
}


def requests_that_fit(memory: int) -> int:
    """How many of the 100 requests have memory: each needs 64 pages of 2 MiB."""
    return max(0, min(REQUESTS, (memory - SPARE_BYTES) // (REGIONS * PAGE_BYTES)))


def _own_mappings() -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(f"memfd:{HostVmm.file_name}" in line for line in maps)


def raw_loop(raw: RawVmm, mappings: int, samples: Samples) -> None:
    """Give each page a reservation of its own, as vAttention's cu_measure does, and take it back.

    Memory is not written to. Adds ``mappings`` samples of each call.
    """
    clock = time.perf_counter_ns

    def timed(call: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = clock()
        result = function(*arguments)
        samples[call].append(clock() - start)
        return result

    bases = [timed("reserve", raw.reserve, PAGE_BYTES) for _ in range(mappings)]
    handles = [timed("create", raw.create, PAGE_BYTES) for _ in range(mappings)]
    before = _own_mappings()
    for base, handle in zip(bases, handles, strict=True):
        timed("map", raw.map, base, PAGE_BYTES, handle)
        if raw.has_access:
            timed("set_access", raw.set_access, base, PAGE_BYTES)
    if isinstance(raw, HostVmm):
        # Neighbours in the file would be one mapping, which no separate handles are.
        expect_calls(_own_mappings() - before, mappings, "separate mappings")
    for base in bases:
        timed("unmap", raw.unmap, base, PAGE_BYTES)
    for handle in handles:
        timed("release", raw.release, handle, PAGE_BYTES)
    for base in bases:
        timed("free", raw.free, base, PAGE_BYTES)
    if raw.has_access:
        pairs = zip(samples["map"][-mappings:], samples["set_access"][-mappings:], strict=True)
        samples["map+set_access"] += [a + b for a, b in pairs]
    else:
        samples["map+set_access"] += samples["map"][-mappings:]


def _raw_measurements(raw: RawVmm, requests: int, rounds: int) -> list[Measurement]:
    mappings = requests * REGIONS
    samples: Samples = defaultdict(list)
    for _ in common.progress(range(rounds), f"{mappings:,} mappings of 2 MiB, directly"):
        raw_loop(raw, mappings, samples)
    found = []
    for call in SHOWN:
        if call not in samples:
            continue
        ns = samples[call]
        expect_calls(len(ns), mappings * rounds, f"raw loop: {call}")
        totals = [sum(ns[i : i + mappings]) for i in range(0, len(ns), mappings)]
        for name, values, calls in (("call", ns, 1), ("total", totals, mappings)):
            found.append(
                Measurement(
                    name=f"vattention/raw/{call}/{name}",
                    what=f"{call}, {'each' if calls == 1 else f'all {calls:,}'}",
                    ns=Distribution.of(values),
                    calls={call: calls},
                    limit=floors.CALL if calls == 1 else None,
                )
            )
    return found


def _cache(device: str, requests: int, layout: str, max_extent_bytes: int) -> vattn.KVCache:
    return vattn.init(
        vattn.CacheConfig(
            num_layers=LAYERS,
            num_kv_heads=8,
            head_dim=128,
            dtype="bfloat16",
            max_batch_size=requests,
            max_seq_len=TOKENS,
            device=device,
            memory=requests * REGIONS * PAGE_BYTES,
            layout=layout,
            page_bytes=PAGE_BYTES,
            max_extent_bytes=max_extent_bytes,
            lookahead=0,
        )
    )


def own_loop(device: str, requests: int, manner: str, samples: Samples) -> dict[str, int]:
    """Let one request after the other come to a cache. Adds one sample a request; counts calls."""
    layout, max_extent_bytes = MANNERS[manner]
    cache = _cache(device, requests, layout, max_extent_bytes)
    start = driver_totals(cache.pool)
    for _ in range(requests):
        before = driver_totals(cache.pool)
        begin = time.perf_counter_ns()
        cache.step({cache.alloc(): TOKENS})
        samples["step"].append(time.perf_counter_ns() - begin)
        after = driver_totals(cache.pool)
        for call in ("create", "map"):
            samples[call].append(after[call][1] - before[call][1])
    counts = {call: after[call][0] - start[call][0] for call in ("create", "map")}
    expected = requests * REGIONS * PAGE_BYTES
    expect_calls(cache.stats().mapped_bytes, expected, f"vattn {manner}: bytes mapped")
    cache.close()
    extents = expected // max_extent_bytes
    expect_calls(counts["create"], extents, f"vattn {manner}: create")
    return counts


def _own_measurements(device: str, requests: int, rounds: int) -> list[Measurement]:
    found = []
    for manner in common.progress(list(MANNERS), f"{requests} requests through vattn's cache"):
        samples: Samples = defaultdict(list)
        for _ in range(rounds):
            counts = own_loop(device, requests, manner, samples) | {"step": requests}
        for call, ns in samples.items():
            shown = "map+set_access" if call == "map" else call
            totals = [sum(ns[i : i + requests]) for i in range(0, len(ns), requests)]
            means = [n * requests / counts[call] for n in ns]
            for name, values, calls in (("call", means, 1), ("total", totals, counts[call])):
                mean = ", mean of a step" if name == "call" and counts[call] > requests else ""
                found.append(
                    Measurement(
                        name=f"vattention/vattn {manner}/{shown}/{name}",
                        what=f"{shown}, {'each' + mean if name == 'call' else f'all {calls:,}'}",
                        ns=Distribution.of(values),
                        calls={shown: calls},
                    )
                )
    return found


def measure(
    device: str, raw: RawVmm | None, *, requests: int, rounds: int = ROUNDS
) -> list[Measurement]:
    """Map 2 MiB for K and V of 32 layers of each request: directly, and through vattn's cache.

    Expected: the calls cost what Table 3 says, or what a newer driver makes of it; vattn's cache
    with one region per layer makes as many of them, less the reservations; interleaved, it maps a
    request's 64 pages as one handle of 128 MiB.
    """
    found = [] if raw is None else _raw_measurements(raw, requests, rounds)
    return found + _own_measurements(device, requests, rounds)


def print_table(
    requests: int, device: str, raw_name: str, measurements: Sequence[Measurement]
) -> None:
    """Print the loop: the published line first, then what was measured here, call by call."""
    mappings = requests * REGIONS
    size = f"{mappings * PAGE_BYTES / GIB:g} GiB"
    table = Table(
        title=f"vAttention's loop: {mappings:,} mappings of 2 MiB, {size}", title_justify="left"
    )
    for heading in ("call", "by"):
        table.add_column(heading, no_wrap=heading == "call")
    for heading in ("calls", "total", "n", "min", "median", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_name = {m.name: m for m in measurements}
    backends = dict.fromkeys(m.name.split("/")[1] for m in measurements)
    for call in (*SHOWN, "step"):
        published = MAP_NS if call == "map+set_access" else CALL_NS.get(call)
        if published:
            total = common.duration(published * mappings)
            by = "vAttention, Table 3 (A100); total derived"
            each = common.duration(published)
            table.add_row(call, by, f"{mappings:,}", total, "", "", each, "")
        for backend in backends:
            each_m = by_name.get(f"vattention/{backend}/{call}/call")
            total_m = by_name.get(f"vattention/{backend}/{call}/total")
            if each_m is None or total_m is None:
                continue
            (calls,) = total_m.calls.values()
            ns = each_m.ns
            table.add_row(
                call,
                raw_name if backend == "raw" else backend,
                f"{calls:,}",
                common.duration(total_m.ns.median),
                f"{ns.n:,}",
                *map(common.duration, (ns.min, ns.median, ns.p99)),
            )
    notes = []
    if requests < REQUESTS:
        notes.append(f"Scaled down to {requests} of {REQUESTS} requests (6,400 mappings).")
    if kind_of(device) == "cpu":
        notes.append("On the host no memory is written to: a handle is a place in a file.")
    table.caption, table.caption_justify = " ".join(notes), "left"
    common.console.print(table)
