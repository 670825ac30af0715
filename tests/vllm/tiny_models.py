"""Tiny models with random weights, made on the spot, that vLLM serves on the CPU in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
MAX_TOKENS = 512
WINDOW = 96  # of the models that have one: no multiple of their block
# As they come, random weights repeat a few tokens whose logits are nearly alike.
SHARPEN = 5.0

_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A model on disk, and what the engine has to be told about it."""

    path: Path
    block_size: int = 32
    kv_bytes_per_token: int = 3 * 2 * (32 + 32) * 4  # layers, heads, keys and values, fp32


def llama(folder: Path) -> TinyModel:
    """Grouped queries, three layers of full attention."""
    return _save(folder / "llama", LlamaForCausalLM, LlamaConfig(**_SIZES))


def mistral(folder: Path) -> TinyModel:
    """Every layer has a sliding window."""
    config = MistralConfig(**_SIZES, sliding_window=WINDOW)
    return _save(folder / "mistral", MistralForCausalLM, config)


def gemma(folder: Path) -> TinyModel:
    """Layers with a sliding window, and one with full attention: two groups of KV caches."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **_SIZES, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=32
    )
    return _save(folder / "gemma", Gemma3ForCausalLM, config)


def word(token: int) -> str:
    """Text of a token; of the same length for all, so that none begins like another."""
    return f"w{token:03d}"


def _save(path: Path, kind: Any, config: Any) -> TinyModel:
    torch.manual_seed(0)
    model = kind(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(SHARPEN)
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({word(i): i for i in range(VOCABULARY)}, unk_token=word(0)))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=word(0), bos_token=word(1), eos_token=word(2)
    ).save_pretrained(path)
    return TinyModel(path=path)
