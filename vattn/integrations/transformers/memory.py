"""Where the KV cache of a model gets its memory from, and how much of it there may be."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import torch

from vattn import _C
from vattn.cache import KVCache
from vattn.config import CacheConfig
from vattn.environment import apply_environment
from vattn.pool import open_pool
from vattn.units import parse_bytes

_LOG = logging.getLogger(__name__)

# What is left is for activations, and for whatever else runs on the machine.
_CPU_SHARE = 0.5
_CUDA_SHARE = 0.8


class Memory:
    """One budget for any number of caches: so much on each device they are on.

    Parameters
    ----------
    budget : int or str, optional
        In bytes or as "4GiB". By default :func:`default_memory`, when the first cache is opened.
    """

    def __init__(self, budget: int | str | None = None) -> None:
        self._budget = None if budget is None else parse_bytes(budget, "memory")
        self._pools: dict[str, _C.Pool] = {}

    def open(self, config: CacheConfig) -> KVCache:
        """Make a cache of this configuration, which names no memory of its own."""
        apply_environment()
        device = str(config.device)
        if device not in self._pools:
            budget = self._budget
            if budget is None:
                budget = default_memory(torch.device(device))
                _LOG.info(
                    "vattn: the KV cache may use %.1f GiB, a share of the memory free now; pass "
                    "memory to choose",
                    budget / 2**30,
                )
            self._pools[device] = open_pool(replace(config, memory=budget))
        return KVCache(config, self._pools[device])


def order_for(device: torch.device) -> str:
    """Return the order that attention wants: token-major for FlashAttention, else head-major.

    SDPA on the CPU is twice as fast on the second.
    """
    return "NHD" if device.type == "cuda" else "HND"


def head_major(cache: KVCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return K and V of every layer as [rows, heads, tokens, dim], as transformers has them."""
    tensors = []
    # Made inside inference_mode, they could not be written outside of it.
    with torch.inference_mode(False):
        for layer in range(cache.config.num_layers):
            k, v = cache.kv(layer)
            assert v is not None
            if cache.config.order == "NHD":
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            tensors.append((k, v))
    return tensors


def default_memory(device: torch.device) -> int:
    """Return a share of the memory that is free on this device, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has cached but not in use is free for torch only.
        return max(1, int(free * _CUDA_SHARE))
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(available * _CPU_SHARE)
