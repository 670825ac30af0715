"""Attention over vattn's tensors, and over others: decode and prefill, by shape and length.

The same kernel reads the same keys and values from vattn's rows (both layouts, both orders), from a
torch.empty of exactly their size, from rows reserved in full, and from blocks through paged
kernels. All subjects take turns within each round; a ratio is the median over rounds. Each sample
is the attention of one layer; calls go around layers, so that caches are as cold as in a forward
pass. A subject whose output differs from the others' has no figure, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from vattn.bench import common
from vattn.bench.attention import cases, picture, report
from vattn.bench.attention.cases import Case, NotMeasured
from vattn.bench.attention.measure import (
    CpuClock,
    CudaClock,
    OutOfTime,
    check_outputs,
    take_turns,
)
from vattn.bench.attention.results import Result, summarize
from vattn.bench.attention.subjects import set_up
from vattn.bench.attention.verdict import LayoutRatio, decide
from vattn.errors import DriverError
from vattn.models import MODELS

BUDGET_S = {"cpu": 345.0, "cuda": 110.0}
MAX_ROUNDS, QUICK_ROUNDS = 100, 3


@dataclass
class Run:
    """What has been measured, and what has not."""

    device: str
    rounds: int
    ends: float
    results: list[Result] = field(default_factory=list)
    not_measured: list[NotMeasured] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    # Seconds for each unit of Case.effort: a guess, then what the last case of the phase took.
    _s_per_effort: dict[str, float] = field(
        default_factory=lambda: {"decode": 4 / cases.GIB, "prefill": 0.3 / cases.GIB}
    )

    def left(self) -> float:
        """Seconds until the budget is used up."""
        return self.ends - time.monotonic()

    def measure_all(self, selected: Sequence[Case]) -> None:
        """Measure what fits, in the order given; each case gets its part of the time left."""
        room, fitting = cases.room_of(self.device), []
        for case in selected:
            reason = cases.refusal(case, room)
            if reason is None:
                fitting.append(case)
            else:
                self.not_measured.append(NotMeasured(case.name, reason))
        for at, case in enumerate(common.progress(fitting, "attention")):
            expected_s = case.effort * self._s_per_effort[case.phase]
            try:
                if self.left() <= 0:
                    raise OutOfTime("the time is up")
                if 2 * expected_s > self.left():  # some must be left for measuring
                    raise OutOfTime(
                        f"preparing takes about {expected_s:.0f} s, {self.left():.0f} s were left"
                    )
                self._measure(case, n_left=len(fitting) - at)
            except (OutOfTime, torch.OutOfMemoryError, MemoryError) as error:
                self.not_measured.append(NotMeasured(case.name, str(error)))
            except DriverError as error:
                self.errors.append(f"{case.name}: {error}")
            gc.collect()  # tensors keep their reservations until nothing names them
            if self.device != "cpu":
                torch.cuda.empty_cache()  # vattn takes its pages from the driver, not from torch

    def _measure(self, case: Case, n_left: int) -> None:
        started = time.monotonic()
        with set_up(case, self.device) as setup:
            subjects, missing, errors = check_outputs(setup)
            self._s_per_effort[case.phase] = (time.monotonic() - started) / case.effort
            self.kernels |= setup.kernels
            self.errors += errors
            self.not_measured += [
                NotMeasured(f"{case.name}/{entry.name}", entry.reason)
                for entry in (*setup.missing, *missing)
            ]
            if not subjects:
                return
            samples = take_turns(
                subjects,
                setup.limit,
                CpuClock() if self.device == "cpu" else CudaClock(),
                max_rounds=self.rounds,
                seconds=max(0.0, self.left()) / n_left,
                deadline_s=self.left(),
            )
            self.results.append(summarize(case, subjects, samples))


def options_of(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    common.add_arguments(parser)
    known = ",".join(MODELS)
    parser.add_argument("--models", help=f"some of {known} (default: by device)")
    parser.add_argument("--tokens", help="tokens in each row, such as 1K,8K (default: by device)")
    parser.add_argument("--batches", help="rows, such as 1,16 (default: by device)")
    parser.add_argument("--dtypes", help=f"some of {','.join(cases.DTYPE_NAMES)}")
    parser.add_argument("--phases", default=",".join(cases.PHASES), help="decode,prefill")
    parser.add_argument(
        "--budget-s",
        type=float,
        help="seconds after which it stops and lists what was not measured "
        f"(default: {BUDGET_S['cpu']:g} on the CPU, {BUDGET_S['cuda']:g} on a GPU)",
    )
    options = parser.parse_args(arguments)
    if options.device.partition(":")[0] not in BUDGET_S:
        raise ValueError(f"--device is {options.device!r}, expected cpu or cuda:N")
    if options.budget_s is not None and options.budget_s <= 0:
        raise ValueError(f"--budget-s is {options.budget_s:g}, expected seconds above 0")
    return options


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """List the cases that the options name, cheap ones first."""
    return cases.chosen(
        options.device,
        cases.names(options.phases, cases.PHASES, "--phases"),
        models=options.models and cases.names(options.models, cases.SHAPES, "--models"),
        dtypes=options.dtypes and cases.names(options.dtypes, cases.DTYPE_NAMES, "--dtypes"),
        tokens=options.tokens and cases.counts(options.tokens, "--tokens"),
        batches=options.batches and cases.counts(options.batches, "--batches"),
        quick=options.quick,
    )


def main(arguments: list[str] | None = None, *, prog: str = "vattn bench attention") -> int:
    """Measure, print, save, draw.

    Returns
    -------
    int
        Exit status 1 if a subject computed something else than the others, or the driver failed.
    """
    started = time.monotonic()
    options = options_of(arguments, prog)
    selected = chosen_cases(options)
    skipped = common.skip_reason(options.device)
    if skipped:
        common.console.print(f"attention on {options.device}: {skipped}")
        return 0
    env = common.environment(options.commit) | {"threads": torch.get_num_threads()}
    kind = options.device.partition(":")[0]
    budget_s = options.budget_s or BUDGET_S[kind]
    rounds = QUICK_ROUNDS if options.quick else MAX_ROUNDS
    run = Run(options.device, rounds, started + budget_s)
    on_gpu = contextlib.nullcontext() if kind == "cpu" else torch.cuda.device(options.device)
    with torch.inference_mode(), on_gpu:
        run.measure_all(selected)
    verdict = decide(options.device, [] if options.quick else _decode_layouts(run.results))
    report.show(run.results, run.not_measured, run.errors, verdict)
    goals = report.targets(options.device, run.results)
    if goals:
        common.print_targets(goals)
    path = common.save(
        "attention",
        options,
        env,
        [measurement for result in run.results for measurement in result.measurements],
        goals,
        budget_s=budget_s,
        reserved_over_live=cases.RESERVED,
        kernels=run.kernels,
        cases=[result.record() for result in run.results],
        not_measured=[asdict(entry) for entry in run.not_measured],
        errors=run.errors,
        verdict=asdict(verdict),
    )
    for file in picture.draw(run.results, options.device, options.out, path.stem):
        common.console.print(f"written: {file}", highlight=False, soft_wrap=True)
    return 1 if run.errors else 0


def _decode_layouts(results: Sequence[Result]) -> list[LayoutRatio]:
    return [r for result in results if result.case.phase == "decode" for r in result.layouts]
