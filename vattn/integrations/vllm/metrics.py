"""The metrics that vattn adds to vLLM's ``/metrics``, and to its log."""

from __future__ import annotations

import atexit
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.logger import init_logger

from vattn.integrations.vllm.channel import ask, running
from vattn.integrations.vllm.settings import active_settings, engine_name

if TYPE_CHECKING:
    from vattn.integrations.vllm.engine import EngineMemory

# A name below "vllm", which is what vLLM configures to be shown.
logger = init_logger(f"vllm.{__name__}")

GAUGES = {
    "mapped_bytes": "Physical memory under the KV cache, of one worker.",
    "budget_bytes": "Physical memory that the KV cache may take, of one worker.",
    "floor_bytes": "Physical memory that an idle engine keeps, of one worker.",
}
COUNTERS = {
    "mapped_pages": "Pages that were mapped.",
    "unmapped_pages": "Pages that were unmapped.",
    "refusals": "Times that a worker had no memory below the budget.",
    "budget_waits": "Times that blocks were refused because the budget was used up.",
}


@dataclass
class MemoryStats(KVConnectorStats):
    """Sizes at a moment, and totals since the start: the last one seen counts."""

    @classmethod
    def of(cls, engine: EngineMemory) -> MemoryStats | None:
        """Read an engine; None before it serves."""
        if engine.ledger is None:
            return None
        status = engine.status()
        totals = vars(engine.ledger.counters)
        data: dict[str, Any] = {name: status[name] for name in GAUGES}
        data.update((name, totals[name]) for name in COUNTERS)
        return cls(data=data)

    def reset(self) -> None:
        """Forget."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Take over what is newer."""
        return MemoryStats(data={**self.data, **other.data})

    def reduce(self) -> dict[str, int | float]:
        """Summarise for the log."""
        return {name: self.data[name] for name in GAUGES if name in self.data}

    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return not self.data


class MemoryMetrics(KVConnectorPromMetrics):
    """``vattn:*`` at ``/metrics``, with vLLM's labels.

    vLLM passes on what a scheduler reports with a step. An idle engine makes none while it gives
    memory back, so when somebody looks, the sizes are asked for.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        settings = active_settings(vllm_config)
        assert settings is not None
        several = vllm_config.parallel_config.data_parallel_size > 1
        self._sizes = {
            engine: _Sizes(engine_name(vllm_config, settings, engine if several else None))
            for engine in per_engine_labelvalues
        }
        self._gauges = self._make(metric_types[Gauge], GAUGES)
        self._counters = self._make(metric_types[Counter], COUNTERS)
        self._seen: dict[tuple[int, str], float] = {}
        for (engine, name), gauge in self._gauges.items():
            if isinstance(gauge, Gauge):  # not those that vLLM has for Ray
                gauge.set_function(partial(self._sizes[engine].get, name))
        # vLLM ends its engines with SIGKILL if they are not quick. Whoever is left, this process,
        # removes the sockets that nobody listens to.
        atexit.register(running)

    def _make(self, kind: Any, names: dict[str, str]) -> dict[tuple[int, str], Any]:
        made = {}
        for name, text in names.items():
            metric = kind(name=f"vattn:kv_{name}", documentation=text, labelnames=self._labelnames)
            for engine, labels in self.per_engine_labelvalues.items():
                made[engine, name] = metric.labels(*labels)
        return made

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take over what the scheduler reported."""
        sizes = {name: transfer_stats_data[name] for name in GAUGES if name in transfer_stats_data}
        self._sizes[engine_idx].note(sizes)
        for name, size in sizes.items():
            self._gauges[engine_idx, name].set(size)
        for name in COUNTERS:
            total = transfer_stats_data.get(name, 0)
            key = engine_idx, name
            self._counters[key].inc(max(0, total - self._seen.get(key, 0)))
            self._seen[key] = total


class _Sizes:
    """Sizes of one engine, asked for when they are older than a moment."""

    MOMENT_S = 0.5
    PATIENCE_S = 0.5

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[str, float] = {}
        self._asked_at = -self.MOMENT_S

    def note(self, sizes: dict[str, float]) -> None:
        self._known.update(sizes)

    def get(self, name: str) -> float:
        if time.monotonic() - self._asked_at >= self.MOMENT_S:
            self._asked_at = time.monotonic()
            try:
                answer = ask(self._name, {"op": "status"}, timeout_s=self.PATIENCE_S)
                self.note({size: answer["status"][size] for size in GAUGES})
            except (OSError, RuntimeError, ValueError) as error:
                # Starting, ending or busy: what was known last is shown.
                logger.debug("vattn: %s did not tell its sizes: %s", self._name, error)
        return self._known.get(name, 0.0)
