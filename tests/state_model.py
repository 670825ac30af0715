"""What every byte of every row should be, kept beside a cache.

A row of the model is a list of token ids, such as a prompt is. What is written for a token depends
on its id and nothing else, so rows that share tokens show the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import vattn

N_CONTENTS = 1021  # different tokens; a prime, so that they repeat at other places of a page
UNKNOWN = -1  # id of a token that was never written
DTYPES = {"uint8": torch.uint8, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Layers of a cache. All tokens of all layers may have other lengths in bytes."""

    groups: tuple[vattn.LayerGroup, ...]
    dtype: str
    pages: int  # that the longest row has in its largest region

    @property
    def n_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def windows(self) -> list[tuple[int | None, int]]:
        """Window and sink of each group."""
        return [(group.window, group.sink) for group in self.groups]

    @property
    def has_window(self) -> bool:
        return any(window is not None for window, _ in self.windows)

    def region_token_bytes(self, layout: str, order: str) -> list[int]:
        """Bytes of a token in each region, where no layer has a window."""
        item = 1 if self.dtype == "uint8" else 4
        regions = []
        for group in self.groups:
            heads = group.num_kv_heads
            stripes = [d * item for d in head_dims(group) if d != 0] * len(group.layers)
            if layout == "interleaved":
                stripes = [sum(stripes)]
            regions += stripes * heads if order == "HND" else [heads * b for b in stripes]
        return [sum(regions)] if (layout, order) == ("interleaved", "NHD") else regions


def head_dims(group: vattn.LayerGroup) -> tuple[int, int]:
    """Head dim of K and of V."""
    return group.head_dim, group.head_dim if group.v_head_dim is None else group.v_head_dim


def group(layers: Sequence[int], heads: int, dim: int, **options: Any) -> vattn.LayerGroup:
    return vattn.LayerGroup(layers=layers, num_kv_heads=heads, head_dim=dim, **options)


def shapes(*, host: bool) -> list[Shape]:
    """Tokens that straddle pages, heads of floats, layers that differ, windows, a mixture."""
    n = 1 if host else 512  # pages of 4 KiB or 2 MiB: the same tokens in a page, or one more
    pages = 8 if host else 2
    odd = group(range(2), 1, 3 * n)
    wide = group(range(2), 2, 8 * n)
    differing = (group([0, 2], 1, 5 * n, v_head_dim=3 * n), group([1], 2, 7 * n, v_head_dim=0))
    window = group(range(2), 2, 5 * n, window=130, sink=3)
    mixed = (
        group([0], 1, 5 * n, window=500),
        group([1], 1, 6 * n),
        group([2], 1, 7 * n, window=9, sink=2),
    )
    return [
        Shape(groups=(odd,), dtype="uint8", pages=pages),
        Shape(groups=(wide,), dtype="float32" if host else "uint8", pages=pages),
        Shape(groups=differing, dtype="uint8", pages=pages),
        Shape(groups=(window,), dtype="uint8", pages=pages),
        Shape(groups=mixed, dtype="uint8", pages=pages),
    ]


def common(a: list[int], b: list[int]) -> int:
    """First tokens that both have."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@dataclass(frozen=True)
class Stripe:
    """K or V of one layer: where it is in the contents of a token."""

    layer: int
    which: int
    group: int
    heads: int
    dim: int
    start: int

    def of(self, contents: torch.Tensor) -> torch.Tensor:
        """[tokens, all] as [tokens, heads, dim]."""
        part = contents[:, self.start : self.start + self.heads * self.dim]
        return part.unflatten(1, (self.heads, self.dim))


@functools.lru_cache(maxsize=32)
def contents_by_id(n_items: int, dtype: str) -> torch.Tensor:
    """[id, item]: bytes that are no other token's, none of them zero."""
    generator = torch.Generator().manual_seed(n_items)
    top = 256 if dtype == "uint8" else 2**24
    numbers = torch.randint(1, top, (N_CONTENTS, n_items), generator=generator)
    return numbers.to(DTYPES[dtype])


@dataclass
class Row:
    ids: torch.Tensor  # [group, token], UNKNOWN where a window had moved on before it was written
    longest: int  # the most tokens since the row's request began
    written: int  # the most since it was empty

    @property
    def length(self) -> int:
        return self.ids.shape[1]


