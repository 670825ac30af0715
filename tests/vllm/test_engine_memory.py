"""When an engine gives memory back: on which thread, between which steps, and when not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_walk import BLOCK_SIZE, MAX_TOKENS, Shape, Walk, new_request

from vattn.integrations.vllm import engine as engine_module
from vattn.integrations.vllm.engine import EngineMemory
from vattn.integrations.vllm.ledger import OutOfStepError
from vattn.integrations.vllm.settings import Settings
from vattn.integrations.vllm.specs import Plan

pytestmark = pytest.mark.vllm

LONG_S = 60.0


class Channel:
    """Stands in for the server and the workers behind it."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.facts: list[dict[str, int]] = []
        self.fails = ""

    def wait_for_workers(self, timeout_s: float) -> list[dict[str, int]]:
        return self.facts

    def call(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        if request["op"] == "serve":
            return [{"mapped_pages": len(self.walk.workers.mapped[0])}] * 2
        if request["op"] == self.fails:
            return [{"error": "broken", "kind": "DriverError"}] * 2
        return self.walk.workers.call(request)

    def close(self) -> None:
        pass


class Rig:
    """An engine's memory over vLLM's bookkeeping, and one request of it."""

    def __init__(self, kind: str, idle_seconds: float) -> None:
        self.walk = Walk(Shape(kind=kind, num_blocks=128), seed=0)
        geometry = self.walk.ledger.geometry
        self.channel = Channel(self.walk)
        page_bytes = geometry.page_bytes
        self.channel.facts = [{"n_pages": geometry.n_pages, "page_bytes": page_bytes}] * 2
        self.walk.workers.limit = geometry.n_pages
        config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=2),
            model_config=SimpleNamespace(max_model_len=MAX_TOKENS),
            cache_config=SimpleNamespace(block_size=BLOCK_SIZE),
        )
        settings = Settings(mode="elastic", idle_seconds=idle_seconds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "plan_of", lambda *_: Plan(geometry, None))
            patch.setattr(engine_module, "start_id", lambda _: "an engine")
            patch.setattr(engine_module, "Server", lambda *_, **__: self.channel)
            self.memory = EngineMemory(config, self.walk.shape.config(), settings, "an-engine")

    def bind(self) -> Any:
        self.memory.bind(self.walk.manager)
        return self.memory.ledger

    def run(self, name: str) -> Any:
        """A request comes, and a step is scheduled for it; what it has must be given."""
        # Of other tokens than all before, so that it finds none of their blocks.
        request = new_request(name, [len(name)] * MAX_TOKENS)
        self.memory.request_came(name)
        self.walk.manager.new_step_starts()
        assert self.walk.manager.allocate_slots(request, MAX_TOKENS) is not None
        self.memory.before_step()
        return request

    def run_several(self) -> Any:
        """Four requests come, and all but the first end; their memory stays for others."""
        requests = [self.run("r" * n) for n in range(1, 5)]
        for request in requests[1:]:
            self.end(request)
        return requests[0]

    def end(self, request: Any) -> None:
        self.walk.manager.free(request)
        self.memory.request_ended(request.request_id)

    def ask_for(self, pages: int) -> None:
        """A client sets the budget, on its own thread."""
        self.memory.answer({"op": "budget", "bytes": pages * self.walk.ledger.page_bytes})


@pytest.fixture(params=["elastic", "contiguous"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def new(idle_seconds: float = LONG_S) -> Rig:
        made.append(Rig(request.param, idle_seconds))
        return made[-1]

    yield new
    for rig in made:
        rig.memory.close()


def wait_until(holds: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + 10.0
    while not holds() and time.monotonic() < give_up:
        time.sleep(0.01)
    return holds()


def test_a_lower_budget_is_followed_between_steps_though_requests_are_there(
    make: Callable[..., Rig],
) -> None:
    rig = make(idle_seconds=0.0)
    ledger = rig.bind()
    first = rig.run_several()
    assert ledger.mapped_pages > ledger.minimum_pages
    rig.ask_for(ledger.minimum_pages)
    # No more than that is given back: the engine is not idle.
    assert 0 <= ledger.minimum_pages - ledger.mapped_pages <= ledger.frame_pages
    # What the first one has stays.
    assert all(
        ledger.backed(ledger.geometry.frame_of(block))
        for block in rig.walk.manager.get_block_ids(first.request_id)[0]
    )


def test_while_a_step_is_scheduled_only_its_own_thread_takes_memory(
    make: Callable[..., Rig],
) -> None:
    rig = make(idle_seconds=0.0)
    ledger = rig.bind()
    rig.run_several()
    held = ledger.mapped_pages
    assert held > ledger.minimum_pages
    rig.walk.manager.new_step_starts()
    rig.ask_for(ledger.minimum_pages)
    assert ledger.mapped_pages == held
    rig.memory.before_step()
    assert ledger.mapped_pages <= ledger.minimum_pages


def test_an_engine_shrinks_once_it_has_been_idle_and_not_before(make: Callable[..., Rig]) -> None:
    rig = make(idle_seconds=0.3)
    ledger = rig.bind()
    first, second = rig.run("first"), rig.run("second")
    rig.end(first)
    time.sleep(0.5)
    held = ledger.mapped_pages
    assert held > ledger.floor_pages  # there is a request
    ended_at = time.monotonic()
    rig.end(second)
    assert ledger.mapped_pages == held
    assert wait_until(lambda: ledger.mapped_pages == ledger.floor_pages)
    assert time.monotonic() - ended_at >= 0.3


def test_memory_that_nobody_can_follow_ends_the_engine_with_the_next_request(
    make: Callable[..., Rig],
) -> None:
    rig = make(idle_seconds=0.0)
    rig.bind()
    request = rig.run("first")
    rig.channel.fails = "unmap"
    rig.end(request)
    assert wait_until(lambda: not rig.memory._control.is_alive())
    with pytest.raises(OutOfStepError, match="could not give KV memory back: broken"):
        rig.memory.request_came("second")


def test_a_worker_that_planned_another_buffer_is_refused(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.channel.facts = [rig.channel.facts[0], {"n_pages": 7, "page_bytes": 4096}]
    with pytest.raises(RuntimeError, match=r"worker 1 has a KV buffer of .*'n_pages': 7"):
        rig.bind()
