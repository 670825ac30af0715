"""Batches over contiguous rows, what attention over them is, and a stand-in for torch's kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROW_TOKENS = 448
SPARE_ROWS = 2  # of nobody, before and between those of the requests

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Shape:
    """Heads of one layer."""

    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    head_size_v: int = 32
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return 0.7 * self.head_size**-0.5


@dataclass(frozen=True)
class Batch:
    """Requests whose rows lie in any order in a buffer that is NaN elsewhere."""

    shape: Shape
    query: torch.Tensor
    flat: torch.Tensor
    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    row_starts: torch.Tensor

    @property
    def max_query_len(self) -> int:
        return int(self.query_starts.diff().max())

    @property
    def max_seq_len(self) -> int:
        return int(self.seq_lens.max())

    def empty_output(self) -> torch.Tensor:
        size = (*self.query.shape[:2], self.shape.head_size_v)
        return torch.full(size, torch.nan, dtype=self.shape.dtype)


def make_batch(requests: list[tuple[int, int]], shape: Shape = Shape()) -> Batch:
    """``requests`` are pairs of queries and tokens; (0, 0) is padding."""
    torch.manual_seed(len(requests))
    rows = torch.randperm(len(requests) + SPARE_ROWS)[: len(requests)].tolist()
    tokens = (len(requests) + SPARE_ROWS) * ROW_TOKENS
    elements = shape.head_size + shape.head_size_v
    flat = torch.full((tokens, shape.kv_heads, elements), torch.nan, dtype=shape.dtype)
    for row, (_, seq_len) in zip(rows, requests, strict=True):
        used = flat[row * ROW_TOKENS : row * ROW_TOKENS + seq_len]
        used.copy_(torch.randn(used.shape))
    queries = [n for n, _ in requests]
    # Queries come as a part of one matrix with the new keys, so tokens are further apart.
    packed = torch.randn(sum(queries), shape.heads + 2, shape.head_size).to(shape.dtype)
    return Batch(
        shape=shape,
        query=packed[:, : shape.heads],
        flat=flat,
        query_starts=torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seq_lens=torch.tensor([n for _, n in requests], dtype=torch.int32),
        # One more than there are rows; nothing may read it.
        row_starts=torch.tensor([*(row * ROW_TOKENS for row in rows), -1], dtype=torch.int32),
    )


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, causal: bool
) -> torch.Tensor:
    """Attend in float64. ``[tokens, heads, ...]``; the queries are the last of the tokens."""
    groups = query.shape[1] // key.shape[1]
    q = query.double().transpose(0, 1)
    k, v = (t.double().repeat_interleave(groups, dim=1).transpose(0, 1) for t in (key, value))
    scores = scale * q @ k.transpose(1, 2)
    if causal:
        queries, tokens = query.shape[0], key.shape[0]
        position = torch.arange(tokens - queries, tokens)[:, None]
        scores = scores.masked_fill(torch.arange(tokens) > position, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def expected(batch: Batch) -> torch.Tensor:
    """What the requests of a batch should get, float64."""
    head_size, results = batch.shape.head_size, []
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        first = int(batch.row_starts[request])
        row = batch.flat[first : first + seq_len]
        own = slice(int(batch.query_starts[request]), int(batch.query_starts[request + 1]))
        results.append(
            attention(
                batch.query[own],
                row[..., :head_size],
                row[..., head_size:],
                scale=batch.shape.scale,
                causal=True,
            )
        )
    return torch.cat(results)


def close(result: torch.Tensor, right: torch.Tensor) -> None:
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.double(), right, atol=tolerance, rtol=tolerance)


def varlen_stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn, and what its kernel checks and takes for granted."""
    requests = seqused_k.shape[0]
    for tensor, length in (
        (cu_seq_q, requests + 1),
        (cu_seq_k, requests + 1),
        (seqused_k, requests),
    ):
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.int32, (length,))
        assert tensor.is_contiguous()
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert enable_gqa == (query.shape[1] != key.shape[1])
    if max_q == 1 and enable_gqa and window_size == (-1, -1):
        assert query.shape[0] == requests  # it folds groups, with one query for each request
    output = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
    for request, seq_len in enumerate(seqused_k.tolist()):
        begin, end = int(cu_seq_q[request]), int(cu_seq_q[request + 1])
        assert end - begin <= max_q
        assert seq_len <= max_k
        row = slice(int(cu_seq_k[request]), int(cu_seq_k[request]) + seq_len)
        causal = window_size == (-1, 0)
        assert causal or window_size == (-1, -1)
        output[begin:end] = attention(
            query[begin:end], key[row], value[row], scale=scale, causal=causal
        )
    return output
