"""The memory of a continuous batch: one KVCache, of which each running request has a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import vattn
from vattn.integrations.transformers.memory import default_memory, head_major, order_for
from vattn.units import dtype_name


@dataclass(frozen=True)
class LayerShape:
    """What one layer of a model keeps of every token."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class RowsOptions:
    """What the rows are made from."""

    layers: Sequence[LayerShape]
    dtype: torch.dtype
    device: torch.device
    max_batch_size: int
    max_seq_len: int
    memory: int | str | None


class TokenPool:
    """Keys or values of one layer, of all rows.

    Parameters
    ----------
    rows : torch.Tensor
        [rows, heads, tokens, head_dim], in any strides.

    Attributes
    ----------
    row_tokens : int
        Tokens from one row to the next, in ``flat``.
    flat : torch.Tensor
        [heads, tokens of all rows, head_dim]: token ``t`` of row ``b`` is ``b * row_tokens + t``.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        n_rows, heads, tokens, dim = rows.shape
        row_stride, head_stride, token_stride, _ = rows.stride()
        self.rows = rows
        self.row_tokens = row_stride // token_stride
        assert self.row_tokens * token_stride == row_stride, "a row is a whole number of tokens"
        # Between two rows lies more than their tokens. Nothing is ever written there.
        total = (n_rows - 1) * self.row_tokens + tokens
        self.flat = rows.as_strided((heads, total, dim), (head_stride, token_stride, 1))


class Rows:
    """Rows as the scheduler wants them, and as attention does."""

    def __init__(self, options: RowsOptions) -> None:
        by_shape: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(options.layers):
            by_shape.setdefault(shape, []).append(index)
        memory = default_memory(options.device) if options.memory is None else options.memory
        config = vattn.CacheConfig(
            num_layers=len(options.layers),
            layer_groups=[
                vattn.LayerGroup(
                    layers=layers,
                    num_kv_heads=shape.num_kv_heads,
                    head_dim=shape.head_dim,
                    v_head_dim=shape.v_head_dim,
                )
                for shape, layers in by_shape.items()
            ],
            dtype=dtype_name(options.dtype),
            max_batch_size=options.max_batch_size,
            max_seq_len=options.max_seq_len,
            device=str(options.device),
            memory=memory,
            order=order_for(options.device),
        )
        self.cache = vattn.init(config)
        with torch.inference_mode(False):
            self.layers = [(TokenPool(k), TokenPool(v)) for k, v in head_major(self.cache)]

    def admit(self, num_tokens: int) -> int:
        """Take a row and back it; see :class:`~.scheduler.RowMemory`."""
        return self._back(self.cache.alloc(seq_len=num_tokens), num_tokens)

    def fork(self, row: int, shared: int, num_tokens: int) -> int:
        """Take a row that begins like another; see :class:`~.scheduler.RowMemory`."""
        (child,) = self.cache.fork(row, shared)
        return self._back(child, num_tokens)

    def grow(self, lengths: Mapping[int, int]) -> None:
        """Back rows; see :class:`~.scheduler.RowMemory`."""
        self.cache.step(lengths)

    def free(self, row: int) -> None:
        """Let go of a row; see :class:`~.scheduler.RowMemory`."""
        self.cache.free(row)

    def _back(self, row: int, num_tokens: int) -> int:
        try:
            self.cache.step({row: num_tokens})
        except vattn.OutOfPagesError:
            self.cache.free(row)
            raise
        return row

    def close(self) -> None:
        """Give all memory back."""
        self.layers.clear()
        self.cache.close()
