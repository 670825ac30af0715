"""A worker's KV buffer as on CUDA, but for its memory: which pages have some, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scheduler_walk import Shape

import vattn
from vattn.integrations.vllm import worker as worker_module
from vattn.integrations.vllm.geometry import Geometry, permanent_pages, runs_of
from vattn.integrations.vllm.settings import Settings
from vattn.integrations.vllm.specs import Plan
from vattn.integrations.vllm.worker import WorkerMemory

pytestmark = pytest.mark.vllm

PAGE = 65536
SHAPE = Shape(kind="elastic", num_blocks=1024, page_bytes=PAGE)


@pytest.fixture(params=[None, 2], ids=["elastic", "contiguous"])
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of the second device, whose scheduler is never reached."""
    geometry = Geometry.of(SHAPE.config(), PAGE, SHAPE.frame_blocks)
    waits: list[str] = []
    monkeypatch.setattr(worker_module, "plan_of", lambda *_: Plan(geometry, request.param))
    monkeypatch.setattr(worker_module, "start_id", lambda _: "an engine")
    monkeypatch.setattr(
        worker_module, "PageRange", lambda size, device, **o: vattn.PageRange(size, **o)
    )
    monkeypatch.setattr(worker_module, "WorkerLink", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    config: Any = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"))
    memory = WorkerMemory(config, SHAPE.config(), Settings())
    return SimpleNamespace(memory=memory, waits=waits, plan=Plan(geometry, request.param))


def start(worker: Any) -> torch.Tensor:
    buffer: torch.Tensor = worker.memory.pages.tensor()
    worker.memory.start({"layer": buffer}, "name", 1)
    return buffer


def test_kernels_can_be_warmed_up_on_any_block_before_the_scheduler_begins(worker: Any) -> None:
    buffer = start(worker)
    buffer[:: PAGE // 2] = 1  # a write to a page without memory would end this process
    own, shared = permanent_pages(*worker.plan)
    # All the rest is one page for each run of neighbours.
    assert worker.memory.pages.mapped_pages <= len(own) + 4
    assert len(own) + len(shared) < worker.memory.pages.n_pages


def test_what_warming_up_needed_is_given_back_when_the_scheduler_begins(worker: Any) -> None:
    start(worker)
    own, shared = permanent_pages(*worker.plan)
    said = worker.memory.answer({"op": "serve"})
    assert said["mapped_pages"] == len(own) + len(runs_of(shared))
    mapped = {p for first, n in worker.memory.pages.mapped_runs() for p in range(first, first + n)}
    assert mapped == {*own.tolist(), *shared.tolist()}
    # What is free now can be mapped.
    free = next(p for p in range(worker.memory.pages.n_pages) if p not in mapped)
    worker.memory.answer({"op": "map", "runs": [[free, 1]]})
    assert worker.memory.pages.is_mapped(free)


def test_unmapping_waits_for_the_workers_own_device(worker: Any) -> None:
    start(worker)
    worker.memory.answer({"op": "serve"})
    own, shared = permanent_pages(*worker.plan)
    first = int(max(*own, *shared)) + 1
    worker.memory.answer({"op": "map", "runs": [[first, 1]]})
    worker.waits.clear()
    worker.memory.answer({"op": "unmap", "runs": [[first, 1]]})
    # The thread that answers has no current device but the first.
    assert worker.waits == ["cuda:1"]
