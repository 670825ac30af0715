"""What the kernel says about memory, whatever vattn counts; and rows as flat tensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import vattn

_DESCRIPTORS = Path("/proc/self/fd")


def physical_bytes() -> int:
    """Bytes that the kernel holds for vattn's files in memory: each page once, if it was written.

    A page that rows share counts once, one that was mapped but never touched does not count.
    """
    return sum(map(_file_bytes, _DESCRIPTORS.iterdir()))


def _file_bytes(descriptor: Path) -> int:
    try:
        if os.readlink(descriptor).startswith("/memfd:vattn"):
            return descriptor.stat().st_blocks * 512
    except FileNotFoundError:  # closed meanwhile: the one that the folder is read with is, always
        return 0
    return 0


def flat_row(cache: vattn.KVCache, row: int, tokens: int) -> list[torch.Tensor]:
    """View the tokens of a row as one 1-D tensor for each region: the fastest way to copy them.

    pre: order NHD and one layer group; fewer tokens than ``max_seq_len``.
    """
    views: list[torch.Tensor] = []
    n_layers = 1 if cache.regions_per_row == 1 else cache.config.num_layers
    for layer in range(n_layers):
        for tensor in cache.kv(layer):
            assert tensor is not None
            start = tensor.storage_offset() + row * tensor.stride(0)
            views.append(tensor.as_strided((tokens * tensor.stride(1),), (1,), start))
            if cache.regions_per_row == 1:
                return views  # K of the first layer begins a token, the rest follows it
    return views


def touch(views: list[torch.Tensor]) -> float:
    """Read one element of every page of the kernel's, so that all are faulted in."""
    step = os.sysconf("SC_PAGE_SIZE")
    return sum(float(view[:: step // view.element_size()].sum()) for view in views)
