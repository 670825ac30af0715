"""The cache that the parts with real memory use: 32 KiB a token, 64 tokens a page."""

from __future__ import annotations

from typing import Any

import vattn

LAYERS, HEADS, HEAD_DIM = 8, 8, 128
DTYPE = "bfloat16"
TOKEN_BYTES = LAYERS * 2 * HEADS * HEAD_DIM * 2
PAGE_TOKENS = 64
LAYOUTS = ("interleaved", "per_layer")
MIB = 2**20


def make_cache(layout: str, *, rows: int, tokens: int, memory: int, **more: Any) -> vattn.KVCache:
    """Make a cache whose pages are 2 MiB (interleaved) or 128 KiB (per_layer): 64 tokens each.

    Nothing is mapped ahead, so that all work is on the clock of whoever asks for it.
    """
    page_bytes = PAGE_TOKENS * TOKEN_BYTES // regions_of(layout)
    config = vattn.CacheConfig(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        max_batch_size=rows,
        max_seq_len=tokens,
        device="cpu",
        layout=layout,
        page_bytes=page_bytes,
        memory=-(-memory // page_bytes) * page_bytes,
        lookahead=0,
        **more,
    )
    return vattn.init(config)


def regions_of(layout: str) -> int:
    """Regions of a row."""
    return 1 if layout == "interleaved" else 2 * LAYERS


def tokens_name(tokens: int) -> str:
    """Write tokens in thousands where they are.

    >>> tokens_name(32768), tokens_name(32767)
    ('32K', '32767')
    """
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
