"""The cache on a real GPU: what the test double of libcuda cannot show."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import vattn

pytestmark = pytest.mark.gpu

MIB = 2**20
DEVICE = "cuda:0"
LAYERS, HEADS, DIM = 2, 4, 128  # the head dim that benchmarks.gpu_suite.flash_attn_build builds
LENS = [300, 1, 77]  # tokens of the rows, none of them a whole number of pages
MakeCache = Callable[..., vattn.KVCache]


@pytest.fixture
def make_cache() -> Iterator[MakeCache]:
    """Makes caches of three rows; checks and closes them at the end."""
    caches: list[vattn.KVCache] = []

    def make(**options: object) -> vattn.KVCache:
        defaults: dict[str, object] = {
            "num_layers": LAYERS,
            "num_kv_heads": HEADS,
            "head_dim": DIM,
            "dtype": torch.bfloat16,
            "max_batch_size": len(LENS),
            "max_seq_len": 8192,
            "device": DEVICE,
            "memory": "64MiB",
        }
        caches.append(vattn.init(vattn.CacheConfig(**(defaults | options))))
        return caches[-1]

    yield make
    torch.cuda.synchronize()
    for cache in caches:
        if not cache.closed:
            cache.check()
        cache.close()


def filled(cache: vattn.KVCache) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Fill all rows to LENS with random numbers; returns ordinary copies, by layer and row."""
    rows = [cache.alloc(n) for n in LENS]
    assert rows == list(range(len(LENS)))
    cache.step(LENS)
    copies = []
    for layer in range(LAYERS):
        pairs = []
        for row, n in enumerate(LENS):
            k, v = (torch.randn(n, HEADS, DIM, device=DEVICE).bfloat16() for _ in range(2))
            own_k, own_v = cache.kv(layer, rows=row, max_len=n)
            own_k[0].copy_(k)
            own_v[0].copy_(v)
            pairs.append((k, v))
        copies.append(pairs)
    return copies


