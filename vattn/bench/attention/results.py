"""What the samples of a case become: measurements, ratios, bandwidths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vattn.bench.attention.cases import Case
from vattn.bench.attention.measure import LIMIT, Ratio, Samples
from vattn.bench.attention.subjects import Subject
from vattn.bench.attention.verdict import LayoutRatio
from vattn.bench.common import Distribution, Measurement

_MOVED = "copying as many bytes as attention reads"
_MULTIPLIED = "a matrix product with as many multiplications as a causal prefill has"


@dataclass(frozen=True)
class Line:
    """One subject of a case."""

    subject: str
    store: str
    kernel: str
    baseline: str | None
    token_stride_bytes: int
    median_ns: float
    gb_per_s: float  # K and V of a layer over the median
    ratio: Ratio | None  # to the baseline


@dataclass(frozen=True)
class Result:
    """One case."""

    case: Case
    limit_ns: float
    lines: list[Line]
    measurements: list[Measurement]
    layouts: list[LayoutRatio]

    def record(self) -> dict[str, Any]:
        """Describe the case for the JSON file."""
        case = self.case
        return {
            "name": case.name,
            "phase": case.phase,
            "model": case.shape.name,
            "dtype": case.dtype,
            "tokens": case.tokens,
            "batch": case.batch,
            "num_layers": case.shape.num_layers,
            "layers_timed": case.layers_timed,
            "layer_bytes": case.layer_bytes,
            "limit_ns": self.limit_ns,
            "limit_gb_per_s": case.layer_bytes / self.limit_ns,
            "subjects": [asdict(line) for line in self.lines],
            "interleaved_over_per_layer": [asdict(ratio) for ratio in self.layouts],
        }


def summarize(case: Case, subjects: Sequence[Subject], samples: Samples) -> Result:
    """Turn the samples of a case into figures."""
    limit = f"{case.name}/{LIMIT}"
    what = _MOVED if case.phase == "decode" else _MULTIPLIED
    limit_ns = Distribution.of(samples[LIMIT])
    measurements = [Measurement(name=limit, what=what, ns=limit_ns)]
    lines = []
    for subject in subjects:
        ns = Distribution.of(samples[subject.name])
        measurements.append(
            Measurement(
                name=f"{case.name}/{subject.name}",
                what=subject.name,
                ns=ns,
                calls={"attention of one layer": 1},
                limit=limit,
            )
        )
        # Its baseline may have refused the case, or have been wrong.
        baseline = subject.baseline if subject.baseline in samples else None
        ratio = None if baseline is None else Ratio.of(samples[subject.name], samples[baseline])
        lines.append(
            Line(
                subject=subject.name,
                store=subject.store,
                kernel=subject.kernel,
                baseline=baseline,
                token_stride_bytes=subject.token_stride_bytes,
                median_ns=ns.median,
                gb_per_s=case.layer_bytes / ns.median,
                ratio=ratio,
            )
        )
    layouts = list(_layouts(case, subjects, samples))
    return Result(case, limit_ns.median, lines, measurements, layouts)


def _layouts(case: Case, subjects: Sequence[Subject], samples: Samples) -> Iterator[LayoutRatio]:
    """Compare the layouts round by round, for each order and kernel."""
    for subject in subjects:
        other = subject.name.replace("interleaved", "per_layer")
        if "interleaved" in subject.store and other in samples:
            ratio = Ratio.of(samples[subject.name], samples[other])
            order = subject.store.rpartition(" ")[2]
            yield LayoutRatio(f"{case.name}/{subject.kernel}", order, ratio.median)
