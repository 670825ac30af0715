"""Timing in turns, after a check that every subject computes the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vattn.bench.attention.cases import NotMeasured
from vattn.bench.attention.kernels import Call
from vattn.bench.attention.subjects import REFUSALS, Setup, Subject, why
from vattn.bench.common import NothingMeasured, expect_calls, time_calls

LIMIT = "limit"
MIN_ROUNDS = 5
# Largest difference, in root mean squares of the right result of a query. Leaving out a block of 16
# tokens of 8,192 makes about 0.2.
TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}

Samples = dict[str, list[float]]


class OutOfTime(Exception):
    """There was not enough time for the fewest rounds that give a figure."""


class Clock(Protocol):
    """Times calls on a device."""

    calls_per_sample: int

    def ns_per_call(self, calls: Sequence[Call]) -> float:
        """Make the calls, one after the other; nanoseconds of one."""


class CpuClock:
    """One call, between two readings of the clock."""

    calls_per_sample = 1

    def ns_per_call(self, calls: Sequence[Call]) -> float:
        (call,) = calls
        return time_calls(lambda function: function(), [call], 1)[0]


class CudaClock:
    """Several layers between two events, queued behind a pause so that the GPU never waits for us.

    What is timed is the GPU alone, as with CUDA graphs, with which engines decode.
    """

    calls_per_sample = 8
    _LONGEST_PAUSE = 100_000_000  # cycles, some 50 ms

    def __init__(self) -> None:
        self._pause_cycles = 1_000_000

    def ns_per_call(self, calls: Sequence[Call]) -> float:
        while True:
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            torch.cuda._sleep(self._pause_cycles)  # type: ignore[no-untyped-call]
            start.record()
            for call in calls:
                call()
            end.record()
            # Whether the pause was over before all was queued.
            came_late = start.query()  # type: ignore[no-untyped-call]
            end.synchronize()
            if not came_late or self._pause_cycles >= self._LONGEST_PAUSE:
                return float(start.elapsed_time(end)) * 1e6 / len(calls)
            self._pause_cycles *= 2


def difference(output: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference in root mean squares of its query; infinite if one is not a number."""
    if output.shape != right.shape:
        return float("inf")
    right = right.float()
    scale = right.square().mean(dim=-1, keepdim=True).sqrt()
    largest = ((output.float() - right).abs() / scale).max()
    return float(largest.nan_to_num(nan=float("inf")))


def check_outputs(setup: Setup) -> tuple[list[Subject], list[NotMeasured], list[str]]:
    """Call every subject once for each layer, which also warms it up.

    The first subject is compared with a reference in float32, the others with the first.

    Returns
    -------
    right, missing, errors
        Subjects that may be timed; those whose kernel refused; sentences about those that computed
        something else, and about those of vattn's that were refused when the plain ones were not.
    """
    tolerance, right = TOLERANCE[setup.case.dtype], list(setup.subjects)
    missing, errors = [], []
    for layer, expected in enumerate(setup.expected):
        first: torch.Tensor | None = None
        for subject in list(right):
            try:
                output = subject.calls[layer]()
            except REFUSALS as error:
                missing.append(NotMeasured(subject.name, why(error)))
                right.remove(subject)
                continue
            wrong = difference(output[0, 0, -len(expected) :], expected)
            if first is not None:
                wrong = max(wrong, difference(output, first))
            if wrong > tolerance:
                name = f"{setup.case.name}/{subject.name}"
                errors.append(f"{name}: layer {layer} is off by {wrong:.3g}, allowed {tolerance}")
                right.remove(subject)
            elif first is None:
                first = output
    # Whatever takes the plain tensors must take ours.
    names = {subject.name for subject in right}
    ours = {
        subject.name
        for subject in setup.subjects
        if subject.store.startswith("vattn") and subject.baseline in names
    }
    errors += [f"{setup.case.name}/{e.name}: {e.reason}" for e in missing if e.name in ours]
    return right, missing, errors


def take_turns(
    subjects: Sequence[Subject],
    limit: Sequence[Call],
    clock: Clock,
    *,
    max_rounds: int,
    seconds: float,
    deadline_s: float,
    now: Callable[[], float] = time.monotonic,
) -> Samples:
    """Time all subjects in every round, so that whatever else the machine does hits all of them.

    Every round begins with the next subject and goes on to the next layers. The first round is not
    counted.

    Parameters
    ----------
    max_rounds : int
        As many are enough.
    seconds, deadline_s : float
        It stops after ``seconds`` if it has ``MIN_ROUNDS`` by then, after ``deadline_s`` anyway.

    Raises
    ------
    OutOfTime
        ``deadline_s`` were over before ``MIN_ROUNDS`` rounds.
    """
    turns = [(subject.name, subject.calls) for subject in subjects]
    turns.append((LIMIT, limit))
    samples: Samples = {name: [] for name, _ in turns}
    started, n, enough = now(), clock.calls_per_sample, min(MIN_ROUNDS, max_rounds)
    for turn in range(max_rounds + 1):
        if turn > enough and now() - started > seconds:
            break
        at = turn % len(turns)
        taken: dict[str, float] = {}
        for name, calls in turns[at:] + turns[:at]:
            if now() - started > deadline_s:
                break
            taken[name] = clock.ns_per_call([calls[(turn * n + i) % len(calls)] for i in range(n)])
        if len(taken) < len(turns):
            if turn <= enough:
                raise OutOfTime(f"the time was up after {max(0, turn - 1)} of {enough} rounds")
            break
        for name, ns in taken.items() if turn > 0 else ():
            samples[name].append(ns)
    rounds = len(samples[LIMIT])
    for name, of_one in samples.items():
        expect_calls(len(of_one), rounds, name)
    return samples


@dataclass(frozen=True)
class Ratio:
    """Time of one over that of another in the same round."""

    n: int
    p25: float
    median: float
    p75: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Divide round by round.

        >>> Ratio.of([2, 3, 4], [2, 2, 2])
        Ratio(n=3, p25=1.0, median=1.5, p75=2.0)
        """
        each = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        if not each:
            raise NothingMeasured("there are no rounds")
        n = len(each)
        return cls(n, each[(n - 1) // 4], statistics.median(each), each[-1 - (n - 1) // 4])
