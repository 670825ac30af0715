"""Attention over contiguous rows, by kernels that know no blocks; needs torch alone.

The KV buffer of a layer is ``flat``, ``[tokens, kv heads, head_size + head_size_v]``: the key of a
token lies before its value. The tokens of a request are ``flat[start : start + seq_len]``, its
queries are the last of them, and attention is causal. Whatever else is in ``flat`` may have no
memory behind it, so nothing here reads or writes outside of those tokens.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

_sdpa = torch.nn.functional.scaled_dot_product_attention

# Queries per call where a mask is needed: torch makes it a matrix of queries by keys in float32,
# 32 MiB at 32k keys.
_MASKED_QUERIES = 256


def write_tokens(
    flat: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store keys and values of new tokens on the CPU. Call before attention reads them.

    Parameters
    ----------
    flat : torch.Tensor
        ``[tokens, kv heads, head_size + head_size_v]``, written in place.
    key, value : torch.Tensor
        ``[new tokens, kv heads, head_size]`` and ``[new tokens, kv heads, head_size_v]``; those
        past the end of ``slot_mapping`` are padding.
    slot_mapping : torch.Tensor
        int64, the index in ``flat`` of each new token; -1 for padding, which is skipped.

    Raises
    ------
    ValueError
        Fewer keys than slots, or another dtype than that of ``flat``. Nothing was written.
    IndexError
        A slot past the end of ``flat``.
    """
    slots = slot_mapping.shape[0]
    if key.shape[0] < slots or value.shape[0] < slots:
        raise ValueError(
            f"{key.shape[0]} keys and {value.shape[0]} values for {slots} slots; pass one of each "
            "for every slot"
        )
    if not (flat.dtype == key.dtype == value.dtype):
        raise ValueError(
            f"keys are {key.dtype}, values {value.dtype}, the KV buffer is {flat.dtype}; use "
            "--kv-cache-dtype auto"
        )
    key, value = key[:slots], value[:slots]
    real = slot_mapping >= 0
    if not bool(real.all()):
        slot_mapping, key, value = slot_mapping[real], key[real], value[real]
    head_size = key.shape[-1]
    flat[..., :head_size].index_copy_(0, slot_mapping, key)
    flat[..., head_size:].index_copy_(0, slot_mapping, value)


def attend_rows(
    query: torch.Tensor,
    flat: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    row_starts: torch.Tensor,
    *,
    scale: float,
    head_size: int,
    out: torch.Tensor,
) -> None:
    """Attend on the CPU: torch's unmodified SDPA over the row of each request.

    Parameters
    ----------
    query : torch.Tensor
        ``[queries of all requests, heads, head_size]``.
    flat : torch.Tensor
        ``[tokens, kv heads, head_size + head_size_v]``, in the type of the queries.
    query_starts : torch.Tensor
        ``[requests + 1]`` on the CPU. The queries of request r are
        ``query[query_starts[r] : query_starts[r + 1]]``; none if r is padding.
    seq_lens : torch.Tensor
        ``[requests]`` on the CPU, tokens of each request with those of its queries.
    row_starts : torch.Tensor
        ``[requests]`` or more on the CPU, the first token of each request in ``flat``.
    scale : float
        Factor of the scores.
    head_size : int
        Elements of a key; the rest of the last dimension of ``flat`` is the value.
    out : torch.Tensor
        ``[queries of all requests, heads, head_size_v]``, written where there are queries.

    Raises
    ------
    ValueError
        A request with more queries than tokens, or whose tokens leave ``flat``. The output of
        requests before it is written.
    """
    starts, lens, firsts = query_starts.tolist(), seq_lens.tolist(), row_starts.tolist()
    for request, seq_len in enumerate(lens):
        begin, end = starts[request], starts[request + 1]
        if begin == end:
            continue
        first = firsts[request]
        if end - begin > seq_len or first < 0 or first + seq_len > flat.shape[0]:
            raise ValueError(
                f"request {request} has {end - begin} queries and tokens [{first}, "
                f"{first + seq_len}), the KV buffer has {flat.shape[0]} tokens; block table and "
                "lengths do not fit contiguous rows"
            )
        row = flat[first : first + seq_len]
        _attend_row(query[begin:end], row, scale=scale, head_size=head_size, out=out[begin:end])


