"""The questions survive one another, and what they found is kept."""

from __future__ import annotations

import argparse
import json
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_questions import command
from benchmarks.gpu_questions.answers import Answer, Evidence, Question
from benchmarks.gpu_questions.one import ask_here
from benchmarks.gpu_questions.questions import QUESTIONS

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")


@without_gpu
def test_without_a_gpu_every_question_is_skipped(tmp_path: Path) -> None:
    assert command.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.glob("gpu_questions-*.json")
    record = json.loads(path.read_text())
    assert [answer["name"] for answer in record["answers"]] == list(QUESTIONS)
    assert {answer["status"] for answer in record["answers"]} == {"skipped: no CUDA device"}
    for answer in record["answers"]:
        assert set(answer) == set(vars(Answer("", "")))
        assert answer["answer"] is None


def child(code: str) -> list[str]:
    """A process in place of the one that asks; its arguments are a name and a file."""
    return [sys.executable, "-c", f"import sys, json, os, time\nfile = sys.argv[2]\n{code}"]


RECORD = {"name": "q", "question": "Is it?", "said": "so", "evidence": {"n": 1}, "seconds": 1.0}
WRITE = "open(file, 'w').write(json.dumps({record!r}))\n"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("", "answered", "so"),
        ("os._exit(3)", "failed", "its process ended with 3"),
        ("os.kill(os.getpid(), 11)", "failed", "its process ended with -11"),
        ("time.sleep(60)", "failed", "it took more than 2 s"),
    ],
)
def test_a_question_that_dies_or_hangs_leaves_what_it_found(
    code: str, status: str, said: str
) -> None:
    record = RECORD | {"answer": True if not code else None}
    record["status"] = "asked" if code else "answered"
    question = Question("q", "Is it?", lambda evidence: (True, ""), limit_s=2)
    answer = command.ask(
        question, child(WRITE.format(record=record) + "print('last', flush=True)\n" + code)
    )
    assert (answer.status, answer.said) == (status, said)
    assert answer.evidence["n"] == 1
    assert answer.evidence.get("output", "").strip() == ("last" if code else "")


def test_the_questions_after_one_that_fails_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: Question) -> Answer:
        status = "failed" if question.name == "b" else "answered"
        return Answer(question.name, question.text, status == "answered" or None, "said", status)

    monkeypatch.setattr(command, "ask", ask)
    monkeypatch.setattr(command.common, "skip_reason", lambda device: None)
    chosen = [Question(name, "Is it?", lambda evidence: (True, "")) for name in "abc"]
    chosen.append(Question("d", "Is it?", lambda evidence: (True, ""), needs_module="no_such"))
    options = argparse.Namespace(
        out=tmp_path, commit="x", quick=False, device="cuda:0", deadline=60.0
    )
    assert command.ask_all(chosen, options) == 1
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert [answer["status"] for answer in record["answers"]] == [
        *("answered", "failed", "answered", "skipped: no no_such"),
    ]
    assert record["summary"] == "2 of 4 answered; could not tell: b"
    late = argparse.Namespace(**(vars(options) | {"deadline": -1.0}))
    assert command.ask_all(chosen[:1], late) == 1


@pytest.mark.skipif(find_library("cuda") is not None, reason="there is a driver to ask")
def test_a_question_is_asked_in_a_process_of_its_own() -> None:
    answer = command.ask(QUESTIONS["partial_handle"])
    assert (answer.status, answer.answer) == ("failed", None)
    assert answer.said.startswith("OSError: libcuda.so.1")


def test_an_error_is_a_finding(tmp_path: Path) -> None:
    def ask(evidence: Evidence) -> tuple[bool | None, str]:
        evidence.note(before=1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    answer = ask_here(Question("q", "Is it?", ask), tmp_path / "answer")
    assert answer.failed
    assert answer.said == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert json.loads((tmp_path / "answer").read_text())["evidence"]["before"] == 1
