"""Part ``generate``: tokens per second and memory of a decode with each cache and attention."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from benchmarks.hf_generate.memory import allocate_from_heap, no_room, watch_peak
from benchmarks.hf_generate.model import (
    GIB,
    GREEDY,
    Shape,
    TokenClock,
    build,
    fill,
    gaps,
    kv_bytes_held,
    make_cache,
    synchronize,
)
from benchmarks.hf_generate.results import Part, Rate
from benchmarks.hf_generate.turns import ChildFailed, in_child, there_and_back
from vattn.bench.common import (
    Distribution,
    Measurement,
    Target,
    at_least,
    at_most,
    expect_calls,
    progress,
    time_calls,
)
from vattn.integrations.transformers.naming import CACHE_ARGUMENT

SPEED_GOALS = {"float32": 2.5, "bfloat16": 5.0}  # times the tokens/s of the stock
PEAK_GOAL = 0.6  # times the peak of the stock
LARGE = 32768  # tokens of the StaticCache that has room to spare


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured. A run ends after ``tokens`` or ``seconds``, whichever is first."""

    contexts: tuple[int, ...] = (8192, 32768)
    batches: tuple[int, ...] = (1, 4)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    tokens: int = 33
    seconds: float = 3.0
    rounds: int = 4  # of the first context and batch; a quarter of the others
    heap_tokens: int = 129
    heap_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is in the cache."""

    context: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}/{self.context}/b{self.batch}"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A cache with an attention. ``peak`` estimates the growth of memory, in sizes of the cache."""

    name: str
    cache: str
    attention: str = "sdpa"
    is_large: bool = False
    from_heap: bool = False
    peak: float


