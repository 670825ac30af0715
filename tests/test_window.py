"""Layers with a sliding window show what a full cache with a window mask would, in bounded memory.

The model is every token that was ever written, in ordinary tensors. Heads of 80 floats: tokens
divide neither pages nor rings, so they lie at other places in each lap.
"""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS
from torch.nn.functional import scaled_dot_product_attention as sdpa

import vattn

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

HEADS, DIM = 2, 80
# Bytes of a token in one region of two layers.
TOKEN_BYTES = {
    ("interleaved", "NHD"): 2 * 2 * HEADS * DIM * 4,
    ("interleaved", "HND"): 2 * 2 * DIM * 4,
    ("per_layer", "NHD"): HEADS * DIM * 4,
    ("per_layer", "HND"): DIM * 4,
}
LAYOUTS = pytest.mark.parametrize(("layout", "order"), list(TOKEN_BYTES))
SINKS = pytest.mark.parametrize("sink", [0, 4])


class Model:
    """A windowed cache, and all tokens that its rows have had."""

    def __init__(self, make_cache, backend, *, layout="per_layer", order="NHD", **options):
        self.token_bytes = TOKEN_BYTES[layout, order]
        page_tokens = backend.page_bytes / self.token_bytes
        # A ring of two pages, unless said otherwise.
        self.window = options.setdefault("window", int(1.3 * page_tokens))
        self.sink = options.get("sink", 0)
        options.setdefault("max_seq_len", 8 * self.window)
        shape = {"num_kv_heads": HEADS, "head_dim": DIM, "layout": layout, "order": order}
        self.cache = make_cache(**(shape | {"pages": 128} | options))
        self.n_layers = self.cache.config.num_layers
        self.generator = torch.Generator().manual_seed(0)
        self._room = {}
        self.tokens = {}  # by row: [layer, K or V, token, head, dim]

    def alloc(self):
        row = self.cache.alloc()
        limit = self.cache.config.max_seq_len
        self._room[row] = torch.empty(self.n_layers, 2, limit, HEADS, DIM)
        self.tokens[row] = self._room[row][:, :, :0]
        return row

    def take_over(self, row, parent, n):
        """The row has the first n tokens of its parent."""
        self._room[row] = self._room[parent].clone()
        self.tokens[row] = self._room[row][:, :, :n]

    def views(self, layer, row):
        """[K, V] of the sink and of the window, each [token, head, dim]."""
        pairs = self.cache.kv_sink(layer, rows=row), self.cache.kv_window(layer, rows=row)
        order = self.cache.config.order
        return [[(t if order == "NHD" else t.transpose(1, 2))[0] for t in pair] for pair in pairs]

    def step(self, row, n):
        """Moves the row on to n tokens, and writes those of the new ones that stay readable."""
        old = self.tokens[row].shape[2]
        self.tokens[row] = self._room[row][:, :, :n]
        self.tokens[row][:, :, old:].normal_(generator=self.generator)
        self.cache.step({row: n})
        for layer in range(self.n_layers):
            sinks, windows = self.views(layer, row)
            for which in (0, 1):
                every = self.tokens[row][layer, which]
                sinks[which][old:] = every[old : len(sinks[which])]
                n_new = min(n - max(old, self.sink), len(windows[which]))
                if n_new > 0:
                    windows[which][-n_new:] = every[n - n_new :]

    def visible(self, row):
        """Positions of the tokens that the sink and the window are to show."""
        n = self.tokens[row].shape[2]
        return [*range(min(self.sink, n)), *range(max(self.sink, n - self.window), n)]

    def shown(self, layer, row):
        """[K, V] of the sink and the window together, [token, head, dim]."""
        sinks, windows = self.views(layer, row)
        return [torch.cat([sinks[which], windows[which]]) for which in (0, 1)]

    def check(self, row):
        for layer in range(self.n_layers):
            for which, shown in enumerate(self.shown(layer, row)):
                every = self.tokens[row][layer, which]
                assert torch.equal(shown.cpu(), every[self.visible(row)]), (layer, which)


def attend(query, k, v, mask=None):
    """Attention of [head, query, dim] to [token, head, dim]."""
    k, v = (t.cpu().transpose(0, 1) for t in (k, v))
    return sdpa(query[None], k[None], v[None], attn_mask=mask)[0]


