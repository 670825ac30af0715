"""The scheduler's end: the ledger, the socket, and the thread that shrinks an idle engine."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Protocol

import numpy as np
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig

from vattn.integrations.vllm.channel import ChannelClosed, Json, Server
from vattn.integrations.vllm.geometry import permanent_pages
from vattn.integrations.vllm.ledger import OutOfStepError, PageLedger
from vattn.integrations.vllm.settings import Settings, start_id
from vattn.integrations.vllm.specs import Plan, plan_of
from vattn.units import format_bytes

# A name below "vllm", which is what vLLM configures to be shown.
logger = init_logger(f"vllm.{__name__}")

# Workers listen before the scheduler is made; on a busy machine their threads may need a moment.
WORKERS_TIMEOUT_S = 120.0
# How often an idle engine looks whether blocks have been given back since.
RECHECK_S = 0.25


class Pool(Protocol):
    """What gives blocks to requests: one for each mode."""

    def bind(self, ledger: PageLedger) -> None:
        """Start serving with the memory of this ledger."""

    def shrink_to(self, pages: int) -> None:
        """Take memory that nobody uses until at most so many pages are mapped."""

    def enforce_budget(self) -> None:
        """Get below a budget that was lowered."""

    def settle(self) -> None:
        """Let vLLM's own data follow what ``shrink_to`` did on another thread."""


