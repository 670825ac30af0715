"""Contiguous mode: what an ended request leaves behind is what the next one begins with."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_walk import BLOCK_SIZE, MAX_TOKENS, Shape, Walk
from vllm import SamplingParams
from vllm.v1.request import Request

pytestmark = pytest.mark.vllm

SHAPE = Shape(kind="contiguous", num_blocks=128)
FRAME_TOKENS = BLOCK_SIZE * SHAPE.frame_blocks
PARKED = (5, 1, 3)  # frames with memory, of the rows that requests have left


class Rows:
    """An engine whose requests are as long as they are told to be."""

    def __init__(self) -> None:
        self.walk = Walk(SHAPE, seed=0)
        self.maps: list[set[int]] = []  # pages of each call
        call = self.walk.ledger._call

        def listen(request: dict[str, Any]) -> list[dict[str, Any]]:
            if request["op"] == "map":
                self.maps.append({first + i for first, n in request["runs"] for i in range(n)})
            return call(request)

        self.walk.ledger._call = listen
        requests = [self.start(f"parked {frames}", frames) for frames in PARKED]
        self.parked = dict(zip(PARKED, map(self.first_block, requests), strict=True))
        for request in requests:
            self.walk.manager.free(request)
        self.maps.clear()

    def start(self, name: str, n_frames: int) -> Request:
        tokens = [1] * (n_frames * FRAME_TOKENS - 1)  # a little less than all of the last frame
        request = Request(name, tokens, SamplingParams(max_tokens=MAX_TOKENS), None)
        assert self.walk.manager.allocate_slots(request, len(tokens)) is not None
        return request

    def first_block(self, request: Request) -> int:
        (row,) = self.walk.manager.get_block_ids(request.request_id)
        return int(row[0])


@pytest.mark.parametrize(("needed", "adopted"), [(1, 1), (2, 3), (3, 3), (4, 5), (5, 5)])
def test_a_request_takes_the_parked_row_that_fits_best_and_maps_nothing(
    needed: int, adopted: int
) -> None:
    rows = Rows()
    request = rows.start("next", needed)
    assert rows.first_block(request) == rows.parked[adopted]
    assert rows.maps == []


@pytest.mark.parametrize("needed", [6, 8])
def test_a_request_that_fits_nowhere_takes_the_largest_parked_row_and_maps_the_rest(
    needed: int,
) -> None:
    rows = Rows()
    before = set(rows.walk.workers.mapped[0])
    request = rows.start("next", needed)
    first = rows.first_block(request)
    assert first == rows.parked[max(PARKED)]
    whole = range(first, first + needed * SHAPE.frame_blocks)
    pages = {int(page) for page in rows.walk.ledger.geometry.pages_of_blocks(whole)}
    assert rows.maps == [pages - before]


def test_parked_rows_are_adopted_before_any_row_gets_new_memory() -> None:
    rows = Rows()
    adopted = {rows.first_block(rows.start(f"next {n}", n)) for n in sorted(PARKED)}
    assert adopted == set(rows.parked.values())
    assert rows.maps == []
    rows.start("one more", 1)
    assert len(rows.maps) == 1
