"""Contiguous virtual memory for the KV cache of LLM serving, backed page by page on demand.

Four calls: :func:`init`, then per request :meth:`KVCache.alloc`, :meth:`KVCache.step` once per
iteration, and :meth:`KVCache.free`. Attention kernels read :meth:`KVCache.kv` as plain tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vattn.cache import KVCache, init
from vattn.config import CacheConfig, LayerGroup
from vattn.errors import DriverError, OutOfPagesError, OutOfRowsError
from vattn.page_range import PageRange
from vattn.prefix import PrefixCache, PrefixMatch, PrefixStats
from vattn.stats import CacheStats, CallStats

if TYPE_CHECKING:
    from vattn.integrations.transformers import VAttnCache

__version__ = "0.1.0"
__all__ = [
    "CacheConfig",
    "CacheStats",
    "CallStats",
    "DriverError",
    "KVCache",
    "LayerGroup",
    "OutOfPagesError",
    "OutOfRowsError",
    "PageRange",
    "PrefixCache",
    "PrefixMatch",
    "PrefixStats",
    "VAttnCache",
    "init",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import and need not be installed.
    if name == "VAttnCache":
        from vattn.integrations.transformers import VAttnCache

        return VAttnCache
    raise AttributeError(f"module 'vattn' has no attribute {name!r}")
