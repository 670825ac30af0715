"""What kernels that are not installed here would be called with: stand-ins attend with just that.

Each follows the documentation of what it stands for, in plain torch, so that a wrong index, length
or order gives a wrong result.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from vattn.bench.attention import kernels, measure, paged
from vattn.bench.attention.cases import TINY, Case
from vattn.bench.attention.kernels import FlashAttn, Sdpa, Varlen
from vattn.bench.attention.stores import Blocks, PlainRows, VattnRows

TOKENS, BATCH, HEADS, KV_HEADS, DIM = 40, 2, 4, 2, 64


@pytest.fixture(params=["decode", "prefill"])
def case(request: pytest.FixtureRequest) -> Case:
    sizes = {"dtype": "float32", "tokens": TOKENS, "batch": BATCH}
    return Case(phase=request.param, shape=TINY, **sizes)


def contents(case: Case) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A query, K and V, and the right result."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(BATCH, HEADS, case.queries, DIM, generator=generator)
    k, v = torch.randn(2, BATCH, KV_HEADS, TOKENS, DIM, generator=generator)
    return query, (k, v), sdpa(query, k, v, is_causal=case.queries > 1, enable_gqa=True)


def close(output: torch.Tensor, right: torch.Tensor) -> bool:
    return measure.difference(output, right) < 1e-5


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """[queries, heads, dim] over [keys, kv_heads, dim]; the last query sees the last key."""
    n, keys = len(q), len(k)
    mask = torch.ones(n, keys, dtype=torch.bool).tril(keys - n) if causal else None
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def of_blocks(cache: torch.Tensor, table: torch.Tensor, tokens: int) -> torch.Tensor:
    return cache[table.long()].flatten(0, 1)[:tokens]


def flash_attn(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    causal: bool,
    cache_batch_idx: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    for tensor in (cache_seqlens, cache_batch_idx, block_table):
        assert tensor is None or tensor.dtype == torch.int32
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    out = []
    for b, n in enumerate(cache_seqlens.tolist()):
        if block_table is not None:
            k, v = (of_blocks(cache, block_table[b], n) for cache in (k_cache, v_cache))
        else:
            assert cache_batch_idx is not None
            row = int(cache_batch_idx[b])
            k, v = k_cache[row, :n], v_cache[row, :n]
        out.append(dense(q[b], k, v, causal=causal))
    return torch.stack(out)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    assert enable_gqa
    out = []
    for b, n in enumerate(seqused_k.tolist()):
        q = query[cu_seq_q[b] : cu_seq_q[b + 1]]
        assert (len(q), n) == (max_q, max_k)
        if block_table is not None:
            k, v = (of_blocks(cache, block_table[b], n) for cache in (key, value))
        else:
            start = int(cu_seq_k[b])
            k, v = key[start : start + n], value[start : start + n]
        out.append(dense(q, k, v, causal=window_size == (-1, 0)))
    return torch.cat(out)


class FlashInferWrapper:
    """Both wrappers: ``plan`` takes the queries' starts first where it is for prefill."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, **_: Any) -> None:
        assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")

    def plan(self, *args: Any, causal: bool = False, **types: Any) -> None:
        *pages, heads, kv_heads, dim, self.page = args
        assert (heads, kv_heads, dim) == (HEADS, KV_HEADS, DIM)
        assert types == {"q_data_type": torch.float32, "kv_data_type": torch.float32}
        *starts, self.indptr, self.indices, self.last = pages
        self.starts = starts[0] if starts else torch.arange(BATCH + 1)
        self.causal = causal

    def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = []
        for b in range(BATCH):
            ids = self.indices[self.indptr[b] : self.indptr[b + 1]]
            n = (len(ids) - 1) * self.page + int(self.last[b])
            k, v = (of_blocks(cache, ids, n) for cache in kv)
            out.append(dense(q[self.starts[b] : self.starts[b + 1]], k, v, causal=self.causal))
        return torch.cat(out)


FLASHINFER = types.SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=FlashInferWrapper,
    BatchPrefillWithPagedKVCacheWrapper=FlashInferWrapper,
)


