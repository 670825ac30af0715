"""Rows that share tokens, or lose some: contents and memory. The same over every driver."""

from __future__ import annotations

import threading

import pytest
import torch
from backends import BACKENDS, fill
from torch.nn.functional import scaled_dot_product_attention as sdpa

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

LAYOUTS = pytest.mark.parametrize(
    ("layout", "order"), [("interleaved", "NHD"), ("interleaved", "HND"), ("per_layer", "NHD")]
)


def write(cache, row, first, end):
    """Random numbers in tokens first to end of the row; all its tokens, ordinary and on the CPU."""
    for tensor in views(cache, row, end):
        tensor[first:] = torch.rand(tensor[first:].shape).to(tensor.device)
    return read(cache, row, end)


def views(cache, row, n):
    """K and V of all layers as [token, head, dim]."""
    nhd = cache.config.order == "NHD"
    pairs = [cache.kv(layer, rows=row, max_len=n) for layer in range(cache.config.num_layers)]
    return [t[0] if nhd else t[0].transpose(0, 1) for pair in pairs for t in pair]


def read(cache, row, n):
    return [tensor.cpu().clone() for tensor in views(cache, row, n)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def grown(cache, n):
    """A new row with n random tokens, and what they are."""
    row = cache.alloc()
    cache.step({row: n})
    return row, write(cache, row, 0, n)


# fork


@LAYOUTS
def test_a_fork_reads_the_same_tokens_and_copies_a_page_a_region(
    make_cache, backend, layout, order
):
    cache = make_cache(layout=layout, order=order, max_extent_bytes=backend.page_bytes, pages=128)
    regions = cache.regions_per_row
    n = 2 * backend.page_tokens * regions + 5  # two pages of each region, and a part of one
    row, tokens = grown(cache, n)
    before = cache.stats()
    children = cache.fork(row, n=2)
    after = cache.stats()
    assert cache.seq_lens == [n, n, n, 0]
    assert [cache.row_state(child) for child in children] == ["active", "active"]
    assert after.mapped_bytes - before.mapped_bytes == 2 * regions * backend.page_bytes
    assert after.aliased_bytes == 2 * 2 * regions * backend.page_bytes
    assert after.used_bytes == 3 * n * cache.token_bytes
    for child in children:
        assert same(read(cache, child, n), tokens)


@LAYOUTS
def test_rows_go_their_own_ways_after_a_fork(make_cache, backend, layout, order):
    cache = make_cache(layout=layout, order=order, max_extent_bytes=backend.page_bytes, pages=128)
    n = backend.page_tokens * cache.regions_per_row * 3 // 2
    row, tokens = grown(cache, n)
    rows = [row, *cache.fork(row, n=2)]
    held = {r: tokens for r in rows}
    for length in (n + 1, n + backend.page_tokens * cache.regions_per_row):
        for r in rows:
            old = cache.seq_lens[r]
            cache.step({r: length})
            held[r] = write(cache, r, old, length)
        for r in rows:
            assert same(read(cache, r, length), held[r]), r
    cache.free(row)
    cache.trim()
    for r in rows[1:]:
        assert same(read(cache, r, length), held[r]), r


@pytest.mark.parametrize("quarters", [0, 1, 4, 5, 8])
def test_a_fork_may_end_anywhere_in_the_row(make_cache, backend, quarters):
    cache = make_cache(max_extent_bytes=backend.page_bytes)
    n = quarters * backend.page_tokens // 4
    row, tokens = grown(cache, 2 * backend.page_tokens)
    (child,) = cache.fork(row, n)
    assert cache.seq_lens[child] == n
    assert cache.stats().aliased_bytes == quarters // 4 * backend.page_bytes
    assert same(read(cache, child, n), [t[:n] for t in tokens])
    cache.step({child: n + 3})
    write(cache, child, n, n + 3)
    assert same(read(cache, row, 2 * backend.page_tokens), tokens)


def test_a_fork_that_ends_inside_an_extent_copies_the_tokens_of_that_extent(make_cache, backend):
    cache = make_cache(max_extent_bytes=8 * backend.page_bytes)
    n = 8 * backend.page_tokens
    row, tokens = grown(cache, n)
    (whole,) = cache.fork(row)
    assert cache.stats().aliased_bytes == 8 * backend.page_bytes
    (part,) = cache.fork(row, n - 1)
    assert cache.stats().aliased_bytes == 8 * backend.page_bytes
    assert same(read(cache, whole, n), tokens)
    assert same(read(cache, part, n - 1), [t[:-1] for t in tokens])


def test_memory_is_given_back_with_the_last_row_that_has_it(make_cache, backend):
    cache = make_cache(max_extent_bytes=backend.page_bytes)
    row, tokens = grown(cache, 4 * backend.page_tokens)
    (child,) = cache.fork(row)
    assert cache.stats().mapped_bytes == 4 * backend.page_bytes
    cache.free(row)
    cache.trim()
    assert cache.stats().aliased_bytes == 0
    assert cache.stats().mapped_bytes == 4 * backend.page_bytes
    assert same(read(cache, child, 4 * backend.page_tokens), tokens)
    cache.free(child)
    cache.trim()
    assert cache.stats().held_bytes == 0


def test_a_fork_takes_free_rows_first_and_then_the_row_idle_for_longest(make_cache, backend):
    cache = make_cache()
    rows = [grown(cache, backend.page_tokens)[0] for _ in range(3)]
    for row in (rows[2], rows[1]):
        cache.free(row)
    assert cache.fork(rows[0]) == [3]
    assert cache.fork(rows[0]) == [rows[2]]
    assert cache.row_state(rows[1]) == "idle"


def test_no_row_at_all_is_a_fork_of_none(make_cache):
    cache = make_cache()
    row, _ = grown(cache, 3)
    assert cache.fork(row, n=0) == []
    assert cache.fork(cache.alloc()) == [2]  # a row without tokens
    assert cache.seq_lens == [3, 0, 0, 0]


def test_a_batch_of_forks_gives_the_attention_of_separate_rows(make_cache, backend):
    cache = make_cache(order="HND", max_extent_bytes=backend.page_bytes)
    n = 2 * backend.page_tokens + 9
    row, tokens = grown(cache, n)
    rows = [row, *cache.fork(row, n=3)]
    cache.step({r: n + 4 for r in rows})
    held = [write(cache, r, n, n + 4) for r in rows]
    assert rows == [0, 1, 2, 3]
    query = torch.randn(4, 2, 1, 64)
    for layer in range(2):
        k, v = cache.kv(layer, max_len=n + 4)
        together = sdpa(query.to(k.device), k, v).cpu()
        for r, own in zip(rows, held, strict=True):
            own_k, own_v = (t.transpose(0, 1) for t in own[2 * layer : 2 * layer + 2])
            alone = sdpa(query[r], own_k, own_v)
            torch.testing.assert_close(together[r], alone, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(own[0][:n], tokens[0]) for own in held)


# truncate


@pytest.mark.parametrize("by_step", [False, True])
def test_truncating_calls_no_driver_and_keeps_the_first_tokens(make_cache, backend, by_step):
    cache = make_cache(max_extent_bytes=backend.page_bytes)
    n = 2 * backend.page_tokens + 7
    row, tokens = grown(cache, n)
    before = cache.stats()
    if by_step:
        cache.step({row: n - 5})
    else:
        cache.truncate(row, n - 5)
    assert cache.seq_lens[row] == n - 5
    assert cache.stats().driver_calls == before.driver_calls
    assert cache.stats().mapped_bytes == before.mapped_bytes
    cache.step({row: n})  # the same memory
    assert cache.stats().driver_calls == before.driver_calls
    assert same(read(cache, row, n), tokens)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_a_row_cut_inside_shared_pages_gets_its_own_before_it_writes(make_cache, backend, who):
    cache = make_cache(max_extent_bytes=backend.page_bytes)
    n = 3 * backend.page_tokens
    row, tokens = grown(cache, n)
    (child,) = cache.fork(row)
    writer, other = (row, child) if who == "parent" else (child, row)
    cut = backend.page_tokens + 3
    cache.truncate(writer, cut)
    assert cache.stats().aliased_bytes == 3 * backend.page_bytes
    cache.step({writer: cut + 1})
    assert cache.stats().aliased_bytes == backend.page_bytes
    written = write(cache, writer, cut, cut + 1)
    assert same([t[:cut] for t in written], [t[:cut] for t in tokens])
    assert same(read(cache, other, n), tokens)


# reorder


@pytest.mark.parametrize(
    ("layout", "order", "parents"),
    [
        ("interleaved", "NHD", [1, 0, 2]),
        ("interleaved", "NHD", [0, 0, 0]),
        ("interleaved", "HND", [1, 2, 0]),
        ("interleaved", "HND", [1, 1, 2]),
        ("per_layer", "NHD", [2, 2, 1]),
    ],
)
def test_reordered_rows_have_the_tokens_of_their_parents(
    make_cache, backend, layout, order, parents
):
    cache = make_cache(layout=layout, order=order, max_extent_bytes=backend.page_bytes, pages=128)
    region = backend.page_tokens * cache.regions_per_row
    lens = [region // 2, region + 3, 2 * region]
    tokens = [grown(cache, n)[1] for n in lens]
    cache.reorder([0, 1, 2], parents)
    assert cache.seq_lens[:3] == [lens[parent] for parent in parents]
    for row, parent in enumerate(parents):
        assert same(read(cache, row, lens[parent]), tokens[parent]), row
    cache.step([n + 1 for n in cache.seq_lens[:3]] + [0])
    held = [write(cache, row, cache.seq_lens[row] - 1, cache.seq_lens[row]) for row in range(3)]
    for row, own in enumerate(held):
        assert same(read(cache, row, cache.seq_lens[row]), own), row


def test_a_row_that_keeps_its_parent_is_not_touched(make_cache, backend):
    cache = make_cache(max_extent_bytes=backend.page_bytes)
    rows = [grown(cache, 2 * backend.page_tokens + 1)[0] for _ in range(3)]
    before = cache.stats()
    cache.reorder(rows, rows)
    assert cache.stats() == before
    cache.reorder(rows, [rows[0], rows[0], rows[2]])
    assert cache.stats().aliased_bytes == 2 * backend.page_bytes
    before = cache.stats()
    cache.reorder([rows[2]], [rows[2]])
    assert cache.stats() == before


def test_beams_that_share_a_prompt_move_only_what_differs(make_cache, backend):
    cache = make_cache(max_extent_bytes=backend.page_bytes)
    n = 8 * backend.page_tokens
    row, _ = grown(cache, n)
    rows = [row, *cache.fork(row, n=2)]
    cache.step({r: n + 2 for r in rows})
    held = [write(cache, r, n, n + 2) for r in rows]
    before = cache.stats()
    cache.reorder(rows, [rows[1], rows[0], rows[1]])
    after = cache.stats()
    assert after.aliased_bytes == before.aliased_bytes == 2 * 8 * backend.page_bytes
    assert after.mapped_bytes == before.mapped_bytes
    for r, parent in zip(rows, (1, 0, 1), strict=True):
        assert same(read(cache, r, n + 2), held[parent])


# compact


@LAYOUTS
def test_compacting_moves_the_kept_tokens_together(make_cache, backend, layout, order):
    cache = make_cache(layout=layout, order=order, max_extent_bytes=backend.page_bytes, pages=128)
    n = 2 * backend.page_tokens * cache.regions_per_row + 20
    row, tokens = grown(cache, n)
    steps = [
        lambda n: (n - 8, [n - 8, n - 6, n - 3, n - 1]),  # a path of a token tree
        lambda n: (10, range(15, n - 3)),  # a run that overlaps where it goes to
        lambda n: (0, [0, 1, 2, 3, 7, 9, 15, 16, 17, 29]),
        lambda n: (3, []),
    ]
    for choose in steps:
        start, keep = choose(n)
        cache.compact(row, keep, start=start)
        tokens = [t[[*range(start), *keep]] for t in tokens]
        n = start + len(keep)
        assert cache.seq_lens[row] == n
        assert same(read(cache, row, n), tokens), start


def test_compacting_does_not_show_in_rows_that_share_the_tokens(make_cache, backend):
    cache = make_cache(max_extent_bytes=backend.page_bytes)
    n = 3 * backend.page_tokens
    row, tokens = grown(cache, n)
    (child,) = cache.fork(row)
    keep = list(range(backend.page_tokens, n, 2))
    cache.compact(row, keep, start=backend.page_tokens)
    assert same(read(cache, child, n), tokens)
    after = [t[[*range(backend.page_tokens), *keep]] for t in tokens]
    assert same(read(cache, row, len(after[0])), after)
    assert cache.stats().aliased_bytes == backend.page_bytes


def test_keeping_what_is_in_place_calls_no_driver(make_cache, backend):
    cache = make_cache(max_extent_bytes=backend.page_bytes)
    row, _ = grown(cache, 40)
    (child,) = cache.fork(row)
    before = cache.stats().driver_calls
    cache.compact(child, range(10, 30), start=10)
    assert cache.seq_lens[child] == 30
    assert cache.stats().driver_calls == before


# Threads.


def test_requests_fork_and_grow_in_several_threads(make_cache, backend):
    cache = make_cache(
        max_batch_size=16, max_extent_bytes=backend.page_bytes, lookahead=40, pages=128
    )
    n = backend.page_tokens + 5
    prompts = [cache.alloc() for _ in range(4)]
    for value, row in enumerate(prompts):
        cache.step({row: n})
        fill(cache, row, n, float(value))
    wrong = []

    def put(row, first, end, value):
        cache.step({row: end})
        for tensor in views(cache, row, end):
            tensor[first:] = value

    def expect(row, *runs):
        """(tokens, value) of each run, from the first token on."""
        values = torch.cat([torch.full((n,), float(value)) for n, value in runs])[:, None, None]
        if not all(bool((t == values).all()) for t in read(cache, row, len(values))):
            wrong.append((row, runs))

    def sample(value, row):
        for turn in range(10):
            (child,) = cache.fork(row, n - turn % 3)
            length = n - turn % 3
            expect(child, (length, value))
            put(child, length, length + 3, 100)
            expect(child, (length, value), (3, 100))
            cache.reorder([child], [row])
            cache.truncate(child, 7)
            put(child, 7, 9, 200)
            cache.compact(child, [5, 7], start=2)
            expect(child, (3, value), (1, 200))
            cache.free(child)
            cache.check()
            expect(row, (n, value))

    threads = [threading.Thread(target=sample, args=pair) for pair in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
