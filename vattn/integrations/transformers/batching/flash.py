"""Attention over rows by FlashAttention's kernel, on CUDA."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vattn.integrations.transformers.batching.attention import AttentionOptions

FlashKernel = Callable[..., torch.Tensor]

# What the kernel is compiled for.
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


@functools.cache
def _installed_kernel() -> FlashKernel | None:
    try:
        kernel: FlashKernel = importlib.import_module("flash_attn").flash_attn_with_kvcache
    except (ImportError, AttributeError):  # AttributeError: before version 2.2
        return None
    return kernel


def find_flash_kernel(
    query: torch.Tensor, value: torch.Tensor, options: AttentionOptions
) -> FlashKernel | None:
    """Return flash_attn_with_kvcache if it is there and can do this."""
    if query.device.type != "cuda" or query.dtype not in _DTYPES or options.sinks is not None:
        return None
    if query.shape[3] != value.shape[3] or query.shape[3] > _MAX_HEAD_DIM:
        return None
    return _installed_kernel()


def attend_with_flash(
    kernel: FlashKernel,
    segments: Sequence[tuple[int, int, int]],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: AttentionOptions,
    output: torch.Tensor,
) -> None:
    """Attend with one call for all segments of one token, and one for each longer one.

    Parameters
    ----------
    kernel : callable
        ``flash_attn_with_kvcache``.
    segments : sequence of (int, int, int)
        Row, tokens in it, and how many of them are new; those with one new token come first.
    query : torch.Tensor
        [1, heads, new tokens of all segments, head_dim]
    key, value : torch.Tensor
        [rows, num_kv_heads, tokens, head_dim]
    options : AttentionOptions
        Without sinks.
    output : torch.Tensor
        [1, new tokens of all segments, heads, head_dim], written to.
    """
    rows = torch.tensor([s[0] for s in segments], dtype=torch.int32, device=query.device)
    lengths = torch.tensor([s[1] for s in segments], dtype=torch.int32, device=query.device)
    n_singles = sum(count == 1 for _, _, count in segments)
    fixed: dict[str, Any] = {
        "softmax_scale": options.scaling,
        "causal": True,  # the last query sees all keys, and so on backwards
        "window_size": (-1, -1) if options.window is None else (options.window - 1, 0),
        "softcap": options.softcap or 0.0,
    }
    tokens = query[0].transpose(0, 1)  # [tokens, heads, dim]
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    # As [batch, tokens of each, heads, dim]: the single tokens are one batch.
    groups = [(0, n_singles, slice(0, n_singles), (n_singles, 1))] if n_singles else []
    start = n_singles
    for index in range(n_singles, len(segments)):
        count = segments[index][2]
        groups.append((start, start + count, slice(index, index + 1), (1, count)))
        start += count
    for start, stop, which, shape in groups:
        part = kernel(
            tokens[start:stop].view(*shape, *tokens.shape[1:]),
            keys,
            values,
            cache_seqlens=lengths[which],
            cache_batch_idx=rows[which],
            **fixed,
        )
        output[0, start:stop] = part.reshape(output[0, start:stop].shape)