STOCK = Subject(name="DynamicCache + sdpa", cache="DynamicCache", peak=1.5)
OURS = Subject(name="VAttnCache + vattn", cache="VAttnCache", attention="vattn", peak=1.25)
SUBJECTS = (
    STOCK,
    Subject(name="StaticCache exact + sdpa", cache="StaticCache", peak=1.75),
    Subject(name="StaticCache 32K + sdpa", cache="StaticCache", is_large=True, peak=1.75),
    Subject(name="VAttnCache + sdpa", cache="VAttnCache", peak=1.5),
    OURS,
)
# The same with a malloc that keeps large blocks, as long-lived processes and other mallocs do: what
# is freed is not given back at once, and blocks that grow leave holes. Takes many tokens to show.
HEAP_SUBJECTS = tuple(
    replace(subject, name=f"{subject.name}, heap", from_heap=True, peak=3 * subject.peak)
    for subject in (STOCK, OURS)
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one process measured."""

    gaps_ns: list[float]
    peak_growth_bytes: int
    torch_peak_bytes: int | None
    kv_bytes: int
    mlp_ns: float


def measure(shape: Shape, sizes: Sizes, device: str, deadline: float) -> Part:
    """Measure all cases, the first ones first, until the deadline.

    Expected: one token takes as long as reading the weights and all keys. DynamicCache reads the
    keys once more and writes them; the rest is what the attention makes of them.
    """
    part = Part()
    cases = [
        Case(context=context, batch=batch, dtype=dtype)
        for context in sizes.contexts
        for batch in sizes.batches
        for dtype in sizes.dtypes
    ]
    order = [(case, subject) for case in cases for subject in _order(case, sizes, device)]
    samples: dict[tuple[Case, Subject], list[Sample]] = defaultdict(list)
    given_up = set()
    for case, subject in progress(order, "generate"):
        if (case, subject) in given_up:
            continue
        name = f"generate/{case}/{subject.name}"
        reason = _why_not(shape, sizes, case, subject, device, deadline)
        if reason:
            part.miss(name, "skipped", reason)
            given_up.add((case, subject))
            continue
        try:
            samples[case, subject] += in_child(
                run_once, shape, sizes, case, subject, device, limit_s=600
            )
        except ChildFailed as error:
            part.miss(name, "failed", str(error))
            given_up.add((case, subject))
    for case in cases:
        subjects = *SUBJECTS, *HEAP_SUBJECTS
        measured = {s: samples[case, s] for s in subjects if samples[case, s]}
        _summarize(part, case, measured)
        if (case.context, case.batch) == (sizes.contexts[0], 1):
            _add_targets(part, case)
    return part


def _order(case: Case, sizes: Sizes, device: str) -> list[Subject]:
    """Say who comes when. The stock and ours, which are compared, come more often."""
    is_first = (case.context, case.batch) == (sizes.contexts[0], sizes.batches[0])
    rounds = sizes.rounds if is_first else max(1, sizes.rounds // 4)
    fewer = max(1, rounds // 2)
    order = there_and_back({s: fewer if s.cache == "StaticCache" else rounds for s in SUBJECTS})
    return [*order, *HEAP_SUBJECTS] if is_first and device == "cpu" else order


def _limit(sizes: Sizes, case: Case, subject: Subject) -> int:
    """Tokens that a StaticCache reserves for each row."""
    return sizes.tokens + (LARGE if subject.is_large else case.context)


def _why_not(
    shape: Shape, sizes: Sizes, case: Case, subject: Subject, device: str, deadline: float
) -> str | None:
    if subject.is_large and case.context >= LARGE:
        return "no larger than the exact fit"
    if time.monotonic() > deadline:
        return "no time was left"
    cache_bytes = shape.kv_bytes(case.dtype) * _limit(sizes, case, subject) * case.batch
    return no_room(int(cache_bytes * subject.peak) + GIB, device)


def run_once(
    shape: Shape, sizes: Sizes, case: Case, subject: Subject, device: str
) -> Iterator[Sample]:
    """Generate once, in a process that does nothing else.

    A real prefill would take minutes: the keys of all tokens but the last are random instead.
    """
    if subject.from_heap:
        allocate_from_heap()
        sizes = replace(sizes, tokens=sizes.heap_tokens, seconds=sizes.heap_seconds)
    end = case.context + sizes.tokens
    shared: dict[str, Any] = {"batch": case.batch, "dtype": case.dtype}
    model = build(
        shape, dtype=case.dtype, device=device, attention=subject.attention, positions=end
    )
    ids = torch.randint(shape.vocab_size, (case.batch, case.context), device=device)
    model.generate(
        ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), max_new_tokens=3, **GREEDY
    )
    peak = watch_peak(device)
    cache = make_cache(
        subject.cache, shape, tokens=end, limit=_limit(sizes, case, subject), **shared
    )
    fill(cache, shape, tokens=case.context - 1, device=device, **shared)
    clock = TokenClock(sizes.seconds)
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=sizes.tokens,
        stopping_criteria=[clock],
        disable_compile=True,  # compiling a StaticCache takes longer than the run
        **GREEDY,
    )
    expect_calls(len(clock.times), tokens.shape[1] - case.context, "the clock")
    # The last token that came out never went in.
    expect_calls(int(cache.get_seq_length()), tokens.shape[1] - 1, "tokens in the cache")
    yield Sample(
        gaps_ns=gaps(clock.times),
        peak_growth_bytes=peak.growth(),
        torch_peak_bytes=peak.torch_growth(),
        kv_bytes=kv_bytes_held(cache),
        mlp_ns=_mlp_ns(model, case.batch, device),
    )


def _mlp_ns(model: Any, batch: int, device: str) -> float:
    """Time of the MLPs of all layers for one token: the part that no cache changes."""
    hidden = torch.randn(batch, 1, model.config.hidden_size, device=device, dtype=model.dtype)

    def run_all(_: None) -> None:
        for layer in model.model.layers:
            layer.mlp(hidden)
        synchronize(device)

    with torch.no_grad():
        return median(time_calls(run_all, [None], 9))


def _summarize(part: Part, case: Case, measured: Mapping[Subject, list[Sample]]) -> None:
    for subject, runs in measured.items():
        times = Distribution.of(ns for run in runs for ns in run.gaps_ns)
        what = f"{subject.name}: from token to token, {case.context} tokens, batch {case.batch}"
        part.measurements.append(
            Measurement(
                name=f"generate/{case}/{subject.name}",
                what=f"{what}, {case.dtype}",
                ns=times,
                calls={"processes": len(runs)},
            )
        )
        rates = [case.batch * len(run.gaps_ns) / sum(run.gaps_ns) * 1e9 for run in runs]
        torch_peaks = [run.torch_peak_bytes for run in runs if run.torch_peak_bytes is not None]
        part.rows.append(
            {
                **asdict(case),
                "subject": subject.name,
                "tokens_per_s": asdict(Rate.of(rates)),
                "peak_growth_bytes": int(median(run.peak_growth_bytes for run in runs)),
                "torch_peak_bytes": int(median(torch_peaks)) if torch_peaks else None,
                "kv_bytes": int(median(run.kv_bytes for run in runs)),
                "mlp_share": median(run.mlp_ns for run in runs) / times.median,
            }
        )


def _add_targets(part: Part, case: Case) -> None:
    rows = {row["subject"]: row for row in part.rows if row.items() >= asdict(case).items()}
    if case.dtype not in SPEED_GOALS or not {STOCK.name, OURS.name} <= rows.keys():
        return
    stock, ours = rows[STOCK.name], rows[OURS.name]
    where = f"{case.dtype}, {case.context} tokens: {OURS.name} against {STOCK.name}"
    speed = ours["tokens_per_s"]["median"] / stock["tokens_per_s"]["median"]
    part.targets.append(at_least(f"tokens/s, {where}", speed, SPEED_GOALS[case.dtype], "times"))
    part.targets.append(_peak_target(where, ours, stock))
    heap_stock, heap_ours = (rows.get(subject.name) for subject in HEAP_SUBJECTS)
    if heap_stock and heap_ours:
        part.targets.append(_peak_target(f"{where}, heap", heap_ours, heap_stock))


def _peak_target(where: str, ours: dict[str, Any], stock: dict[str, Any]) -> Target:
    ratio = ours["peak_growth_bytes"] / stock["peak_growth_bytes"]
    return at_most(f"peak of memory, {where}", ratio, PEAK_GOAL, "times")
