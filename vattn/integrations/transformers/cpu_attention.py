"""Attention over head-major rows on the CPU."""

from __future__ import annotations

import torch

_sdpa = torch.nn.functional.scaled_dot_product_attention


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
) -> torch.Tensor:
    """Attend without copying keys or values, however many query heads share one of theirs.

    The query heads of a group become further query rows of their one key head, so that each key is
    read once for all of them. A causal prefill is left to torch, whose kernel skips the half that
    no query sees.

    Parameters
    ----------
    query : torch.Tensor
        [batch, heads, queries, head_dim]
    key, value : torch.Tensor
        [batch, num_kv_heads, keys, head_dim], in any strides; the head_dim of values may differ.
    mask : torch.Tensor, optional
        True where a query sees a key, or a number to add to the score; broadcastable to [batch,
        heads, queries, keys].
    is_causal : bool
        Query i sees the keys up to i. Not together with ``mask``.
    scaling : float, optional
        Factor of the scores; by default ``head_dim ** -0.5``.
    softcap : float, optional
        Scores are bent to stay within this (Gemma 2, arXiv 2408.00118, section 2).
    sinks : torch.Tensor, optional
        [heads], score of a key without value, one for each head (gpt-oss).

    Returns
    -------
    torch.Tensor
        [batch, heads, queries, head_dim of values]
    """
    batch, heads, queries, head_dim = query.shape
    groups = heads // key.shape[1]
    if softcap is not None or sinks is not None:
        if is_causal:
            mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=key.device).tril()
        scores = _masked_scores(query, key, mask, scaling or head_dim**-0.5, softcap)
        return _weighted_sum(scores, value, sinks)
    if is_causal:
        return _sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
    if groups == 1:
        return _sdpa(query, key, value, attn_mask=mask, scale=scaling)
    folded = query.reshape(batch, -1, groups * queries, head_dim)
    if mask is not None and queries > 1:
        mask = _fold_mask(mask, key.shape[1], groups, queries)
    elif mask is not None and mask.dim() == 4 and mask.shape[1] == heads:
        mask = mask.reshape(mask.shape[0], -1, groups, mask.shape[-1])
    output = _sdpa(folded, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, heads, queries, value.shape[-1])


def _fold_mask(mask: torch.Tensor, kv_heads: int, groups: int, queries: int) -> torch.Tensor:
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[1] == 1:
        return mask.expand(-1, -1, queries, -1).repeat(1, 1, groups, 1)
    return mask.expand(-1, -1, queries, -1).reshape(mask.shape[0], kv_heads, groups * queries, -1)


def _masked_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Scores of shape [batch, heads, queries, keys] in the type of the query."""
    batch, heads, queries, head_dim = query.shape
    folded = query.reshape(batch, key.shape[1], -1, head_dim)
    scores = (folded @ key.transpose(-1, -2)).view(batch, heads, queries, -1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def _weighted_sum(
    scores: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    batch, heads, queries, keys = scores.shape
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, queries, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., :keys].to(value.dtype)
    folded = weights.reshape(batch, value.shape[1], -1, keys)
    return (folded @ value).view(batch, heads, queries, -1)
