"""Paged attention: what each device and installation has, over the same blocks.

Blocks are [blocks, block, kv_heads, dim]; queries and results as in ``kernels``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from vattn.bench.attention import kernels
from vattn.bench.attention.cases import Case, NotMeasured
from vattn.bench.attention.kernels import Call, FlashAttn, Kernel, Varlen
from vattn.bench.attention.stores import Blocks

SMALL, LARGE = 16, 256  # vLLM's and SGLang's usual block; the smallest that flash-attn 2 takes
_WORKSPACE = 128 * 2**20  # what FlashInfer's examples give it


class PagedKernel(Protocol):
    """A way to attend to blocks."""

    name: str
    what: str
    baseline: str  # name of the kernel over torch.empty that it is compared with

    def bind(self, case: Case, queries: Sequence[torch.Tensor], blocks: Blocks) -> list[Call]:
        """Prepare the calls of all timed layers. The blocks have been written."""


class Gather:
    """What works everywhere: copy a row's blocks together, then attend to the copy."""

    name, baseline = "gather", "sdpa"
    what = "torch.index_select of the blocks, then torch SDPA"

    def bind(self, case: Case, queries: Sequence[torch.Tensor], blocks: Blocks) -> list[Call]:
        ids = blocks.table.ids.flatten()

        def gathered(cache: torch.Tensor) -> torch.Tensor:
            rows = cache.index_select(0, ids).view(case.batch, -1, *cache.shape[2:])
            return rows[:, : case.tokens].transpose(1, 2)

        def bind(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
            return lambda: kernels.attend(query, (gathered(k), gathered(v)))

        return [bind(query, *blocks.kv(layer)) for layer, query in enumerate(queries)]


class BlockTable:
    """A kernel that takes contiguous rows as well as a block table."""

    def __init__(self, kernel: FlashAttn | Varlen) -> None:
        self._kernel = kernel
        self.name = self.baseline = kernel.name
        self.what = f"{kernel.name} with block_table"

    def bind(self, case: Case, queries: Sequence[torch.Tensor], blocks: Blocks) -> list[Call]:
        return [
            self._kernel.bind_blocks(case, query, blocks.kv(layer), blocks.table.ids)
            for layer, query in enumerate(queries)
        ]


class FlashInfer:
    """FlashInfer's batch wrappers. Planning is not timed: an engine plans once a step."""

    name = "flashinfer"
    what = "flashinfer.Batch{Decode,Prefill}WithPagedKVCacheWrapper, planned before"

    def __init__(self, module: Any, baseline: str) -> None:
        self._module, self.baseline = module, baseline

    def bind(self, case: Case, queries: Sequence[torch.Tensor], blocks: Blocks) -> list[Call]:
        table, heads = blocks.table, case.shape.num_query_heads
        of_row, device = table.ids.shape[1], queries[0].device

        def int32(values: Any) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        pages = (
            int32(range(0, (case.batch + 1) * of_row, of_row)),
            table.ids.flatten().int(),
            int32([table.last_block_tokens] * case.batch),
        )
        shape = (heads, case.kv_heads, case.head_dim, table.block)
        types = {"q_data_type": case.torch_dtype, "kv_data_type": case.torch_dtype}
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        if case.phase == "decode":
            # Tensor cores are what FlashInfer advises where many query heads share one of the keys.
            wrapper = self._module.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=heads // case.kv_heads >= 4
            )
            wrapper.plan(*pages, *shape, **types)
        else:
            wrapper = self._module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            starts = int32(range(0, (case.batch + 1) * case.queries, case.queries))
            wrapper.plan(starts, *pages, *shape, causal=True, **types)

        def bind(layer: int, query: torch.Tensor) -> Call:
            q, kv = query.transpose(1, 2).reshape(-1, heads, case.head_dim), blocks.kv(layer)
            size = (case.batch, case.queries, heads, case.head_dim)
            return lambda: wrapper.run(q, kv).view(size).transpose(1, 2)

        return [bind(layer, query) for layer, query in enumerate(queries)]


