"""An engine in small: what it writes for a token depends on all tokens before it, and on whose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import vattn

MODULUS = 2**23  # sums of two numbers below are exact in float32


def states(ids: Sequence[int], salt: Any) -> torch.Tensor:
    """A number per token, from the salt and all tokens up to it."""
    seed = 1 + sum(repr(salt).encode())
    places = torch.arange(len(ids)) + seed
    return ((torch.tensor(ids) + 1) * (places * 1_000_003 % 65_537)).cumsum(dim=0) * seed % MODULUS


class Engine:
    """Requests over a prefix cache. Every start and end checks every byte of the row."""

    def __init__(self, cache: vattn.KVCache, **options: Any) -> None:
        self.cache = cache
        self.prefixes = vattn.PrefixCache(cache, **options)

    def start(
        self, ids: Sequence[int], salt: Any = None, *, insert: bool = True
    ) -> tuple[int, int]:
        """A request whose prompt is computed, except for what was found."""
        row, n_cached = self.prefixes.match(ids, salt=salt)
        assert self.cache.row_state(row) == "active"
        assert self.cache.seq_lens[row] == n_cached < len(ids)
        self.extend(row, ids, salt)
        if insert:
            self.prefixes.insert(row, ids, salt=salt)
        return row, n_cached

    def extend(self, row: int, ids: Sequence[int], salt: Any = None) -> None:
        """Computes what the row lacks of the tokens."""
        n_cached = self.cache.seq_lens[row]
        self.cache.step({row: len(ids)})
        for tensor, expected in self._tensors(row, ids, salt):
            tensor[n_cached:] = expected[n_cached:].to(tensor.device)
        self.verify(row, ids, salt)

    def end(self, row: int, ids: Sequence[int], salt: Any = None) -> None:
        self.verify(row, ids, salt)
        self.prefixes.insert(row, ids, salt=salt)
        self.cache.free(row)

    def serve(self, ids: Sequence[int], salt: Any = None) -> tuple[int, int]:
        """A request from start to end."""
        row, n_cached = self.start(ids, salt)
        self.end(row, ids, salt)
        return row, n_cached

    def verify(self, row: int, ids: Sequence[int], salt: Any = None) -> None:
        """Every number of K and V of the row, in all layers, is what these tokens give."""
        for tensor, expected in self._tensors(row, ids, salt):
            same = (tensor.cpu() == expected).flatten(1).all(dim=1)
            assert bool(same.all()), f"row {row} differs from token {int(same.int().argmin())} on"

    def _tensors(self, row: int, ids: Sequence[int], salt: Any):
        state = states(ids, salt).float()[:, None, None]
        for layer in range(self.cache.config.num_layers):
            pair = self.cache.kv(layer, rows=row, max_len=len(ids))
            for which, tensor in enumerate(pair):
                tensor = tensor[0]
                if self.cache.config.order == "HND":
                    tensor = tensor.transpose(0, 1)
                place = torch.arange(tensor[0].numel()).view(tensor.shape[1:])
                offset = (7919 * place + 104_729 * (2 * layer + which)) % MODULUS
                yield tensor, state + offset


def calls(cache: vattn.KVCache) -> dict[str, int]:
    """Driver calls so far, by name."""
    counts: dict[str, int] = {}
    for by_name in cache.stats().driver_calls.values():
        for name, call in by_name.items():
            counts[name] = counts.get(name, 0) + call.count
    return counts


def tokens(n: int, seed: int = 0) -> list[int]:
    """Token ids that begin like those of no other seed."""
    return [1_000 * seed + 7 * i % 991 for i in range(n)]
