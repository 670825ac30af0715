"""What vattn cannot serve is refused at start-up, in a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import MIB
from engine_rounds import STARTED, serve
from packaging.version import Version
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vattn.integrations.vllm import support
from vattn.integrations.vllm.settings import Settings
from vattn.integrations.vllm.specs import (
    ContiguousSpec,
    ElasticFullSpec,
    ElasticSlidingSpec,
    customize,
)

pytestmark = pytest.mark.vllm

ELASTIC = Settings(mode="elastic")
CONTIGUOUS = Settings(mode="contiguous")
SIZES: dict[str, Any] = {
    "block_size": 32,
    "num_kv_heads": 2,
    "head_size": 32,
    "dtype": torch.float32,
}


def engine(**changes: Any) -> Any:
    """A configuration that can be served, as far as it is looked at, but for some values."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "is_encoder_decoder": False,
            "use_mla": False,
            "has_inner_state": False,
            "enable_sleep_mode": False,
            "max_model_len": 512,
        },
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "nnodes": 1,
            "decode_context_parallel_size": 1,
        },
        "kv_transfer_config": {"kv_role": "kv_both"},
        "device_config": {"device_type": "cpu"},
    }
    for name, value in changes.items():
        (part,) = [part for part in parts.values() if name in part]
        part[name] = value
    spaces = {name: SimpleNamespace(**part) for name, part in parts.items()}
    return SimpleNamespace(**spaces, speculative_config=None)


@pytest.mark.parametrize("settings", [ELASTIC, CONTIGUOUS], ids=["elastic", "contiguous"])
def test_an_ordinary_engine_is_not_refused(settings: Settings) -> None:
    support.check_config(engine(), settings)
    support.check_config(engine(device_type="cuda"), settings)
    support.check_version()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_role": "kv_producer"}, "kv_role must be 'kv_both'"),
        ({"kv_role": "kv_consumer"}, "kv_role must be 'kv_both'"),
        ({"is_encoder_decoder": True}, "encoder-decoder models are not supported"),
        ({"use_mla": True}, r"models with MLA \(latent attention\) are not supported"),
        ({"has_inner_state": True}, "Mamba or linear attention are not supported"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism.*use --tensor-parallel-size"),
        ({"nnodes": 2}, "workers on several machines are not supported"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism is not supported"),
        ({"enable_sleep_mode": True}, "sleep mode is not supported"),
        ({"device_type": "tpu"}, "device 'tpu', only 'cpu' and 'cuda'"),
    ],
)
@pytest.mark.parametrize("settings", [ELASTIC, CONTIGUOUS], ids=["elastic", "contiguous"])
def test_an_engine_that_cannot_be_served_is_refused(
    changes: dict[str, Any], words: str, settings: Settings
) -> None:
    with pytest.raises(ValueError, match=rf"^vattn cannot serve .*{words}") as refusal:
        support.check_config(engine(**changes), settings)
    assert "leave --kv-transfer-config out" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_speculative_decoding_needs_elastic_mode() -> None:
    config = engine()
    config.speculative_config = SimpleNamespace()
    support.check_config(config, ELASTIC)
    with pytest.raises(ValueError, match=r"speculative decoding.*contiguous mode; use elastic"):
        support.check_config(config, CONTIGUOUS)


@pytest.mark.parametrize("version", ["0.30.9", "0.33.0", "0.34.0rc1", "1.0"])
def test_another_version_of_vllm_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "vllm_version", lambda: Version(version))
    with pytest.raises(
        ValueError, match=rf"^vLLM is {version}, and vattn supports 0\.31 and later"
    ):
        support.check_version()


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0", "0.32.1.post1", "0.32.0+cpu"])
def test_a_version_of_vllm_that_was_tested_is_served(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "vllm_version", lambda: Version(version))
    support.check_version()


@pytest.mark.parametrize(
    ("spec", "settings", "kind"),
    [
        (FullAttentionSpec(**SIZES), ELASTIC, ElasticFullSpec),
        (FullAttentionSpec(**SIZES, sliding_window=64), ELASTIC, ElasticFullSpec),
        (SlidingWindowSpec(**SIZES, sliding_window=64), ELASTIC, ElasticSlidingSpec),
        (FullAttentionSpec(**SIZES), CONTIGUOUS, ContiguousSpec),
    ],
    ids=["full", "full with a window", "window", "row"],
)
def test_attention_gets_a_spec_that_says_the_same(
    spec: Any, settings: Settings, kind: type[KVCacheSpec]
) -> None:
    found: Any = customize(spec, engine(), settings)
    assert type(found) is kind
    assert found.page_size_bytes == spec.page_size_bytes
    assert found.sliding_window == spec.sliding_window


@pytest.mark.parametrize(
    ("spec", "settings", "words"),
    [
        (SlidingWindowSpec(**SIZES, sliding_window=64), CONTIGUOUS, 'use "mode": "elastic"'),
        (FullAttentionSpec(**SIZES, sliding_window=64), CONTIGUOUS, 'use "mode": "elastic"'),
        (FullAttentionSpec(**SIZES, attention_chunk_size=64), ELASTIC, "leave --kv-transfer"),
        (FullAttentionSpec(**SIZES, non_causal=True), CONTIGUOUS, 'use "mode": "elastic"'),
        (MLAAttentionSpec(**SIZES), ELASTIC, "leave --kv-transfer-config out"),
    ],
    ids=["window", "full with a window", "chunks", "not causal", "MLA"],
)
def test_attention_of_another_kind_is_refused(spec: Any, settings: Settings, words: str) -> None:
    with pytest.raises(ValueError, match=f"mode cannot serve .* layers, only .*{words}"):
        customize(spec, engine(), settings)


def test_a_row_is_whole_frames_and_holds_the_longest_request() -> None:
    spec: Any = customize(FullAttentionSpec(**SIZES), engine(max_model_len=500), CONTIGUOUS)
    frame = 64 * 2**10 // spec.page_size_bytes
    assert frame == 4
    assert spec.blocks_per_row % frame == 0
    assert spec.blocks_per_row * spec.block_size >= 500


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_that_is_refused_does_not_start(
    llama: Path, new_folder: Callable[[], Path]
) -> None:
    outcome = serve(llama, [], {"budget": MIB // 4}, folder=new_folder())
    assert outcome.returncode == 1
    assert STARTED not in outcome.output
    assert "that one request of the longest length needs; give more" in outcome.output
    assert outcome.sockets == []
