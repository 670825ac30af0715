"""The suite's command line."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from benchmarks import RESULTS, gpu_suite
from benchmarks.gpu_questions.answers import WORDS
from benchmarks.gpu_suite.parts import DEADLINE_S, FLASH_ATTN, find_sdist, parts
from benchmarks.gpu_suite.processes import Outcome, environment_of_parts, run_all
from vattn.bench import common
from vattn.bench.common import console


def print_outcomes(outcomes: list[Outcome]) -> None:
    """Print one line for each part, and one for each answer."""
    table = Table(title="gpu_suite", title_justify="left")
    for heading in ("part", "outcome", "seconds", "summary"):
        table.add_column(heading, overflow="fold")
    for o in outcomes:
        names = "".join(f"\n{name}" for name in o.failures)
        # The name of a test has square brackets, which rich would take for markup.
        table.add_row(o.name, o.status, f"{o.seconds:.0f}", escape(o.summary + names))
        answers = o.result.get("answers", []) if isinstance(o.result, dict) else []
        for answer in answers:
            said = f"{answer['name']}: {WORDS[answer['answer']]}. {answer['said']}"
            table.add_row("", "", f"{answer['seconds']:.0f}", escape(said))
    console.print(table)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [part.name for part in parts(work=Path())]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=gpu_suite.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes; no figures")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder for the JSON file and the log (default: benchmarks/results)",
    )
    parser.add_argument("--commit", help="what to record as the commit where there is no git")
    for option, what in (("--skip", "leave out a part"), ("--only", "run this part, not all")):
        parser.add_argument(option, action="append", default=[], choices=names, help=what)
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds for everything")
    parser.add_argument("--flash-attn", type=Path, help="flash_attn-*.tar.gz from PyPI, to build")
    parser.add_argument("--carry", type=Path, help="folder in which that may be")
    options = parser.parse_args(arguments)
    if options.flash_attn and not options.flash_attn.is_file():
        parser.error(f"--flash-attn: there is no file {options.flash_attn}")
    return options


def main(arguments: list[str] | None = None, *, started: float | None = None) -> int:
    """Run the suite; ``started`` is when its time began to count."""
    started = time.monotonic() if started is None else started
    options = _parse(arguments)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu_suite.log"
    log.write_text("")
    env = common.environment(options.commit)

    def save(outcomes: list[Outcome]) -> Path:
        listed = [asdict(outcome) for outcome in outcomes]
        return common.save("gpu_suite", options, env, parts=listed)

    def save_quietly(outcomes: list[Outcome]) -> None:
        # Whoever ends the suite before its time finds what there was.
        with console.capture():
            save(outcomes)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, lacks = find_sdist(options.flash_attn, options.carry)
        listed = parts(work=work, quick=options.quick, sdist=sdist, lacks=lacks)
        wanted = options.only or [part.name for part in listed]
        chosen = [p for p in listed if p.name in wanted and p.name not in options.skip]
        outcomes = run_all(
            chosen,
            started + options.deadline,
            log,
            common.skip_reason("cuda:0"),
            environment_of_parts(work / FLASH_ATTN / "site"),
            save_quietly,
        )
    print_outcomes(outcomes)
    save(outcomes)
    failed = [outcome.name for outcome in outcomes if outcome.failed]
    console.print(f"failed: {', '.join(failed)}" if failed else "no part failed")
    return 1 if failed else 0
