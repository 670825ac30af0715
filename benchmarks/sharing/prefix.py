"""Part ``prefix``: a trace through vattn's prefix cache, beside an ideal cache of whole blocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

import vattn
from benchmarks.hf_generate.results import Part
from benchmarks.sharing.calls import CallWatch
from benchmarks.sharing.ideal import IdealBlockCache
from benchmarks.sharing.replay import Played, PrefixSide, Schedule
from benchmarks.sharing.requests import BLOCK_TOKENS, Request, longest
from vattn.bench.common import Distribution, Measurement, NothingMeasured, at_least, at_most
from vattn.pool import open_pool
from vattn.units import parse_bytes

GOAL = 0.98
TOKEN_BYTES = 128 * 1024  # Llama-3-8B in bfloat16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How the replay is done. ``block_tokens`` is of vattn's cache; None: its default."""

    budgets: tuple[str, ...] = ("64GiB", "256GiB", "1TiB")
    at_a_time: int = 16
    rows: int = 1024
    max_extent: str = "64MiB"  # 512 tokens
    lookahead: int = 0
    block_tokens: int | None = None


class VattnSide:
    """The real cache and its driver calls, on memory that nobody touches."""

    name = "vattn"

    def __init__(self, budget: str, longest_tokens: int, sizes: Sizes) -> None:
        config = vattn.CacheConfig(
            num_layers=32,
            num_kv_heads=8,
            head_dim=128,
            dtype="bfloat16",
            max_batch_size=sizes.rows,
            max_seq_len=-(-longest_tokens // 1024) * 1024,
            device="cpu",
            layout="interleaved",
            memory=budget,
            page_bytes="2MiB",
            max_extent_bytes=sizes.max_extent,
            lookahead=sizes.lookahead,
        )
        self.cache = vattn.KVCache(config, open_pool(config, rehearsal=True))
        self.prefix = vattn.PrefixCache(self.cache, block_tokens=sizes.block_tokens)
        self.match_ns: list[int] = []
        self.insert_ns: list[int] = []
        self.step_ns: list[int] = []
        self.hits_without_a_call = 0
        self.hits_with_a_copy = 0
        self.most_copied_bytes = 0
        self.copied_bytes = 0
        self.calls: dict[str, Counter[str]] = {"match": Counter(), "step": Counter()}
        self.prefix_stats: dict[str, Any] = {}
        self._ids: Any = None
        self._watch = CallWatch(self.cache)

    def match(self, request: Request) -> tuple[int, int]:
        self._ids = request.token_ids()
        self.calls["step"] += self._watch.look()
        start = time.perf_counter_ns()
        row, n_cached = self.prefix.match(self._ids)
        self.match_ns.append(time.perf_counter_ns() - start)
        calls = self._watch.look()
        self.calls["match"] += calls
        copied = self._watch.copied_bytes(calls["copy"])
        self.copied_bytes += copied
        self.most_copied_bytes = max(self.most_copied_bytes, copied)
        self.hits_with_a_copy += copied > 0
        self.hits_without_a_call += n_cached > 0 and calls.total() == 0
        if not 0 <= n_cached < request.prompt_tokens or self.cache.mapped_tokens(row) < n_cached:
            raise RuntimeError(f"row {row} does not have the {n_cached} tokens that were matched")
        return row, n_cached

    def grow(self, handle: int, tokens: int) -> None:
        start = time.perf_counter_ns()
        self.cache.step({handle: tokens})
        self.step_ns.append(time.perf_counter_ns() - start)

    def insert(self, handle: int, request: Request) -> None:
        start = time.perf_counter_ns()
        self.prefix.insert(handle, self._ids)
        self.insert_ns.append(time.perf_counter_ns() - start)

    def end(self, handle: int) -> None:
        self.cache.free(handle)

    def finish(self) -> None:
        """Note what came of it. Check that all is in order, and that no request is left."""
        self.calls["step"] += self._watch.look()
        self.calls["background"] = self._watch.background()
        self.prefix_stats = asdict(self.prefix.stats())
        self.cache.check()
        after = self.cache.stats()
        if after.rows_active or after.used_bytes:
            raise NothingMeasured(f"{after.rows_active} rows are still active, expected none")


def measure(requests: Sequence[Request], sizes: Sizes) -> Part:
    """Replay with each budget, the ideal cache first, then vattn's."""
    part = Part()
    for budget in sizes.budgets:
        ideal = IdealBlockCache(parse_bytes(budget, "memory") // (BLOCK_TOKENS * TOKEN_BYTES))
        ideal_played, ideal_seconds = _play(requests, ideal, sizes.at_a_time, budget)
        side = VattnSide(budget, longest(requests), sizes)
        with side.cache:
            played, seconds = _play(requests, side, sizes.at_a_time, budget)
            side.finish()
        _check(side, played, ideal_played)
        _summarize(part, budget, side, (played, seconds), (ideal_played, ideal_seconds))
    return part


def _play(
    requests: Sequence[Request], side: PrefixSide, at_a_time: int, budget: str
) -> tuple[Played, dict[str, float]]:
    """Play, and say how long that took: on the wall's clock, and on the processor's."""
    with _bar(f"{side.name}, {budget}", len(requests)) as on_done:
        start, cpu_start = time.perf_counter(), time.process_time()
        played = Schedule(side, at_a_time).play(requests, on_done)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        return played, {"wall_s": wall_s, "cpu_s": cpu_s}


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    err = Console(stderr=True)
    if not err.is_terminal:
        err.print(f"{what} ({total} requests)", highlight=False)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def _check(side: VattnSide, played: Played, ideal: Played) -> None:
    """No figure without hits on both sides, and without the driver calls that they need."""
    for name, one in (("vattn", played), ("ideal", ideal)):
        if one.hits == 0 or one.requests == 0:
            raise NothingMeasured(f"{name}: none of {one.requests} requests shared a prefix")
    if side.calls["step"]["map"] == 0:
        raise NothingMeasured("step() mapped nothing, so no request had memory of its own")
    if side.hits_without_a_call == played.hits:
        raise NothingMeasured(f"all {played.hits} hits went to idle rows; none shared its memory")


def _summarize(
    part: Part,
    budget: str,
    side: VattnSide,
    vattn_side: tuple[Played, dict[str, float]],
    ideal_side: tuple[Played, dict[str, float]],
) -> None:
    (played, seconds), (ideal, ideal_seconds) = vattn_side, ideal_side
    region_pages = side.cache.page_bytes * side.cache.regions_per_row
    ratio = played.hit_tokens / ideal.hit_tokens
    name = f"prefix/{budget}"
    for what, ns in (("match", side.match_ns), ("insert", side.insert_ns), ("step", side.step_ns)):
        of_all = f"{what}, {budget}, {len(ns)} calls"
        part.measurements.append(
            Measurement(name=f"{name}/{what}", what=of_all, ns=Distribution.of(ns))
        )
    part.rows.append(
        {
            "budget": budget,
            "ideal": asdict(ideal) | ideal_seconds,
            "vattn": asdict(played) | seconds,
            "hit_ratio": ratio,
            "whole_block_ratio": played.whole_block_tokens / ideal.whole_block_tokens,
            "copied_bytes": side.copied_bytes,
            "copied_bytes_per_hit": side.copied_bytes / played.hits,
            "most_copied_bytes": side.most_copied_bytes,
            "hits_without_a_call": side.hits_without_a_call,
            "hits_with_a_copy": side.hits_with_a_copy,
            "driver_calls": {where: dict(calls) for where, calls in side.calls.items()},
            "driver_calls_per_request": sum(calls.total() for calls in side.calls.values())
            / played.requests,
            "prefix_stats": side.prefix_stats,
        }
    )
    what = f"prefix, {budget}: hit tokens"
    part.targets += [
        at_least(f"{what} against the ideal cache", ratio, GOAL, "times"),
        at_most(
            f"prefix, {budget}: most bytes copied for a hit",
            side.most_copied_bytes / region_pages,
            1,
            "pages per region",
        ),
    ]