def window_mask(positions, n_queries, n, window, sink):
    """Whether each of the last queries of n tokens may see the tokens at `positions`."""
    query = torch.arange(n - n_queries, n)[:, None]
    token = torch.tensor(positions)[None]
    return (token <= query) & ((token > query - window) | (token < sink))


@SINKS
@LAYOUTS
def test_decoding_equals_a_full_cache_with_a_window_mask(make_cache, backend, layout, order, sink):
    model = Model(make_cache, backend, layout=layout, order=order, sink=sink)
    w = model.window
    row = model.alloc()
    n = 0
    # Prompts and chunks shorter and longer than the window, single tokens between them.
    for n_new in [3, 1, w // 2, 1, w - 9, 1, 1, w, 1, 2 * w + 7, 1, w // 3, 1, 1, w + 1, 1, w, 1]:
        n += n_new
        model.step(row, n)
        mask = window_mask(range(n), 1, n, w, sink)
        query = torch.randn(HEADS, 1, DIM, generator=model.generator)
        ours = attend(query, *model.shown(1, row))
        theirs = attend(query, *model.tokens[row][1], mask)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        model.check(row)
    assert n > 6 * w


@SINKS
@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_every_single_step_shows_the_last_tokens(make_cache, backend, order, sink):
    # Most of a page, so that a lap is not much longer than the window.
    tokens = backend.page_bytes // TOKEN_BYTES["interleaved", order]
    model = Model(
        make_cache, backend, layout="interleaved", order=order, sink=sink, window=tokens - 3
    )
    row = model.alloc()
    first = 1 if backend.name == "host" else 6 * model.window - 40
    for n in range(first, 6 * model.window + 20):
        model.step(row, n)
        model.check(row)


@SINKS
def test_chunks_attend_to_the_window_of_before_the_step(make_cache, backend, sink):
    model = Model(make_cache, backend, layout="interleaved", sink=sink)
    w = model.window
    row = model.alloc()
    n = 0
    for n_new in [2, w - 1, w // 4, w + 30, w // 2, w // 2, w // 2]:
        before, positions = model.shown(0, row), model.visible(row)
        model.step(row, n + n_new)
        chunk = model.tokens[row][0, :, n:]
        n += n_new
        query = torch.randn(HEADS, n_new, DIM, generator=model.generator)
        positions += range(n - n_new, n)
        keys = [torch.cat([old.cpu(), new]) for old, new in zip(before, chunk, strict=True)]
        ours = attend(query, *keys, window_mask(positions, n_new, n, w, sink))
        mask = window_mask(range(n), n_new, n, w, sink)
        theirs = attend(query, *model.tokens[row][0], mask)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@LAYOUTS
def test_physical_memory_is_flat_from_the_first_lap_on(make_cache, backend, layout, order):
    token_bytes = TOKEN_BYTES[layout, order]
    window = int(0.7 * backend.page_bytes / token_bytes)
    limit = 100 * window
    # One page for the sink and one for the ring, in each region, and none to spare.
    regions = {"interleaved": 1, "per_layer": 4}[layout] * {"NHD": 1, "HND": HEADS}[order]
    model = Model(make_cache, backend, layout=layout, order=order, sink=4, window=window,
                  max_seq_len=limit, pages=2 * regions, lookahead=16)  # fmt: skip
    cache, row = model.cache, model.alloc()
    assert cache.regions_per_row == regions
    for n in [4 * window, 4 * window + 1, 10 * window, 50 * window + 1, limit - 2]:
        cache.step({row: n})
        assert cache.stats().mapped_bytes == 2 * regions * cache.page_bytes
    calls = cache.stats().driver_calls
    cache.step({row: limit - 1})
    cache.step({row: limit})
    assert cache.stats().driver_calls == calls


def test_a_window_longer_than_a_row_can_be_keeps_all_tokens(make_cache, backend):
    model = Model(make_cache, backend, window=10**9, sink=3, max_seq_len=70)
    row = model.alloc()
    for n in (2, 50, 70):
        model.step(row, n)
        model.check(row)
        k_sink, k_window = (pair[0] for pair in model.views(0, row))
        assert len(k_sink) + len(k_window) == n


def test_layers_with_and_without_a_window_share_a_row(make_cache, backend):
    groups = [
        vattn.LayerGroup(layers=[0, 2], num_kv_heads=2, head_dim=80, window=50),
        vattn.LayerGroup(layers=[1], num_kv_heads=1, head_dim=48),
        vattn.LayerGroup(layers=[3], num_kv_heads=1, head_dim=40, v_head_dim=0, window=9, sink=2),
    ]
    shape = {"num_layers": 4, "num_kv_heads": None, "head_dim": None, "layer_groups": groups}
    window, sink = {0: 50, 2: 50, 3: 9}, {0: 0, 2: 0, 3: 2}
    n_tokens = 3 * backend.page_tokens * 2048 // 640
    for layout in ("interleaved", "per_layer"):
        cache = make_cache(**shape, layout=layout, max_seq_len=n_tokens)
        row = cache.alloc()
        for n in [1, 10, 11, 60, *range(61, n_tokens, n_tokens // 7), n_tokens]:
            cache.step({row: n})
            cache.kv(1, rows=row, max_len=n)[0][0, -1].fill_(n)
            for layer in window:
                views = [cache.kv_window(layer, rows=row)[0], cache.kv_sink(layer, rows=row)[0]]
                positions = range(max(sink[layer], n - window[layer]), n), range(sink[layer])
                for view, tokens in zip(views, positions, strict=True):
                    for i, token in enumerate(tokens[:n]):
                        view[0, i].fill_(token)
            for layer in window:
                k, v = cache.kv_window(layer, rows=row)
                first = max(sink[layer], n - window[layer])
                assert k[0, :, 0, 0].tolist() == list(range(first, n))
                assert (v is None) == (layer == 3)
            assert bool((cache.kv(1)[0][row, n - 1] == n).all())
        cache.check()


def test_rows_of_one_length_are_one_view(make_cache, backend):
    model = Model(make_cache, backend, sink=4)
    rows = [model.alloc() for _ in range(4)]
    n = 5 * model.window // 2
    for row in rows:
        model.step(row, n)
    for selection, chosen in [(None, rows), (slice(1, 3), rows[1:3]), ([0, 3], [rows[0], rows[3]])]:
        for views, first, last in [
            (model.cache.kv_window(1, rows=selection), n - model.window, n),
            (model.cache.kv_sink(1, rows=selection), 0, 4),
        ]:
            for which, view in enumerate(views):
                expected = [model.tokens[row][1, which, first:last] for row in chosen]
                assert torch.equal(view.cpu(), torch.stack(expected))


def test_views_that_cannot_be_are_refused(make_cache, backend):
    cache = Model(make_cache, backend, sink=4).cache
    for _ in range(4):
        cache.alloc()
    cache.step([9, 9, 8, 9])
    with pytest.raises(ValueError, match=r"layer 1 has a sliding window.*use kv_window\(\)"):
        cache.kv(1)
    with pytest.raises(ValueError, match="sliding window"):
        cache.kv_flat(0)
    for views in (cache.kv_window, cache.kv_sink):
        with pytest.raises(ValueError, match=r"row 1 has 9 tokens and row 2 has 8, .* one length"):
            views(0, rows=[1, 2, 3])
        with pytest.raises(ValueError, match="row 0 has 9 tokens and row 2 has 8"):
            views(0)
        with pytest.raises(ValueError, match="evenly spaced"):
            views(0, rows=[0, 1, 3])
        with pytest.raises(IndexError, match="row is 4, expected 0 to 3"):
            views(0, rows=4)
        with pytest.raises(IndexError, match="layer is 2, expected 0 to 1"):
            views(2, rows=0)
        assert views(0, rows=[0, 1])[0].shape[0] == 2
        with pytest.raises(ValueError, match=r"layer 0 has no sliding window; use kv\(\)"):
            getattr(make_cache(), views.__name__)(0)
    cache.close()
    for views in (cache.kv_window, cache.kv_sink):
        with pytest.raises(ValueError, match="closed"):
            views(0, rows=0)
