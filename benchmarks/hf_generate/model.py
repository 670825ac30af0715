"""What all parts share: the model, caches filled with random keys, and a clock for each token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    StaticCache,
    StoppingCriteria,
)

# Importing it also registers attn_implementation="vattn".
from vattn.integrations.transformers import VAttnCache

# The bar and the tables are what is to be read.
transformers.logging.set_verbosity_error()

MIB, GIB = 2**20, 2**30
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MAX_POSITIONS = 65536


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with random weights."""

    layers: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden_size: int = 1024
    intermediate_size: int = 2816
    vocab_size: int = 1024

    def config(self, positions: int = MAX_POSITIONS) -> LlamaConfig:
        """Make the configuration that transformers wants."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=max(MAX_POSITIONS, positions),
            eos_token_id=None,  # every request to its end
        )

    def kv_bytes(self, dtype: str) -> int:
        """Bytes that one token adds to the cache, all layers together."""
        itemsize: int = getattr(torch, dtype).itemsize
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def __str__(self) -> str:
        return (
            f"Llama with random weights, {self.layers} layers, {self.heads} query and "
            f"{self.kv_heads} KV heads of {self.head_dim}, hidden {self.hidden_size}, "
            f"MLP {self.intermediate_size}"
        )


def build(
    shape: Shape, *, dtype: str, device: str, attention: str = "sdpa", positions: int = 0
) -> Any:
    """Make the model; the same weights each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        shape.config(positions), dtype=getattr(torch, dtype), attn_implementation=attention
    )
    return model.to(device).eval()


def make_cache(
    kind: str, shape: Shape, *, tokens: int, limit: int, batch: int, dtype: str
) -> DynamicCache | StaticCache | VAttnCache:
    """Make an empty cache for ``tokens``. A StaticCache reserves ``limit`` at once."""
    config = shape.config(tokens)
    if kind == "DynamicCache":
        return DynamicCache(config=config)
    if kind == "StaticCache":
        return StaticCache(config=config, max_cache_len=limit)
    memory = shape.kv_bytes(dtype) * tokens * batch * 11 // 10 + 64 * MIB
    return VAttnCache(config, max_batch_size=batch, memory=memory)


def random_kv(
    shape: Shape, *, batch: int, tokens: int, dtype: str, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make random keys and values of one layer, [batch, kv_heads, tokens, head_dim].

    Each token is a window on a line of noise. So they take next to no memory, and filling a cache
    with them does not show in the peak.
    """
    line = 2, batch, shape.kv_heads, tokens + shape.head_dim - 1
    noise = torch.randn(line, dtype=getattr(torch, dtype), device=device)
    keys, values = noise.unfold(-1, shape.head_dim, 1)
    return keys, values


def fill(cache: Any, shape: Shape, *, batch: int, tokens: int, dtype: str, device: str) -> None:
    """Put random keys and values into all layers."""
    for layer in range(shape.layers):
        keys, values = random_kv(shape, batch=batch, tokens=tokens, dtype=dtype, device=device)
        cache.update(keys, values, layer)


def kv_bytes_held(cache: Any) -> int:
    """Bytes that the cache holds for keys and values."""
    if isinstance(cache, VAttnCache):
        return sum(kv_cache.stats().mapped_bytes for kv_cache in cache.kv_caches)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def synchronize(device: str) -> None:
    """Wait for what the device was given to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def gaps(times: Sequence[float]) -> list[float]:
    """Times from one token to the next."""
    return [after - before for before, after in pairwise(times)]


class TokenClock(StoppingCriteria):
    """Reads the clock after each token; ends the generation after ``limit_s``, with two at least.

    A criterion because that is the one hook of generate() that is called once per token.
    """

    def __init__(self, limit_s: float = float("inf")) -> None:
        self._limit_ns = limit_s * 1e9
        self.times: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> torch.Tensor:
        synchronize(str(input_ids.device))
        self.times.append(time.perf_counter_ns())
        stop = len(self.times) > 1 and self.times[-1] - self.times[0] > self._limit_ns
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)
