"""The yardstick: whole blocks under one LRU, with no loss of memory to anything."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from benchmarks.sharing.requests import BLOCK_TOKENS, Request
from vattn.errors import OutOfPagesError


@dataclass
class _Running:
    shared: list[int] = field(default_factory=list)  # blocks that others may find
    private: int = 0  # blocks that nobody else can have: not full, or of the output


class IdealBlockCache:
    """Blocks of 512 tokens, shared as soon as they are computed, the least recently used given up.

    A block of a running request stays. When the request ends, its prompt's full blocks can still be
    found, its other ones are free at once. Of two blocks that were last used together the one
    further behind goes first, as it is of no use without the other.

    Parameters
    ----------
    capacity_blocks : int
        Memory, in blocks.
    """

    name = "ideal"

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()  # nobody runs on it; oldest first
        self._pins: dict[int, int] = {}  # running requests on it
        self._private = 0
        self._running: dict[int, _Running] = {}
        self._next_handle = 0

    @property
    def used_blocks(self) -> int:
        """Blocks with anything in them."""
        return len(self._idle) + len(self._pins) + self._private

    def match(self, request: Request) -> tuple[int, int]:
        """Start a request. Returns its handle, and how many tokens need not be computed."""
        running = _Running()
        for block in request.full_blocks:
            if block not in self._pins and block not in self._idle:
                break
            self._pin(block)
            running.shared.append(block)
        handle = self._next_handle
        self._next_handle += 1
        self._running[handle] = running
        return handle, min(len(running.shared) * BLOCK_TOKENS, request.prompt_tokens - 1)

    def grow(self, handle: int, tokens: int) -> None:
        """Take blocks for so many tokens in all, or raise OutOfPagesError and change nothing."""
        running = self._running[handle]
        needed = -(-tokens // BLOCK_TOKENS) - len(running.shared) - running.private
        if needed <= 0:
            return
        free = self.capacity_blocks - self.used_blocks
        if needed > free + len(self._idle):
            available = free + len(self._idle)
            raise OutOfPagesError(
                f"need {needed} blocks, {available} free", needed=needed, free=available
            )
        for _ in range(needed - free):
            self._idle.popitem(last=False)
        running.private += needed
        self._private += needed

    def insert(self, handle: int, request: Request) -> None:
        """Let others find the full blocks of the prompt, which ``grow`` has given memory."""
        running = self._running[handle]
        for block in request.full_blocks[len(running.shared) :]:
            self._pin(block)  # if another request had it by now, this one's copy is free
            running.shared.append(block)
            running.private -= 1
            self._private -= 1

    def end(self, handle: int) -> None:
        """End a request."""
        running = self._running.pop(handle)
        self._private -= running.private
        for block in reversed(running.shared):
            self._pins[block] -= 1
            if self._pins[block] == 0:
                del self._pins[block]
                self._idle[block] = None

    def _pin(self, block: int) -> None:
        self._idle.pop(block, None)
        self._pins[block] = self._pins.get(block, 0) + 1
