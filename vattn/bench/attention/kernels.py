"""How attention is called over contiguous rows: one call, the same for every store.

Each ``bind`` prepares a call without arguments, so that only the attention is timed. Queries and
results are [batch, heads, queries, dim], keys and values [batch, kv_heads, tokens, dim].
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vattn.bench.attention.cases import Case, NotMeasured
from vattn.bench.attention.stores import KV

Call = Callable[[], torch.Tensor]


class Kernel(Protocol):
    """A way to attend to contiguous rows."""

    name: str
    what: str

    def bind(self, case: Case, query: torch.Tensor, kv: KV) -> Call:
        """Prepare the call of one layer."""


def attend(query: torch.Tensor, kv: KV, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Call torch's SDPA without copying keys for the query heads that share them.

    One query: those heads become further queries of their one key head, as in vattn's own
    integration. On the CPU that is two to nine times as fast as ``enable_gqa``, which reads every
    key once for each of them.
    """
    k, v = kv
    batch, heads, queries, dim = query.shape
    if queries > 1:
        return sdpa(query, k, v, is_causal=True, enable_gqa=k.shape[1] < heads)
    folded = query.reshape(batch, k.shape[1], -1, dim)
    return sdpa(folded, k, v, attn_mask=mask).reshape(query.shape)


class Sdpa:
    """torch's SDPA; on CUDA its flash kernel and no other."""

    name = "sdpa"
    what = "torch SDPA; decode: query heads of a group folded into queries; prefill: enable_gqa"

    def bind(self, case: Case, query: torch.Tensor, kv: KV) -> Call:
        if query.device.type == "cpu" or case.dtype == "float32":
            return lambda: attend(query, kv)

        def call() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return attend(query, kv)

        return call


class FlashAttn:
    """The flash-attn package, taking rows by their index."""

    name = "flash_attn"
    what = "flash_attn.flash_attn_with_kvcache(cache_batch_idx=..., cache_seqlens=...)"

    def __init__(self, kernel: Callable[..., torch.Tensor]) -> None:
        self._kernel = kernel

    def bind(self, case: Case, query: torch.Tensor, kv: KV) -> Call:
        q, (k, v) = query.transpose(1, 2), (tensor.transpose(1, 2) for tensor in kv)
        used = _int32([case.tokens] * case.batch, query)
        rows = _int32(range(case.batch), query)

        def call() -> torch.Tensor:
            out = self._kernel(q, k, v, cache_seqlens=used, cache_batch_idx=rows, causal=True)
            return out.transpose(1, 2)

        return call

    def bind_blocks(self, case: Case, query: torch.Tensor, kv: KV, table: torch.Tensor) -> Call:
        """The same kernel with a block table: blocks [blocks, 256, heads, dim]."""
        q, (k, v) = query.transpose(1, 2), kv
        used, ids = _int32([case.tokens] * case.batch, query), table.int()

        def call() -> torch.Tensor:
            out = self._kernel(q, k, v, cache_seqlens=used, block_table=ids, causal=True)
            return out.transpose(1, 2)

        return call


class Varlen:
    """torch's own variable-length flash kernel, all rows in one dimension."""

    name = "varlen"
    what = "torch.nn.attention.varlen.varlen_attn(seqused_k=...)"

    def __init__(self, kernel: Callable[..., torch.Tensor]) -> None:
        self._kernel = kernel
        self.takes_blocks = "block_table" in inspect.signature(kernel).parameters

    def bind(self, case: Case, query: torch.Tensor, kv: KV) -> Call:
        k, v = kv
        # With one row, dimension 0 may have any stride.
        row_tokens = k.stride(0) // k.stride(2) if case.batch > 1 else case.tokens
        flat = rows_in_one(k, row_tokens), rows_in_one(v, row_tokens)
        return self._bind(case, query, flat, row_tokens)

    def bind_blocks(self, case: Case, query: torch.Tensor, kv: KV, table: torch.Tensor) -> Call:
        """The same kernel with a block table."""
        return self._bind(case, query, kv, case.tokens, block_table=table.int())

    def _bind(self, case: Case, query: torch.Tensor, kv: KV, row_tokens: int, **more: Any) -> Call:
        heads, dim = query.shape[1], query.shape[3]
        q = query.transpose(1, 2).reshape(-1, heads, dim)
        starts_q = _int32(range(0, (case.batch + 1) * case.queries, case.queries), query)
        starts_k = _int32(range(0, (case.batch + 1) * row_tokens, row_tokens), query)
        more["seqused_k"] = _int32([case.tokens] * case.batch, query)
        more["window_size"] = (-1, 0 if case.queries > 1 else -1)
        more["enable_gqa"] = heads != case.kv_heads

        def call() -> torch.Tensor:
            out = self._kernel(q, *kv, starts_q, starts_k, case.queries, case.tokens, **more)
            return out.view(case.batch, case.queries, heads, dim).transpose(1, 2)

        return call


def rows_in_one(tensor: torch.Tensor, row_tokens: int) -> torch.Tensor:
    """View [batch, heads, tokens, dim] as [tokens of all rows, heads, dim], gaps included."""
    batch, heads, tokens, dim = tensor.shape
    _, head_stride, token_stride, dim_stride = tensor.stride()
    size = ((batch - 1) * row_tokens + tokens, heads, dim)
    return tensor.as_strided(size, (token_stride, head_stride, dim_stride))


def _int32(values: Any, beside: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=beside.device)


def imported(module: str, attribute: str) -> Any:
    """Something of a package that need not be there; None if it is not."""
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def contiguous_kernels(device: str, dtype: str) -> tuple[list[Kernel], list[NotMeasured]]:
    """List the kernels of a device, and those that it could have."""
    found: list[Kernel] = [Sdpa()]
    if not device.startswith("cuda"):
        return found, []
    if dtype == "float32":
        return found, [NotMeasured(name, "takes no float32") for name in ("flash_attn", "varlen")]
    missing = []
    flash_attn = imported("flash_attn", "flash_attn_with_kvcache")
    if flash_attn is None:
        missing.append(NotMeasured("flash_attn", "not installed"))
    else:
        found.append(FlashAttn(flash_attn))
    varlen = imported("torch.nn.attention.varlen", "varlen_attn")
    if varlen is None or "seqused_k" not in inspect.signature(varlen).parameters:
        missing.append(NotMeasured("varlen", f"torch {torch.__version__} has none for rows"))
    else:
        found.append(Varlen(varlen))
    return found, missing
