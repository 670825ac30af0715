"""How each subject holds its keys and values. The contents are the same in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

import vattn
from vattn import _C
from vattn.bench.attention.cases import GPU_PAGE, RESERVED, Case, layers_held, mapped_bytes
from vattn.bench.common import NothingMeasured
from vattn.config import LAYOUTS, ORDERS

KV = tuple[torch.Tensor, torch.Tensor]
PLAIN, RESERVED_ROWS = "torch.empty", "reserved"


class Store(Protocol):
    """Keys and values of the timed layers."""

    name: str
    order: str  # of the plain tensors that it is compared with

    def write(self, layer: int, kv: KV) -> None:
        """Take [batch, heads, tokens, dim]."""

    @property
    def token_stride_bytes(self) -> int:
        """From a token of one head to the next; 0 where that differs."""

    def close(self) -> None:
        """Give the memory back."""


class Rows(Store, Protocol):
    """A store whose rows are contiguous, so that any kernel can read them."""

    def kv(self, layer: int) -> KV:
        """Live tokens as views of [batch, heads, tokens, dim]."""


def head_major(tensor: torch.Tensor, order: str) -> torch.Tensor:
    """View a tensor of either order as [batch, heads, tokens, dim]."""
    return tensor if order == "HND" else tensor.transpose(1, 2)


class _Views:
    """What contiguous stores have in common, given ``kv``."""

    def kv(self, layer: int) -> KV:
        raise NotImplementedError

    def write(self, layer: int, kv: KV) -> None:
        for target, source in zip(self.kv(layer), kv, strict=True):
            target.copy_(source)

    @property
    def token_stride_bytes(self) -> int:
        k, _ = self.kv(0)
        return k.stride(2) * k.element_size()


class VattnRows(_Views):
    """Rows of a :class:`vattn.KVCache`."""

    def __init__(self, case: Case, layout: str, order: str, device: str) -> None:
        self.name, self.order, self._case = f"vattn {layout} {order}", order, case
        layers = layers_held(case, layout)
        live = case.layer_bytes * layers
        shape: dict[str, Any] = {
            "num_layers": layers,
            "num_kv_heads": case.kv_heads,
            "head_dim": case.head_dim,
            "dtype": case.dtype,
            "max_batch_size": case.batch,
            "max_seq_len": RESERVED * case.tokens,
            "device": device,
            "layout": layout,
            "order": order,
            "lookahead": 0,
        }
        page_bytes = page_bytes_of(vattn.CacheConfig(**shape))
        memory = mapped_bytes(case, layout, order, page_bytes)
        self._cache = vattn.init(vattn.CacheConfig(**shape, memory=memory))
        rows = [self._cache.alloc(case.tokens) for _ in range(case.batch)]
        self._cache.step(dict.fromkeys(rows, case.tokens))
        if self._cache.stats().mapped_bytes < live:
            raise NothingMeasured(f"{self.name}: step() has not mapped {live} bytes")

    def kv(self, layer: int) -> KV:
        k, v = self._cache.kv(layer, max_len=self._case.tokens)
        assert v is not None
        return head_major(k, self.order), head_major(v, self.order)

    def close(self) -> None:
        self._cache.close()


def page_bytes_of(config: vattn.CacheConfig) -> int:
    """Return the page size of a cache whose configuration leaves it open."""
    if config.device_type == "cuda":
        return GPU_PAGE
    return _C.default_host_page_bytes(
        layout=config.layout_name,
        order=config.order,
        item_bytes=config.item_bytes,
        groups=[group.shape() for group in config.groups],
    )


class PlainRows(_Views):
    """``torch.empty`` of exactly the live tokens, or of rows with room for more."""

    def __init__(
        self, case: Case, order: str, device: str, *, name: str, reserved: int = 1
    ) -> None:
        self.name, self.order, self._tokens = f"{name} {order}", order, case.tokens
        room = case.tokens * reserved
        heads_tokens = (case.kv_heads, room) if order == "HND" else (room, case.kv_heads)
        size = (case.layers_timed, 2, case.batch, *heads_tokens, case.head_dim)
        self._kv = torch.empty(size, dtype=case.torch_dtype, device=device)
        if reserved > 1:
            self._kv.zero_()  # a mask hides what is behind the live tokens, but not NaN

    def reserved(self, layer: int) -> KV:
        """All of the rows, live or not."""
        k, v = self._kv[layer]
        return head_major(k, self.order), head_major(v, self.order)

    def kv(self, layer: int) -> KV:
        k, v = self.reserved(layer)
        return k[:, :, : self._tokens], v[:, :, : self._tokens]

    def close(self) -> None:
        del self._kv


class BlockTable(NamedTuple):
    """Which block holds which tokens: [batch, blocks of a row], int64."""

    ids: torch.Tensor
    tokens: int
    block: int

    @property
    def last_block_tokens(self) -> int:
        return (self.tokens - 1) % self.block + 1


class Blocks:
    """Blocks of tokens, [blocks, block, heads, dim], in an order that chance has made."""

    order = "NHD"

    def __init__(self, case: Case, block: int, device: str) -> None:
        self.name = f"blocks of {block}"
        in_row = -(-case.tokens // block)
        n = case.batch * in_row
        generator = torch.Generator().manual_seed(n)
        ids = torch.randperm(n, generator=generator).view(case.batch, in_row).to(device)
        self.table = BlockTable(ids, case.tokens, block)
        size = (case.layers_timed, 2, n, block, case.kv_heads, case.head_dim)
        self._kv = torch.zeros(size, dtype=case.torch_dtype, device=device)

    def kv(self, layer: int) -> KV:
        """All blocks of a layer."""
        k, v = self._kv[layer]
        return k, v

    def write(self, layer: int, kv: KV) -> None:
        table = self.table
        for blocks, source in zip(self.kv(layer), kv, strict=True):
            tokens = source.transpose(1, 2)  # [batch, tokens, heads, dim]
            whole = table.tokens // table.block
            if whole:
                size = (tokens.shape[0], whole, table.block, *tokens.shape[2:])
                of_rows = tokens[:, : whole * table.block].view(size)
                blocks[table.ids[:, :whole]] = of_rows
            if whole < table.ids.shape[1]:
                blocks[table.ids[:, whole], : table.last_block_tokens] = tokens[
                    :, whole * table.block :
                ]

    @property
    def token_stride_bytes(self) -> int:
        return 0

    def close(self) -> None:
        del self._kv


def contiguous_stores(case: Case, device: str, held: Callable[[Store], None]) -> list[Rows]:
    """Make the plain tensors and vattn's in all layouts and orders; ``held`` gets each at once."""
    stores: list[Rows] = []

    def add(store: Rows) -> None:
        held(store)
        stores.append(store)

    for order in ORDERS:
        add(PlainRows(case, order, device, name=PLAIN))
    for layout in LAYOUTS:
        for order in ORDERS:
            add(VattnRows(case, layout, order, device))
    return stores
