"""CUDA graphs and DLPack over rows whose memory comes and goes under the same addresses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import vattn

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
HEADS, DIM = 4, 64
TOKENS = 1000


@pytest.fixture(params=["interleaved", "per_layer"])
def cache(request: pytest.FixtureRequest) -> Iterator[vattn.KVCache]:
    """One row of up to 256 MiB."""
    config = vattn.CacheConfig(
        num_layers=2,
        num_kv_heads=HEADS,
        head_dim=DIM,
        max_batch_size=1,
        max_seq_len=131072,
        device=DEVICE,
        memory="256MiB",
        layout=request.param,
        lookahead=0,
    )
    with vattn.init(config) as cache:
        yield cache
        torch.cuda.synchronize()
        cache.check()


def captured(k: torch.Tensor, out: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A graph that writes k + 1 to out."""
    k.fill_(0)
    torch.add(k, 1, out=out)  # warm up: nothing may be loaded during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.add(k, 1, out=out)
    return graph


def driver_calls(cache: vattn.KVCache, name: str) -> int:
    """How often the driver was called so far."""
    by_origin = cache.stats().driver_calls.values()
    return sum(calls[name].count for calls in by_origin if name in calls)


def test_a_graph_replays_after_growth_and_over_extents_of_other_sizes(
    cache: vattn.KVCache,
) -> None:
    row = cache.alloc()
    cache.step({row: TOKENS})
    k, _ = cache.kv(1, rows=row, max_len=TOKENS)
    address = k.data_ptr()
    out = torch.empty(1, TOKENS, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
    graph = captured(k, out)
    for i, tokens in enumerate((TOKENS, 60_000, TOKENS + 1, 20_000)):
        if i > 1:
            unmaps = driver_calls(cache, "unmap")
            cache.free(row)
            torch.cuda.synchronize()
            cache.trim()
            assert cache.stats().mapped_bytes == 0
            assert driver_calls(cache, "unmap") > unmaps
            row = cache.alloc()
        cache.step({row: tokens})
        assert cache.kv(1, rows=row)[0].data_ptr() == address
        k.fill_(i + 2)
        out.zero_()
        graph.replay()
        assert (out == i + 3).all(), tokens


def test_a_row_can_grow_while_a_replay_runs(cache: vattn.KVCache) -> None:
    row = cache.alloc()
    cache.step({row: TOKENS})
    k, _ = cache.kv(0, rows=row, max_len=TOKENS)
    out = torch.zeros(1, TOKENS, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
    graph = captured(k, out)
    for tokens in range(TOKENS, 100_000, 9_000):
        graph.replay()
        cache.step({row: tokens})  # maps while the replay may still run
    torch.cuda.synchronize()
    assert (out == 1).all()


def test_tensors_pass_through_dlpack_while_nothing_is_mapped(cache: vattn.KVCache) -> None:
    k, v = cache.kv(1)
    assert v is not None
    assert cache.stats().mapped_bytes == 0
    for tensor in (k, v, k.transpose(1, 2)[:, :, 5:100_000:3], v.view(torch.int16)):
        again = torch.from_dlpack(tensor)
        assert (again.data_ptr(), again.stride()) == (tensor.data_ptr(), tensor.stride())
    row = cache.alloc()
    cache.step({row: 10})
    torch.from_dlpack(v)[row, :10].fill_(4)
    assert (v[row, :10] == 4).all()
    assert cache.stats().mapped_bytes < cache.stats().reserved_bytes
