"""Part ``update``: what it costs to add one token to a cache, without model and attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.hf_generate.memory import no_room
from benchmarks.hf_generate.model import (
    GIB,
    MIB,
    Shape,
    fill,
    make_cache,
    random_kv,
    synchronize,
)
from benchmarks.hf_generate.results import Part
from benchmarks.hf_generate.turns import ChildFailed, in_child, there_and_back
from vattn.bench.common import (
    Distribution,
    Measurement,
    at_least,
    expect_calls,
    progress,
    time_calls,
)

CACHES = ("DynamicCache", "StaticCache", "VAttnCache")
GOAL = 80.0  # times the speed of DynamicCache


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    context: int = 8192
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    turns: int = 20
    per_turn: int = 5
    copied_bytes: int = 256 * MIB


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the caches are filled with."""

    dtype: str
    batch: int

    def __str__(self) -> str:
        return f"update/{self.dtype}/b{self.batch}"


def measure(shape: Shape, sizes: Sizes, device: str) -> Part:
    """Measure all cases. Expected: DynamicCache copies everything, the others one token."""
    part = Part()
    for case in (Case(dtype=d, batch=b) for d in sizes.dtypes for b in sizes.batches):
        # Three caches, one of which is there twice for a moment.
        needed = 4 * shape.kv_bytes(case.dtype) * sizes.context * case.batch + GIB
        reason = no_room(needed, device)
        if reason:
            part.miss(str(case), "skipped", reason)
            continue
        samples: dict[str, list[float]] = defaultdict(list)
        answers = in_child(run_case, shape, sizes, case, device, limit_s=300)
        turns = progress(range(sizes.turns * len(CACHES) + 1), str(case))
        try:
            for (subject, ns), _ in zip(answers, turns, strict=True):
                samples[subject] += ns
        except ChildFailed as error:
            part.miss(str(case), "failed", str(error))
            continue
        _summarize(part, shape, sizes, case, samples)
    return part


def run_case(
    shape: Shape, sizes: Sizes, case: Case, device: str
) -> Iterator[tuple[str, Sequence[float]]]:
    """Give the samples of one turn after the other, then those of the limit."""
    shared: dict[str, Any] = {"batch": case.batch, "dtype": case.dtype}
    # One more turn warms up.
    order = there_and_back(dict.fromkeys(CACHES, sizes.turns + 1))
    end = sizes.context + (sizes.turns + 1) * sizes.per_turn
    caches = {}
    for kind in CACHES:
        caches[kind] = make_cache(kind, shape, tokens=end, limit=end, **shared)
        fill(caches[kind], shape, tokens=sizes.context, device=device, **shared)
    token = [random_kv(shape, tokens=1, device=device, **shared) for _ in range(shape.layers)]

    def advance(cache: Any) -> None:
        for layer, (keys, values) in enumerate(token):
            cache.update(keys, values, layer)
        synchronize(device)

    for number, kind in enumerate(order):
        samples = time_calls(advance, [caches[kind]], sizes.per_turn)
        if number >= len(CACHES):
            yield kind, samples
    for kind, cache in caches.items():
        _expect_token(cache, token[-1], end - 1, kind)
    yield "limit", _copy_samples(sizes, shape.kv_bytes(case.dtype) * case.batch, device)


def _expect_token(cache: Any, token: tuple[torch.Tensor, torch.Tensor], at: int, what: str) -> None:
    """Fail unless the last layer has this token at the end: no figure without the work."""
    expect_calls(int(cache.get_seq_length()), at + 1, what)
    layer = cache.layers[-1]
    for written, new in zip((layer.keys, layer.values), token, strict=True):
        if not written[:, :, at : at + 1].equal(new):
            raise RuntimeError(f"{what} does not hold the token that was written")


def _copy_samples(sizes: Sizes, token_bytes: int, device: str) -> list[float]:
    """Time to write so many bytes as fast as memory is copied."""
    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy(_: None) -> None:
        target.copy_(source)
        synchronize(device)

    copy(None)
    samples = time_calls(copy, [None], sizes.turns)
    return [ns * token_bytes / sizes.copied_bytes for ns in samples]


def _summarize(
    part: Part, shape: Shape, sizes: Sizes, case: Case, samples: dict[str, list[float]]
) -> None:
    token_bytes = shape.kv_bytes(case.dtype) * case.batch
    where = f"{case.dtype}, batch {case.batch}, after {sizes.context} tokens"
    what = {kind: f"{kind}: one token, {shape.layers} layers, {where}" for kind in CACHES}
    what["limit"] = f"writing its {token_bytes} bytes as fast as {sizes.copied_bytes} are copied"
    times = {kind: Distribution.of(samples[kind]) for kind in what}
    part.measurements += [
        Measurement(
            name=f"{case}/{kind}",
            what=what[kind],
            ns=times[kind],
            calls={"update": shape.layers} if kind in CACHES else {},
            limit=f"{case}/limit" if kind in CACHES else None,
        )
        for kind in what
    ]
    ratio = times["DynamicCache"].median / times["VAttnCache"].median
    part.rows.append(
        {
            "dtype": case.dtype,
            "batch": case.batch,
            "context": sizes.context,
            "token_bytes": token_bytes,
            "copied_bytes_per_s": token_bytes / times["limit"].median * 1e9,
            "dynamic_over_vattn": ratio,
            "dynamic_over_static": times["DynamicCache"].median / times["StaticCache"].median,
        }
    )
    part.targets.append(
        at_least(f"update, {where}: VAttnCache against DynamicCache", ratio, GOAL, "times")
    )
