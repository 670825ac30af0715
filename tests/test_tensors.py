"""The tensors: where every token lies, and the views of them, the same over every driver."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, TOKEN_BYTES, fill, holds

import vattn

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("layout", ["interleaved", "per_layer"])
def test_every_token_of_every_row_and_layer_has_memory_of_its_own(make_cache, layout, order):
    cache = make_cache(layout=layout, order=order, pages=256)
    tokens = [5, cache.config.max_seq_len // 16, 1, 33]
    rows = [cache.alloc(n) for n in tokens]
    cache.step({row: n for row, n in zip(rows, tokens, strict=True)})
    written = {}
    for layer in range(2):
        for which, tensor in enumerate(cache.kv(layer)):
            tensor = tensor if order == "NHD" else tensor.transpose(1, 2)
            for row, n in zip(rows, tokens, strict=True):
                data = torch.randn(n, 2, 64)
                tensor[row, :n] = data
                written[layer, which, row, n] = data
    for (layer, which, row, n), data in written.items():
        tensor = cache.kv(layer)[which]
        tensor = tensor if order == "NHD" else tensor.transpose(1, 2)
        assert torch.equal(tensor[row, :n].cpu(), data), (layer, which, row)


def test_shapes_and_strides_are_those_of_the_order(make_cache, backend):
    n = 64 * backend.page_tokens
    nhd, _ = make_cache().kv(1)
    assert nhd.shape == (4, n, 2, 64)
    assert nhd.stride() == (n * TOKEN_BYTES // 4, TOKEN_BYTES // 4, 64, 1)
    hnd, _ = make_cache(layout="per_layer", order="HND").kv(1)
    assert hnd.shape == (4, 2, n, 64)
    assert hnd.stride()[2:] == (64, 1)


def test_layers_may_differ_in_heads_and_dims(make_cache):
    groups = [
        vattn.LayerGroup(layers=[0, 2], num_kv_heads=4, head_dim=32),
        vattn.LayerGroup(layers=[1], num_kv_heads=1, head_dim=48, v_head_dim=16),
    ]
    shape = {"num_layers": 3, "num_kv_heads": None, "head_dim": None, "layer_groups": groups}
    for layout in ("interleaved", "per_layer"):
        cache = make_cache(**shape, layout=layout)
        row = cache.alloc()
        cache.step({row: 40})
        fill(cache, row, 40, 3.0)
        assert [cache.kv(layer)[0].shape[2:] for layer in range(3)] == [(4, 32), (1, 48), (4, 32)]
        assert cache.kv(1)[1].shape[2:] == (1, 16)
        assert holds(cache, row, 40, 3.0)


def test_a_latent_stripe_has_no_v(make_cache):
    cache = make_cache(num_kv_heads=1, head_dim=576, v_head_dim=0, dtype="bfloat16")
    row = cache.alloc()
    cache.step({row: 7})
    k, v = cache.kv(0)
    k[row, :7] = 1
    assert v is None
    assert k.shape[2:] == (1, 576)


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]
)
def test_every_dtype_reads_what_it_wrote(make_cache, dtype):
    cache = make_cache(dtype=getattr(torch, dtype))
    row = cache.alloc()
    cache.step({row: 3})
    k, _ = cache.kv(0)
    assert k.dtype == getattr(torch, dtype)
    k[row, :3] = torch.full((3, 2, 64), 2.0).to(k.dtype)
    assert bool((k[row, :3].float() == 2).all())


def test_views_select_rows_and_lengths_without_a_copy(make_cache):
    cache = make_cache()
    for _ in range(4):
        cache.alloc()
    cache.step([9, 9, 9, 9])
    k, _ = cache.kv(0)
    choices = [(1, [1]), ([1, 2], [1, 2]), ([0, 2], [0, 2]), (slice(1, 4), [1, 2, 3])]
    for value, (rows, selected) in enumerate(choices, start=1):
        view, _ = cache.kv(0, rows=rows, max_len=9)
        assert view.shape == (len(selected), 9, 2, 64)
        view.fill_(value)
        written = (k[:, :9] == value).flatten(1).all(dim=1)
        assert written.nonzero().flatten().tolist() == selected


def test_views_that_cannot_be_are_refused(make_cache):
    cache = make_cache()
    for rows in ([0, 1, 3], [2, 1], []):
        with pytest.raises(ValueError, match="evenly spaced"):
            cache.kv(0, rows=rows)
    with pytest.raises(IndexError, match="row is 4, expected 0 to 3"):
        cache.kv(0, rows=4)
    with pytest.raises(IndexError, match="layer is 2, expected 0 to 1"):
        cache.kv(2)
    with pytest.raises(ValueError, match="max_len is -1"):
        cache.kv(0, max_len=-1)
    with pytest.raises(ValueError, match="HND"):
        make_cache(order="HND").kv_flat(0)


def test_the_flat_view_finds_every_token_where_the_rows_have_it(make_cache):
    for layout in ("interleaved", "per_layer"):
        cache = make_cache(layout=layout)
        for _ in range(4):
            cache.alloc()
        cache.step([9, 9, 9, 9])
        for row in range(4):
            fill(cache, row, 9, float(row + 1))
        for flat in cache.kv_flat(1):
            for row in range(4):
                start = row * cache.row_stride_tokens
                assert bool((flat[start : start + 9] == row + 1).all())
