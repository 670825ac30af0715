"""Everything that needs a GPU, in one call of under nine minutes, on a machine without a network.

Builds the extension in place, runs the tests marked gpu, then the benchmarks. Each part is a
process with a time limit of its own; when one fails, the others still run. Needs Python 3.10 or
later with torch, pybind11, setuptools, pytest, pytest-timeout, hypothesis, numpy and rich; a C++17
compiler and make; cuda-bindings and transformers if there are. Writes
gpu_suite-<date>-<commit>.json, which holds the results of all parts, and gpu_suite.log into --out.
Without a GPU the parts that need one are skipped.

Exit status: 0 if no part failed, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import RESULTS
from vattn.bench import common
from vattn.bench.common import ROOT, console

DEADLINE_S = 530
TAIL_CHARS = 6000

SHOW_MACHINE = """
import subprocess, sys, torch
print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.is_available())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), torch.cuda.mem_get_info())
    subprocess.run(["nvidia-smi"], check=True)
subprocess.run(["g++", "--version"], check=True)
"""


@dataclass(frozen=True)
class Part:
    """One process of the suite. ``{scratch}`` in an argument is a folder for its results."""

    name: str
    limit_s: int
    arguments: tuple[str, ...]
    needs_gpu: bool = True
    needs_module: str | None = None

    def why_skip(self, gpu_missing: str | None) -> str | None:
        """Say why it cannot be run; None if it can."""
        if self.needs_gpu and gpu_missing:
            return gpu_missing
        if self.needs_module and find_spec(self.needs_module) is None:
            return f"skipped: no {self.needs_module}"
        return None


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    status: str
    seconds: float = 0.0
    summary: str = ""
    output_tail: str = ""
    result: Any = None
    failures: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "timed out", "not started")


def parts(quick: bool) -> list[Part]:
    """List what is run, in this order: what is needed first, then what matters most."""
    small = ("--quick",) if quick else ()
    out = ("--out", "{scratch}")
    junit = ("--junitxml", "{scratch}/junit.xml")
    build = ("setup.py", "build_ext", "--inplace")
    vmm = ("-m", "benchmarks.vmm_latency", *small, *out)
    step = ("-m", "benchmarks.step_latency", *small, *out)
    # Ends by itself before its limit: a part that is killed has no results.
    hf = ("-m", "benchmarks.hf_generate", *small, *out, "--dtypes", "bfloat16", "--deadline", "180")
    tests = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *junit)
    return [
        Part("machine", 60, ("-c", SHOW_MACHINE), needs_gpu=False),
        Part("build", 200, build, needs_gpu=False),
        Part("tests", 180, (*tests, "--continue-on-collection-errors", "tests")),
        Part("vmm_latency_gpu", 90, (*vmm, "--device", "cuda:0")),
        Part("step_latency_gpu", 120, (*step, "--device", "cuda:0")),
        Part("vmm_latency_host", 60, (*vmm, "--device", "cpu"), needs_gpu=False),
        Part("hf_generate_gpu", 260, (*hf, "--device", "cuda:0"), needs_module="transformers"),
    ]


def run_process(command: list[str], log: Path, limit_s: float) -> tuple[int | None, str]:
    """Run a command, output to ``log``. Status None: it took too long, and all of it was ended."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
            # Its children too: a compiler would go on, a hung kernel would hold the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, log.read_text(errors="replace")


def read_junit(path: Path) -> tuple[str, list[str], int]:
    """Read a JUnit file: a summary, the names of what failed, how many tests really ran."""
    suites = list(ET.parse(path).getroot().iter("testsuite"))
    count = {
        key: sum(int(suite.get(key, 0)) for suite in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    failures = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    ran = count["tests"] - count["skipped"]
    failed = count["failures"] + count["errors"]
    return f"{ran - failed} passed, {failed} failed, {count['skipped']} skipped", failures, ran


def run_part(part: Part, limit_s: float, log: Path) -> Outcome:
    """Run one part; never raises for what the part does."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [argument.replace("{scratch}", scratch) for argument in part.arguments]
        own_log = Path(scratch) / "log"
        status, output = run_process([sys.executable, *arguments], own_log, limit_s)
        outcome = Outcome(
            name=part.name,
            status={0: "ok", None: "timed out"}.get(status, "failed"),
            seconds=time.monotonic() - started,
            output_tail=output[-TAIL_CHARS:],
        )
        with log.open("a") as everything:
            everything.write(f"==== {part.name}: {outcome.status}\n{output}\n")
        results = sorted(Path(scratch).glob("*.json"))
        if results:
            outcome.result = json.loads(results[-1].read_text())
            outcome.summary = _summary(outcome.result)
        junit = Path(scratch) / "junit.xml"
        if junit.exists():
            outcome.summary, outcome.failures, ran = read_junit(junit)
            if ran == 0 and outcome.status == "ok":
                outcome.status, outcome.summary = "failed", "no test ran"
    return outcome


def _summary(result: dict[str, Any]) -> str:
    missed = [target["name"] for target in result["targets"] if not target["met"]]
    summary = f"{len(result['measurements'])} measurements"
    return f"{summary}; missed: {', '.join(missed)}" if missed else summary


def run_all(
    chosen: list[Part], deadline: float, log: Path, gpu_missing: str | None
) -> list[Outcome]:
    """Run the parts one after the other until the deadline."""
    outcomes = []
    for part in chosen:
        left = deadline - time.monotonic()
        skipped = part.why_skip(gpu_missing)
        if skipped:
            outcomes.append(Outcome(part.name, skipped))
        elif left < 5:
            outcomes.append(Outcome(part.name, "not started", summary="no time was left"))
        else:
            console.print(f"{part.name} (at most {min(part.limit_s, left):.0f} s)")
            outcomes.append(run_part(part, min(part.limit_s, left), log))
            if outcomes[-1].failed:
                console.print(outcomes[-1].output_tail, markup=False, highlight=False)
        console.print(f"  {part.name}: {outcomes[-1].status}")
    return outcomes


def print_outcomes(outcomes: list[Outcome]) -> None:
    """Print one line for each part, and the table of each benchmark's targets."""
    table = Table(title="gpu_suite", title_justify="left")
    for heading in ("part", "outcome", "seconds", "summary"):
        table.add_column(heading, overflow="fold")
    for o in outcomes:
        names = "".join(f"\n{name}" for name in o.failures)
        table.add_row(o.name, o.status, f"{o.seconds:.0f}", o.summary + names)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the suite."""
    names = [part.name for part in parts(quick=False)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
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
    parser.add_argument(
        "--skip", action="append", default=[], choices=names, help="leave out a part"
    )
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds for everything")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu_suite.log"
    log.write_text("")
    env = common.environment(options.commit)
    chosen = [part for part in parts(options.quick) if part.name not in options.skip]
    missing = common.skip_reason("cuda:0")
    outcomes = run_all(chosen, started + options.deadline, log, missing)
    print_outcomes(outcomes)
    common.save("gpu_suite", options, env, parts=[asdict(outcome) for outcome in outcomes])
    failed = [outcome.name for outcome in outcomes if outcome.failed]
    console.print(f"failed: {', '.join(failed)}" if failed else "no part failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
