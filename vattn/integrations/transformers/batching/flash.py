"""Attention over rows by FlashAttention's kernel, on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vattn.integrations.transformers.batching.attention import AttentionOptions
from vattn.integrations.transformers.cuda_attention import flash_attn_with_kvcache, has_flash

FlashKernel = Callable[..., torch.Tensor]

_MAX_HEAD_DIM = 256


def find_flash_kernel(
    query: torch.Tensor, value: torch.Tensor, options: AttentionOptions
) -> FlashKernel | None:
    """Return flash_attn_with_kvcache if it is there and can do this."""
    if options.sinks is not None or not has_flash(query.device, query.dtype):
        return None
    if query.shape[3] != value.shape[3] or query.shape[3] > _MAX_HEAD_DIM:
        return None
    return flash_attn_with_kvcache()


class FlashCalls:
    """Calls of the kernel for one forward: one for all single tokens, one for each longer segment.

    Parameters
    ----------
    segments : sequence of (int, int, int)
        Row, tokens in it, and how many of them are new; those with one new token come first.
    device : torch.device
        Of the model.
    """

    def __init__(self, segments: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        rows = torch.tensor([row for row, _, _ in segments], dtype=torch.int32, device=device)
        lengths = torch.tensor([n for _, n, _ in segments], dtype=torch.int32, device=device)
        n_singles = sum(count == 1 for _, _, count in segments)
        # First token, last one, tokens of each segment, and the kernel's own arguments.
        self._calls = []
        if n_singles:
            self._calls.append((0, n_singles, 1, rows[:n_singles], lengths[:n_singles]))
        start = n_singles
        for index in range(n_singles, len(segments)):
            count, only = segments[index][2], slice(index, index + 1)
            self._calls.append((start, start + count, count, rows[only], lengths[only]))
            start += count

    def attend(
        self,
        kernel: FlashKernel,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attend over rows.

        Parameters
        ----------
        kernel : callable
            ``flash_attn_with_kvcache``.
        query : torch.Tensor
            [1, heads, new tokens of all segments, head_dim]
        key, value : torch.Tensor
            [rows, num_kv_heads, tokens, head_dim]
        options : AttentionOptions
            Without sinks.

        Returns
        -------
        torch.Tensor
            [1, new tokens of all segments, heads, head_dim]
        """
        fixed: dict[str, Any] = {
            "softmax_scale": options.scaling,
            "causal": True,  # the last query sees all keys, the one before it all but one
            "window_size": (-1, -1) if options.window is None else (options.window - 1, 0),
            "softcap": options.softcap or 0.0,
        }
        tokens = query[0].transpose(0, 1)
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        parts = []
        for start, stop, count, rows, lengths in self._calls:
            batch = tokens[start:stop].view(-1, count, *tokens.shape[1:])
            part = kernel(batch, keys, values, cache_seqlens=lengths, cache_batch_idx=rows, **fixed)
            parts.append(part.flatten(0, 1))
        return torch.cat(parts)[None]