class Model:
    """A cache, and what is in its active rows."""

    def __init__(self, cache: vattn.KVCache, shape: Shape) -> None:
        self.cache = cache
        self.shape = shape
        self.rows: dict[int, Row] = {}
        self.n_ids = 0
        self.nhd = cache.config.order == "NHD"
        self.stripes = []
        start = 0
        for index, g in enumerate(shape.groups):
            for layer in g.layers:
                for which, dim in enumerate(head_dims(g)):
                    if dim != 0:
                        self.stripes.append(Stripe(layer, which, index, g.num_kv_heads, dim, start))
                        start += g.num_kv_heads * dim
        self.contents = contents_by_id(start, shape.dtype)

    # What operations do.

    def new_ids(self, n: int) -> torch.Tensor:
        ids = torch.arange(self.n_ids, self.n_ids + n)
        self.n_ids += n
        return ids

    def start(self, row: int, ids: torch.Tensor, written: int = 0) -> None:
        """A request begins in the row, with tokens of others or none."""
        assert row not in self.rows
        n = ids.shape[1]
        self.rows[row] = Row(ids, n, max(written, n) if n else 0)

    def no_ids(self) -> torch.Tensor:
        return torch.empty(len(self.shape.groups), 0, dtype=torch.int64)

    def set_length(self, row: int, n: int, ids: torch.Tensor | None = None) -> None:
        """The row has n tokens. New ones are written where they can be, those of `ids` if given."""
        state = self.rows[row]
        old = state.length
        state.longest = max(state.longest, n)
        state.written = max(state.written, n) if n else 0
        if n <= old:
            state.ids = state.ids[:, :n]
            return
        new = self.new_ids(n - old) if ids is None else ids[old:n]
        new = new.repeat(len(self.shape.groups), 1)
        for ids, (window, sink) in zip(new, self.shape.windows, strict=True):
            if window is not None:
                lost = slice(max(0, sink - old), max(0, n - window - old))
                ids[lost] = UNKNOWN
        state.ids = torch.cat([state.ids, new], dim=1)
        for stripe in self.stripes:
            ids = state.ids[stripe.group]
            for first, view in self.views(stripe, row):
                skip = max(0, old - first)
                if skip < len(view):
                    known = ids[first + skip : first + len(view)]
                    view[skip:] = stripe.of(self.contents[known % N_CONTENTS]).to(view.device)

    def fork(self, row: int, n: int, children: list[int]) -> None:
        for child in children:
            self.start(child, self.rows[row].ids[:, :n], self.rows[row].written)

    def reorder(self, rows: list[int], parents: list[int]) -> None:
        before = dict(self.rows)
        for row, parent in zip(rows, parents, strict=True):
            if row != parent:
                del self.rows[row]
                self.start(row, before[parent].ids, before[parent].written)

    def compact(self, row: int, keep: list[int], start: int) -> None:
        state = self.rows[row]
        state.ids = state.ids[:, [*range(start), *keep]]

    def can_be_cut_to(self, row: int, n: int) -> bool:
        """Whether the windows are there for certain; whole pages may hold more of them."""
        state = self.rows[row]
        return n in (0, state.length) or all(
            window is None or state.written <= window + sink for window, sink in self.shape.windows
        )

    # What the cache shows.

    def views(self, stripe: Stripe, row: int) -> Iterator[tuple[int, torch.Tensor]]:
        """First token and [token, head, dim] of what is readable of a row."""
        n = self.rows[row].length
        window, sink = self.shape.windows[stripe.group]
        if window is None:
            parts = [(0, self.cache.kv(stripe.layer, rows=row, max_len=n))]
        else:
            parts = [
                (0, self.cache.kv_sink(stripe.layer, rows=row)),
                (max(sink, n - window), self.cache.kv_window(stripe.layer, rows=row)),
            ]
        for first, pair in parts:
            tensor = pair[stripe.which][0]
            yield first, tensor if self.nhd else tensor.transpose(0, 1)

    def check(self) -> None:
        """Every byte of every token of every active row."""
        lens = [0] * self.cache.config.max_batch_size
        for row, state in self.rows.items():
            lens[row] = state.length
        assert self.cache.seq_lens == lens
        for row, state in self.rows.items():
            expected = [self.contents[ids % N_CONTENTS] for ids in state.ids]
            for stripe in self.stripes:
                n_seen = 0
                for first, view in self.views(stripe, row):
                    end = first + len(view)
                    n_seen += len(view)
                    theirs = stripe.of(expected[stripe.group][first:end]).to(view.device)
                    if torch.equal(view, theirs):
                        continue
                    differs = (view != theirs).flatten(1).any(dim=1).cpu()
                    differs &= state.ids[stripe.group, first:end] != UNKNOWN
                    wrong = (first + differs.nonzero()[:, 0]).tolist()
                    assert not wrong, f"row {row}, {stripe}: tokens {wrong[:8]} of {len(wrong)}"
                window, sink = self.shape.windows[stripe.group]
                most = state.length if window is None else min(state.length, window + sink)
                assert n_seen == most

    def check_scrubbed(self) -> None:
        """What is mapped beyond the tokens that a request ever had is zero."""
        for row, state in self.rows.items():
            mapped = min(self.cache.mapped_tokens(row), self.cache.config.max_seq_len)
            for stripe in self.stripes:
                if self.shape.windows[stripe.group][0] is not None:
                    continue
                tensor = self.cache.kv(stripe.layer, rows=row, max_len=mapped)[stripe.which][0]
                rest = (tensor if self.nhd else tensor.transpose(0, 1))[state.longest :]
                assert not rest.any(), f"row {row}, {stripe}: leftovers from {state.longest} on"

    def most_pages(self, lens: list[int]) -> int:
        """Pages of rows that share nothing, without windows."""
        config = self.cache.config
        regions = self.shape.region_token_bytes(config.layout_name, config.order)
        assert len(regions) == self.cache.regions_per_row
        return sum(-(-n * b // self.cache.page_bytes) for n in lens for b in regions)