class VllmOps:
    """vllm._custom_ops, as far as attention on the CPU goes."""

    def cpu_attn_get_scheduler_metadata(self, **shape: Any) -> torch.Tensor:
        assert (shape["num_reqs"], shape["num_heads"], shape["isa"]) == (BATCH, HEADS, "vec")
        return torch.tensor([7])

    def cpu_attn_reshape_and_cache(
        self, *, key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any, isa: str
    ) -> None:
        block = key_cache.shape[2]
        for source, target in ((key, key_cache), (value, value_cache)):
            for token, slot in enumerate(slot_mapping.tolist()):
                target[slot // block, :, slot % block] = source[token]

    def cpu_attention_with_kv_cache(self, *, query: Any, output: Any, **rest: Any) -> None:
        starts, used = rest["query_start_loc"], rest["seq_lens"]
        assert rest["scale"] == DIM**-0.5
        for b, n in enumerate(used.tolist()):
            k, v = (
                of_blocks(rest[name].transpose(1, 2), rest["block_table"][b], n)
                for name in ("key_cache", "value_cache")
            )
            of_row = slice(int(starts[b]), int(starts[b + 1]))
            output[of_row] = dense(query[of_row], k, v, causal=rest["causal"])


@pytest.mark.parametrize("kernel", [Sdpa(), FlashAttn(flash_attn), Varlen(varlen)])
@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_contiguous_rows(case: Case, kernel: kernels.Kernel, order: str) -> None:
    query, kv, right = contents(case)
    stores = [
        PlainRows(case, order, "cpu", name="torch.empty"),
        PlainRows(case, order, "cpu", name="reserved", reserved=2),
        VattnRows(case, "interleaved", order, "cpu"),
        VattnRows(case, "per_layer", order, "cpu"),
    ]
    for store in stores:
        store.write(1, kv)
        assert close(kernel.bind(case, query, store.kv(1))(), right), store.name
        store.close()


@pytest.mark.parametrize(
    "kernel",
    [
        paged.Gather(),
        paged.BlockTable(FlashAttn(flash_attn)),
        paged.BlockTable(Varlen(varlen)),
        paged.FlashInfer(FLASHINFER, "sdpa"),
        paged.VllmCpu(VllmOps(), lambda dtype, block, dim: "vec"),
    ],
    ids=lambda kernel: kernel.name,
)
@pytest.mark.parametrize("block", [16, 8, 256])
def test_blocks(case: Case, kernel: paged.PagedKernel, block: int) -> None:
    query, kv, right = contents(case)
    blocks = Blocks(case, block, "cpu")
    for layer in range(case.layers_timed):
        blocks.write(layer, kv)
    calls = kernel.bind(case, [query] * case.layers_timed, blocks)
    assert len(calls) == case.layers_timed
    assert close(calls[1](), right)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn", "flashinfer", "vllm"):
        monkeypatch.setitem(sys.modules, module, None)
    found, missing = kernels.contiguous_kernels("cuda:0", "bfloat16")
    assert {kernel.name for kernel in found} | {entry.name for entry in missing} == {
        *("sdpa", "flash_attn", "varlen")
    }
    assert ("flash_attn", "not installed") in missing_pairs(missing)
    by_block, not_installed = paged.available("cuda:0", found)
    assert [kernel.name for kernel in by_block[paged.SMALL]] == ["gather"]
    assert missing_pairs(not_installed) == {("flashinfer", "not installed")}
    _, not_installed = paged.available("cpu", found)
    assert {name for name, _ in missing_pairs(not_installed)} == {"vllm"}


def missing_pairs(missing: list[Any]) -> set[tuple[str, str]]:
    return {(entry.name, entry.reason) for entry in missing}


def test_what_is_installed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("flash_attn")
    package.flash_attn_with_kvcache = flash_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flashinfer", FLASHINFER)  # type: ignore[arg-type]
    found, _ = kernels.contiguous_kernels("cuda:0", "bfloat16")
    by_block, missing = paged.available("cuda:0", found)
    assert missing == []
    assert [kernel.name for kernel in by_block[paged.SMALL]] == ["gather", "flashinfer"]
    assert by_block[paged.SMALL][1].baseline == "flash_attn"
    assert by_block[paged.LARGE][0].name == "flash_attn"
    found, missing = kernels.contiguous_kernels("cuda:0", "float32")
    assert [kernel.name for kernel in found] == ["sdpa"]
    assert ("flash_attn", "takes no float32") in missing_pairs(missing)


def test_a_gpu_is_timed_again_if_it_had_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    late, pauses = [True, True, False], []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return late.pop(0)

        def elapsed_time(self, end: object) -> float:
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", pauses.append)
    calls = []
    assert measure.CudaClock().ns_per_call([lambda: calls.append(1)] * 2) == 250_000
    assert (len(pauses), len(calls)) == (3, 6)
    assert pauses[2] == 4 * pauses[0]
