"""What the rows of a VAttnCache have in common, and how they came by it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import vattn


def count_reorders(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often rows are given the tokens of others, from now on."""
    counts: Counter[str] = Counter()
    reorder = vattn.KVCache.reorder

    def counted(cache: Any, rows: Any, parents: Any, **options: Any) -> None:
        counts["reorder"] += 1
        reorder(cache, rows, parents, **options)

    monkeypatch.setattr(vattn.KVCache, "reorder", counted)
    return counts


def aliased(cache: Any) -> int:
    return sum(kv_cache.stats().aliased_bytes for kv_cache in cache.kv_caches)


def mapped(cache: Any) -> int:
    return sum(kv_cache.stats().mapped_bytes for kv_cache in cache.kv_caches)


def row_bytes(cache: Any, tokens: int = 300) -> int:
    """What a row with so many tokens takes."""
    total = 0
    for kv in cache.kv_caches:
        a_page_each = kv.regions_per_row * kv.page_bytes
        total += -(-tokens * kv.token_bytes // a_page_each) * a_page_each
    return total


def whole_bytes(cache: Any) -> int:
    """What of a row with 300 tokens can be shared: all but the last page of each region."""
    return row_bytes(cache) - row_bytes(cache, 1)


def contents(cache: Any) -> list[torch.Tensor]:
    """Keys and values of all tokens that there are, windows or not."""
    return [
        tensor.clone()
        for storage in cache._storages
        for index, length in enumerate(storage.lengths)
        for tensor in storage.kv(index, length)
    ]
