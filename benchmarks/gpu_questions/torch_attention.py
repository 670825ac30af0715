"""Do torch's own kernels read rows that are mapped only in part?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import vattn
from benchmarks.gpu_questions.answers import Evidence
from benchmarks.gpu_questions.work import (
    DEVICE,
    DIM,
    HEADS,
    LENS,
    attention,
    fill_rows,
    make_cache,
    worst,
)

NEAR = 2e-2  # bfloat16 against float32, of numbers around 1
GROUP = 4  # query heads to a KV head, as in Llama-3-8B


def _sdpa(cache: vattn.KVCache, q: torch.Tensor) -> torch.Tensor:
    """SDPA's flash kernel, row by row, over the live part."""
    rows = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for row, n in enumerate(LENS):
            k, v = cache.kv(0, rows=row, max_len=n)
            args = (t.transpose(1, 2) for t in (q[row][None, None], k, v))
            out = scaled_dot_product_attention(*args, enable_gqa=q.shape[1] != HEADS)
            rows.append(out[0, :, 0])
    return torch.stack(rows)


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def gaps(stride: int) -> tuple[list[int], list[int]]:
    """Ends of queries and of keys: each row, then the gap to the next, which no query reads."""
    ends_q, ends_k = [0], [0]
    for row, n in enumerate(LENS):
        if row > 0:
            ends_q.append(row)
            ends_k.append(row * stride)
        ends_q.append(row + 1)
        ends_k.append(row * stride + n)
    return ends_q, ends_k


def _varlen(cache: vattn.KVCache, q: torch.Tensor, **options: Any) -> torch.Tensor:
    """varlen_attn over the flat view, with the gaps as sequences without queries."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = cache.kv_flat(0)
    ends_q, ends_k = (_int32(ends) for ends in gaps(cache.row_stride_tokens))
    return varlen_attn(q, k, v, ends_q, ends_k, 1, max(LENS), **options)


def _varlen_seqused(cache: vattn.KVCache, q: torch.Tensor, **options: Any) -> torch.Tensor:
    """varlen_attn with a sequence for each row, and seqused_k to say how much of it is live."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = cache.kv_flat(0)
    rows = range(len(LENS) + 1)
    starts = _int32([min(row * cache.row_stride_tokens, k.shape[0]) for row in rows])
    used = _int32(list(LENS))
    ends_q = _int32(list(rows))
    return varlen_attn(q, k, v, ends_q, starts, 1, max(LENS), seqused_k=used, **options)


def _kernels() -> dict[str, tuple[Callable[..., torch.Tensor], int]]:
    """Name, call, query heads."""
    kernels: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
        "sdpa flash": (_sdpa, HEADS),
        "sdpa flash gqa": (_sdpa, HEADS * GROUP),
    }
    takes = varlen_parameters()
    if not takes:
        return kernels
    kernels["varlen"] = (_varlen, HEADS)
    if "enable_gqa" in takes:
        kernels["varlen gqa"] = (partial(_varlen, enable_gqa=True), HEADS * GROUP)
    if "seqused_k" in takes:
        kernels["varlen seqused_k"] = (_varlen_seqused, HEADS)
    return kernels


def varlen_parameters() -> list[str]:
    """Parameters of this torch's varlen_attn; none if it has none."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return []
    return list(inspect.signature(varlen.varlen_attn).parameters)


def ask(evidence: Evidence) -> tuple[bool | None, str]:
    """Compare each kernel over each layout with attention in float32 over ordinary copies."""
    takes = varlen_parameters()
    evidence.note(torch=torch.__version__, varlen_attn_parameters=takes)
    evidence.note(varlen_takes_seqused_k="seqused_k" in takes)
    differences: dict[str, float | str] = {}
    for layout in ("interleaved", "per_layer"):
        cache = make_cache(layout=layout)
        copies = fill_rows(cache, 0)
        for name, (kernel, heads) in _kernels().items():
            q = torch.randn(len(LENS), heads, DIM, device=DEVICE).bfloat16()
            expected = torch.stack([attention(q[row], *pair) for row, pair in enumerate(copies)])
            evidence.note(now=f"{layout} {name}")
            try:
                difference: float | str = worst(kernel(cache, q), expected)
                torch.cuda.synchronize()
            except (RuntimeError, TypeError, ValueError) as error:
                difference = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            differences[f"{layout} {name}"] = difference
            evidence.note(worst_difference=differences)
        cache.close()
    return judge(differences)


def judge(differences: dict[str, float | str]) -> tuple[bool | None, str]:
    """Say which kernels came near the reference."""
    near = [name for name, d in differences.items() if isinstance(d, float) and d <= NEAR]
    rest = [f"{name}: {d}" for name, d in differences.items() if name not in near]
    said = f"{len(near)} of {len(differences)} right"
    return not rest, f"{said}; {'; '.join(rest)}" if rest else f"{said}: {', '.join(near)}"
