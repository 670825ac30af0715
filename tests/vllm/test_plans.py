"""What scheduler and workers plan for a buffer, and which buffers they refuse."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_walk import BLOCK_SIZE, MAX_TOKENS, Shape
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs

from vattn.integrations.vllm.settings import Settings
from vattn.integrations.vllm.specs import plan_of

pytestmark = pytest.mark.vllm

ELASTIC = Settings(page_bytes=4096)
CONTIGUOUS = Settings(mode="contiguous", page_bytes=4096)


def engine(max_model_len: int = MAX_TOKENS, device_type: str = "cpu") -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        device_config=SimpleNamespace(device_type=device_type),
    )


def buffer(kind: str, spec: Any = None, **shape: Any) -> KVCacheConfig:
    """Planned by vLLM; ``spec`` makes another one of that of the group."""
    config = Shape(kind=kind, **shape).config()
    if spec is not None:
        (group,) = config.kv_cache_groups
        config.kv_cache_groups = [replace(group, kv_cache_spec=spec(group.kv_cache_spec))]
    return config


def test_dummy_runs_read_row_0_on_a_gpu_only() -> None:
    config = buffer("contiguous", num_blocks=128)
    shape = Shape(kind="contiguous")
    assert plan_of(engine(), config, CONTIGUOUS).row_frames is None
    on_gpu = plan_of(engine(device_type="cuda"), config, CONTIGUOUS)
    assert on_gpu.row_frames == shape.blocks_per_row // shape.frame_blocks
    assert plan_of(engine(device_type="cuda"), buffer("elastic"), ELASTIC).row_frames is None


def test_rows_for_no_request_at_all_are_refused() -> None:
    row = Shape(kind="contiguous").blocks_per_row
    plan_of(engine(), buffer("contiguous", num_blocks=2 * row), CONTIGUOUS)
    with pytest.raises(
        ValueError, match=rf"there are {2 * row - 1} blocks.*no request.*\(n \+ 1\)"
    ):
        plan_of(engine(), buffer("contiguous", num_blocks=2 * row - 1), CONTIGUOUS)


def test_layers_of_another_backend_are_refused() -> None:
    def stock(spec: Any) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=spec.dtype
        )

    with pytest.raises(ValueError, match=r"FullAttentionSpec.*--attention-backend CUSTOM"):
        plan_of(engine(), buffer("elastic", stock), ELASTIC)


def test_layers_that_differ_in_size_are_refused_by_name() -> None:
    def several(spec: Any) -> UniformTypeKVCacheSpecs:
        return UniformTypeKVCacheSpecs(block_size=BLOCK_SIZE, kv_cache_specs={"one": spec})

    with pytest.raises(
        ValueError, match="cannot serve layers whose keys and values differ in size"
    ):
        plan_of(engine(), buffer("elastic", several), ELASTIC)


def test_a_model_without_a_cache_is_refused() -> None:
    config = buffer("elastic")
    config.kv_cache_groups = []
    with pytest.raises(ValueError, match="has no KV cache; leave --kv-transfer-config out"):
        plan_of(engine(), config, ELASTIC)


@pytest.mark.parametrize(
    ("kind", "settings", "max_model_len"),
    [
        ("elastic", CONTIGUOUS, MAX_TOKENS),
        ("contiguous", ELASTIC, MAX_TOKENS),
        ("contiguous", CONTIGUOUS, 2 * MAX_TOKENS),
    ],
)
def test_layers_that_were_made_for_another_engine_of_the_process_are_refused(
    kind: str, settings: Settings, max_model_len: int
) -> None:
    with pytest.raises(ValueError, match="start each engine in a process of its own"):
        plan_of(engine(max_model_len), buffer(kind, num_blocks=256), settings)