class EngineMemory:
    """The memory of one engine, as its scheduler sees it.

    Notes
    -----
    vLLM's scheduler runs on one thread, which takes the ledger's lock when a step begins and when a
    request comes; the control thread acts only between two steps. So a step that begins while the
    engine shrinks waits for the end of it, and vLLM's own data are touched by its own thread alone.
    """

    def __init__(
        self, config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings, name: str
    ) -> None:
        self.settings = settings
        self.name = name
        self._plan: Plan = plan_of(config, kv_cache_config, settings)
        longest = -(-config.model_config.max_model_len // config.cache_config.block_size)
        self._longest_blocks = longest * len(kv_cache_config.kv_cache_groups)
        self._live: set[str] = set()
        self._was_over = False
        self._idle_since = time.monotonic()
        self._wake = threading.Condition()
        self._closed = False
        self._pool: Pool | None = None
        self.ledger: PageLedger | None = None
        self._server = Server(
            name,
            self.answer,
            engine_id=start_id(config),
            n_workers=config.parallel_config.world_size,
        )
        self._control = threading.Thread(target=self._run, name="vattn-control", daemon=True)

    def bind(self, manager: KVCacheManager) -> None:
        """Wait for the workers and begin to serve.

        Raises
        ------
        ValueError
            A budget that one request of the longest length does not fit in.
        RuntimeError
            A worker has planned another buffer than this scheduler has.
        TimeoutError
            The workers did not come.
        """
        geometry, row_frames = self._plan
        own = {"n_pages": geometry.n_pages, "page_bytes": geometry.page_bytes}
        for rank, facts in enumerate(self._server.wait_for_workers(WORKERS_TIMEOUT_S)):
            if facts != own:
                raise RuntimeError(
                    f"worker {rank} has a KV buffer of {facts}, but its scheduler expects {own}; "
                    "this vLLM is not supported, or vattn has a bug"
                )
        permanent = self._begin_to_serve()
        budget = geometry.n_pages
        if self.settings.budget_bytes is not None:
            # vLLM rounds its blocks down, so a little too much is no mistake here.
            budget = min(budget, self.settings.budget_bytes // geometry.page_bytes)
        self.ledger = PageLedger(
            geometry,
            budget_pages=geometry.n_pages,
            floor_pages=self.settings.floor_bytes // geometry.page_bytes,
            minimum_pages=self._minimum_pages(permanent),
            call=self._server.call,
        )
        self.ledger.set_budget(budget)
        self.ledger.hold(np.concatenate(permanent_pages(geometry, row_frames)), permanent)
        managers = manager.coordinator.single_type_managers
        pool: Pool = managers[0].pool_of_vattn()
        pool.bind(self.ledger)
        self._pool = pool
        self._control.start()
        logger.info(
            "vattn serves %s in %s mode: %s",
            self.name,
            self.settings.mode,
            self.describe(),
        )

    def _begin_to_serve(self) -> int:
        """Let the workers take back what only warming up needed; pages that stay."""
        answers = self._server.call({"op": "serve"})
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(f"a worker could not begin to serve: {answer['error']}")
        return max(int(answer["mapped_pages"]) for answer in answers)

    def _minimum_pages(self, permanent: int) -> int:
        geometry = self._plan.geometry
        # The null block's frame has one block less for requests.
        spare = 1 if self.settings.mode == "elastic" else 0
        frames = -(-(self._longest_blocks + spare) // geometry.frame_blocks)
        return min(permanent + frames * geometry.max_frame_pages, geometry.n_pages)

    # On the scheduler's thread.

    def request_came(self, request_id: str) -> None:
        """Note a request; waits while the control thread takes memory from the idle engine.

        Raises
        ------
        OutOfStepError
            The control thread has found that nobody knows what is mapped. It ends the engine.
        """
        assert self.ledger is not None and self._pool is not None
        with self.ledger.lock:
            self.ledger.check_in_step()
            self._live.add(request_id)
            self._pool.settle()

    def request_ended(self, request_id: str) -> None:
        """Note the end of a request."""
        if self._live == {request_id}:
            self._idle_since = time.monotonic()
        self._live.discard(request_id)
        if not self._live:
            with self._wake:
                self._wake.notify_all()

    def before_step(self) -> None:
        """Follow a budget that was lowered, or raised again; a step has been scheduled."""
        assert self.ledger is not None and self._pool is not None
        with self.ledger.lock:
            if self.ledger.over or self._was_over:
                self._pool.enforce_budget()
            self._was_over = self.ledger.over > 0
            self.ledger.step_ends()

    # On other threads.

    def answer(self, request: Json) -> Json:
        """Answer a client of the socket."""
        if self.ledger is None:
            raise ValueError("the engine is still starting; ask again")
        if request.get("op") == "budget":
            size = int(request["bytes"])
            self.ledger.set_budget(size // self.ledger.page_bytes)
            logger.info("vattn: the budget of %s is now %s", self.name, format_bytes(size))
            with self._wake:
                self._wake.notify_all()
            self._shrink()
        elif request.get("op") != "status":
            raise ValueError(f"operation {request.get('op')!r} is neither 'status' nor 'budget'")
        return {"status": self.status()}

    def status(self) -> dict[str, Any]:
        """Describe the engine's memory; sizes are those of one worker."""
        assert self.ledger is not None
        ledger = self.ledger
        page = ledger.page_bytes
        return {
            "name": self.name,
            "mode": self.settings.mode,
            "pid": os.getpid(),
            "budget_bytes": ledger.budget_pages * page,
            "floor_bytes": ledger.floor_pages * page,
            "minimum_bytes": ledger.minimum_pages * page,
            "ceiling_bytes": ledger.geometry.n_pages * page,
            "mapped_bytes": ledger.mapped_pages * page,
            "idle": not self._live,
            "running_requests": len(self._live),
        }

    def describe(self) -> str:
        """Write the limits in words."""
        sizes = {k: format_bytes(v) for k, v in self.status().items() if k.endswith("_bytes")}
        return (
            f"budget {sizes['budget_bytes']} of {sizes['ceiling_bytes']}, floor "
            f"{sizes['floor_bytes']}, idle after {self.settings.idle_seconds:g} s"
        )

    def close(self) -> None:
        """Stop listening and end the control thread. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._server.close()
        if self._control.is_alive():
            self._control.join()

    def _run(self) -> None:
        while not self._closed:
            with self._wake:
                self._wake.wait(self._pause())
            try:
                self._shrink()
            except (ChannelClosed, OutOfStepError) as error:
                # vLLM sees by itself that a worker is gone; the other ends the next request's step.
                logger.error("vattn: the memory of %s cannot be followed: %s", self.name, error)
                return
            except Exception:
                # Nobody waits for this thread; the engine goes on with what is mapped.
                logger.exception("vattn could not shrink the idle engine %s", self.name)

    def _pause(self) -> float | None:
        """Seconds until the idle engine is looked at; None: when something happens."""
        if self._closed:
            return 0.0
        if self._live or self.ledger is None or self.ledger.mapped_pages <= self._idle_pages():
            return None
        left = self._idle_since + self.settings.idle_seconds - time.monotonic()
        return max(left, RECHECK_S)

    def _idle_pages(self) -> int:
        assert self.ledger is not None
        return min(self.ledger.floor_pages, self.ledger.budget_pages)

    def _shrink(self) -> None:
        assert self.ledger is not None and self._pool is not None
        ledger = self.ledger
        with ledger.lock:
            if ledger.stepping:
                return  # the step's own thread follows the budget
            idle_for = time.monotonic() - self._idle_since
            target = ledger.budget_pages
            if not self._live and idle_for >= self.settings.idle_seconds:
                target = self._idle_pages()
            if ledger.mapped_pages > target:
                self._pool.shrink_to(target)
