"""KV-cache specs: what tells vLLM's scheduler which of our managers a layer's cache is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vattn.integrations.vllm.contiguous import ContiguousManager
from vattn.integrations.vllm.elastic import ElasticFullManager, ElasticSlidingManager
from vattn.integrations.vllm.geometry import Geometry, blocks_per_frame
from vattn.integrations.vllm.ledger import ONE_PROCESS
from vattn.integrations.vllm.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ElasticFullSpec(FullAttentionSpec):
    """Full attention over an elastic pool."""


@dataclass(frozen=True, kw_only=True)
class ElasticSlidingSpec(SlidingWindowSpec):
    """Sliding-window attention over an elastic pool."""


@dataclass(frozen=True, kw_only=True)
class ContiguousSpec(FullAttentionSpec):
    """Full attention over rows: request ``r`` has the blocks from ``r * blocks_per_row`` on."""

    blocks_per_row: int = 0

    @property
    def prefix_cacheable(self) -> bool:
        """No: a row belongs to one request."""
        return False

    @classmethod
    def merge(cls, specs: list[Any]) -> ContiguousSpec:
        """Merge the specs of the layers of a group, which are all alike."""
        merged = super().merge(specs)
        return replace(merged, blocks_per_row=specs[0].blocks_per_row)


def _register() -> None:
    # vLLM registers its own only if there are none yet.
    register_all_kvcache_specs(None)
    for spec, manager, base in (
        (ElasticFullSpec, ElasticFullManager, FullAttentionSpec),
        (ElasticSlidingSpec, ElasticSlidingManager, SlidingWindowSpec),
        (ContiguousSpec, ContiguousManager, FullAttentionSpec),
    ):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=base)


def customize(spec: AttentionSpec, config: VllmConfig, settings: Settings) -> AttentionSpec:
    """Turn a layer's spec into ours.

    Raises
    ------
    ValueError
        A kind of attention that the mode cannot serve.
    """
    kind = type(spec)
    if kind is FullAttentionSpec and not spec.non_causal and spec.attention_chunk_size is None:
        if settings.mode == "elastic":
            return replace_as(spec, ElasticFullSpec)
        if spec.sliding_window is None:
            return replace_as(
                spec, ContiguousSpec, blocks_per_row=blocks_per_row(spec, config, settings)
            )
    if kind is SlidingWindowSpec and settings.mode == "elastic":
        return replace_as(spec, ElasticSlidingSpec)
    raise ValueError(
        f"vattn's {settings.mode} mode cannot serve {kind.__name__} layers, only "
        + (
            "full and sliding-window attention; leave --kv-transfer-config out"
            if settings.mode == "elastic"
            else 'full attention without a window; use "mode": "elastic"'
        )
    )


class Plan(NamedTuple):
    """What the scheduler and its workers both work out, each for itself."""

    geometry: Geometry
    row_frames: int | None  # frames of row 0, if dummy runs read all of it


def plan_of(config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings) -> Plan:
    """Plan the buffer of an engine whose layers all have specs of ours.

    Raises
    ------
    ValueError
        A layer has another spec: our attention backend was not asked. Or no request could run.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    if not specs:
        raise ValueError("the model has no KV cache; leave --kv-transfer-config out")
    for spec in specs:
        _check_ours(spec, config, settings)
    device_type = config.device_config.device_type
    block_bytes = max(tensor.block_stride for tensor in kv_cache_config.kv_cache_tensors)
    page_bytes = settings.page_bytes_for(device_type, block_bytes)
    frame = blocks_per_frame(block_bytes, page_bytes)
    geometry = Geometry.of(kv_cache_config, page_bytes, frame)
    if settings.mode == "elastic":
        return Plan(geometry, None)
    per_row = specs[0].blocks_per_row
    if geometry.num_blocks < 2 * per_row:
        raise ValueError(
            f"there are {geometry.num_blocks} blocks, but a row has {per_row} and row 0 is vLLM's "
            f"own, so no request could run; set --num-gpu-blocks-override to (n + 1) * {per_row} "
            "for n requests at a time, or lower --max-model-len"
        )
    # On the CPU nothing runs over rows that no request has.
    return Plan(geometry, per_row // frame if device_type == "cuda" else None)


def _check_ours(spec: KVCacheSpec, config: VllmConfig, settings: Settings) -> None:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        raise ValueError(
            "vattn cannot serve layers whose keys and values differ in size, such as those of a "
            "draft model beside its target; leave --kv-transfer-config out"
        )
    if not isinstance(spec, ElasticFullSpec | ElasticSlidingSpec | ContiguousSpec):
        raise ValueError(
            f"the layers have a {type(spec).__name__}, so vattn's attention backend is not in "
            "use; name VattnConnector alone in --kv-transfer-config and, but for the CPU, add "
            "--attention-backend CUSTOM, or leave --kv-transfer-config out"
        )
    rows = spec.blocks_per_row if isinstance(spec, ContiguousSpec) else None
    wanted = blocks_per_row(spec, config, settings) if settings.mode == "contiguous" else None
    if rows != wanted:
        raise ValueError(
            f"the layers have a {type(spec).__name__} with {rows} blocks in a row, and this engine "
            f"in {settings.mode} mode wants {wanted}: {ONE_PROCESS}"
        )


def blocks_per_row(spec: KVCacheSpec, config: VllmConfig, settings: Settings) -> int:
    """Blocks of a row: for the longest request, in whole frames."""
    page_bytes = settings.page_bytes_for(config.device_config.device_type, spec.page_size_bytes)
    frame = blocks_per_frame(spec.page_size_bytes, page_bytes)
    longest = -(-config.model_config.max_model_len // spec.block_size)
    return -(-longest // frame) * frame


# Whoever unpickles a spec of ours imports this module, and then knows its manager.
_register()
