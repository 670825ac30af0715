"""What a question is, and what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORDS = {True: "yes", False: "no", None: "could not tell"}


@dataclass
class Answer:
    """A question, its answer, and why. ``answer`` is None if it could not be told."""

    name: str
    question: str
    answer: bool | None = None
    said: str = "no answer yet"
    status: str = "asked"
    evidence: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it was asked and could not be answered."""
        return self.status == "failed"


class Evidence:
    """Findings, written to a file one by one: the process may not live to report them."""

    def __init__(self, answer: Answer, path: Path) -> None:
        self._answer = answer
        self._path = path
        self.save()

    def note(self, **found: Any) -> None:
        """Keep findings."""
        self._answer.evidence |= found
        self.save()

    def found(self, name: str) -> Any:
        """Return a finding."""
        return self._answer.evidence[name]

    def save(self) -> None:
        """Write the answer as it is now."""
        # First beside it: a process that is killed while it writes must not spoil what there was.
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self._answer)) + "\n")
        new.replace(self._path)


Ask = Callable[[Evidence], "tuple[bool | None, str]"]


@dataclass(frozen=True)
class Question:
    """``ask`` notes its evidence and returns the answer and one sentence."""

    name: str
    text: str
    ask: Ask
    needs_module: str | None = None
    limit_s: float = 45.0