class VllmCpu:
    """vLLM's kernel for the CPU, over blocks that it has written itself, in its own format."""

    name, baseline = "vllm", "sdpa"
    what = "vllm._custom_ops.cpu_attention_with_kv_cache"

    def __init__(self, ops: Any, choose_isa: Any) -> None:
        self._ops, self._choose_isa = ops, choose_isa

    def bind(self, case: Case, queries: Sequence[torch.Tensor], blocks: Blocks) -> list[Call]:
        table, heads = blocks.table, case.shape.num_query_heads
        isa = self._choose_isa(case.torch_dtype, table.block, case.head_dim)
        starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.queries
        used = torch.full((case.batch,), case.tokens, dtype=torch.int32)
        metadata = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.batch,
            num_heads=heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            seq_lens=used,
            dtype=case.torch_dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

        def bind(layer: int, query: torch.Tensor) -> Call:
            own = self._written(blocks, layer, isa)
            q = query.transpose(1, 2).reshape(-1, heads, case.head_dim)
            out = torch.empty_like(q)

            def call() -> torch.Tensor:
                self._ops.cpu_attention_with_kv_cache(
                    query=q,
                    key_cache=own[0],
                    value_cache=own[1],
                    output=out,
                    query_start_loc=starts,
                    seq_lens=used,
                    scale=1 / math.sqrt(case.head_dim),
                    causal=True,
                    alibi_slopes=None,
                    sliding_window=(-1, -1),
                    block_table=table.ids.int(),
                    softcap=0,
                    scheduler_metadata=metadata,
                    s_aux=None,
                )
                return out.view(case.batch, case.queries, heads, -1).transpose(1, 2)

            return call

        return [bind(layer, query) for layer, query in enumerate(queries)]

    def _written(self, blocks: Blocks, layer: int, isa: str) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = blocks.kv(layer)
        n, block, heads, dim = k.shape
        own_k, own_v = (k.new_zeros((n, heads, block, dim)) for _ in range(2))
        self._ops.cpu_attn_reshape_and_cache(
            key=k.view(-1, heads, dim),
            value=v.view(-1, heads, dim),
            key_cache=own_k,
            value_cache=own_v,
            slot_mapping=torch.arange(n * block),
            isa=isa,
        )
        return own_k, own_v


def available(
    device: str, found: Sequence[Kernel]
) -> tuple[dict[int, list[PagedKernel]], list[NotMeasured]]:
    """List the paged kernels by the size of their blocks, and those that are not installed."""
    missing: list[NotMeasured] = []
    small: list[PagedKernel] = [Gather()]
    if device.startswith("cuda"):
        large = [
            BlockTable(kernel)
            for kernel in found
            if isinstance(kernel, FlashAttn) or (isinstance(kernel, Varlen) and kernel.takes_blocks)
        ]
        flashinfer = kernels.imported("flashinfer", "BatchDecodeWithPagedKVCacheWrapper")
        if flashinfer is None:
            missing.append(NotMeasured("flashinfer", "not installed"))
        else:
            own = "flash_attn" if any(k.name == "flash_attn" for k in found) else "sdpa"
            small.append(FlashInfer(importlib.import_module("flashinfer"), own))
        return {SMALL: small, LARGE: list(large)}, missing
    ops = kernels.imported("vllm", "_custom_ops")
    choose_isa = kernels.imported("vllm.v1.attention.backends.cpu_attn", "_get_attn_isa")
    if ops is None or choose_isa is None or not hasattr(ops, "cpu_attention_with_kv_cache"):
        missing.append(NotMeasured("vllm", "not installed, or without its kernels for the CPU"))
    else:
        small.append(VllmCpu(ops, choose_isa))
    return {SMALL: small}, missing
