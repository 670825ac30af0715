"""Asks one question, in this process: ``python -m benchmarks.gpu_questions.one NAME FILE``."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu_questions.answers import Answer, Evidence, Question


def ask_here(question: Question, path: Path) -> Answer:
    """Ask; the file has what was found, whatever becomes of it."""
    answer = Answer(question.name, question.text)
    evidence = Evidence(answer, path)
    started = time.monotonic()
    try:
        answer.answer, answer.said = question.ask(evidence)
        answer.status = "answered" if answer.answer is not None else "failed"
    except Exception as error:  # whatever it is, it belongs to the findings
        answer.status = "failed"
        answer.said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        answer.evidence["traceback"] = traceback.format_exc()[-3000:]
        traceback.print_exc()
    answer.seconds = time.monotonic() - started
    evidence.save()
    return answer


if __name__ == "__main__":
    from benchmarks.gpu_questions.questions import QUESTIONS

    sys.exit(ask_here(QUESTIONS[sys.argv[1]], Path(sys.argv[2])).failed)
