"""Several requests in one forward, each with the keys and values of its own row.

Their tokens lie behind each other in one sequence, without padding. The cache writes each key and
value to its place in its row, and hands on the rows as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from vattn.integrations.transformers.batching.attention import AttentionOptions, current_attention
from vattn.integrations.transformers.batching.flash import FlashCalls, find_flash_kernel
from vattn.integrations.transformers.batching.rows import Rows, TokenPool
from vattn.integrations.transformers.cpu_attention import attend


@dataclass(frozen=True)
class Segment:
    """Tokens of one request in a forward.

    Parameters
    ----------
    row : int
        Where its keys and values are.
    length : int
        Tokens in the row after the forward.
    count : int
        How many of them are new: the last ones.
    """

    row: int
    length: int
    count: int


class RaggedBatch:
    """The requests of one forward.

    Parameters
    ----------
    segments : sequence of Segment
        In the order of their tokens; those with one new token come first.
    device : torch.device
        Of the model.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.singles = [segment for segment in segments if segment.count == 1]
        self.chunks = list(segments[len(self.singles) :])
        assert all(segment.count > 1 for segment in self.chunks), "single tokens come first"
        self._device = device
        rows: list[int] = []
        positions: list[int] = []
        for segment in segments:
            rows += [segment.row] * segment.count
            positions += range(segment.length - segment.count, segment.length)
        self._rows = torch.tensor(rows, device=device)
        self.positions = torch.tensor(positions, device=device)
        # Of use to all layers, so made only once.
        self._places: dict[int, torch.Tensor] = {}
        self._spans: dict[int | None, list[tuple[int, int, int]]] = {}
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def write(self, pool: TokenPool, states: torch.Tensor) -> None:
        """Put keys or values of the new tokens, [1, heads, tokens, dim], into their rows."""
        places = self._places.get(pool.row_tokens)
        if places is None:
            places = self._rows * pool.row_tokens + self.positions
            self._places[pool.row_tokens] = places
        # Takes a half to a quarter of what pool[rows, :, positions] = states does, on two cores.
        pool.flat.index_copy_(1, places, states[0])

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attend over rows; see :class:`~.attention.Attention`. ``key`` and ``value`` are rows."""
        kernel = find_flash_kernel(query, value, options)
        if kernel is not None:
            return self._flash_calls.attend(kernel, query, key, value, options)
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        if self.singles:
            self._attend_singles(query, key, value, options, output[0, : len(self.singles)])
        start = len(self.singles)
        for segment in self.chunks:
            stop = start + segment.count
            part = self._attend_chunk(segment, query[:, :, start:stop], key, value, options)
            output[:, start:stop] = part.transpose(1, 2)
            start = stop
        return output

    @functools.cached_property
    def _flash_calls(self) -> FlashCalls:
        segments = [(s.row, s.length, s.count) for s in (*self.singles, *self.chunks)]
        return FlashCalls(segments, self._device)

    def _attend_singles(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
        output: torch.Tensor,
    ) -> None:
        """Let each of the first tokens see its row. The loop that small models spend time in."""
        n, heads, kv_heads = len(self.singles), query.shape[1], key.shape[1]
        if options.softcap is None and options.sinks is None:
            # What attend() would do for each: query heads that share a key become its queries.
            shape = (n, 1, kv_heads, heads // kv_heads, query.shape[3])
        else:
            shape = (n, 1, heads, 1, query.shape[3])
        queries = query[0, :, :n].transpose(0, 1).reshape(shape).unbind(0)
        spans = self._spans.get(options.window)
        if spans is None:
            spans = [_visible(segment, options.window) for segment in self.singles]
            self._spans[options.window] = spans
        seen = zip(queries, _views(key, spans), _views(value, spans), strict=True)
        scaling, softcap, sinks = options.scaling, options.softcap, options.sinks
        outputs = [
            attend(q, k, v, scaling=scaling, softcap=softcap, sinks=sinks) for q, k, v in seen
        ]
        output.copy_(torch.cat(outputs).view(output.shape))

    def _attend_chunk(
        self,
        segment: Segment,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        span = _visible(segment, options.window)
        count, length = segment.count, span[2]
        is_causal = length == count and (options.window is None or options.window >= count)
        return attend(
            query,
            _views(key, [span])[0],
            _views(value, [span])[0],
            mask=None if is_causal else self._mask(count, length, options.window),
            is_causal=is_causal,
            scaling=options.scaling,
            softcap=options.softcap,
            sinks=options.sinks,
        )

    def _mask(self, count: int, length: int, window: int | None) -> torch.Tensor:
        """Return a mask: True where one of the last ``count`` tokens sees one of ``length``."""
        which = count, length, window
        if which not in self._masks:
            mask = torch.ones(count, length, dtype=torch.bool, device=self._device)
            mask = mask.tril(length - count)
            if window is not None:
                mask = mask.triu(length - count - window + 1)
            self._masks[which] = mask
        return self._masks[which]


def _visible(segment: Segment, window: int | None) -> tuple[int, int, int]:
    """Return the row, its first token that any of the new ones sees, and how many follow."""
    if window is None or segment.length < window + segment.count:
        return segment.row, 0, segment.length
    length = window - 1 + segment.count
    return segment.row, segment.length - length, length


def _views(rows: torch.Tensor, spans: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    """[1, heads, tokens, dim] for each row, first token and number of tokens."""
    _, heads, _, dim = rows.shape
    row_stride, _, token_stride, _ = strides = rows.stride()
    base = rows.storage_offset()
    # Half the time of slicing.
    return [
        rows.as_strided(
            (1, heads, length, dim), strides, base + row * row_stride + first * token_stride
        )
        for row, first, length in spans
    ]


class RaggedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, as transformers wants them; what is where, the batch knows."""

    is_compileable = False
    is_sliding = False  # windows come with the call of the attention function

    def __init__(self, keys: TokenPool, values: TokenPool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pools = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the memory is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens into their rows, and return all rows.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            [1, num_kv_heads, new tokens of all requests, dim]

        Returns
        -------
        keys, values : torch.Tensor
            [rows, num_kv_heads, max_seq_len, dim], views of the cache. Most of it has no memory.
        """
        batch = current_attention()
        assert isinstance(batch, RaggedBatch)
        keys, values = self._pools
        batch.write(keys, key_states)
        batch.write(values, value_states)
        return keys.rows, values.rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of a mask that nobody makes."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: there is not one length. Models need it only when they get no position_ids."""
        return 0

    def get_max_length(self) -> int:
        """Tokens that fit into a row."""
        return self._pools[0].rows.shape[2]

    def get_max_cache_shape(self) -> int:
        """``get_max_length`` under the name it had until transformers 5.15."""
        return self.get_max_length()


class RaggedCache(DynamicCache):
    """The rows as a cache of transformers, in which each token has a place of its own."""

    def __init__(self, config: Any, rows: Rows) -> None:
        super().__init__(config=config)
        self.layers = [RaggedLayer(keys, values) for keys, values in rows.layers]
