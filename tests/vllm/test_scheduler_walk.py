"""Random walks of vLLM's block bookkeeping over memory that comes and goes."""

from __future__ import annotations

import pytest
from scheduler_walk import MAX_TOKENS, Shape, Walk

pytestmark = pytest.mark.vllm

SHAPES = [
    Shape(kind="elastic"),
    Shape(kind="elastic", layout="BLNHC"),
    Shape(kind="elastic", page_bytes=1024),  # a block has pages in common with its neighbours
    Shape(kind="elastic", num_blocks=97, page_bytes=8192),
    Shape(kind="hybrid"),
    Shape(kind="hybrid", layout="BLHNC", page_bytes=16384),
    Shape(kind="contiguous", num_blocks=128),
    Shape(kind="contiguous", num_blocks=131, page_bytes=8192),
    Shape(kind="contiguous", num_blocks=128, page_bytes=1024),
]
SEEDS = range(4)
STEPS = 250


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_that_are_handed_out_have_memory_and_prefixes_stay_true(shape: Shape) -> None:
    done = []
    for seed in SEEDS:
        walk = Walk(shape, seed=seed)
        walk.set_budget(3 * walk.ledger.minimum_pages)
        for _ in range(STEPS):
            walk.step()
        done.append(walk)
    # The walks have been everywhere.
    assert sum(walk.refused for walk in done) > 0
    assert sum(walk.preempted for walk in done) > 0
    assert sum(walk.ledger.counters.refusals for walk in done) > 0
    assert sum(walk.ledger.counters.unmapped_pages for walk in done) > 0
    if shape.kind != "contiguous":
        assert sum(walk.hits for walk in done) > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_memory_but_the_null_blocks_comes_back(shape: Shape) -> None:
    walk = Walk(shape, seed=0)
    for _ in range(STEPS):
        walk.step()
    while walk.running:
        walk.end()
    walk.pool.shrink_to(0)
    assert walk.ledger.mapped_pages == walk.ledger.floor_pages
    walk.check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_smallest_budget_serves_one_request_of_any_length(shape: Shape) -> None:
    walk = Walk(shape, seed=0)
    longest = -(-MAX_TOKENS // 4) * (2 if shape.kind == "hybrid" else 1)
    geometry = walk.ledger.geometry
    frames = -(-(longest + (shape.kind != "contiguous")) // geometry.frame_blocks)
    walk.set_budget(walk.ledger.floor_pages + frames * geometry.max_frame_pages)
    walk.admit()
    (request,) = walk.running
    while request.num_tokens < MAX_TOKENS:
        request.append_output_token_ids(1)
        assert walk.manager.allocate_slots(request, 1) is not None
        walk._compute(request, request.num_tokens - 1, request.num_tokens)
        walk.check()
