"""Which rows have tokens in the same memory, and what may be written to those. No driver here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Compared as integers: a NaN is like itself, and zeros of different sign are not alike.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}

States = Sequence[torch.Tensor]  # keys and values, each [batch, heads, tokens, dim]


class Common:
    """What the rows of a storage have in common.

    Attributes
    ----------
    tokens : int
        From this token on, each row has memory of its own.
    families : list of int
        Rows with the same number here have the same tokens before that one.
    """

    def __init__(self) -> None:
        self.forget(0)

    def forget(self, n_rows: int) -> None:
        """Take note that each row has all of its memory for itself."""
        self.tokens = 0
        self.families = list(range(n_rows))
        # Rows that share with the row before, if no others do.
        self._repeats: list[int] = []

    def begin(self, n_rows: int, repeats: list[int], tokens: int) -> None:
        """Take note that the rows ``repeats`` have the first tokens of the row before."""
        self.forget(n_rows)
        for row in repeats:
            self.families[row] = self.families[row - 1]
        self.tokens, self._repeats = tokens, repeats

    def reordered(self, rows: list[int], tokens: int) -> None:
        """Take note that row ``b`` has the tokens that row ``rows[b]`` had, so many."""
        self.tokens, self.families, self._repeats = tokens, list(rows), []

    def copied(self, n_rows: int) -> None:
        """Take note that there are so many rows, which have copied what is not in common."""
        if self.tokens:
            assert n_rows <= len(self.families), "new rows have nothing in common yet"
            del self.families[n_rows:]
        else:
            self.forget(n_rows)

    def cut(self, tokens: int) -> None:
        """Take note that rows have no more tokens than these. What comes next is their own."""
        self.tokens = min(self.tokens, tokens)

    def with_parents(self, rows: list[int]) -> int | None:
        """Tokens that each row has in common with the row ``rows[b]`` that it shall become.

        None if that is not known for all of them, and memory that they share is in the way.
        """
        if self.tokens == 0:
            return 0
        known = len(rows) <= len(self.families)
        if known and all(self.families[b] == self.families[p] for b, p in enumerate(rows)):
            return self.tokens
        return None

    def takes(self, start: int, states: States | None) -> bool:
        """Whether these may be written at ``start``: rows that share get the same, if any."""
        if start >= self.tokens:
            return True
        if states is None or not self._repeats:
            return False
        return all(_is_like_row_before(states, row) for row in self._repeats)


def repeated_rows(states: States) -> list[int]:
    """Rows that are, bit for bit, what the row before them is."""
    return [row for row in range(1, len(states[0])) if _is_like_row_before(states, row)]


def _is_like_row_before(states: States, row: int) -> bool:
    for tensor in states:
        bits = tensor.view(_INTEGERS[tensor.element_size()])
        if not torch.equal(bits[row], bits[row - 1]):
            return False
    return True
