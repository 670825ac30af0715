"""Unmodified attention over vattn tensors gives what it gives over ordinary ones."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from torch.nn.functional import scaled_dot_product_attention as sdpa

import vattn

LENS = [1, 17, 200, 64]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture(
    params=[
        ("interleaved", "NHD"),
        ("per_layer", "NHD"),
        ("interleaved", "HND"),
        ("per_layer", "HND"),
    ]
)
def filled(request, dtype):
    """A cache with random tokens, and the same in torch.empty tensors of the same padded length."""
    layout, order = request.param
    cache = vattn.init(Backend("host").config(layout=layout, order=order, dtype=dtype, pages=128))
    generator = torch.Generator().manual_seed(0)
    for n in LENS:
        cache.alloc(n)
    cache.step(LENS)
    plain = []
    for tensor in cache.kv(1, max_len=max(LENS)):
        tensor = tensor if order == "HND" else tensor.transpose(1, 2)
        copy = torch.empty(tensor.shape, dtype=dtype).zero_()
        for row, n in enumerate(LENS):
            copy[row, :, :n] = torch.randn(2, n, 64, generator=generator).to(dtype)
            tensor[row, :, :n] = copy[row, :, :n]
        plain.append(copy)
    yield cache, plain
    cache.close()


def views(cache, **select):
    """K and V as [rows, heads, tokens, dim]."""
    pair = cache.kv(1, **select)
    return pair if cache.config.order == "HND" else tuple(t.transpose(1, 2) for t in pair)


def test_masked_decode_of_a_ragged_batch_is_equal(filled, dtype):
    cache, plain = filled
    query = torch.randn(4, 8, 1, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = (torch.arange(max(LENS)) < torch.tensor(LENS)[:, None])[:, None, None, :]
    ours = sdpa(query, *views(cache, max_len=max(LENS)), attn_mask=mask, enable_gqa=True)
    theirs = sdpa(query, *plain, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert bool(ours.isfinite().all())


def test_causal_prefill_of_every_row_is_equal(filled, dtype):
    cache, (k, v) = filled
    for row, n in enumerate(LENS):
        query = torch.randn(1, 2, n, 64, generator=torch.Generator().manual_seed(row)).to(dtype)
        ours = sdpa(query, *views(cache, rows=row, max_len=n), is_causal=True)
        theirs = sdpa(query, k[row : row + 1, :, :n], v[row : row + 1, :, :n], is_causal=True)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
