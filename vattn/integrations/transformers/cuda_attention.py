"""Attention over token-major rows on CUDA: a flash kernel where one is there, torch's SDPA else.

The kernels read the rows where they are. Padding on the left is skipped by telling them where each
row starts, so nothing is gathered.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from vattn.integrations.transformers import cpu_attention

_HALF = (torch.float16, torch.bfloat16)
_MAX_FLASH_HEAD_DIM = 256


@functools.cache
def flash_attn_with_kvcache() -> Callable[..., torch.Tensor] | None:
    """Return the kernel of the flash-attn package; None where that is not installed."""
    try:
        module = importlib.import_module("flash_attn")
    except ImportError:
        return None
    kernel: Callable[..., torch.Tensor] = module.flash_attn_with_kvcache
    return kernel


@functools.cache
def varlen_attn() -> Callable[..., torch.Tensor] | None:
    """Return torch's own flash kernel; None where it cannot leave out the end of a row."""
    try:
        kernel: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return kernel if "seqused_k" in inspect.signature(kernel).parameters else None


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a flash kernel takes tensors of this type there."""
    if device.type != "cuda" or dtype not in _HALF:
        return False
    return flash_attn_with_kvcache() is not None or varlen_attn() is not None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attend; see :func:`vattn.integrations.transformers.cpu_attention.attend` for the rest.

    Parameters
    ----------
    query, key, value, is_causal, scaling, softcap, sinks
        As there. Causal queries are the last of the keys.
    mask : torch.Tensor, optional
        [batch, keys]: which keys are no padding; padding is on the left, and attention is causal.
        Or as there.
    window : int, optional
        Keys that a query sees, itself included, if ``mask`` does not say.
    """
    causal = is_causal or (mask is not None and mask.dim() == 2)
    same: dict[str, Any] = {"causal": causal, "scaling": scaling, "window": window}
    if _fits_flash(query, key, value, mask, sinks):
        if (kernel := flash_attn_with_kvcache()) is not None:
            return _flash_attn(kernel, query, key, value, mask, softcap=softcap, **same)
        if (kernel := varlen_attn()) is not None and softcap is None:
            return _varlen(kernel, query, key, value, mask, **same)
    if mask is not None and mask.dim() == 2:
        mask = _dense_mask(mask, query.shape[2], window)
    elif causal and (key.shape[2] > query.shape[2] or window is not None):
        everything = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
        mask, is_causal = _dense_mask(everything, query.shape[2], window), False
    return cpu_attention.attend(
        query,
        key,
        value,
        mask=mask,
        is_causal=is_causal,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
    )


def _fits_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> bool:
    return (
        has_flash(query.device, query.dtype)
        and (mask is None or mask.dim() == 2)
        and sinks is None
        and key.shape[-1] == value.shape[-1] <= _MAX_FLASH_HEAD_DIM
    )


def _left_padding(mask: torch.Tensor) -> torch.Tensor:
    """Columns of padding of each row, int32."""
    return mask.shape[1] - mask.sum(dim=1, dtype=torch.int32)


def _flash_attn(
    kernel: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    batch, keys = key.shape[0], key.shape[2]
    output = kernel(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=torch.full((batch,), keys, dtype=torch.int32, device=key.device),
        cache_leftpad=None if mask is None else _left_padding(mask),
        softmax_scale=scaling,
        causal=causal,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return output.transpose(1, 2)


def _varlen(
    kernel: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Rows in one dimension, as the kernel wants them: row b starts at b times the row stride."""
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    row_tokens = key.stride(0) // key.stride(2) if batch > 1 else keys
    starts = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * row_tokens
    used = torch.full((batch,), keys, dtype=torch.int32, device=key.device)
    if mask is not None:
        padding = _left_padding(mask)
        starts[:batch] += padding
        used -= padding
    left = -1 if window is None else window - 1
    output = kernel(
        query.transpose(1, 2).reshape(batch * queries, heads, head_dim),
        _rows_in_one(key, row_tokens),
        _rows_in_one(value, row_tokens),
        torch.arange(batch + 1, dtype=torch.int32, device=key.device) * queries,
        starts,
        queries,
        keys,
        scale=scaling,
        window_size=(left, 0 if causal else -1),
        enable_gqa=key.shape[1] != heads,
        seqused_k=used,
    )
    return output.view(batch, queries, heads, head_dim).transpose(1, 2)


def _rows_in_one(tensor: torch.Tensor, row_tokens: int) -> torch.Tensor:
    """View [batch, heads, tokens, dim] as [tokens of all rows, heads, dim]."""
    batch, heads, tokens, dim = tensor.shape
    _, head_stride, token_stride, dim_stride = tensor.stride()
    size = ((batch - 1) * row_tokens + tokens, heads, dim)
    return tensor.as_strided(size, (token_stride, head_stride, dim_stride))


def _dense_mask(keys_used: torch.Tensor, queries: int, window: int | None) -> torch.Tensor:
    """Which query sees which key, [batch, 1, queries, keys]."""
    keys = keys_used.shape[1]
    column = torch.arange(keys, device=keys_used.device)
    last = torch.arange(keys - queries, keys, device=keys_used.device)[:, None]
    sees = column <= last
    if window is not None:
        sees &= column > last - window
    return sees & keys_used[:, None, None, :].bool()
