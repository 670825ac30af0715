"""What is recorded of a replay, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Printed and saved with every result.
DEFINITIONS = {
    "used": "tokens of running requests x bytes of a token",
    "granted": "bytes that no other request can have. vattn: mapped, less what step() may take "
    "back for others (idle rows, pages ahead of need). The others: whole units for the tokens of "
    "running requests",
    "mapped": "physical memory in place. vattn: with idle rows and pages ahead of need. The "
    "others: the same as granted",
    "utilisation": "used / granted in each iteration, weighted by its virtual duration",
    "without a driver call": "step() found everything in place: it neither mapped nor unmapped",
    "late": "what was left to be mapped ahead took longer, in real time, than the iteration that "
    "it had for it, in virtual time",
}


class Iteration(NamedTuple):
    """What is recorded of an iteration. Memory is that after ``grow`` and the work behind it."""

    start_s: float  # virtual time, as is the duration
    duration_s: float
    prefill_tokens: float
    running: float  # requests
    waiting: float
    used_bytes: float
    needed_bytes: float  # whole pages, or blocks, for the tokens of running requests
    granted_bytes: float
    mapped_bytes: float
    calls_in_step: float  # driver calls so far
    calls_in_background: float
    grow_ns: float
    settle_ns: float  # from the end of grow() until all was mapped ahead; 0 at real pace


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What came of a trace under one policy.

    Attributes
    ----------
    iterations : numpy.ndarray of float64, shape (iterations, fields of Iteration)
        See ``column``.
    queueing_s : numpy.ndarray of float64, shape (requests that started,)
        Virtual seconds from arrival to start.
    completed, refused : int
        Requests; those are refused that would not fit if they were alone.
    preemptions, recomputed_tokens : int
        Requests that lost their memory, and the tokens in it.
    wall_s, cpu_s : float
        Real seconds, and the processor's in them, the background thread's included.
    driver_calls : dict
        ``driver_calls[origin][name]``: calls in all, of a policy that makes some.
    """

    policy: str
    budget_bytes: int
    iterations: FloatArray
    queueing_s: FloatArray
    completed: int
    refused: int
    preemptions: int
    recomputed_tokens: int
    wall_s: float
    cpu_s: float
    driver_calls: dict[str, dict[str, int]] = field(default_factory=dict)

    def column(self, name: str) -> FloatArray:
        """One field of all iterations."""
        column: FloatArray = self.iterations[:, Iteration._fields.index(name)]
        return column

    def decoding(self) -> NDArray[np.bool_]:
        """Which iterations had no prefill."""
        decoding: NDArray[np.bool_] = self.column("prefill_tokens") == 0
        return decoding

    def series(self, points: int = 500) -> dict[str, FloatArray]:
        """Every field at ``points`` evenly spaced iterations, or at all if there are fewer."""
        n = len(self.iterations)
        at = np.unique(np.linspace(0, n - 1, min(n, points)).round().astype(np.int64))
        return {name: self.column(name)[at] for name in Iteration._fields}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of an outcome. Shares are of 1; means over time are weighted by duration.

    Attributes
    ----------
    utilisation, utilisation_min, utilisation_p5, utilisation_median : float
        used / granted: mean, and order statistics over time.
    used_of_mapped : float
        Mean of used / mapped.
    kept_whole : float
        Mean share of granted bytes in pages that no token needs: extents larger than a page that a
        row uses a part of.
    queue_empty : float
        Share of the makespan in which nobody waited.
    steps_without_call, decode_steps_without_call : float
        Share of iterations, and of those without a prefill.
    late : int
        Iterations; see ``DEFINITIONS``. At real pace 0: then the next step maps what is missing.
    """

    policy: str
    utilisation: float
    utilisation_min: float
    utilisation_p5: float
    utilisation_median: float
    used_of_mapped: float
    kept_whole: float
    running_mean: float
    running_peak: int
    queue_empty: float
    queueing_mean_s: float
    queueing_p99_s: float
    makespan_s: float
    iterations: int
    decode_iterations: int
    completed: int
    refused: int
    preemptions: int
    recomputed_tokens: int
    calls_in_step: int
    calls_in_background: int
    steps_without_call: float
    decode_steps_without_call: float
    late: int
    wall_s: float
    cpu_s: float


def summarise(outcome: Outcome) -> Summary | None:
    """Compute the figures; None if no request fitted."""
    if len(outcome.iterations) == 0:
        return None
    column = outcome.column
    duration = column("duration_s")
    makespan_s = float(column("start_s")[-1] + duration[-1])
    granted = column("granted_bytes")
    utilisation = column("used_bytes") / granted
    without_call = np.diff(column("calls_in_step"), prepend=0) == 0
    decoding = outcome.decoding()

    def mean(values: FloatArray) -> float:
        return float(np.average(values, weights=duration))

    return Summary(
        policy=outcome.policy,
        utilisation=mean(utilisation),
        utilisation_min=float(utilisation.min()),
        utilisation_p5=weighted_quantile(utilisation, duration, 0.05),
        utilisation_median=weighted_quantile(utilisation, duration, 0.5),
        used_of_mapped=mean(column("used_bytes") / column("mapped_bytes")),
        kept_whole=mean((granted - column("needed_bytes")) / granted),
        running_mean=mean(column("running")),
        running_peak=int(column("running").max()),
        queue_empty=float(1 - duration[column("waiting") > 0].sum() / makespan_s),
        queueing_mean_s=float(outcome.queueing_s.mean()),
        queueing_p99_s=float(np.quantile(outcome.queueing_s, 0.99)),
        makespan_s=makespan_s,
        iterations=len(duration),
        decode_iterations=int(decoding.sum()),
        completed=outcome.completed,
        refused=outcome.refused,
        preemptions=outcome.preemptions,
        recomputed_tokens=outcome.recomputed_tokens,
        calls_in_step=int(column("calls_in_step")[-1]),
        calls_in_background=int(column("calls_in_background")[-1]),
        steps_without_call=float(without_call.mean()),
        decode_steps_without_call=float(without_call[decoding].mean()) if decoding.any() else 1.0,
        late=int((column("settle_ns") > duration * 1e9).sum()),
        wall_s=outcome.wall_s,
        cpu_s=outcome.cpu_s,
    )


def weighted_quantile(values: FloatArray, weights: FloatArray, share: float) -> float:
    """Return the smallest value that ``share`` of the weight does not exceed.

    >>> weighted_quantile(np.array([3.0, 1.0, 2.0]), np.array([1.0, 8.0, 1.0]), 0.5)
    1.0
    """
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    at = int(np.searchsorted(reached, share * reached[-1]))
    return float(values[order][at])
