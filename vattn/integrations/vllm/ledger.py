"""Which frames of the KV buffer have memory: the scheduler's account of it.

The scheduler decides, the workers map. A frame is backed before a block of it is handed out, and
all workers have said so: when the scheduler goes on, the memory is there. A worker that has none
left is not an error but a refusal, after which vLLM waits or preempts as if the cache were full.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vattn.integrations.vllm.geometry import Geometry, runs_of

# How long a refusal is believed. Asking again costs a call to every worker, and an engine with
# nothing to run asks in a tight loop.
REFUSAL_S = 0.05
# Kind of a worker's answer that means: not now.
REFUSAL = "OutOfPagesError"


class OutOfStepError(RuntimeError):
    """Scheduler and workers disagree about what is mapped, which is a bug of vattn."""


ONE_PROCESS = (
    "vLLM remembers attention backends for the life of a process, and this process had an engine "
    "that was set up otherwise; start each engine in a process of its own, as vLLM does by default"
)


@dataclass
class Counters:
    """Events since the start."""

    mapped_pages: int = 0
    unmapped_pages: int = 0
    refusals: int = 0
    budget_waits: int = 0


def bound(ledger: PageLedger | None) -> PageLedger:
    """Return the ledger of a pool that was bound to one.

    Raises
    ------
    RuntimeError
        It was not: the engine has our specs, but not our connector.
    """
    if ledger is None:
        raise RuntimeError(f"no memory of vattn is bound to these blocks: {ONE_PROCESS}")
    return ledger


class PageLedger:
    """Backs frames within a budget.

    Parameters
    ----------
    geometry : Geometry
        Frames and their pages.
    budget_pages, floor_pages : int
        Pages that may be mapped, and that stay mapped when the engine is idle.
    minimum_pages : int
        Smallest budget: what one request of the longest length needs.
    call : callable
        Sends a request to all workers at the same time and returns their answers.

    Notes
    -----
    ``lock`` guards it: the scheduler's thread holds it while it backs frames, the control thread
    while it takes some between two steps, that is while ``stepping`` is False.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        budget_pages: int,
        floor_pages: int,
        minimum_pages: int,
        call: Callable[[dict[str, object]], list[dict[str, object]]],
    ) -> None:
        self.geometry = geometry
        self.minimum_pages = minimum_pages
        self.floor_pages = floor_pages
        self.counters = Counters()
        self.lock = threading.RLock()
        self.stepping = False
        self.frame_pages = geometry.max_frame_pages
        self.mapped_pages = 0
        self.budget_pages = min(budget_pages, geometry.n_pages)
        self._call = call
        self._frames_on = np.zeros(geometry.n_pages, np.int32)  # backed ones; for each stripe once
        self._backed = np.zeros(geometry.n_frames, np.bool_)
        self._n_backed = 0
        self._lowest_unbacked = 0  # no frame below it is without memory
        self._refused_until = 0.0
        self._refused_ahead_until = 0.0
        self._broken: str | None = None

    def step_begins(self) -> None:
        """Keep other threads from taking memory until the step has been scheduled."""
        with self.lock:
            self.stepping = True

    def step_ends(self) -> None:
        """Let other threads take memory again."""
        with self.lock:
            self.stepping = False

    def set_budget(self, pages: int) -> None:
        """Set the budget. What is mapped beyond it is for the caller to give back.

        Raises
        ------
        ValueError
            Less than one request of the longest length needs: it would wait for ever. Or more than
            there are addresses for.
        """
        if pages > self.geometry.n_pages:
            raise ValueError(
                f"the budget is {pages * self.page_bytes} bytes, but vLLM has addresses for "
                f"{self.geometry.n_pages * self.page_bytes} only; give less, or serve with a "
                "higher --num-gpu-blocks-override"
            )
        if pages < self.minimum_pages:
            raise ValueError(
                f"the budget is {pages * self.page_bytes} bytes, less than the "
                f"{self.minimum_pages * self.page_bytes} that one request of the longest length "
                "needs; give more, or serve with a lower --max-model-len"
            )
        with self.lock:
            self.budget_pages = pages
            self._refused_until = 0.0

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.geometry.page_bytes

    @property
    def room(self) -> int:
        """Pages that may still be mapped; 0 for a moment after a worker refused."""
        if time.monotonic() < self._refused_until:
            return 0
        return max(0, self.budget_pages - self.mapped_pages)

    @property
    def room_ahead(self) -> int:
        """Pages that may still be mapped although nobody waits for them."""
        return 0 if time.monotonic() < self._refused_ahead_until else self.room

    @property
    def over(self) -> int:
        """Pages mapped beyond the budget, after it was lowered."""
        return max(0, self.mapped_pages - self.budget_pages)

    def backed(self, frame: int) -> bool:
        """Whether a frame has memory."""
        return bool(self._backed[frame])

    @property
    def n_backed(self) -> int:
        """How many frames have memory."""
        return self._n_backed

    def count_backed(self, first: int, stop: int) -> int:
        """How many of the frames ``first`` to ``stop - 1`` have memory."""
        return int(np.count_nonzero(self._backed[first:stop]))

    def unbacked_frames(self) -> Iterator[int]:
        """Frames without memory, ascending."""
        for frame in range(self._lowest_unbacked, self.geometry.n_frames):
            if not self._backed[frame]:
                yield frame

    def backed_frames(self) -> list[int]:
        """Frames that have memory, ascending."""
        return [int(frame) for frame in np.flatnonzero(self._backed)]

    def pages_missing(self, frames: Iterable[int]) -> int:
        """Pages that backing these frames would map."""
        return len(self._missing(frames))

    def pages_freed(self, frames: Iterable[int]) -> int:
        """Pages that taking the memory from these frames would unmap."""
        return len(self._no_longer_used(frames))

    def enough_of(self, frames: Iterable[int], n_pages: int) -> list[int]:
        """Take frames, in their order, until so many pages would be unmapped with them; or all."""
        left = self._frames_on.copy()
        enough: list[int] = []
        for frame in frames:
            if n_pages <= 0:
                break
            pages, uses = np.unique(self.geometry.uses_by([frame]), return_counts=True)
            left[pages] -= uses
            n_pages -= int(np.count_nonzero(left[pages] == 0))
            enough.append(frame)
        return enough

    def hold(self, pages: NDArray[np.int64], n_physical: int) -> None:
        """Record pages that the workers mapped themselves, for good: those of the null block.

        Parameters
        ----------
        pages : array of int
            Their indices.
        n_physical : int
            Pages of memory that they take: fewer if some are one.
        """
        with self.lock:
            self._frames_on[pages] += 1
            self.mapped_pages += n_physical
            self.floor_pages = max(self.floor_pages, self.mapped_pages)

    def back(self, frames: Sequence[int], *, ahead: bool = False) -> bool:
        """Give memory to frames that have none, on all workers, or to none of them.

        Parameters
        ----------
        frames : sequence of int
            Without memory.
        ahead : bool
            Nobody waits for it: if a worker has not so much, somebody may still get less.

        Returns
        -------
        bool
            False: the budget has no room, or a worker has no memory. Nothing changed.
        """
        with self.lock:
            self.check_in_step()
            pages = self._missing(frames)
            if len(pages) > self.room:
                self.counters.budget_waits += 1
                return False
            if len(pages) and not self._map(pages):
                self.counters.refusals += 1
                self._refused_ahead_until = time.monotonic() + REFUSAL_S
                if not ahead:
                    self._refused_until = self._refused_ahead_until
                return False
            self._commit(frames, +1)
            self.mapped_pages += len(pages)
            self.counters.mapped_pages += len(pages)
            return True

    def unback(self, frames: Sequence[int]) -> int:
        """Take the memory from frames that have some. Pages that were unmapped.

        The blocks of the frames must have no reference: vLLM gives the last one back when no step
        in flight uses the block. The workers wait for what is on their stream.
        """
        with self.lock:
            self.check_in_step()
            pages = self._no_longer_used(frames)
            if len(pages):
                self._checked(self._call({"op": "unmap", "runs": runs_of(pages)}))
            self._commit(frames, -1)
            self.mapped_pages -= len(pages)
            self._refused_until = 0.0
            self.counters.unmapped_pages += len(pages)
            return len(pages)

    def check_in_step(self) -> None:
        """Check that no worker has failed to give memory back, on whichever thread that was.

        Raises
        ------
        OutOfStepError
            One has. Blocks that are thought to have memory may have none, so the engine must end.
        """
        if self._broken is not None:
            raise OutOfStepError(self._broken)

    def _missing(self, frames: Iterable[int]) -> NDArray[np.int64]:
        pages = np.unique(self.geometry.uses_by(frames))
        return pages[self._frames_on[pages] == 0]

    def _no_longer_used(self, frames: Iterable[int]) -> NDArray[np.int64]:
        pages, uses = np.unique(self.geometry.uses_by(frames), return_counts=True)
        return pages[self._frames_on[pages] == uses]

    def _commit(self, frames: Sequence[int], change: int) -> None:
        np.add.at(self._frames_on, self.geometry.uses_by(frames), change)
        self._backed[list(frames)] = change > 0
        self._n_backed += change * len(frames)
        if change < 0:
            self._lowest_unbacked = min([self._lowest_unbacked, *frames])
        while (
            self._lowest_unbacked < self.geometry.n_frames and self._backed[self._lowest_unbacked]
        ):
            self._lowest_unbacked += 1

    def _map(self, pages: NDArray[np.int64]) -> bool:
        runs = runs_of(pages)
        answers = self._call({"op": "map", "runs": runs})
        done = [answer for answer in answers if "error" not in answer]
        if len(done) == len(answers):
            return True
        # Those that could do it have to give it back: workers always have the same pages mapped.
        self._checked(
            self._call({"op": "undo", "runs": runs}) if done else [],
        )
        failed = next(answer for answer in answers if "error" in answer)
        if failed.get("kind") != REFUSAL:
            raise RuntimeError(f"a worker could not map KV memory: {failed['error']}")
        return False

    def _checked(self, answers: list[dict[str, object]]) -> None:
        for answer in answers:
            if "error" in answer:
                self._broken = f"a worker could not give KV memory back: {answer['error']}"
        self.check_in_step()