def _attend_row(
    query: torch.Tensor, row: torch.Tensor, *, scale: float, head_size: int, out: torch.Tensor
) -> None:
    """Attend with the last queries of a row; all arguments are those of one request."""
    queries, tokens, kv_heads = query.shape[0], row.shape[0], row.shape[1]
    if queries == 1:
        # The query heads of a group become query rows of their one key head: each key is read
        # once for all of them.
        keys, values = row.transpose(0, 1).split_with_sizes([head_size, out.shape[-1]], dim=-1)
        folded = query.view(kv_heads, -1, head_size)
        out.view(kv_heads, -1, out.shape[-1]).copy_(
            _sdpa(folded[None], keys[None], values[None], scale=scale)[0]
        )
    elif queries == tokens:
        _attend_heads(query, row, None, scale=scale, out=out)
    else:
        for begin in range(0, queries, _MASKED_QUERIES):
            part = slice(begin, min(begin + _MASKED_QUERIES, queries))
            # Keys after the last of these queries are not looked at.
            seen = tokens - queries + part.stop
            rows = part.stop - begin
            mask = torch.ones(rows, seen, dtype=torch.bool, device=row.device)
            mask = mask.tril(diagonal=seen - rows)
            _attend_heads(query[part], row[:seen], mask, scale=scale, out=out[part])


def _attend_heads(
    query: torch.Tensor,
    row: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend with many queries; without a mask, query i sees the keys up to i."""
    queries, heads, head_size = query.shape
    kv_heads = row.shape[1]
    # [kv heads, heads of a group, ...]: a group looks at its one key head through a stride of 0,
    # so nothing is copied.
    shared = row.transpose(0, 1)[:, None].expand(-1, heads // kv_heads, -1, -1)
    result = _sdpa(
        query.view(queries, kv_heads, -1, head_size).permute(1, 2, 0, 3),
        shared[..., :head_size],
        shared[..., head_size:],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    out.view(queries, kv_heads, -1, out.shape[-1]).copy_(result.permute(2, 0, 1, 3))


def varlen_attn() -> Callable[..., torch.Tensor]:
    """Return torch's flash kernel for sequences of different lengths.

    Raises
    ------
    ImportError
        This torch has none, or one that cannot leave out the end of a row.
    """
    try:
        kernel: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError) as error:
        raise ImportError(_no_varlen("no varlen_attn")) from error
    if "seqused_k" not in inspect.signature(kernel).parameters:
        raise ImportError(_no_varlen("a varlen_attn without seqused_k"))
    found: Callable[..., torch.Tensor] = kernel
    return found


def _no_varlen(found: str) -> str:
    return f"torch {torch.__version__} has {found}, which contiguous rows on CUDA need: use 2.13"


def attend_rows_varlen(
    query: torch.Tensor,
    flat: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    row_starts: torch.Tensor,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    head_size: int,
    out: torch.Tensor,
    kernel: Callable[..., torch.Tensor],
) -> None:
    """Attend on CUDA: one call of an unmodified variable-length flash kernel, no wait for it.

    Parameters
    ----------
    query, flat, scale, head_size, out
        As in :func:`attend_rows`; float16 or bfloat16, and ``head_size_v`` is ``head_size``.
    query_starts : torch.Tensor
        ``[requests + 1]``, int32, contiguous, on the device.
    seq_lens : torch.Tensor
        ``[requests]``, int32, contiguous, on the device.
    row_starts : torch.Tensor
        ``[requests + 1]``, int32, contiguous, on the device. The kernel takes the first token of
        each row from here and its length from ``seq_lens``, so rows lie in any order, and the last
        entry is not read.
    max_query_len, max_seq_len : int
        No request has more queries, or more tokens.
    kernel : callable
        What :func:`varlen_attn` returns.
    """
    keys, values = flat.split_with_sizes([head_size, out.shape[-1]], dim=-1)
    # One query each: it is the last token, so causal or not is the same. Without a window the
    # kernel may read keys once for a group of heads and split long rows.
    one_each = max_query_len == 1 and query.shape[0] == seq_lens.shape[0]
    result = kernel(
        query,
        keys,
        values,
        query_starts,
        row_starts,
        max_query_len,
        max_seq_len,
        scale=scale,
        window_size=(-1, -1) if one_each else (-1, 0),
        enable_gqa=query.shape[1] != flat.shape[1],
        seqused_k=seq_lens,
    )
    # Not varlen_attn_out(): where the kernel folds groups, it reshapes its output into a copy.
    out.copy_(result)
