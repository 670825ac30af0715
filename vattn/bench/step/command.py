"""What ``KVCache.step`` costs: when all is mapped, when rows grow, and while decoding."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vattn.bench import common
from vattn.bench.common import Measurement, Target
from vattn.bench.step import batch, decode, growth, pace, patterns, steady, tables
from vattn.bench.step.batch import Sized
from vattn.bench.step.layouts import variants
from vattn.bench.step.pace import Pace
from vattn.bench.step.patterns import Growth

Part = tuple[list[Measurement], list[Target]]
PARTS = ("steady", "growth", "decode")


@dataclass
class Results:
    """What was measured, by part."""

    measurements: list[Measurement] = field(default_factory=list)  # one table
    targets: list[Target] = field(default_factory=list)
    sized: list[Sized] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    paces: list[Pace] = field(default_factory=list)
    floors: list[Measurement] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Add what has the common form."""
        self.measurements += part[0]
        self.targets += part[1]

    def all_measurements(self) -> list[Measurement]:
        """All lines of the record. A limit of a part that did not run is left out."""
        lines = [*self.measurements, *self.floors]
        lines += batch.measurements(self.sized) if self.sized else []
        lines += [line for growth in self.growths for line in growth.measurements()]
        lines += [line for pace in self.paces for line in pace.measurements()]
        return with_known_limits(lines)

    def print(self, device: str) -> None:
        """Print a table for each question."""
        if self.measurements:
            common.print_measurements(f"step() on {device}", with_known_limits(self.measurements))
        if self.sized:
            tables.print_batch(self.sized)
        if self.growths:
            tables.print_growth(self.growths, has_floor=device == "cpu")
        if self.paces:
            tables.print_paces(self.paces)
        common.print_targets(self.targets)


def with_known_limits(measurements: list[Measurement]) -> list[Measurement]:
    """Drop each limit that is not among the measurements."""
    names = {m.name for m in measurements}
    return [m if m.limit in names else replace(m, limit=None) for m in measurements]


def parts_of(text: str) -> list[str]:
    """Read a list of parts, as ``--parts`` takes it.

    >>> parts_of("decode,steady")
    ['steady', 'decode']
    """
    named = [word.strip() for word in text.split(",")]
    for word in named:
        if word not in PARTS:
            raise argparse.ArgumentTypeError(
                f"{word!r} is no part; choose from {', '.join(PARTS)}, with commas between"
            )
    return [part for part in PARTS if part in named]


def period_of(text: str) -> float:
    """Read milliseconds, as ``--period-ms`` takes them.

    >>> period_of("2.5")
    2.5
    """
    try:
        period = float(text)
    except ValueError:
        period = math.nan
    if not 0.1 <= period <= 1000:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no pace; give milliseconds a decode step, 0.1 to 1000"
        )
    return period


def parse(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    common.add_arguments(parser)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument(
        "--parts",
        type=parts_of,
        default=list(PARTS),
        help=f"what to measure, with commas between (default: {','.join(PARTS)})",
    )
    parser.add_argument(
        "--period-ms",
        type=period_of,
        help="milliseconds a decode step (default: 3; the time of that part follows it)",
    )
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, host_floor: Callable[[bool], Part] | None) -> Results:
    """Run the chosen parts."""
    device, quick = options.device, options.quick
    period_s = (options.period_ms or (1 if quick else 3)) / 1e3
    floor = host_floor if device == "cpu" else None
    results = Results()
    if floor and {"steady", "growth"} & set(options.parts):
        results.add(floor(quick))
    if "steady" in options.parts:
        results.add(steady.measure_python(device, quick))
        results.sized = batch.measure(device, quick)
    if "growth" in options.parts:
        results.add(growth.measure(device, quick, has_floor=floor is not None))
        results.growths = patterns.measure(device, variants(device), quick)
    if "decode" in options.parts:
        results.add(decode.measure(device, quick, period_s))
        results.paces, results.floors = pace.measure(device, quick, period_s)
    return results


def draw(results: Results, stem: Path) -> list[Path]:
    """Draw the picture; say so where matplotlib is missing, which no figure depends on."""
    try:
        from vattn.bench.step import picture
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        common.console.print("no picture: install matplotlib with: pip install 'vattn[cli]'")
        return []
    return picture.draw(results.sized, results.paces, stem)


def main(
    arguments: list[str] | None = None,
    *,
    prog: str = "vattn bench step",
    host_floor: Callable[[bool], Part] | None = None,
) -> int:
    """Measure, print, save, draw.

    ``host_floor(quick)`` measures what physics allows on the host; the source tree has one in C++.
    Exit status 1 if ``--check`` is given and a target was missed.
    """
    options = parse(arguments, prog)
    skipped = common.skip_reason(options.device)
    if skipped:
        common.console.print(f"step_latency on {options.device}: {skipped}")
        return 0
    env = common.environment(options.commit)
    results = measure(options, host_floor)
    results.print(options.device)
    written = common.save(
        "step_latency",
        options,
        env,
        results.all_measurements(),
        results.targets,
        critical_path=[pace.record() for pace in results.paces],
    )
    for path in draw(results, written.with_suffix("")):
        common.console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return 1 if options.check and not all(target.met for target in results.targets) else 0
