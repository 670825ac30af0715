"""What each way of managing KV memory grants, behind one interface: vattn, and three others.

Three sums of bytes mean the same everywhere. *Used*: the tokens that requests have now. *Granted*:
what no other request can have, because a request holds it. *Mapped*: physical memory in place; with
vattn also idle rows and pages mapped ahead of need, which the next ``step`` may take back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vattn.cache import KVCache
from vattn.config import CacheConfig
from vattn.errors import OutOfPagesError
from vattn.testing import settle

IntArray = NDArray[np.int64]

BLOCK_TOKENS = 16
PAGE_BYTES = 2 * 2**20


class Memory(NamedTuple):
    """A moment: sums of bytes, and the driver calls so far."""

    used_bytes: int
    needed_bytes: int  # whole pages, or blocks, for the tokens of running requests
    granted_bytes: int
    mapped_bytes: int
    calls_in_step: int = 0
    calls_in_background: int = 0


class Policy(Protocol):
    """A way of managing memory, as the scheduler sees it. Rows are 0 to ``n_rows`` - 1."""

    name: str
    token_bytes: int
    budget_bytes: int
    growth_bytes: int  # what a request takes when it next grows: the headroom of admission

    def bytes_for(self, tokens: int) -> int:
        """What a request of so many tokens, at least 1, is granted."""

    def available_bytes(self) -> int:
        """What requests can still be granted."""

    def admit(self, prompt_tokens: int) -> int:
        """Give a new request a row. It is granted memory by the first ``grow`` with its tokens."""

    def grow(self, lengths: IntArray) -> None:
        """Grant every row memory for its tokens, or raise OutOfPagesError and change nothing."""

    def free(self, row: int) -> None:
        """End the request of a row."""

    def settle(self) -> None:
        """Wait until everything is mapped that can be mapped ahead of need."""

    def memory(self, lengths: IntArray) -> Memory:
        """What it knows about itself after a ``grow`` to these lengths."""


class LengthPolicy:
    """Memory that follows from lengths alone: granted is what the formula says, and so is mapped.

    Parameters
    ----------
    name : str
        For people.
    n_rows : int
        Requests at a time.
    token_bytes, budget_bytes, growth_bytes : int
        As in :class:`Policy`.
    formula : callable
        From lengths, int64 of shape (rows,), to the bytes granted to each; 0 for length 0.
    """

    def __init__(
        self,
        name: str,
        *,
        n_rows: int,
        token_bytes: int,
        budget_bytes: int,
        growth_bytes: int,
        formula: Callable[[IntArray], IntArray],
    ) -> None:
        self.name = name
        self.budget_bytes = budget_bytes
        self.growth_bytes = growth_bytes
        self.token_bytes = token_bytes
        self._formula = formula
        self._free_rows = list(range(n_rows))[::-1]
        self._bytes: IntArray = np.zeros(n_rows, dtype=np.int64)
        self._granted = 0
        self._used = 0

    def bytes_for(self, tokens: int) -> int:
        return int(self._formula(np.array([tokens]))[0])

    def available_bytes(self) -> int:
        return self.budget_bytes - self._granted

    def admit(self, prompt_tokens: int) -> int:
        del prompt_tokens  # granted when the tokens are there
        return self._free_rows.pop()

    def grow(self, lengths: IntArray) -> None:
        wanted = self._formula(lengths)
        granted = int(wanted.sum())
        if granted > self.budget_bytes:
            needed, free = granted - self._granted, self.budget_bytes - self._granted
            raise OutOfPagesError(f"{needed} bytes are needed, {free} are free", needed, free)
        self._bytes, self._granted = wanted, granted
        self._used = int(lengths.sum()) * self.token_bytes

    def free(self, row: int) -> None:
        self._granted -= int(self._bytes[row])
        self._bytes[row] = 0
        self._free_rows.append(row)

    def settle(self) -> None:
        pass  # nothing works in the background

    def memory(self, lengths: IntArray) -> Memory:
        del lengths  # grow() knows them
        return Memory(self._used, self._granted, self._granted, self._granted)


def full_reservation(config: CacheConfig) -> LengthPolicy:
    """``max_seq_len`` tokens for every request, as with a tensor of static shape."""
    token_bytes = token_bytes_of(region_bytes(config, "interleaved"))
    row_bytes = config.max_seq_len * token_bytes
    return _length_policy(
        "full reservation", config, 0, lambda lengths: (lengths > 0).astype(np.int64) * row_bytes
    )


def paged_blocks(config: CacheConfig) -> LengthPolicy:
    """Blocks of 16 tokens, as in PagedAttention."""
    block_bytes = BLOCK_TOKENS * token_bytes_of(region_bytes(config, "interleaved"))
    return _length_policy(
        "paged, 16 tokens",
        config,
        block_bytes,
        lambda lengths: -(-lengths // BLOCK_TOKENS) * block_bytes,
    )


def per_layer_pages(config: CacheConfig) -> LengthPolicy:
    """One tensor per layer for K and one for V, each a whole number of 2 MiB pages: vAttention."""
    regions = region_bytes(config, "per_layer")
    return _length_policy(
        "per layer, 2 MiB",
        config,
        PAGE_BYTES * regions.total(),
        lambda lengths: pages_bytes(lengths, regions, PAGE_BYTES),
    )


def _length_policy(
    name: str, config: CacheConfig, growth_bytes: int, formula: Callable[[IntArray], IntArray]
) -> LengthPolicy:
    assert config.memory_bytes is not None
    return LengthPolicy(
        name,
        n_rows=config.max_batch_size,
        token_bytes=token_bytes_of(region_bytes(config, "interleaved")),
        budget_bytes=config.memory_bytes,
        growth_bytes=growth_bytes,
        formula=formula,
    )


def region_bytes(config: CacheConfig, layout: str) -> Counter[int]:
    """Bytes of a token in a region of a row, in order NHD, and how many such regions a row has.

    >>> config = CacheConfig(num_layers=2, num_kv_heads=8, head_dim=128, max_batch_size=1,
    ...                      max_seq_len=64, device="cpu", memory="1GiB")
    >>> region_bytes(config, "per_layer"), region_bytes(config, "interleaved")
    (Counter({2048: 4}), Counter({8192: 1}))
    """
    regions: Counter[int] = Counter()
    for group in config.groups:
        layers, heads, k_dim, v_dim, *_ = group.shape()
        for dim in (k_dim, v_dim):
            if dim:
                regions[heads * dim * config.item_bytes] += len(layers)
    if layout == "per_layer":
        return regions
    return Counter([token_bytes_of(regions)])


def token_bytes_of(regions: Counter[int]) -> int:
    """Bytes of a token in all regions."""
    return sum(token_bytes * count for token_bytes, count in regions.items())


def pages_bytes(lengths: IntArray, regions: Counter[int], page_bytes: int) -> IntArray:
    """Bytes of rows whose every region is a whole number of pages."""
    pages = np.zeros_like(lengths)
    for token_bytes, count in regions.items():
        pages += (lengths * token_bytes + (page_bytes - 1)) // page_bytes * count
    return pages * page_bytes


OTHERS: dict[str, Callable[[CacheConfig], Policy]] = {
    "full": full_reservation,
    "paged": paged_blocks,
    "per-layer": per_layer_pages,
}
POLICIES = ("vattn", *OTHERS)


class VattnPolicy:
    """The real cache: its allocator, its driver calls, its background thread."""

    name = "vattn"

    def __init__(self, cache: KVCache) -> None:
        config = cache.config
        self._cache = cache
        self._regions = region_bytes(config, config.layout_name)
        self.token_bytes = cache.token_bytes
        self.budget_bytes = cache.stats().budget_bytes
        self.growth_bytes = cache.page_bytes * cache.regions_per_row
        # The cache's own methods: one call less in every iteration.
        self.grow: Callable[[IntArray], None] = cache.step
        self.free: Callable[[int], None] = cache.free

    def bytes_for(self, tokens: int) -> int:
        return int(self._whole_pages(np.array([tokens]))[0])

    def _whole_pages(self, lengths: IntArray) -> IntArray:
        return pages_bytes(lengths, self._regions, self._cache.page_bytes)

    def available_bytes(self) -> int:
        return self._cache.stats().available_bytes

    def admit(self, prompt_tokens: int) -> int:
        return self._cache.alloc(prompt_tokens)

    def settle(self) -> None:
        settle(self._cache)

    def memory(self, lengths: IntArray) -> Memory:
        # Not stats(): most of its time goes into histograms that nobody reads here.
        now = self._cache._core.stats()
        calls = self._cache.pool.driver_calls()
        return Memory(
            used_bytes=now["used_bytes"],
            needed_bytes=int(self._whole_pages(lengths).sum()),
            granted_bytes=now["mapped_bytes"] - now["reclaimable_bytes"],
            mapped_bytes=now["mapped_bytes"],
            calls_in_step=_total(calls["step"]),
            calls_in_background=_total(calls["background"]),
        )


def _total(calls: dict[str, dict[str, Any]]) -> int:
    return sum(call["count"] for call in calls.values())
