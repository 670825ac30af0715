"""Work for a GPU that lasts as long as wanted, and caches to ask questions about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import vattn

DEVICE = "cuda:0"
LENS = (300, 1, 77, 1500)  # tokens of the rows, none of them a whole number of pages
HEADS, DIM = 8, 128


def make_cache(**options: Any) -> vattn.KVCache:
    """A small cache with a row for each of LENS; nothing is mapped ahead of need."""
    defaults: dict[str, Any] = {
        "num_layers": 2,
        "num_kv_heads": HEADS,
        "head_dim": DIM,
        "dtype": torch.bfloat16,
        "max_batch_size": len(LENS),
        "max_seq_len": 32768,
        "device": DEVICE,
        "memory": "256MiB",
        "lookahead": 0,
    }
    return vattn.init(vattn.CacheConfig(**(defaults | options)))


def fill_rows(cache: vattn.KVCache, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give each row its LENS of random tokens in one layer; returns ordinary copies."""
    if not any(cache.seq_lens):
        for n in LENS:
            cache.alloc(n)
        cache.step(list(LENS))
    copies = []
    for row, n in enumerate(LENS):
        own_k, own_v = cache.kv(layer, rows=row, max_len=n)
        assert own_v is not None
        for tensor in (own_k, own_v):
            tensor.normal_()
        copies.append((own_k[0].clone(), own_v[0].clone()))
    return copies


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one token, [heads, dim], to [tokens, kv heads, dim], in float32 step by step."""
    group = q.shape[0] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("hd,thd->ht", q.float(), k) * q.shape[-1] ** -0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


def worst(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; infinity if a number is not finite."""
    difference = (got.float() - expected.float()).abs().max().item()
    return float(difference) if difference == difference else float("inf")


class Matmuls:
    """Matrix products over memory of their own, enqueued for about ``seconds``."""

    def __init__(self, seconds: float, size: int = 8192) -> None:
        self._a, self._b = (
            torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
        )
        self.result = torch.empty_like(self._a)
        self.n = 20
        self.enqueue()  # warms up
        torch.cuda.synchronize()
        ms = self.timed_ms(lambda: None)
        # Fewer than a stream takes before a launch has to wait.
        self.n = max(20, min(700, round(self.n * seconds * 1000 / ms)))

    def enqueue(self) -> None:
        for _ in range(self.n):
            torch.matmul(self._a, self._b, out=self.result)

    def timed_ms(self, meanwhile: Callable[[], object]) -> float:
        """Enqueue all, call ``meanwhile``, wait; returns what the GPU took."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.enqueue()
        end.record()
        meanwhile()
        end.synchronize()
        return float(begin.elapsed_time(end))