def query(rows: int) -> torch.Tensor:
    """One token of each row, [rows, heads, dim]."""
    return torch.randn(rows, HEADS, DIM, device=DEVICE).bfloat16()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one token, [heads, dim], to the tokens of one row, [tokens, heads, dim]."""
    args = (q[None, None], k[None], v[None])
    out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in args))
    return out[0, :, 0]


@pytest.mark.parametrize("layout", ["interleaved", "per_layer"])
def test_rows_keep_what_is_written(make_cache: MakeCache, layout: str) -> None:
    cache = make_cache(layout=layout)
    for layer, pairs in enumerate(filled(cache)):
        for row, (k, v) in enumerate(pairs):
            own_k, own_v = cache.kv(layer, rows=row, max_len=LENS[row])
            assert torch.equal(own_k[0], k), (layer, row)
            assert torch.equal(own_v[0], v), (layer, row)


def test_tensors_can_be_made_before_anything_is_mapped(make_cache: MakeCache) -> None:
    cache = make_cache()
    k, v = cache.kv(0)
    assert k.device == v.device == torch.device(DEVICE)
    assert k.shape == (len(LENS), 8192, HEADS, DIM)
    assert cache.stats().mapped_bytes == 0
    row = cache.alloc()
    cache.step({row: 5})
    k[row, :5].fill_(3)
    assert (k[row, :5] == 3).all()


@pytest.mark.parametrize("layout", ["interleaved", "per_layer"])
@pytest.mark.parametrize(
    "kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
)
def test_sdpa_over_a_partly_mapped_row_is_that_over_plain_tensors(
    make_cache: MakeCache, layout: str, kernel: SDPBackend
) -> None:
    cache = make_cache(layout=layout)
    copies = filled(cache)
    q = query(len(LENS))
    with sdpa_kernel(kernel):
        for layer, pairs in enumerate(copies):
            for row, (k, v) in enumerate(pairs):
                own_k, own_v = cache.kv(layer, rows=row, max_len=LENS[row])
                torch.testing.assert_close(attend(q[row], own_k[0], own_v[0]), attend(q[row], k, v))


@pytest.mark.parametrize("layout", ["interleaved", "per_layer"])
def test_varlen_attention_reads_rows_with_unmapped_gaps(make_cache: MakeCache, layout: str) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    cache = make_cache(layout=layout)
    copies = filled(cache)
    q = query(len(LENS))
    # Each row, then the gap to the next: a sequence without queries, of which nothing is read.
    ends_k, ends_q = [0], [0]
    for row, n in enumerate(LENS):
        start = row * cache.row_stride_tokens
        if row > 0:
            ends_k.append(start)
            ends_q.append(row)
        ends_k.append(start + n)
        ends_q.append(row + 1)
    cu_q = torch.tensor(ends_q, dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor(ends_k, dtype=torch.int32, device=DEVICE)
    for layer, pairs in enumerate(copies):
        k, v = cache.kv_flat(layer)
        out = varlen.varlen_attn(q, k, v, cu_q, cu_k, 1, max(LENS))
        plain = torch.stack([attend(q[row], *pair) for row, pair in enumerate(pairs)])
        torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", ["interleaved", "per_layer"])
def test_flash_attn_with_kvcache_takes_rows_by_index(make_cache: MakeCache, layout: str) -> None:
    flash_attn = pytest.importorskip("flash_attn")
    cache = make_cache(layout=layout)
    copies = filled(cache)
    chosen = [2, 0]
    q = query(len(chosen))
    lens = torch.tensor([LENS[row] for row in chosen], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor(chosen, dtype=torch.int32, device=DEVICE)
    for layer, pairs in enumerate(copies):
        k, v = cache.kv(layer)
        out = flash_attn.flash_attn_with_kvcache(
            q[:, None], k, v, cache_seqlens=lens, cache_batch_idx=rows
        )
        plain = torch.stack([attend(q[i], *pairs[row]) for i, row in enumerate(chosen)])
        torch.testing.assert_close(out[:, 0], plain, rtol=2e-2, atol=2e-2)


def test_a_row_is_adopted_only_after_the_work_of_its_last_request(make_cache: MakeCache) -> None:
    cache = make_cache(max_batch_size=1)
    old, new = torch.cuda.Stream(), torch.cuda.Stream()
    row = cache.alloc(LENS[0], stream=old)
    cache.step([LENS[0]])
    k, _ = cache.kv(0, rows=row, max_len=LENS[0])
    with torch.cuda.stream(old):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: without the fence this write comes last
        k.fill_(1)
    cache.free(row, stream=old)
    assert cache.alloc(LENS[0], stream=new) == row
    cache.step([LENS[0]])
    with torch.cuda.stream(new):
        k.fill_(2)
    torch.cuda.synchronize()
    assert (k == 2).all()


def test_memory_is_taken_from_a_freed_row_only_after_its_work(make_cache: MakeCache) -> None:
    tokens = 32 * MIB // (2 * LAYERS * HEADS * DIM * 2)
    cache = make_cache(max_batch_size=2, memory="32MiB", max_seq_len=tokens, lookahead=0)
    stream = torch.cuda.Stream()
    first, second = cache.alloc(), cache.alloc()
    cache.step({first: tokens // 2})
    k, _ = cache.kv(0, rows=first, max_len=tokens // 2)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        k.fill_(1)  # an illegal address, if the memory is gone by then
    cache.free(first, stream=stream)
    cache.step({second: tokens})
    torch.cuda.synchronize()
    assert cache.row_state(first) == "free"


def test_too_long_a_step_raises_and_changes_nothing(make_cache: MakeCache) -> None:
    cache = make_cache(memory="8MiB", max_seq_len=65536, lookahead=0)
    copies = filled(cache)
    with pytest.raises(vattn.OutOfPagesError) as caught:
        cache.step([60000, LENS[1], LENS[2]])
    assert caught.value.needed > caught.value.free
    assert cache.seq_lens == LENS
    for row, (k, _) in enumerate(copies[0]):
        own_k, _ = cache.kv(0, rows=row, max_len=LENS[row])
        assert torch.equal(own_k[0], k)
    cache.step(LENS)


def test_close_returns_the_memory_to_the_driver(make_cache: MakeCache) -> None:
    make_cache().close()  # what the first use of CUDA takes is not ours
    gc.collect()
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info(DEVICE)
    token_bytes = 2 * LAYERS * HEADS * DIM * 2
    size = 512 * MIB
    cache = make_cache(memory=size, max_seq_len=size // token_bytes, lookahead=0)
    row = cache.alloc()
    cache.step({row: size // token_bytes})
    during, _ = torch.cuda.mem_get_info(DEVICE)
    cache.close()
    after, _ = torch.cuda.mem_get_info(DEVICE)
    assert before - during >= size
    assert before - after < 8 * MIB, "close() kept memory"


def test_a_cuda_graph_replays_over_memory_that_was_mapped_again(make_cache: MakeCache) -> None:
    cache = make_cache(max_batch_size=1, lookahead=0)
    row = cache.alloc()
    cache.step([100])
    k, _ = cache.kv(1, rows=row, max_len=100)
    out = torch.empty(1, 100, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
    k.fill_(1)
    torch.add(k, 1, out=out)  # warm up: nothing may be loaded during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.add(k, 1, out=out)
    for value in (3, 5):
        k.fill_(value)
        graph.replay()
        assert (out == value + 1).all()
        cache.free(row)
        torch.cuda.synchronize()
        cache.trim()
        assert cache.stats().mapped_bytes == 0
        row = cache.alloc()
        cache.step([100])
