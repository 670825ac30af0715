"""Runs the parts of the suite, and reads what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.parts import SANITIZER_FOUND, Part, limit_of
from vattn.bench.common import ROOT, console

TAIL_CHARS = 6000
GRACE_S = 4.0  # between asking a process to end and ending it
OWN_END = 0.8  # of its limit: when a part that can should end by itself

_TEST_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
_SANITIZER_LINE = re.compile(r"^=+ (ERROR SUMMARY: .*|Error: .*)$", re.MULTILINE)


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


def run_process(
    command: Sequence[str], log: Path, limit_s: float, env: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Run a command, output to ``log``. Status None: it took too long, and all of it was ended."""
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
            # An interrupted pytest still writes what it has; a hung kernel needs more than that.
            # Its children too: a compiler would go on, a hung kernel would hold the GPU.
            for signal_number in (signal.SIGINT, signal.SIGKILL):
                _signal_group(process.pid, signal_number)
                _wait(process, GRACE_S)
    return status, log.read_text(errors="replace")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return  # it does not listen, or is stuck in the device's driver: the suite goes on


def _signal_group(group: int, signal_number: int) -> None:
    try:
        os.killpg(group, signal_number)
    except ProcessLookupError:
        return  # all of it has ended


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


def read_progress(output: str) -> tuple[str, list[str]]:
    """Read how far a pytest run came that wrote no JUnit file, from what it printed with -v."""
    seen = dict(_TEST_LINE.findall(output))
    failures = [name for name, status in seen.items() if status in ("FAILED", "ERROR")]
    passed = list(seen.values()).count("PASSED")
    return f"{passed} passed, {len(failures)} failed before it ended", failures


def _read_results(scratch: Path, output: str, outcome: Outcome) -> None:
    paths = sorted(scratch.glob("*.json"))
    # Without a file, what was printed may hold it, perhaps after other lines.
    text = paths[-1].read_text() if paths else output
    begin = re.search(r"^\{", text, re.MULTILINE)
    try:
        outcome.result, _ = json.JSONDecoder().raw_decode(text, begin.start() if begin else 0)
    except ValueError as error:
        if paths:
            outcome.summary = f"{paths[-1].name} cannot be read: {error}"
        return
    outcome.summary = _summary(outcome.result)


def _read_tests(scratch: Path, output: str, outcome: Outcome) -> None:
    junit = scratch / "junit.xml"
    try:
        outcome.summary, outcome.failures, ran = read_junit(junit)
    except (OSError, ET.ParseError):
        outcome.summary, outcome.failures = read_progress(output)
        return
    if ran == 0 and outcome.status == "ok":
        outcome.status, outcome.summary = "failed", "no test ran"


def _summary(result: Any) -> str:
    if not isinstance(result, dict):
        return ""
    if "summary" in result:
        said = result["summary"]
        return said if isinstance(said, str) else " ".join(map(str, said))
    if "measurements" not in result:
        return ""
    missed = [t["name"] for t in result.get("targets", []) if not t["met"]]
    summary = f"{len(result['measurements'])} measurements"
    return f"{summary}; missed: {', '.join(missed)}" if missed else summary


def environment_of_parts(site: Path) -> dict[str, str]:
    """Environment in which what was built into ``site`` is found, and output comes at once."""
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(entry for entry in paths if entry)
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # The tests compile C++ with make, which would use one core.
    return {"MAKEFLAGS": f"-j{os.cpu_count()}"} | dict(os.environ) | own


def run_part(
    part: Part, limit_s: float, log: Path, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run one part; never raises for what the part does."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        fields = {"{scratch}": folder, "{seconds}": f"{limit_s * OWN_END:.0f}"}
        arguments = [_filled(argument, fields) for argument in part.arguments]
        own_log = scratch / "log"
        status, output = run_process([part.program, *arguments], own_log, limit_s, env)
        outcome = Outcome(
            name=part.name,
            status={0: "ok", None: "timed out"}.get(status, "failed"),
            seconds=time.monotonic() - started,
            output_tail=output[-TAIL_CHARS:],
        )
        with log.open("a") as everything:
            everything.write(f"==== {part.name}: {outcome.status}\n{output}\n")
        _read_results(scratch, output, outcome)
        if any("{scratch}/junit.xml" in argument for argument in part.arguments):
            _read_tests(scratch, output, outcome)
        found = _SANITIZER_LINE.findall(output)
        if status == SANITIZER_FOUND or found:
            outcome.summary += f"; {found[-1] if found else 'the sanitizer found errors'}"
        if outcome.failed and not outcome.summary:
            outcome.summary = _last_line(output)
    return outcome


def _filled(argument: str, fields: Mapping[str, str]) -> str:
    for name, value in fields.items():
        argument = argument.replace(name, value)
    return argument


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def run_all(
    chosen: Sequence[Part],
    deadline: float,
    log: Path,
    gpu_missing: str | None,
    env: Mapping[str, str] | None = None,
    after_each: Callable[[list[Outcome]], object] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the parts until the deadline: one after the other, but for those that run beside others.

    A part may take its budget and what the parts before it left over, so that nothing that hangs
    takes the time of what follows.
    """
    outcomes: list[Outcome] = []
    running: list[Future[Outcome]] = []

    def take(outcome: Outcome) -> None:
        outcomes.append(outcome)
        console.print(f"  {outcome.name}: {outcome.status} {outcome.summary}", markup=False)
        if outcome.failed:
            console.print(outcome.output_tail, markup=False, highlight=False)
        after_each(outcomes)

    with ThreadPoolExecutor() as pool:
        for i, part in enumerate(chosen):
            if part.waits:
                while running:
                    take(running.pop(0).result())
            limit_s = limit_of(chosen[i:], deadline - time.monotonic())
            skipped = part.why_skip(gpu_missing)
            if skipped:
                take(Outcome(part.name, skipped))
            elif limit_s < part.budget_s / 2:
                why = f"{max(limit_s, 0):.0f} s were left, it needs {part.budget_s:.0f}"
                take(Outcome(part.name, "not started", summary=why))
            else:
                console.print(f"{part.name} (at most {limit_s:.0f} s)")
                if part.beside:
                    running.append(pool.submit(run_part, part, limit_s, log, env))
                else:
                    take(run_part(part, limit_s, log, env))
        while running:
            take(running.pop(0).result())
    return outcomes
