"""Arithmetic: from the times of tokens to what is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vattn.bench.common import Distribution, NothingMeasured


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and range over rounds."""

    n: int
    median: float
    min: float
    max: float
    rounds: list[float]

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        """Summarize rounds."""
        ordered = sorted(rounds)
        n = len(ordered)
        if n == 0:
            raise NothingMeasured("there are no rounds")
        median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        return cls(n=n, median=median, min=ordered[0], max=ordered[-1], rounds=list(rounds))


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one load on one engine: seconds from the start of the load to each token."""

    arrived: list[float]
    tokens: list[list[float]]

    @classmethod
    def of(cls, load: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> Times:
        """Read what an engine answered to a load.

        Raises
        ------
        NothingMeasured
            A request got fewer or more tokens than it asked for.
        """
        for asked, answer in zip(load, answers, strict=True):
            if len(answer["token_s"]) != asked["generate"]:
                raise NothingMeasured(
                    f"a request got {len(answer['token_s'])} tokens, asked for {asked['generate']}"
                )
        return cls(
            arrived=[asked["at_s"] for asked in load],
            tokens=[list(answer["token_s"]) for answer in answers],
        )

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return max(times[-1] for times in self.tokens) - min(self.arrived)

    @property
    def requests_per_s(self) -> float:
        """Requests by the time that all of them took."""
        return len(self.tokens) / self.seconds

    @property
    def first_ns(self) -> list[float]:
        """Time to the first token of each request, from its arrival."""
        pairs = zip(self.arrived, self.tokens, strict=True)
        return [(times[0] - arrived) * 1e9 for arrived, times in pairs]

    @property
    def between_ns(self) -> list[float]:
        """Time between neighbouring tokens, of all requests."""
        return [
            (later - sooner) * 1e9 for times in self.tokens for sooner, later in pairwise(times)
        ]


def percentile(samples: Sequence[float], percent: int) -> float:
    """Smallest sample that ``percent`` % of the samples do not exceed.

    >>> percentile([4, 1, 3, 2], 50), percentile([4, 1, 3, 2], 99)
    (2, 4)
    """
    if not samples:
        raise NothingMeasured("there are no samples")
    return sorted(samples)[(percent * len(samples) + 99) // 100 - 1]


def pooled(rounds: Sequence[Sequence[float]]) -> Distribution:
    """Summarize the samples of all rounds together."""
    return Distribution.of([sample for samples in rounds for sample in samples])


def ratios(ours: Sequence[float], stock: Sequence[float]) -> Spread:
    """Compare round by round: what ran at about the same time."""
    return Spread.of([a / b for a, b in zip(ours, stock, strict=True)])
