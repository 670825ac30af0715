"""What all benchmarks share: samples, the record of the machine, JSON files, tables, progress."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import vattn

# The source tree, if the package is imported from one.
ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path("vattn-results")
SCHEMA = 1


class NothingMeasured(RuntimeError):
    """The code that was timed did not do the work that the figure is named for."""


def expect_calls(counted: int, expected: int, what: str) -> None:
    """Fail unless exactly ``expected`` calls were made: no figure without the work behind it."""
    if expected < 1 or counted != expected:
        raise NothingMeasured(f"{what}: {counted} calls were made, expected {expected}")


@dataclass(frozen=True)
class Distribution:
    """Nanoseconds of ``n`` repetitions."""

    n: int
    min: float
    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Distribution:
        """Summarize samples; the p99 is the smallest sample that 99% do not exceed."""
        ordered = sorted(samples)
        n = len(ordered)
        if n == 0:
            raise NothingMeasured("there are no samples")
        middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        return cls(n, ordered[0], middle, ordered[(99 * n + 99) // 100 - 1], ordered[-1])


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of a table. ``limit`` names the measurement of what physics allows."""

    name: str
    what: str
    ns: Distribution
    calls: dict[str, int] = field(default_factory=dict)
    limit: str | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """A goal of the project, and what came of it."""

    name: str
    goal: str
    measured: float
    unit: str
    met: bool


def at_most(name: str, measured: float, goal: float, unit: str) -> Target:
    """Make a target that is met by small values."""
    return Target(
        name=name, goal=f"<= {goal:g} {unit}", measured=measured, unit=unit, met=measured <= goal
    )


def at_least(name: str, measured: float, goal: float, unit: str) -> Target:
    """Make a target that is met by large values."""
    return Target(
        name=name, goal=f">= {goal:g} {unit}", measured=measured, unit=unit, met=measured >= goal
    )


def time_calls(function: Callable[[Any], object], arguments: Sequence[Any], n: int) -> list[int]:
    """Time ``n`` calls one by one, with the arguments in turn. Each sample has one clock in it."""
    clock = time.perf_counter_ns
    samples = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(n):
            argument = arguments[i % len(arguments)]
            start = clock()
            function(argument)
            samples.append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return samples


# The machine.


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _first_line(path: str, prefix: str = "") -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.startswith(prefix)), None)


def commit() -> str:
    """Short commit of the source tree, "+dirty" if it has changes, "unknown" without git."""
    top = _output("git", "rev-parse", "--show-toplevel")
    # An installed package may lie inside the repository of another project.
    if top is None or Path(top) != ROOT:
        return "unknown"
    name = _output("git", "rev-parse", "--short=10", "HEAD") or "unknown"
    # Results are written here, and must not make the next one dirty.
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{name}+dirty" if changed else name


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"torch": None}
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda_runtime": torch.version.cuda}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = _output("nvidia-smi", *query)
    return facts


def portable_command(words: Sequence[str]) -> str:
    """Write a command as anyone can repeat it: without the folders of this machine.

    >>> portable_command(["python", "/home/me/.venv/bin/vattn", "replay", "/data/a.csv"])
    'vattn replay a.csv'
    """
    short = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(short[1:] if short[1:2] == ["vattn"] else short)


def environment(commit_name: str | None = None) -> dict[str, Any]:
    """Return everything a reader needs to judge, or to repeat, a figure."""
    cpu = _first_line("/proc/cpuinfo", "model name") or platform.processor()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_name or commit(),
        "vattn": vattn.__version__,
        "command": portable_command(["python", *sys.orig_argv[1:]]),
        "cpu": cpu.partition(":")[2].strip() or cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "huge_pages_shmem": _first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "max_map_count": _first_line("/proc/sys/vm/max_map_count"),
        **_torch_facts(),
    }


def skip_reason(device: str) -> str | None:
    """Say why ``device`` cannot be measured; None if it can."""
    if not device.startswith("cuda"):
        return None
    try:
        import torch
    except ImportError:
        return "skipped: no torch"
    return None if torch.cuda.is_available() else "skipped: no CUDA device"


# What comes out.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it works; no figures"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"folder for what is written (default: {RESULTS})"
    )
    parser.add_argument("--commit", help="what to record as the commit where there is no git")


def save(
    name: str,
    options: argparse.Namespace,
    env: dict[str, Any],
    measurements: Sequence[Measurement] = (),
    targets: Sequence[Target] = (),
    **more: Any,
) -> Path:
    """Write ``<out>/<name>-<date>-<commit>.json`` and print where it is."""
    stamp = env["date"].replace(":", "").replace("-", "")[:15]
    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / f"{name}-{stamp}-{env['commit'].replace('+', '-')}.json"
    record = {
        "schema": SCHEMA,
        "benchmark": name,
        "device": getattr(options, "device", None),
        "quick": options.quick,
        "environment": env | {"load_after": os.getloadavg()[0]},
        "unit": "ns",
        "measurements": [asdict(measurement) for measurement in measurements],
        "targets": [asdict(target) for target in targets],
        **more,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return path


console = Console(width=None if sys.stdout.isatty() else 140)


def duration(ns: float) -> str:
    """Write nanoseconds with three digits and a unit that fits."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.0f} ns"


def print_measurements(title: str, measurements: Sequence[Measurement]) -> None:
    """Print a table, each line with the limit beside it."""
    medians = {measurement.name: measurement.ns.median for measurement in measurements}
    table = Table(title=title, title_justify="left")
    table.add_column("what", overflow="fold")
    for heading in ("n", "min", "median", "p99", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("calls", overflow="fold")
    for m in measurements:
        limit = "" if m.limit is None else f"{m.limit} {duration(medians[m.limit])}"
        calls = ", ".join(f"{count} {name}" for name, count in m.calls.items())
        times = (duration(m.ns.min), duration(m.ns.median), duration(m.ns.p99))
        table.add_row(m.what, str(m.ns.n), *times, limit, calls)
    console.print(table)


def print_targets(targets: Sequence[Target]) -> None:
    """Print goals and what came of them."""
    table = Table(title="Targets", title_justify="left")
    for heading in ("target", "goal", "measured", ""):
        table.add_column(heading, no_wrap=heading != "target")
    for t in targets:
        verdict = "[green]met[/]" if t.met else "[red]missed[/]"
        table.add_row(t.name, t.goal, f"{t.measured:.3g} {t.unit}", verdict)
    console.print(table)


def progress(items: Sequence[Any], what: str) -> Iterator[Any]:
    """Iterate with a bar on a terminal, with one line where there is none."""
    err = Console(stderr=True)
    if not err.is_terminal:
        err.print(f"{what} ({len(items)})", highlight=False)
    yield from track(items, what, console=err, transient=True, disable=not err.is_terminal)
