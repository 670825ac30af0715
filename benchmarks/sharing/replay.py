"""One schedule for every prefix cache: who runs when, and what gives way when memory is short."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.sharing.requests import BLOCK_TOKENS, EndlessCache, Request
from vattn.errors import OutOfPagesError


class PrefixSide(Protocol):
    """A prefix cache and the memory under it, as the schedule sees them."""

    name: str

    def match(self, request: Request) -> tuple[int, int]:
        """Start a request. Returns its handle, and how many tokens need not be computed."""

    def grow(self, handle: int, tokens: int) -> None:
        """Give it memory for so many tokens, or raise OutOfPagesError and change nothing."""

    def insert(self, handle: int, request: Request) -> None:
        """Its prompt is computed: let others find it."""

    def end(self, handle: int) -> None:
        """End it."""


@dataclass(kw_only=True)
class Played:
    """What came of a schedule.

    ``possible_tokens`` is what a cache without limit would have found. ``ended_early`` counts
    requests that gave way because memory was short, ``refused`` those that did not fit alone.
    """

    requests: int = 0
    prompt_tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0
    whole_block_tokens: int = 0  # of the hits, in whole blocks of 512
    possible_tokens: int = 0
    ended_early: int = 0
    refused: int = 0


class Schedule:
    """Requests in the order of the trace, so many at a time; the oldest ends for the next one.

    Parameters
    ----------
    side : PrefixSide
        Where they run.
    at_a_time : int
        Requests that run together.
    """

    def __init__(self, side: PrefixSide, at_a_time: int) -> None:
        self._side = side
        self._at_a_time = at_a_time
        self._running: deque[int] = deque()
        self._endless = EndlessCache()
        self._played = Played()

    def play(self, requests: Sequence[Request], on_done: Callable[[int], None]) -> Played:
        """Run all requests to their end; ``on_done`` hears how many have started.

        Raises
        ------
        RuntimeError
            More tokens were found than any earlier prompt has in common with this one.
        """
        for number, request in enumerate(requests, start=1):
            if len(self._running) == self._at_a_time:
                self._side.end(self._running.popleft())
            self._start(request)
            on_done(number)
        while self._running:
            self._side.end(self._running.popleft())
        return self._played

    def _start(self, request: Request) -> None:
        handle, n_cached = self._side.match(request)
        possible = self._endless.hit_tokens(request)
        if n_cached > possible:
            raise RuntimeError(
                f"{self._side.name} found {n_cached} tokens of a prompt that shares {possible} "
                "with those before it"
            )
        fits = self._grow(handle, request.prompt_tokens)
        if fits:
            self._side.insert(handle, request)
            self._endless.insert(request)
            self._count(request, n_cached, possible)
            fits = self._grow(handle, request.tokens)
        if fits:
            self._running.append(handle)
        else:
            self._side.end(handle)
            self._played.refused += 1

    def _grow(self, handle: int, tokens: int) -> bool:
        """Give it memory, if need be that of the oldest requests. False: that is too little."""
        while not self._fits(handle, tokens):
            if not self._running:
                return False
            self._side.end(self._running.popleft())
            self._played.ended_early += 1
        return True

    def _fits(self, handle: int, tokens: int) -> bool:
        try:
            self._side.grow(handle, tokens)
        except OutOfPagesError:
            return False
        return True

    def _count(self, request: Request, n_cached: int, possible: int) -> None:
        played = self._played
        played.requests += 1
        played.prompt_tokens += request.prompt_tokens
        played.hits += n_cached > 0
        played.hit_tokens += n_cached
        played.whole_block_tokens += _in_whole_blocks(request, n_cached)
        played.possible_tokens += possible


def _in_whole_blocks(request: Request, n_cached: int) -> int:
    """Tokens in blocks that were found whole; the last token of a prompt counts as found."""
    if n_cached == request.prompt_tokens - 1 and request.prompt_tokens % BLOCK_TOKENS == 0:
        return n_cached
    return n_cached - n_cached % BLOCK_TOKENS
