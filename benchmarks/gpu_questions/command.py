"""Asks the questions one after the other, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks import RESULTS, gpu_questions
from benchmarks.gpu_questions.answers import WORDS, Answer, Question
from benchmarks.gpu_questions.questions import QUESTIONS
from vattn.bench import common
from vattn.bench.common import ROOT, console

ASK_ONE = (sys.executable, "-m", "benchmarks.gpu_questions.one")
TAIL_CHARS = 3000


def ask(question: Question, command: Sequence[str] = ASK_ONE) -> Answer:
    """Ask one question in a process; returns what it had found out when it ended, or was ended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record, log = Path(folder) / "answer", Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, question.name, str(record)],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            ended = _wait(process, question.limit_s)
        answer = Answer(question.name, question.text)
        if record.exists():
            answer = Answer(**json.loads(record.read_text()))
        if answer.status == "asked":  # it never came to an end
            answer.status, answer.said = "failed", ended
        if answer.failed:
            answer.evidence["output"] = log.read_text(errors="replace")[-TAIL_CHARS:]
    # With the time to start Python and the device: what it costs to ask.
    answer.seconds = time.monotonic() - started
    return answer


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> str:
    try:
        status = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"it took more than {limit_s:.0f} s"
    return f"its process ended with {status}"


def why_skip(question: Question, gpu_missing: str | None) -> str | None:
    """Say why it cannot be asked; None if it can."""
    if gpu_missing:
        return gpu_missing
    if question.needs_module and find_spec(question.needs_module) is None:
        return f"skipped: no {question.needs_module}"
    return None


def print_answers(answers: Sequence[Answer]) -> None:
    """Print one line for each question."""
    table = Table(title="gpu_questions", title_justify="left")
    for heading in ("question", "answer", "said", "seconds"):
        table.add_column(heading, overflow="fold")
    for a in answers:
        word = a.status if a.status.startswith("skipped") else WORDS[a.answer]
        table.add_row(escape(a.question), word, escape(a.said), f"{a.seconds:.0f}")
    console.print(table)


def summary(answers: Sequence[Answer]) -> str:
    """Count them."""
    told = [a for a in answers if a.status == "answered"]
    text = f"{len(told)} of {len(answers)} answered"
    untold = [a.name for a in answers if a.failed]
    return f"{text}; could not tell: {', '.join(untold)}" if untold else text


def main(arguments: list[str] | None = None) -> int:
    """Ask, print, save. Exit status 1 if a question was asked and not answered."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_questions",
        description=gpu_questions.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", choices=list(QUESTIONS), help="ask this one, not all"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument(
        "--deadline", type=float, default=400, help="seconds after which nothing more is asked"
    )
    parser.add_argument("--commit", help="what to record as the commit where there is no git")
    options = parser.parse_args(arguments)
    options.quick, options.device = False, "cuda:0"
    chosen = [QUESTIONS[name] for name in options.only or QUESTIONS]
    return ask_all(chosen, options)


def ask_all(chosen: Sequence[Question], options: argparse.Namespace) -> int:
    """Ask some questions; the file is brought up to date after each."""
    deadline = time.monotonic() + options.deadline
    gpu_missing = common.skip_reason(options.device)
    env = common.environment(options.commit)
    answers: list[Answer] = []
    for question in chosen:
        skipped = why_skip(question, gpu_missing)
        if skipped:
            answers.append(Answer(question.name, question.text, said=skipped, status=skipped))
        elif time.monotonic() > deadline:
            why = "no time was left"
            answers.append(Answer(question.name, question.text, said=why, status="failed"))
        else:
            console.print(f"{question.name} (at most {question.limit_s:.0f} s)")
            answers.append(ask(question))
            console.print(f"  {WORDS[answers[-1].answer]}: {answers[-1].said}", markup=False)
        with console.capture():
            _save(answers, options, env)
    print_answers(answers)
    _save(answers, options, env)
    return int(any(a.failed for a in answers))


def _save(answers: Sequence[Answer], options: argparse.Namespace, env: dict[str, Any]) -> None:
    listed = [asdict(answer) for answer in answers]
    common.save("gpu_questions", options, env, summary=summary(answers), answers=listed)
