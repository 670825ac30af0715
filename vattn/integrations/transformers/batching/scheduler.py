"""Which requests take part in the next forward, and with how many tokens. No torch in here."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from vattn.errors import OutOfPagesError


class RowMemory(Protocol):
    """Rows of tokens in memory. A method that raises ``OutOfPagesError`` has changed nothing."""

    def admit(self, num_tokens: int) -> int:
        """Take a row and back it with memory for this many tokens."""

    def fork(self, row: int, shared: int, num_tokens: int) -> int:
        """Do the same, for a row that begins with the first ``shared`` tokens of another."""

    def grow(self, lengths: Mapping[int, int]) -> None:
        """Back every row named with memory for as many tokens."""

    def free(self, row: int) -> None:
        """Let go of a row."""


@dataclass(eq=False, kw_only=True)
class Task:
    """A sequence of tokens whose keys and values are to be computed.

    Parameters
    ----------
    tokens : list of int
        The prompt and what was generated so far.
    max_length : int
        Tokens that it has at most when it ends. The last one never needs memory.
    row : int, optional
        Where its keys and values are; None while it waits.
    computed : int
        How many tokens have their keys and values in the row.
    backed : int
        How many tokens the row has memory for.
    family : sequence of Task
        Tasks of the same prompt: whoever comes later takes over what is computed of it.
    shared : int
        Tokens that it takes over: all of the prompt but one, whose scores it needs.
    """

    tokens: list[int]
    max_length: int
    family: Sequence[Task] = ()
    shared: int = 0
    row: int | None = None
    computed: int = 0
    backed: int = 0

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be generated; 1 once the prompt is done."""
        return len(self.tokens) - self.computed


TaskT = TypeVar("TaskT", bound=Task)


@dataclass(frozen=True)
class Plan(Generic[TaskT]):
    """One forward.

    Parameters
    ----------
    chunks : list of (task, int)
        The tasks that take part, and how many of their tokens are computed.
    failed : list of (task, error)
        Those that do not fit into the memory even alone. They are no longer scheduled.
    """

    chunks: list[tuple[TaskT, int]]
    failed: list[tuple[TaskT, OutOfPagesError]]


class Scheduler(Generic[TaskT]):
    """First come, first served, with as many at a time as there are rows and memory for.

    A task is admitted when all of its tokens fit, so that it never waits for memory in the middle
    of a prompt, and when nobody is computing the same prompt: then it takes that over. When those
    that run have outgrown the memory, the one admitted last has to go: it waits at the front of the
    queue and is computed again. Nothing is admitted after that before a task has ended, since until
    then memory only becomes scarcer.

    Parameters
    ----------
    memory : RowMemory
        Asked for memory before every forward.
    max_batch_size : int
        Tasks that run at a time.
    max_batch_tokens : int
        Tokens in one forward. A task that generates has one; prompts share the others.
    """

    def __init__(self, memory: RowMemory, *, max_batch_size: int, max_batch_tokens: int) -> None:
        self._memory = memory
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._preempted_since_one_ended = False
        self.waiting: deque[TaskT] = deque()
        self.running: list[TaskT] = []  # in the order of admission
        self.preemptions = 0

    def add(self, task: TaskT) -> None:
        """Put a task at the end of the queue."""
        self.waiting.append(task)

    def end(self, task: TaskT) -> None:
        """Forget a task, because it is complete or not wanted any more. Its row is free at once."""
        if task.row is None:
            self.waiting.remove(task)
        else:
            self.running.remove(task)
            self._release(task)
        self._preempted_since_one_ended = False

    def plan(self) -> Plan[TaskT]:
        """Decide on the next forward, and see to it that all of its tokens have memory."""
        counts = self._grow()
        chunks = [(t, n) for t, n in zip(self.running, counts, strict=True) if n]
        admitted, failed = self._admit(self._max_batch_tokens - sum(counts))
        return Plan(chunks + admitted, failed)

    def _share_tokens(self) -> list[int]:
        """How many tokens each running task computes: first those that generate, then prompts."""
        left = self._max_batch_tokens - sum(task.missing == 1 for task in self.running)
        counts = []
        for task in self.running:
            count = 1 if task.missing == 1 else min(task.missing, left)
            if task.missing > 1:
                left -= count
            counts.append(count)
        return counts

    def _grow(self) -> list[int]:
        while self.running:
            counts = self._share_tokens()
            lengths = {}
            for task, count in zip(self.running, counts, strict=True):
                assert task.row is not None
                lengths[task.row] = max(task.backed, task.computed + count)
            try:
                self._memory.grow(lengths)
            except OutOfPagesError:
                # Even if it is the only one: then it fails to be admitted again.
                self._preempt(self.running.pop())
                continue
            for task in self.running:
                assert task.row is not None
                task.backed = lengths[task.row]
            return counts
        return []

    def _preempt(self, task: TaskT) -> None:
        self._release(task)
        task.computed = 0
        self.waiting.appendleft(task)
        self._preempted_since_one_ended = True
        self.preemptions += 1

    def _release(self, task: TaskT) -> None:
        assert task.row is not None
        self._memory.free(task.row)
        task.row, task.backed = None, 0

    def _take_row(self, task: TaskT, relatives: Sequence[Task], wanted: int) -> None:
        if task.shared and relatives:
            source = relatives[0].row
            assert source is not None
            task.row = self._memory.fork(source, task.shared, wanted)
            task.computed = task.shared
        else:
            task.row = self._memory.admit(wanted)

    def _admit(
        self, left: int
    ) -> tuple[list[tuple[TaskT, int]], list[tuple[TaskT, OutOfPagesError]]]:
        admitted: list[tuple[TaskT, int]] = []
        failed: list[tuple[TaskT, OutOfPagesError]] = []
        while left and self.waiting and len(self.running) < self._max_batch_size:
            if self.running and self._preempted_since_one_ended:
                break
            task = self.waiting[0]
            relatives = [t for t in task.family if t.row is not None]
            if any(t.computed < task.shared for t in relatives):
                break
            # One more than there are: the first forward after the prompt needs it.
            wanted = min(len(task.tokens) + 1, task.max_length - 1)
            try:
                self._take_row(task, relatives, wanted)
            except OutOfPagesError as error:
                if self.running:
                    break
                self.end(task)
                failed.append((task, error))
                continue
            self.waiting.popleft()
            self.running.append(task)
            task.backed = wanted
            count = min(left, task.missing)
            left -= count
            admitted.append((task, count))
        return admitted, failed
