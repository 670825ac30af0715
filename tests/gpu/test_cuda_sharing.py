"""Rows that share memory on a real GPU: what kernels read and write through several addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import vattn

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
LAYERS, HEADS, DIM = 2, 4, 128
TOKEN_BYTES = 2 * LAYERS * HEADS * DIM * 2
PAGE_TOKENS = 2 * 2**20 // TOKEN_BYTES  # of a region that has all layers
TOKENS = 2 * PAGE_TOKENS + 77
BUSY = 200_000_000  # cycles: about 0.1 s
MakeCache = Callable[..., vattn.KVCache]
LAYOUTS = pytest.mark.parametrize("layout", ["interleaved", "per_layer"])


@pytest.fixture
def make_cache() -> Iterator[MakeCache]:
    """Makes caches of four rows; checks and closes them at the end."""
    caches: list[vattn.KVCache] = []

    def make(**options: object) -> vattn.KVCache:
        defaults: dict[str, object] = {
            "num_layers": LAYERS,
            "num_kv_heads": HEADS,
            "head_dim": DIM,
            "dtype": torch.bfloat16,
            "max_batch_size": 4,
            "max_seq_len": 16 * PAGE_TOKENS,
            "device": DEVICE,
            "memory": "256MiB",
            "max_extent_bytes": "2MiB",
            "lookahead": 0,
        }
        caches.append(vattn.init(vattn.CacheConfig(**(defaults | options))))
        return caches[-1]

    yield make
    torch.cuda.synchronize()
    for cache in caches:
        if not cache.closed:
            cache.check()
        cache.close()


def pairs(cache: vattn.KVCache, row: int) -> list[torch.Tensor]:
    """K and V of all layers of a row, [tokens, heads, dim]."""
    n = cache.seq_lens[row]
    views = [cache.kv(layer, rows=row, max_len=n) for layer in range(LAYERS)]
    return [t[0] for pair in views for t in pair if t is not None]


def grow(cache: vattn.KVCache, row: int, n: int) -> list[torch.Tensor]:
    """Grow a row to n tokens, random ones; returns ordinary copies of all."""
    old = cache.seq_lens[row]
    cache.step({row: n})
    for tensor in pairs(cache, row):
        tensor[old:] = torch.randn(n - old, HEADS, DIM, device=DEVICE).bfloat16()
    return [tensor.clone() for tensor in pairs(cache, row)]


def assert_holds(cache: vattn.KVCache, row: int, expected: list[torch.Tensor]) -> None:
    """Every element of a row."""
    for tensor, theirs in zip(pairs(cache, row), expected, strict=True):
        assert torch.equal(tensor, theirs), row


@LAYOUTS
def test_forks_are_read_and_written_by_kernels_as_rows_of_their_own(
    make_cache: MakeCache, layout: str
) -> None:
    cache = make_cache(layout=layout)
    row = cache.alloc()
    held = {row: grow(cache, row, TOKENS)}
    for child in cache.fork(row, n=3):
        assert_holds(cache, child, held[row])
        held[child] = held[row]
    if layout == "interleaved":
        assert cache.stats().aliased_bytes == 3 * 2 * cache.page_bytes
    for n in (TOKENS + 1, TOKENS + 2 * PAGE_TOKENS):
        for r in list(held):
            held[r] = grow(cache, r, n)
        for r, expected in held.items():
            assert_holds(cache, r, expected)
    cache.free(row)
    torch.cuda.synchronize()
    cache.trim()
    del held[row]
    for r, expected in held.items():
        assert_holds(cache, r, expected)


@LAYOUTS
def test_sdpa_over_forks_is_that_over_separate_rows(make_cache: MakeCache, layout: str) -> None:
    cache = make_cache(layout=layout)
    row = cache.alloc()
    grow(cache, row, TOKENS)
    rows = [row, *cache.fork(row, n=3)]
    held = [grow(cache, r, TOKENS + 5) for r in rows]
    q = torch.randn(len(rows), 1, HEADS, DIM, device=DEVICE).bfloat16()
    for layer in range(LAYERS):
        k, v = cache.kv(layer, max_len=TOKENS + 5)
        assert v is not None
        together = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        for r, own in zip(rows, held, strict=True):
            args = (q[r : r + 1], own[2 * layer][None], own[2 * layer + 1][None])
            alone = scaled_dot_product_attention(*(t.transpose(1, 2) for t in args))
            torch.testing.assert_close(together[r], alone[0], rtol=2e-2, atol=2e-2)


def test_a_row_cut_inside_shared_pages_gets_its_own_before_it_writes(
    make_cache: MakeCache,
) -> None:
    cache = make_cache(layout="interleaved")
    row = cache.alloc()
    expected = grow(cache, row, 3 * PAGE_TOKENS)
    (child,) = cache.fork(row)
    cache.truncate(child, PAGE_TOKENS + 3)
    own = grow(cache, child, PAGE_TOKENS + 9)
    for tensor, theirs in zip(own, expected, strict=True):
        assert torch.equal(tensor[: PAGE_TOKENS + 3], theirs[: PAGE_TOKENS + 3])
    assert_holds(cache, row, expected)
    assert cache.stats().aliased_bytes == cache.page_bytes


def test_a_fork_on_a_side_stream_copies_what_that_stream_was_still_writing(
    make_cache: MakeCache,
) -> None:
    cache = make_cache()
    stream = torch.cuda.Stream()
    row = cache.alloc(stream=stream)
    cache.step({row: TOKENS})
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)  # without the stream's order the copy comes before the writes
        for tensor in pairs(cache, row):
            tensor.fill_(3)
        (child,) = cache.fork(row)  # on torch's current stream
        seen = [(tensor == 3).all() for tensor in pairs(cache, child)]
    torch.cuda.synchronize()
    assert all(seen)


def test_a_step_that_makes_a_page_private_waits_for_the_row_s_stream(
    make_cache: MakeCache,
) -> None:
    cache = make_cache(layout="interleaved")
    stream = torch.cuda.Stream()
    row = cache.alloc(stream=stream)
    cache.step({row: 2 * PAGE_TOKENS})
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        for tensor in pairs(cache, row):
            tensor.fill_(3)
        (child,) = cache.fork(row)
    cache.truncate(child, PAGE_TOKENS + 3)
    cache.step({child: PAGE_TOKENS + 4})
    torch.cuda.synchronize()
    for tensor in pairs(cache, child):
        assert (tensor[: PAGE_TOKENS + 3] == 3).all()


@LAYOUTS
def test_rows_can_be_reordered(make_cache: MakeCache, layout: str) -> None:
    cache = make_cache(layout=layout)
    rows = [cache.alloc() for _ in range(4)]
    held = [grow(cache, row, TOKENS + 30 * row) for row in rows]
    parents = [1, 0, 0, 3]
    cache.reorder(rows, parents)
    for row, parent in zip(rows, parents, strict=True):
        assert_holds(cache, row, held[parent])
    held = [grow(cache, row, cache.seq_lens[row] + 1) for row in rows]
    for row, expected in zip(rows, held, strict=True):
        assert_holds(cache, row, expected)


@LAYOUTS
def test_compact_keeps_the_accepted_tokens(make_cache: MakeCache, layout: str) -> None:
    cache = make_cache(layout=layout)
    row = cache.alloc()
    tokens = grow(cache, row, TOKENS)
    (child,) = cache.fork(row)
    expected = tokens
    for start, keep in [
        (TOKENS - 8, [TOKENS - 8, TOKENS - 5, TOKENS - 4, TOKENS - 1]),
        (10, list(range(12, TOKENS - 20))),  # overlaps where it goes to
    ]:
        cache.compact(child, keep, start=start)
        positions = torch.tensor([*range(start), *keep], device=DEVICE)
        expected = [tensor[positions] for tensor in expected]
        assert_holds(cache, child, expected)
    assert_holds(cache, row, tokens)


@pytest.mark.parametrize("sink", [0, 4])
def test_a_window_is_one_range_wherever_in_the_ring_it_is(make_cache: MakeCache, sink: int) -> None:
    window = PAGE_TOKENS - 9
    cache = make_cache(window=window, sink=sink, max_seq_len=20 * window)
    row = cache.alloc()
    tokens = torch.randn(5 * window, HEADS, DIM, device=DEVICE).bfloat16()
    for n in range(40, len(tokens), 40):
        cache.step({row: n})
        for layer in range(LAYERS):
            for which in (0, 1):
                view = cache.kv_window(layer, rows=row)[which]
                first = cache.kv_sink(layer, rows=row)[which]
                assert view is not None and first is not None
                n_new = min(40, view.shape[1])
                view[0, -n_new:] = tokens[n - n_new : n] + layer + which
                first[0] = tokens[: first.shape[1]] + layer + which
                expected = tokens[max(sink, n - window) : n] + layer + which
                assert torch.equal(view[0], expected)
    (child,) = cache.fork(row)
    for layer in range(LAYERS):
        for ours, theirs in zip(
            cache.kv_window(layer, rows=child), cache.kv_window(layer, rows=row), strict=True
        ):
            assert ours is not None and theirs is not None
            assert torch.equal(ours, theirs)


@LAYOUTS
def test_scrubbed_rows_show_nothing_of_earlier_requests(make_cache: MakeCache, layout: str) -> None:
    cache = make_cache(layout=layout, scrub="on_reuse", memory="64MiB")
    for n in (TOKENS, PAGE_TOKENS, 3 * PAGE_TOKENS):
        row = cache.alloc(n)
        cache.step({row: n})
        mapped = min(cache.mapped_tokens(row), cache.config.max_seq_len)
        for layer in range(LAYERS):
            for tensor in cache.kv(layer, rows=row, max_len=mapped):
                assert tensor is not None
                assert not tensor.any()
                tensor.fill_(7)
        cache.free(row)


def test_a_cuda_graph_holds_its_addresses_across_forks(make_cache: MakeCache) -> None:
    cache = make_cache(layout="interleaved", max_batch_size=2)
    row = cache.alloc()
    grow(cache, row, 2 * PAGE_TOKENS)
    (child,) = cache.fork(row)
    k, _ = cache.kv(1, rows=child, max_len=2 * PAGE_TOKENS)
    out = torch.empty_like(k)
    torch.add(k, 1, out=out)  # warm up: nothing may be loaded during the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.add(k, 1, out=out)
    for _ in range(3):  # the same row again, with the memory of other tokens each time
        cache.free(child)
        cache.truncate(row, 5)
        grow(cache, row, 2 * PAGE_TOKENS)
        torch.cuda.synchronize()
        assert cache.fork(row) == [child]
        out.zero_()
        graph.replay()
        assert torch.equal(out, cache.kv(1, rows=row, max_len=2 * PAGE_TOKENS)[0] + 1)
