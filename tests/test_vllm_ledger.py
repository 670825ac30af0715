"""The account of which frames have memory, over workers that are sets of pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vattn.integrations.vllm import ledger as ledger_module
from vattn.integrations.vllm.geometry import Geometry, Stripe
from vattn.integrations.vllm.ledger import OutOfStepError, PageLedger

# Pages have 64 bytes, and frame f has bytes 80 f to 80 f + 79: neighbours share a page.
SHARING = Geometry(20, 2, 64, 13, (Stripe(0, 40, 40),))
# A frame is a page in each of two stripes.
APART = Geometry(20, 2, 64, 20, (Stripe(0, 32, 32), Stripe(640, 32, 32)))


class Workers:
    """Two workers; ``answers`` overrides what one of them says to an operation."""

    def __init__(self) -> None:
        self.mapped: list[set[int]] = [set(), set()]
        self.said: dict[tuple[str, int], dict[str, object]] = {}
        self.calls: list[str] = []

    def call(self, request: dict[str, Any]) -> list[dict[str, object]]:
        operation = request["op"]
        self.calls.append(operation)
        pages = {page for first, n in request["runs"] for page in range(first, first + n)}
        answers: list[dict[str, object]] = []
        for rank, mapped in enumerate(self.mapped):
            if (operation, rank) in self.said:
                answers.append(self.said[operation, rank])
            elif operation == "map":
                assert not pages & mapped
                mapped |= pages
                answers.append({})
            else:
                # A worker that could not map has nothing to undo.
                assert pages <= mapped or (operation, "map", rank) == ("undo", "map", self.failed())
                mapped -= pages
                answers.append({})
        return answers

    def failed(self) -> int:
        return next((rank for operation, rank in self.said if operation == "map"), -1)


def make(geometry: Geometry = APART, budget: int = 20) -> tuple[PageLedger, Workers]:
    workers = Workers()
    ledger = PageLedger(
        geometry, budget_pages=budget, floor_pages=0, minimum_pages=2, call=workers.call
    )
    return ledger, workers


def state(ledger: PageLedger) -> tuple[object, ...]:
    return ledger.mapped_pages, ledger.backed_frames(), ledger._frames_on.tolist()


def test_a_frame_is_backed_by_its_pages_on_all_workers() -> None:
    ledger, workers = make()
    assert ledger.back([1, 3])
    assert workers.mapped == [{1, 3, 11, 13}] * 2
    assert ledger.mapped_pages == 4
    assert ledger.backed_frames() == [1, 3]
    assert list(ledger.unbacked_frames()) == [0, 2, 4, 5, 6, 7, 8, 9]
    assert ledger.count_backed(0, 3) == 1
    assert ledger.unback([1]) == 2
    assert workers.mapped == [{3, 13}] * 2
    assert ledger.backed_frames() == [3]


def test_a_page_that_frames_share_is_mapped_once_and_stays_for_the_last_one() -> None:
    ledger, workers = make(SHARING)
    assert ledger.back([0])
    assert ledger.back([1])  # bytes 80 to 159
    assert workers.mapped[0] == {0, 1, 2}
    assert ledger.pages_freed([0]) == 1
    assert ledger.unback([0]) == 1
    assert workers.mapped[0] == {1, 2}
    assert ledger.unback([1]) == 2
    assert workers.mapped[0] == set()


def test_frames_that_go_together_free_the_page_between_them() -> None:
    ledger, workers = make(SHARING)
    assert ledger.back([0, 1])
    assert ledger.pages_freed([0, 1]) == 3
    assert ledger.unback([0, 1]) == 3
    assert workers.mapped[0] == set()


def test_the_budget_is_never_exceeded_and_a_refusal_changes_nothing() -> None:
    ledger, workers = make(budget=5)
    assert ledger.back([0, 1])
    before = state(ledger)
    assert not ledger.back([2])  # room for one page, and two are needed
    assert state(ledger) == before
    assert workers.calls == ["map"]
    assert ledger.counters.budget_waits == 1
    assert ledger.room == 1


def test_pages_that_are_mapped_already_need_no_budget() -> None:
    ledger, _ = make(SHARING, budget=4)
    assert ledger.back([0])
    assert ledger.pages_missing([1]) == 1
    assert ledger.back([1])
    assert ledger.mapped_pages == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_worker_refuses_the_other_gives_back(rank: int) -> None:
    ledger, workers = make()
    assert ledger.back([0])
    before, mapped = state(ledger), [set(pages) for pages in workers.mapped]
    workers.said["map", rank] = {"error": "none left", "kind": "OutOfPagesError"}
    assert not ledger.back([1])
    assert state(ledger) == before
    assert workers.mapped == mapped
    assert ledger.counters.refusals == 1


def test_a_refusal_is_believed_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    ledger, workers = make()
    workers.said["map", 1] = {"error": "none left", "kind": "OutOfPagesError"}
    assert not ledger.back([0])
    asked = len(workers.calls)
    assert ledger.room == 0
    assert not ledger.back([0])
    assert len(workers.calls) == asked
    workers.said.clear()
    now[0] += ledger_module.REFUSAL_S
    assert ledger.back([0])


@pytest.mark.parametrize(
    "act", [lambda ledger: ledger.unback([0]), lambda ledger: ledger.set_budget(19)]
)
def test_what_gives_room_ends_a_refusal(act: Callable[[PageLedger], object]) -> None:
    ledger, workers = make()
    assert ledger.back([0])
    workers.said["map", 1] = {"error": "none left", "kind": "OutOfPagesError"}
    assert not ledger.back([1])
    workers.said.clear()
    act(ledger)
    assert ledger.room > 0
    assert ledger.back([1])


def test_a_worker_that_fails_otherwise_is_an_error() -> None:
    ledger, workers = make()
    workers.said["map", 0] = {"error": "cuMemMap failed", "kind": "DriverError"}
    with pytest.raises(RuntimeError, match="could not map KV memory: cuMemMap failed"):
        ledger.back([0])
    assert ledger.mapped_pages == 0
    assert workers.mapped == [set(), set()]


@pytest.mark.parametrize("operation", ["unmap", "undo"])
def test_a_worker_that_cannot_give_back_is_an_error(operation: str) -> None:
    ledger, workers = make()
    assert ledger.back([0])
    workers.said[operation, 0] = {"error": "no", "kind": "DriverError"}
    workers.said["map", 1] = {"error": "none left", "kind": "OutOfPagesError"}
    with pytest.raises(OutOfStepError, match="could not give KV memory back: no"):
        ledger.unback([0]) if operation == "unmap" else ledger.back([1])
    # Nobody knows what is mapped now, so nothing is handed out on it any more.
    workers.said.clear()
    workers.calls.clear()
    for act in (lambda: ledger.back([1]), lambda: ledger.unback([0]), ledger.check_in_step):
        with pytest.raises(OutOfStepError, match="could not give KV memory back: no"):
            act()
    assert workers.calls == []


def test_a_lower_budget_is_exceeded_until_memory_is_given_back() -> None:
    ledger, _ = make()
    assert ledger.back([0, 1, 2])
    ledger.set_budget(4)
    assert (ledger.over, ledger.room) == (2, 0)
    ledger.unback([0])
    assert (ledger.over, ledger.room) == (0, 0)


@pytest.mark.parametrize(("pages", "words"), [(1, "less than the 128"), (21, "addresses for 1280")])
def test_a_budget_that_makes_no_sense_is_refused(pages: int, words: str) -> None:
    ledger, _ = make(budget=10)
    with pytest.raises(ValueError, match=words):
        ledger.set_budget(pages)
    assert ledger.budget_pages == 10


def test_pages_that_workers_mapped_themselves_are_never_given_back() -> None:
    ledger, workers = make()
    for mapped in workers.mapped:
        mapped.update({0, 10})
    ledger.hold(np.array([0, 10]), 2)
    assert (ledger.mapped_pages, ledger.floor_pages) == (2, 2)
    assert ledger.pages_missing([0]) == 0
    assert ledger.back([0])
    assert ledger.mapped_pages == 2
    assert ledger.unback([0]) == 0
    assert workers.calls == []


def test_pages_under_an_alias_count_as_the_memory_they_take() -> None:
    ledger, _ = make()
    ledger.hold(np.array([0, 1, 2, 3]), 1)
    assert ledger.mapped_pages == 1
    assert ledger.room == 19


def test_random_backing_follows_a_plain_model() -> None:
    rng = np.random.default_rng(3)
    for geometry in (SHARING, APART):
        ledger, workers = make(geometry, budget=10)
        backed: set[int] = set()
        for _ in range(400):
            frame = int(rng.integers(geometry.n_frames))
            wanted = backed ^ {frame}
            pages = {p for f in wanted for p in geometry.pages_of(f).tolist()}
            if frame in backed:
                ledger.unback([frame])
                backed = wanted
            elif ledger.back([frame]):
                backed = wanted
                assert len(pages) <= 10
            else:
                assert len(pages) > 10
            assert workers.mapped[0] == {p for f in backed for p in geometry.pages_of(f).tolist()}
            assert ledger.mapped_pages == len(workers.mapped[0])
            assert ledger.backed_frames() == sorted(backed)
            assert ledger.n_backed == len(backed)
            free = [f for f in range(geometry.n_frames) if f not in backed]
            assert list(ledger.unbacked_frames()) == free
