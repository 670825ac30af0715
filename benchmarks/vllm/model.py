"""The model and the four engines that are compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("stock", "elastic", "elastic-budget", "contiguous")
VOCABULARY = 4096
_FLOAT32_BYTES = 4
_LAYERS, _KV_HEADS, _HEAD_SIZE = 4, 2, 64

# Small enough that the scheduler's work is a large part of a step: what vattn adds is seen best so.
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_SIZE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How all engines are set up.

    Parameters
    ----------
    max_model_len : int
        Tokens of the longest request.
    max_requests : int
        At a time.
    block_tokens : int
        Tokens of a block.
    kv_gib : int
        GiB that vLLM may take for keys and values.
    threads : int
        Of the kernels.
    idle_seconds : float
        Until an idle engine of vattn gives memory back.
    budget : str
        Of the engine "elastic-budget".
    page_bytes : str
        Unit in which vattn maps; what it would choose itself for these blocks.
    """

    max_model_len: int = 2048
    max_requests: int = 32
    block_tokens: int = 32
    kv_gib: int = 1
    threads: int = 1
    idle_seconds: float = 1.0
    budget: str = "48MiB"
    page_bytes: str = "64KiB"

    def environment(self) -> dict[str, str]:
        """Variables of an engine's processes."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }


def block_bytes(shape: Shape) -> int:
    """Bytes of the keys and values of one block in all layers."""
    token_bytes = _LAYERS * _KV_HEADS * 2 * _HEAD_SIZE * _FLOAT32_BYTES
    return token_bytes * shape.block_tokens


def write_model(folder: Path) -> None:
    """Write the model's configuration; its weights are random and made by vLLM."""
    (folder / "config.json").write_text(json.dumps(MODEL, indent=1) + "\n")


def engine_arguments(kind: str, folder: Path, shape: Shape, name: str) -> dict[str, Any]:
    """Arguments of ``AsyncEngineArgs`` for one engine.

    ``kind`` is one of ``KINDS``; ``name`` is what vattn calls the engine.
    """
    arguments: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "block_size": shape.block_tokens,
        "max_model_len": shape.max_model_len,
        "max_num_seqs": shape.max_requests,
        "seed": 0,
        "disable_log_stats": True,
    }
    if kind == "stock":
        return arguments
    extra: dict[str, Any] = {
        "mode": "contiguous" if kind == "contiguous" else "elastic",
        "idle_seconds": shape.idle_seconds,
        "page_bytes": shape.page_bytes,
        "name": name,
    }
    if kind == "elastic-budget":
        extra["budget"] = shape.budget
    arguments["kv_transfer_config"] = {
        "kv_connector": "VattnConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    return arguments
