"""A worker's end: the KV buffer, and the thread that maps what the scheduler asks for."""

from __future__ import annotations

import errno
import queue
import threading

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from vattn import DriverError, OutOfPagesError, PageRange
from vattn.integrations.vllm.allocation import KvAllocation, check_views
from vattn.integrations.vllm.channel import Json, WorkerLink
from vattn.integrations.vllm.geometry import Geometry, permanent_pages, runs_of
from vattn.integrations.vllm.ledger import REFUSAL
from vattn.integrations.vllm.settings import Settings, start_id
from vattn.integrations.vllm.specs import plan_of
from vattn.units import format_bytes

# A name below "vllm", which is what vLLM configures to be shown.
logger = init_logger(f"vllm.{__name__}")


class WorkerMemory:
    """The KV buffer of one worker.

    Parameters
    ----------
    config : VllmConfig
        Of the engine.
    kv_cache_config : KVCacheConfig
        What vLLM plans to allocate.
    settings : Settings
        The user's.
    """

    def __init__(
        self, config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings
    ) -> None:
        plan = plan_of(config, kv_cache_config, settings)
        self.geometry: Geometry = plan.geometry
        self._row_frames = plan.row_frames
        self._size = kv_cache_config.kv_cache_tensors[0].size
        self._device_type = config.device_config.device_type
        self._engine_id = start_id(config)
        # vLLM's choice for this thread; the thread of the link has none.
        self._device = "cpu"
        if self._device_type == "cuda":
            self._device = f"cuda:{torch.cuda.current_device()}"
        self.pages = PageRange(self._size, device=self._device, page_bytes=self.geometry.page_bytes)
        self._last_map: list[tuple[int, int]] = []
        self._warm_up: list[tuple[int, int]] = []
        self._link: WorkerLink | None = None
        self._to_populate: queue.SimpleQueue[list[tuple[int, int]] | None] = queue.SimpleQueue()
        logger.info(
            "vattn reserved %s for the KV cache, in pages of %s; memory follows the requests",
            format_bytes(self.pages.size),
            format_bytes(self.pages.page_bytes),
        )

    def allocation(self) -> KvAllocation:
        """Return the context that vLLM allocates its KV buffer in."""
        return KvAllocation(self._size, self.pages.tensor)

    def start(self, kv_caches: dict[str, torch.Tensor], name: str, rank: int) -> None:
        """Back what kernels touch without being asked, and listen to the scheduler.

        Raises
        ------
        RuntimeError
            vLLM put a KV cache elsewhere.
        OutOfPagesError
            There is not even memory for the null block.
        """
        check_views(self.pages.tensor(), kv_caches)
        own, shared = permanent_pages(self.geometry, self._row_frames)
        self.pages.map(runs_of(own))
        for first, count in runs_of(shared):
            self.pages.alias(first, count)
        if self._device_type == "cuda":
            # vLLM warms kernels up on blocks that no request has. They are all one page until the
            # scheduler begins.
            everything = np.arange(self.pages.n_pages)
            self._warm_up = runs_of(np.setdiff1d(everything, np.concatenate((own, shared))))
            for first, count in self._warm_up:
                self.pages.alias(first, count)
        facts = {"n_pages": self.pages.n_pages, "page_bytes": self.pages.page_bytes}
        threading.Thread(target=self._populate, name="vattn-populate", daemon=True).start()
        self._link = WorkerLink(name, rank, self.answer, engine_id=self._engine_id, facts=facts)

    def answer(self, request: Json) -> Json:
        """Do what the scheduler asks; on the thread of the link."""
        if request["op"] == "serve":
            runs, self._warm_up = self._warm_up, []
            return self._unmap(runs)
        runs = [(int(first), int(count)) for first, count in request["runs"]]
        if request["op"] == "map":
            return self._map(runs)
        if request["op"] == "undo":
            # Only who could map the last runs has anything to undo.
            return self._unmap(runs) if self._last_map == runs else self._state()
        if request["op"] == "unmap":
            return self._unmap(runs)
        raise ValueError(f"a worker knows no operation {request['op']!r}")

    def close(self) -> None:
        """Stop listening. The buffer lives as long as vLLM has tensors in it."""
        if self._link is not None:
            self._link.close()
        self._to_populate.put(None)

    def _map(self, runs: list[tuple[int, int]]) -> Json:
        self._last_map = []
        try:
            self.pages.map(runs, populate=False)
        except OutOfPagesError as error:
            return {"error": str(error), "kind": REFUSAL}
        except DriverError as error:
            if error.code != errno.ENOMEM or self._device_type != "cpu":
                raise
            # The kernel has no more mappings for this process: the message says what to do.
            logger.warning("vattn: %s", error)
            return {"error": str(error), "kind": REFUSAL}
        self._last_map = runs
        if self._device_type == "cpu":
            self._to_populate.put(runs)
        return self._state()

    def _populate(self) -> None:
        # The scheduler need not wait until the kernel has found the memory, which takes far longer
        # than mapping it; whoever writes before this thread has come there faults it in.
        while (runs := self._to_populate.get()) is not None:
            self.pages.populate(runs)

    def _unmap(self, runs: list[tuple[int, int]]) -> Json:
        self._last_map = []
        if self._device_type == "cuda":
            # Whatever stream a step used the pages on.
            torch.cuda.synchronize(self._device)
        if self.pages.unmap(runs) < sum(count for _, count in runs):
            raise DriverError("the driver refused to unmap KV memory", "unmap", 0)
        return self._state()

    def _state(self) -> Json:
        return {"mapped_pages": self.pages.mapped_pages}
