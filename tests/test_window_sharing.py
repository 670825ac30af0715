"""Rows with a sliding window that are cut, forked, reordered and used again."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS
from test_window import TOKEN_BYTES, Model

import vattn

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def model_in_one_page(make_cache, backend, *, window, **options):
    """A model whose rings are one page, and the whole tokens that such a page holds."""
    model = Model(make_cache, backend, window=window, **options)
    held = backend.page_bytes // TOKEN_BYTES["per_layer", "NHD"]
    assert window < held
    return model, held


def cut(model, row, n):
    """What truncate() does, in the model."""
    model.tokens[row] = model.tokens[row][:, :, :n]


@pytest.mark.parametrize("sink", [0, 4])
@pytest.mark.parametrize("by_step", [False, True])
def test_a_row_can_be_cut_as_far_as_its_ring_still_holds_the_window(
    make_cache, backend, sink, by_step
):
    model, held = model_in_one_page(
        make_cache, backend, window=10, sink=sink, max_seq_len=20 * backend.page_bytes // 640
    )
    cache, row = model.cache, model.alloc()
    n = 3 * held

    def truncate(length):
        if by_step:
            cache.step({row: length})
        else:
            cache.truncate(row, length)

    # One by one: every token is written, also those that leave the window before the next.
    for length in range(9, n + 1, 9):
        model.step(row, length)
    n = cache.seq_lens[row]
    shortest = n - held + model.window
    with pytest.raises(ValueError, match="window"):
        truncate(shortest - 1)
    assert cache.seq_lens[row] == n
    model.check(row)
    truncate(shortest)
    cut(model, row, shortest)
    model.check(row)
    # Growing again does not bring back what the longer row overwrote.
    model.step(row, shortest + 2)
    with pytest.raises(ValueError, match="window"):
        truncate(shortest - 1)
    model.check(row)
    truncate(0)
    cut(model, row, 0)
    model.step(row, 2 * held)
    model.check(row)


def test_a_row_that_has_not_filled_its_ring_can_be_cut_to_any_length(make_cache, backend):
    model = Model(make_cache, backend, window=10, max_seq_len=1000, sink=3)
    row = model.alloc()
    for length in (8, 15, 24, 33, 40):
        model.step(row, length)
    for length in (39, 20, 12, 2, 1):
        model.cache.truncate(row, length)
        cut(model, row, length)
        model.check(row)


@pytest.mark.parametrize("sink", [0, 4])
@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_a_fork_shows_the_same_window_and_goes_its_own_way(make_cache, backend, order, sink):
    model = Model(make_cache, backend, order=order, sink=sink)
    cache, w = model.cache, model.window
    for n in (2, w // 2, 3 * w + 5):
        parent = model.alloc()
        model.step(parent, n)
        children = cache.fork(parent, n=2)
        for child in children:
            model.take_over(child, parent, n)
            assert cache.seq_lens[child] == n
            model.check(child)
        rows = [parent, *children]
        for new in (1, 3, w // 3):
            for row in rows:
                n = cache.seq_lens[row]
                model.step(row, n + new)
                for other in rows:
                    model.check(other)
        cache.check()
        for row in rows:
            cache.free(row)


def test_a_fork_at_a_length_that_the_ring_has_left_behind_is_refused(make_cache, backend):
    model, held = model_in_one_page(make_cache, backend, window=10, max_seq_len=20000)
    cache, row = model.cache, model.alloc()
    for n in range(10, 2 * held, 10):
        model.step(row, n)
    n = cache.seq_lens[row]
    before = cache.stats()
    with pytest.raises(ValueError, match="window"):
        cache.fork(row, n - held)
    after = cache.stats()
    assert (after.rows_active, after.mapped_bytes) == (before.rows_active, before.mapped_bytes)
    (child,) = cache.fork(row, n - held + 10)
    model.take_over(child, row, n - held + 10)
    model.check(child)
    with pytest.raises(ValueError, match="window"):
        cache.truncate(child, n - held + 9)
    model.check(row)


def test_rows_can_be_reordered(make_cache, backend):
    model = Model(make_cache, backend, sink=4)
    rows = [model.alloc() for _ in range(3)]
    n = 2 * model.window + 11
    for row in rows:
        model.step(row, n)
    model.cache.reorder(rows, [rows[1], rows[0], rows[0]])
    second = model.tokens[rows[1]].clone()
    for row in rows[1:]:
        model.take_over(row, rows[0], n)
    model.tokens[rows[0]].copy_(second)
    for row in rows:
        model.check(row)
        model.step(row, n + 1)
    for row in rows:
        model.check(row)
    model.cache.check()


def test_a_row_used_again_shows_its_own_tokens_only(make_cache, backend):
    model = Model(make_cache, backend, sink=4)
    for n in (3 * model.window, 5, model.window + 1, 2):
        row = model.alloc()
        model.step(row, n)
        model.check(row)
        model.cache.free(row)


def test_scrubbed_windows_show_nothing_of_earlier_requests(make_cache, backend):
    model = Model(make_cache, backend, sink=4, scrub="on_reuse", max_batch_size=1)
    cache = model.cache
    for n in (3 * model.window, 2 * model.window + 7, model.window // 2):
        row = model.alloc()
        cache.step({row: n})
        for layer in range(2):
            for shown in model.shown(layer, row):
                assert bool((shown == 0).all())
        cut(model, row, 0)
        model.step(row, n)
        for layer in range(2):
            for view in model.views(layer, row):
                for tensor in view:
                    tensor.fill_(7.0)
        cache.free(row)


def test_what_needs_all_tokens_is_refused(make_cache, backend):
    model = Model(make_cache, backend)
    row = model.alloc()
    model.step(row, 20)
    with pytest.raises(ValueError, match="window"):
        model.cache.compact(row, [1, 3])
    with pytest.raises(ValueError, match="window"):
        vattn.PrefixCache(model.cache)
    model.check(row)
    assert torch.is_tensor(model.cache.kv_window(0, rows=row)[0])


def test_a_row_cannot_be_cut_to_where_a_long_chunk_left_a_hole(make_cache, backend):
    model = Model(make_cache, backend, window=10, max_seq_len=1000)
    row = model.alloc()
    model.step(row, 50)  # tokens 40 to 49 are written, the others never
    with pytest.raises(ValueError, match="fewer than 50"):
        model.cache.truncate(row, 49)
    model.step(row, 53)
    model.cache.truncate(row, 51)
    cut(model, row, 51)
    model.check(row)


def test_a_chunk_that_is_long_for_one_window_only_can_be_forked(backend):
    window = [
        vattn.LayerGroup(layers=[0], num_kv_heads=1, head_dim=8, window=500),
        vattn.LayerGroup(layers=[1], num_kv_heads=1, head_dim=8, window=9, sink=2),
    ]
    shape = {"num_layers": 2, "num_kv_heads": None, "head_dim": None, "layer_groups": window}
    with vattn.init(backend.config(**shape)) as cache:
        row = cache.alloc()
        cache.step({row: 11})
        cache.truncate(row, 10)
        cache.step({row: 511})
        assert len(cache.fork(row)) == 1
