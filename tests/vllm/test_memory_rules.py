"""Single rules of how blocks get and lose memory; the walks try all of them together."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from scheduler_walk import BLOCK_SIZE, MAX_TOKENS, WINDOW, Shape, Walk, new_request
from vllm.v1.request import Request

from vattn.integrations.vllm.elastic import TILE_TOKENS, ElasticPool

pytestmark = pytest.mark.vllm


def start(walk: Walk, name: str, n_tokens: int) -> Request | None:
    """A request of so many tokens, if it gets its blocks."""
    request = new_request(name, [1] * n_tokens)
    blocks, n_cached, _ = walk.manager.get_computed_blocks(request)
    given = walk.manager.allocate_slots(request, n_tokens - n_cached, n_cached, blocks)
    return None if given is None else request


def walk_of(kind: str, **shape: Any) -> Any:
    """An engine that does nothing by itself."""
    return Walk(Shape(kind=kind, **shape), seed=0)


def count_maps(walk: Walk) -> list[int]:
    """Pages of each map call from now on."""
    calls: list[int] = []
    before = walk.ledger._call

    def call(request: dict[str, Any]) -> list[dict[str, Any]]:
        if request["op"] == "map":
            calls.append(sum(n for _, n in request["runs"]))
        return before(request)

    walk.ledger._call = call  # type: ignore[method-assign]
    return calls


def test_memory_is_mapped_ahead_once_blocks_get_new_memory() -> None:
    walk = walk_of("elastic", num_blocks=512)
    walk.workers.limit = walk.ledger.budget_pages
    walk.pool.ahead_bytes = 8 * walk.ledger.frame_pages * walk.shape.page_bytes
    half = walk.pool._ahead_blocks // 2
    calls = count_maps(walk)
    assert start(walk, "r", MAX_TOKENS) is not None
    assert len(calls) == 2  # for the request itself, and ahead
    ready = []
    for _ in range(4 * half):
        walk.pool.get_new_blocks(1)
        ready.append(len(walk.pool._fresh))
    assert min(ready) >= half - 1
    assert max(ready) <= 3 * half
    assert 3 <= len(calls) <= 2 + 4


def test_a_worker_without_memory_to_map_ahead_has_some_for_who_waits() -> None:
    walk = walk_of("elastic", num_blocks=512)
    walk.pool.ahead_bytes = 8 * walk.ledger.frame_pages * walk.shape.page_bytes
    before = walk.ledger._call

    def call(request: dict[str, Any]) -> list[dict[str, Any]]:
        n_pages = sum(n for _, n in request["runs"])
        walk.workers.refuse = n_pages > walk.ledger.frame_pages  # there is only so much
        return before(request)

    walk.ledger._call = call  # type: ignore[method-assign]
    walk.workers.limit = walk.ledger.budget_pages
    for i in range(6):
        assert start(walk, f"r{i}", BLOCK_SIZE) is not None, i
    assert walk.ledger.counters.refusals > 0
    assert walk.ledger.counters.budget_waits == 0


def test_nothing_is_mapped_ahead_while_blocks_that_have_memory_are_used_again() -> None:
    walk = walk_of("elastic", num_blocks=512)
    walk.workers.limit = walk.ledger.budget_pages
    walk.pool.ahead_bytes = 0
    # Shorter than a block, so nothing of them is cached.
    requests = [start(walk, f"r{i}", BLOCK_SIZE - 1) for i in range(20)]
    for request in requests:
        assert request is not None
        walk.manager.free(request)
    walk.pool.ahead_bytes = 64 * walk.ledger.frame_pages * walk.shape.page_bytes
    calls = count_maps(walk)
    for i in range(20):
        assert start(walk, f"again{i}", BLOCK_SIZE - 1) is not None
    assert calls == []


def test_blocks_that_are_ready_are_known_once_each_whatever_comes_and_goes() -> None:
    walk = walk_of("elastic")
    walk.workers.limit = walk.ledger.budget_pages
    for i in range(20):
        request = start(walk, f"r{i}", MAX_TOKENS)
        assert request is not None
        walk.manager.free(request)
        walk.pool.shrink_to(0)
        assert walk.pool._fresh.keys() <= set(walk.ledger.geometry.blocks_of(0))
    for _ in range(5):
        assert walk.pool.reset_prefix_cache()
    assert len(walk.pool._fresh) < walk.shape.num_blocks


def test_a_pool_of_an_engine_that_is_gone_is_not_kept() -> None:
    walk = walk_of("elastic")
    kept = weakref.ref(walk.pool)
    assert isinstance(walk.pool, ElasticPool)
    walk = None
    gc.collect()
    assert kept() is None


def test_kernels_find_memory_a_tile_below_a_sliding_window() -> None:
    walk = walk_of("hybrid", num_blocks=512)
    manager = walk.manager.coordinator.single_type_managers[1]
    for n_tokens in (WINDOW, WINDOW + TILE_TOKENS, WINDOW + TILE_TOKENS + 10 * BLOCK_SIZE):
        skipped = manager.get_num_skipped_tokens(n_tokens)
        assert skipped == max(0, n_tokens - (WINDOW - 1) - TILE_TOKENS)


def test_a_short_request_in_the_row_of_a_long_one_does_not_keep_its_memory() -> None:
    walk = walk_of("contiguous", num_blocks=128)
    long = start(walk, "long", MAX_TOKENS)
    assert long is not None
    walk.set_budget(walk.ledger.mapped_pages)
    walk.manager.free(long)
    # The first takes over all that memory, as that costs nothing; the others need some of it.
    for i in range(4):
        assert start(walk, f"short{i}", 1) is not None, i
    walk.check()
