"""The ideal prefix cache, the schedule and the requests that benchmarks.sharing measures with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sharing.ideal import IdealBlockCache
from benchmarks.sharing.replay import Played, Schedule
from benchmarks.sharing.requests import (
    BLOCK_TOKENS,
    EndlessCache,
    Request,
    made_up,
    read_requests,
)
from vattn.errors import OutOfPagesError


def request(*blocks: int, tail: int = 0, output: int = 1) -> Request:
    """Make a request of full blocks; with ``tail``, the last one has only so many tokens."""
    prompt = len(blocks) * BLOCK_TOKENS - (BLOCK_TOKENS - tail if tail else 0)
    return Request(prompt, output, blocks)


def play(requests: list[Request], capacity: int, at_a_time: int = 2) -> Played:
    return Schedule(IdealBlockCache(capacity), at_a_time).play(requests, lambda done: None)


# The ideal cache.


def serve(cache: IdealBlockCache, one: Request) -> int:
    """Run a request to its end, and return how many tokens it found."""
    handle, n_cached = cache.match(one)
    cache.grow(handle, one.prompt_tokens)
    cache.insert(handle, one)
    cache.grow(handle, one.tokens)
    cache.end(handle)
    return n_cached


def test_the_ideal_cache_finds_whole_leading_blocks_but_for_the_last_token() -> None:
    cache = IdealBlockCache(10)
    assert serve(cache, request(1, 2, 3, tail=9)) == 0
    assert cache.used_blocks == 2, "what is not full, and the output, is free at once"
    assert serve(cache, request(1, 2, 3, tail=9)) == 2 * BLOCK_TOKENS
    assert serve(cache, request(1, 2)) == 2 * BLOCK_TOKENS - 1
    assert serve(cache, request(1, 8, 3)) == BLOCK_TOKENS
    assert serve(cache, request(7, 8)) == 0, "a block counts behind those before it only"


def test_the_ideal_cache_gives_up_the_least_recently_used_from_the_end() -> None:
    cache = IdealBlockCache(5)
    serve(cache, request(1, 2, output=0))
    serve(cache, request(5, 6, output=0))
    serve(cache, request(1, output=0))  # 1 is the newest now, 2 the oldest
    serve(cache, request(9, output=0))  # and now it is full
    serve(cache, request(7, output=0))  # 2 goes
    assert serve(cache, request(5, 6, tail=1)) == BLOCK_TOKENS
    assert serve(cache, request(1, 2, tail=1)) == BLOCK_TOKENS
    assert cache.used_blocks <= 5


def test_running_requests_keep_their_blocks_and_share_them() -> None:
    cache = IdealBlockCache(4)
    first, _ = cache.match(request(1, 2))
    cache.grow(first, 2 * BLOCK_TOKENS)
    cache.insert(first, request(1, 2))
    second, n_cached = cache.match(request(1, 2, 3))
    assert n_cached == 2 * BLOCK_TOKENS
    cache.grow(second, 4 * BLOCK_TOKENS)
    third, _ = cache.match(request(4))
    with pytest.raises(OutOfPagesError) as short:
        cache.grow(third, BLOCK_TOKENS)
    assert (short.value.needed, short.value.free) == (1, 0)
    cache.end(second)  # its output is free; 1 and 2 still have the first one running on them
    cache.grow(third, 2 * BLOCK_TOKENS)
    assert cache.used_blocks == 4


class BruteForce:
    """The same rules as the ideal cache's, as a list of stamped blocks that is searched."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.stamps: dict[int, tuple[int, int]] = {}  # when last used; then, how far from the end
        self.running: dict[int, tuple[list[int], int]] = {}
        self.clock = self.next_handle = 0

    def pinned(self) -> set[int]:
        return {block for shared, _ in self.running.values() for block in shared}

    def used(self) -> int:
        return len(self.stamps) + sum(private for _, private in self.running.values())

    def match(self, one: Request) -> tuple[int, int]:
        shared = []
        for block in one.full_blocks:
            if block not in self.stamps:
                break
            shared.append(block)
        self.next_handle += 1
        self.running[self.next_handle - 1] = (shared, 0)
        n_cached = min(len(shared) * BLOCK_TOKENS, one.prompt_tokens - 1)
        return self.next_handle - 1, n_cached

    def grow(self, handle: int, tokens: int) -> None:
        shared, private = self.running[handle]
        wanted = max(private, (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS - len(shared))
        idle = sorted(set(self.stamps) - self.pinned(), key=lambda block: self.stamps[block])
        over = self.used() + wanted - private - self.capacity
        if over > len(idle):
            raise OutOfPagesError("short", 0, 0)
        for block in idle[: max(0, over)]:
            del self.stamps[block]
        self.running[handle] = (shared, wanted)

    def insert(self, handle: int, one: Request) -> None:
        shared, private = self.running[handle]
        added = one.full_blocks[len(shared) :]
        for block in added:
            self.stamps.setdefault(block, (self.clock, 0))
        self.running[handle] = ([*shared, *added], private - len(added))

    def end(self, handle: int) -> None:
        shared, _ = self.running.pop(handle)
        self.clock += 1
        for depth, block in enumerate(shared):
            self.stamps[block] = (self.clock, -depth)


@pytest.mark.parametrize("seed", range(20))
def test_the_ideal_cache_does_what_a_search_of_all_blocks_does(seed: int) -> None:
    rng = random.Random(seed)
    requests = made_up(60, seed)
    ideal, brute = IdealBlockCache(40), BruteForce(40)
    handles: list[int] = []
    short = hits = 0
    for one in requests:
        handle, n_cached = ideal.match(one)
        assert brute.match(one) == (handle, n_cached)
        handles.append(handle)
        hits += n_cached > 0
        for tokens in (one.prompt_tokens, one.tokens):
            while True:
                try:
                    ideal.grow(handle, tokens)
                    break
                except OutOfPagesError:
                    short += 1
                    with pytest.raises(OutOfPagesError):
                        brute.grow(handle, tokens)
                    gone = handles.pop(0)
                    ideal.end(gone)
                    brute.end(gone)
            brute.grow(handle, tokens)
            assert ideal.used_blocks == brute.used() <= 40
            if tokens == one.prompt_tokens:
                ideal.insert(handle, one)
                brute.insert(handle, one)
        while handles and rng.random() < 0.3:
            gone = handles.pop(rng.randrange(len(handles)))
            ideal.end(gone)
            brute.end(gone)
    assert hits and short, "neither a hit nor a shortage was tried"


# The schedule.


def test_the_oldest_request_ends_for_the_next_and_for_memory() -> None:
    four = [request(n, output=BLOCK_TOKENS) for n in range(4)]
    assert play(four, capacity=8, at_a_time=4).ended_early == 0
    played = play(four, capacity=7, at_a_time=4)
    assert (played.ended_early, played.refused, played.requests) == (1, 0, 4)
    assert play(four, capacity=7, at_a_time=3).ended_early == 0


@pytest.mark.parametrize(("capacity", "at_a_time"), [(8, 3), (6, 4)])
def test_who_has_run_longest_gives_way(capacity: int, at_a_time: int) -> None:
    ended = []

    class Watched(IdealBlockCache):
        def end(self, handle: int) -> None:
            ended.append(handle)
            super().end(handle)

    requests = [request(n, output=BLOCK_TOKENS) for n in range(5)]
    Schedule(Watched(capacity), at_a_time).play(requests, lambda done: None)
    assert ended == [0, 1, 2, 3, 4]


def test_who_does_not_fit_alone_is_refused() -> None:
    played = play([request(1), request(2, 3, 4), request(1)], capacity=2)
    assert (played.refused, played.ended_early, played.requests) == (1, 1, 2)


def test_hits_are_counted_to_the_token_and_in_whole_blocks() -> None:
    played = play([request(1, 2, tail=9), request(1, 2, tail=9), request(1)], capacity=9)
    assert (played.hits, played.requests, played.prompt_tokens) == (2, 3, 2 * 521 + 512)
    assert played.hit_tokens == played.whole_block_tokens == 512 + 511
    assert played.possible_tokens == 520 + 511


def test_a_cache_that_finds_what_was_never_there_is_caught() -> None:
    class Liar(IdealBlockCache):
        def match(self, request: Request) -> tuple[int, int]:
            handle, n_cached = super().match(request)
            return handle, n_cached and n_cached + 1

    with pytest.raises(RuntimeError, match="found 513 tokens of a prompt that shares 512"):
        Schedule(Liar(9), 2).play([request(1, 2), request(1, 3)], lambda done: None)


# Requests.


def test_token_ids_are_equal_exactly_where_the_blocks_are() -> None:
    one, other = (request(1, last, tail=5).token_ids() for last in (2, 3))
    assert len(one) == BLOCK_TOKENS + 5
    assert (one == other).tolist() == [True] * BLOCK_TOKENS + [False] * 5
    assert len(set(one.tolist())) == len(one)


def test_made_up_requests_share_prefixes_and_are_always_the_same() -> None:
    requests, endless = made_up(40), EndlessCache()
    assert requests == made_up(40)
    found = 0
    seen: dict[int, tuple[tuple[int, ...], int]] = {}
    for one in requests:
        assert len(one.blocks) == -(-one.prompt_tokens // BLOCK_TOKENS)
        for at, block in enumerate(one.blocks):
            tokens = min(BLOCK_TOKENS, one.prompt_tokens - at * BLOCK_TOKENS)
            what = (one.blocks[:at], tokens)
            assert seen.setdefault(block, what) == what, "an id stands for one content"
        found += endless.hit_tokens(one)
        endless.insert(one)
    assert found > 0


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_mooncake_trace_is_read(tmp_path: Path) -> None:
    record = {"timestamp": 0, "input_length": 513, "output_length": 7, "hash_ids": [4, 9]}
    path = write(tmp_path / "a.jsonl", record, record)
    assert read_requests(path) == [Request(513, 7, (4, 9))] * 2
    assert len(read_requests(path, 1)) == 1


@pytest.mark.parametrize(
    "change", [{"hash_ids": [4]}, {"hash_ids": None}, {"input_length": "x"}, {"input_length": 0}]
)
def test_a_line_that_cannot_be_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {"input_length": 513, "output_length": 7, "hash_ids": [4, 9]}
    path = write(tmp_path / "a.jsonl", good, good | change)
    with pytest.raises(ValueError, match=r"line 2.*expected input_length"):
        read_requests(path)


def test_a_trace_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no requests"):
        read_requests(write(tmp_path / "a.jsonl"))
