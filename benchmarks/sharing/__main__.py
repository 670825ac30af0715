"""What sharing saves and costs, each beside its yardstick, in one run on the host.

Parts: ``prefix``, a trace through the prefix cache beside an ideal cache of whole blocks; ``fork``,
beside copying the row; ``samples``, memory of eight samples of a prompt beside that of one;
``window``, memory of rows with a sliding window beside full ones. Draws a picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.hf_generate.results import Part
from benchmarks.sharing import fork, prefix, report, samples, window
from benchmarks.sharing.requests import Request, facts, made_up, read_requests
from vattn.bench import common
from vattn.units import parse_bytes

PARTS = ("prefix", "fork", "samples", "window")
QUICK_REQUESTS = 60


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_arguments(parser)
    parser.set_defaults(out=RESULTS)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="only these")
    of_prefix = parser.add_argument_group("prefix").add_argument
    defaults = prefix.Sizes()
    what = "a Mooncake JSONL with hash_ids; made-up requests with --quick"
    of_prefix("--trace", type=Path, help=what)
    of_prefix("--requests", type=int, metavar="N", help="only the first N of the trace")
    budgets = ",".join(defaults.budgets)
    of_prefix("--memory", default=budgets, help=f"budgets (default: {budgets})")
    of_prefix("--at-a-time", type=int, help=f"requests (default: {defaults.at_a_time})")
    of_prefix("--rows", type=int, help=f"of the cache (default: {defaults.rows})")
    of_prefix("--max-extent", help=f"largest piece mapped (default: {defaults.max_extent})")
    of_prefix("--lookahead", type=int, help=f"tokens (default: {defaults.lookahead})")
    of_prefix("--block-tokens", type=int, help="of vattn's prefix cache (default: its own)")
    options = parser.parse_args(arguments)
    if "prefix" in options.part and options.trace is None and not options.quick:
        parser.error(f"prefix needs --trace FILE; without: --part {' '.join(PARTS[1:])}")
    if options.requests is not None and options.requests < 1:
        parser.error(f"--requests is {options.requests}, expected at least 1")
    for budget in options.memory.split(","):
        parse_bytes(budget, "--memory")
    return options


def _prefix_sizes(options: argparse.Namespace) -> prefix.Sizes:
    names = ("at_a_time", "rows", "max_extent", "lookahead", "block_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(prefix.Sizes(), budgets=tuple(options.memory.split(",")), **given)


def _requests(options: argparse.Namespace) -> list[Request]:
    if options.trace is None:
        return made_up(options.requests or QUICK_REQUESTS)
    return read_requests(options.trace, options.requests)


def _sizes(quick: bool) -> tuple[fork.Sizes, samples.Sizes, window.Sizes]:
    if not quick:
        return fork.Sizes(), samples.Sizes(), window.Sizes()
    return (
        fork.Sizes(tokens=(256,), forks=3, copies=2, touches=1, probe_bytes=2**20),
        samples.Sizes(prompts=(256, 249), own_tokens=8),
        window.Sizes(window=128, noted=(4, 6), rows=1),
    )


def _measure(options: argparse.Namespace, notes: dict[str, Any]) -> dict[str, Part]:
    """Run the chosen parts and print the tables of each when it is done."""
    of_fork, of_samples, of_window = _sizes(options.quick)
    of_prefix = _prefix_sizes(options)
    requests: list[Request] = []
    if "prefix" in options.part:
        requests = _requests(options)
        trace = "made up" if options.trace is None else options.trace.name
        notes["trace"] = {"name": trace, **facts(requests)}
    run: dict[str, tuple[object, Callable[[], Part], Callable[[Part], None]]] = {
        "prefix": (of_prefix, lambda: prefix.measure(requests, of_prefix), report.print_prefix),
        "fork": (of_fork, lambda: fork.measure(of_fork), report.print_fork),
        "samples": (of_samples, lambda: samples.measure(of_samples), report.print_samples),
        "window": (of_window, lambda: window.measure(of_window), report.print_window),
    }
    parts = {}
    for name in [part for part in PARTS if part in options.part]:
        sizes, measure, show = run[name]
        start = time.perf_counter()
        part = parts[name] = measure()
        notes["seconds"][name] = time.perf_counter() - start
        notes["sizes"][name] = asdict(sizes)  # type: ignore[call-overload]
        show(part)
    return parts


def _draw(parts: dict[str, Part], stem: Path) -> None:
    try:
        from benchmarks.sharing import picture
    except ImportError as error:
        common.console.print(f"no picture: {error}", markup=False, highlight=False)
        return
    for path in picture.draw({name: part.rows for name, part in parts.items()}, stem):
        common.console.print(f"drawn: {path}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save, draw."""
    options = _parse(arguments)
    if options.device != "cpu":
        common.console.print(f"sharing on {options.device}: skipped: it measures the host")
        return 0
    env = common.environment(options.commit)
    notes: dict[str, Any] = {"sizes": {}, "seconds": {}}
    parts = _measure(options, notes)
    measurements = [measurement for part in parts.values() for measurement in part.measurements]
    targets = [target for part in parts.values() for target in part.targets]
    missing = [entry for part in parts.values() for entry in part.missing]
    if targets:
        common.print_targets(targets)
    rows = {name: part.rows for name, part in parts.items()}
    path = common.save(
        "sharing", options, env, measurements, targets, missing=missing, **notes, **rows
    )
    _draw(parts, path.with_suffix(""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
