"""vLLM's KV connector, as vattn uses it: to be told what the engine does, not to move any KV."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import KVCacheConfig

from vattn.integrations.vllm.engine import EngineMemory
from vattn.integrations.vllm.metrics import MemoryMetrics, MemoryStats
from vattn.integrations.vllm.settings import active_settings, engine_name
from vattn.integrations.vllm.support import check_config, check_version
from vattn.integrations.vllm.worker import WorkerMemory

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

check_version()


class VattnConnector(KVConnectorBase_V1, SupportsHMA):
    """Puts the KV cache of an engine on memory that vattn maps and unmaps.

    In a worker it answers vLLM's allocation with a reserved range. In the scheduler it binds the
    managers of the blocks to the workers, and notes when requests come and go.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = active_settings(vllm_config)
        assert settings is not None  # vLLM makes what the configuration names
        check_config(vllm_config, settings)
        self._name = engine_name(vllm_config, settings)
        self._worker: WorkerMemory | None = None
        self._engine: EngineMemory | None = None
        if role is KVConnectorRole.WORKER:
            self._worker = WorkerMemory(vllm_config, kv_cache_config, settings)
        else:
            self._engine = EngineMemory(vllm_config, kv_cache_config, settings, self._name)

    @property
    def requires_kv_delivery(self) -> bool:
        """No: nothing is sent anywhere."""
        return False

    # In a worker.

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """Return the context in which vLLM allocates its KV cache."""
        assert self._worker is not None
        return self._worker.allocation()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Check where the KV caches are, and start to listen to the scheduler."""
        assert self._worker is not None
        self._worker.start(kv_caches, self._name, self._vllm_config.parallel_config.rank)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do nothing: memory was mapped when the scheduler handed out the blocks."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing."""

    def wait_for_save(self) -> None:
        """Do nothing."""

    # In the scheduler.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Connect the managers of the blocks to the memory of the workers."""
        super().bind_kv_cache_manager(kv_cache_manager)
        assert self._engine is not None
        self._engine.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        """Note a request."""
        assert self._engine is not None
        self._engine.request_came(request.request_id)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request. vLLM frees its blocks itself."""
        assert self._engine is not None
        self._engine.request_ended(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request of a model with several groups of layers."""
        return self.request_finished(request, [])

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Find nothing: there is no store of KV outside the cache."""
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Do nothing: the blocks have memory already."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Follow the budget at the end of each scheduling step; nothing travels to the workers."""
        assert self._engine is not None
        self._engine.before_step()
        return KVConnectorMetadata()

    def get_kv_connector_stats(self) -> MemoryStats | None:
        """Return what the memory did since the last call; the scheduler's side has it all."""
        return None if self._engine is None else MemoryStats.of(self._engine)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> MemoryStats | None:
        """Make statistics from what came out of another process."""
        return MemoryStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> MemoryMetrics:
        """Make the metrics that vLLM shows at ``/metrics``."""
        return MemoryMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Close the socket and end the threads."""
        if self._engine is not None:
            self._engine.close()
        if self._worker is not None:
            self._worker.close()
