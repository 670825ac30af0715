"""What the parts hand over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vattn.bench.common import Measurement, NothingMeasured, Target, console


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second in each round."""

    median: float
    min: float
    max: float
    rounds: list[float]

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Rate:
        """Summarize rounds."""
        ordered = sorted(rounds)
        n = len(ordered)
        if n == 0:
            raise NothingMeasured("there are no rounds")
        median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        return cls(median=median, min=ordered[0], max=ordered[-1], rounds=list(rounds))


@dataclass(kw_only=True)
class Part:
    """What one part has measured. ``rows`` are its lines in the JSON file."""

    measurements: list[Measurement] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)

    def miss(self, name: str, status: str, reason: str) -> None:
        """Take note of what was skipped or has failed, and say so."""
        self.missing.append({"name": name, "status": status, "reason": reason})
        console.print(f"{name}: {status}: {reason}", markup=False, highlight=False)
