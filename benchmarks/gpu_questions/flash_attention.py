"""Does flash-attn take vattn's rows by index, read them and append to them?"""

from __future__ import annotations

import torch

import vattn
from benchmarks.gpu_questions.answers import Evidence
from benchmarks.gpu_questions.torch_attention import NEAR
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

CHOSEN = (3, 0, 2)  # rows of the batch, in an order of its own
QUERY_HEADS = 32


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def _ask_layout(cache: vattn.KVCache) -> dict[str, float | bool]:
    from flash_attn import flash_attn_with_kvcache

    copies = fill_rows(cache, 0)
    k, v = cache.kv(0)
    q = _random(len(CHOSEN), 1, QUERY_HEADS, DIM)
    rows = _int32(list(CHOSEN))
    lens = _int32([LENS[row] for row in CHOSEN])
    found: dict[str, float | bool] = {}

    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, cache_batch_idx=rows)
    plain = torch.stack([attention(q[i, 0], *copies[row]) for i, row in enumerate(CHOSEN)])
    found["read"] = worst(out[:, 0], plain)

    cache.step({row: LENS[row] + 1 for row in CHOSEN})
    new_k, new_v = (_random(len(CHOSEN), 1, HEADS, DIM) for _ in range(2))
    out = flash_attn_with_kvcache(
        q, k, v, k=new_k, v=new_v, cache_seqlens=lens, cache_batch_idx=rows
    )
    torch.cuda.synchronize()
    found["appended in place"] = all(
        torch.equal(cached[row, LENS[row]], new[i, 0])
        and torch.equal(cached[row, : LENS[row]], copies[row][which])
        for which, (cached, new) in enumerate(((k, new_k), (v, new_v)))
        for i, row in enumerate(CHOSEN)
    )
    longer = [
        [torch.cat([old, new[i]]) for old, new in zip(copies[row], (new_k, new_v), strict=True)]
        for i, row in enumerate(CHOSEN)
    ]
    plain = torch.stack([attention(q[i, 0], *pair) for i, pair in enumerate(longer)])
    found["append and read"] = worst(out[:, 0], plain)
    return found


def ask(evidence: Evidence) -> tuple[bool | None, str]:
    """Read, then append and read, in both layouts."""
    import flash_attn

    evidence.note(flash_attn=flash_attn.__version__, at=flash_attn.__file__)
    wrong = []
    for layout in ("interleaved", "per_layer"):
        with make_cache(layout=layout) as cache:
            found = _ask_layout(cache)
        evidence.note(**{layout: found})
        for name, value in found.items():
            right = value if isinstance(value, bool) else value <= NEAR
            wrong += [] if right else [f"{layout} {name}: {value}"]
    return not wrong, "; ".join(wrong) or f"flash-attn {flash_attn.__version__}: read and append"
