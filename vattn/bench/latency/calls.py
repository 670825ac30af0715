"""One cycle of driver calls, reserve to free: made directly, or by a cache of one row."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import vattn
from vattn.bench.common import expect_calls
from vattn.bench.latency.raw import RawVmm

KIB, MIB, GIB = 2**10, 2**20, 2**30
CALLS = ("reserve", "create", "map", "set_access", "populate", "unmap", "release", "free")
TOKEN = 1024
FEWEST = 3  # repetitions, however long they take

Samples = dict[str, list[int]]


@dataclass(frozen=True)
class Manner:
    """How a range is backed: handles of ``piece`` bytes (None: one), access per run or piece."""

    name: str
    piece: int | None = None
    access_per_run: bool = True
    populate: bool = False


ONE_HANDLE = Manner("one handle")
POPULATED = Manner("one handle, populated", populate=True)
MANY_HANDLES = {
    "cpu": Manner("64 KiB handles", 64 * KIB),
    "cuda": Manner("2 MiB handles, access per run", 2 * MIB),
}


def kind_of(device: str) -> str:
    """Either "cpu" or "cuda"."""
    return "cpu" if device == "cpu" else "cuda"


def repeat(action: Callable[[], object], n: int, budget_s: float) -> int:
    """Do something ``n`` times, or until ``budget_s`` is spent, but a few times at least."""
    end = time.perf_counter() + budget_s
    for done in range(n):
        if done >= FEWEST and time.perf_counter() > end:
            return done
        action()
    return n


def free_bytes(device: str) -> int:
    """Bytes of physical memory that could be taken now."""
    if kind_of(device) == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        return min(available * KIB, int(limit.read_text()) - int(used.read_text()))
    return available * KIB


class RawCycle:
    """The calls of one range, made directly. One sample of each call for each cycle."""

    def __init__(self, raw: RawVmm, size: int, manner: Manner) -> None:
        self.samples: Samples = defaultdict(list)
        self.counts: dict[str, int] = {}
        self._raw, self._size, self._manner = raw, size, manner

    def _timed(self, call: str, action: Callable[[], Any]) -> Any:
        self.counts[call] += 1
        start = time.perf_counter_ns()
        result = action()
        self.samples[call][-1] += time.perf_counter_ns() - start
        return result

    def once(self) -> None:
        """Reserve a range, back it and give it back. Equal calls are summed up in one sample."""
        raw, size, timed = self._raw, self._size, self._timed
        piece = self._manner.piece or size
        offsets = range(0, size, piece)
        for call in CALLS:
            self.samples[call].append(0)
            self.counts[call] = 0
        base = timed("reserve", lambda: raw.reserve(size))
        handles = [timed("create", lambda: raw.create(piece)) for _ in offsets]
        for offset, handle in zip(offsets, handles, strict=True):
            timed("map", partial(raw.map, base + offset, piece, handle))
        whole = self._manner.access_per_run
        runs = [(base, size)] if whole else [(base + offset, piece) for offset in offsets]
        for at, length in runs if raw.has_access else []:
            timed("set_access", partial(raw.set_access, at, length))
        if self._manner.populate:
            timed("populate", lambda: raw.populate(base, size))
        for at, length in runs:
            timed("unmap", partial(raw.unmap, at, length))
        for handle in handles:
            timed("release", partial(raw.release, handle, piece))
        timed("free", lambda: raw.free(base, size))

    def close(self) -> None:
        """Nothing outlives a cycle."""


def driver_totals(pool: Any) -> dict[str, tuple[int, int]]:
    """Count and nanoseconds of each driver call of a pool so far, whoever made it."""
    totals: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for by_name in pool.driver_calls().values():
        for name, entry in by_name.items():
            count, ns = totals[name]
            totals[name] = count + entry["count"], ns + entry["total_ns"]
    return totals


class OwnCycle:
    """The same by a cache of one row: the tracing of its driver says what each call took."""

    def __init__(self, device: str, size: int, manner: Manner) -> None:
        self.samples: Samples = defaultdict(list)
        self.counts: dict[str, int] = {}
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

    def once(self) -> None:
        """Back a row and give it back."""
        pool = self._keeper.pool
        before = driver_totals(pool)
        cache = vattn.init(self._config, share_pool_with=self._keeper)
        row = cache.alloc()
        cache.step({row: self._config.max_seq_len})
        cache.free(row)
        cache.close()
        del cache
        after = driver_totals(pool)
        for call in CALLS:
            name = "unreserve" if call == "free" else call
            self.counts[call] = after[name][0] - before[name][0]
            self.samples[call].append(after[name][1] - before[name][1])
        for call in ("reserve", "map", "free"):
            expect_calls(self.counts[call], 1, f"vattn: {call}")
        for call in ("create", "release"):
            expect_calls(self.counts[call], self._pieces, f"vattn: {call}")

    def close(self) -> None:
        """Give the pool up."""
        self._keeper.close()


Cycle = RawCycle | OwnCycle
