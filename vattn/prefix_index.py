"""Which row holds which tokens: the index of the prefix cache. Pure: it calls no driver."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ID_BYTES = 8
_INT64 = "q"
_SIGN_BYTE = ID_BYTES - 1 if sys.byteorder == "little" else 0
_INTEGER_FORMATS = frozenset("bBhHiIlLqQ")
_FORMS = "a list, a tuple, or a numpy array or torch CPU tensor of integers"

# Rows looked at that share equally many blocks with a request: they differ by less than a block.
MAX_ROWS_PER_LEVEL = 32


def pack_ids(token_ids: Any) -> bytes:
    """Token ids as native int64, in bytes, which compare and hash at the speed of memory.

    Raises
    ------
    TypeError, ValueError
        Not integers of 0 to 2**63 - 1 in one dimension.

    Examples
    --------
    >>> pack_ids([7, 1]) == pack_ids((7, 1))
    True
    >>> pack_ids([7, -1])
    Traceback (most recent call last):
    ValueError: token_ids[1] is -1, expected at least 0; leave padding out
    """
    if isinstance(token_ids, list | tuple):
        packed = _pack_sequence(token_ids)
    else:
        packed = _pack_buffer(token_ids)
    if not packed[_SIGN_BYTE::ID_BYTES].isascii():  # a negative number has the highest bit set
        ids = unpack_ids(packed)
        at = next(i for i, token in enumerate(ids) if token < 0)
        raise ValueError(f"token_ids[{at}] is {ids[at]}, expected at least 0; leave padding out")
    return packed


def unpack_ids(packed: bytes) -> Sequence[int]:
    """Undo ``pack_ids``."""
    return array(_INT64, packed)


def _pack_sequence(ids: Sequence[Any]) -> bytes:
    try:
        return array(_INT64, ids).tobytes()
    except (TypeError, OverflowError):
        for at, token in enumerate(ids):
            _check_id(at, token)
        raise


def _check_id(at: int, token: Any) -> None:
    try:
        array(_INT64, [token])
    except TypeError:
        raise TypeError(f"token_ids[{at}] is {token!r}, expected an int") from None
    except OverflowError:
        raise ValueError(f"token_ids[{at}] is {token}, expected 0 to 2**63 - 1") from None


def _pack_buffer(ids: Any) -> bytes:
    if hasattr(ids, "numpy"):
        # torch has no buffer protocol; this copies nothing, and refuses a CUDA tensor with a
        # remedy.
        ids = ids.numpy()
    try:
        view = memoryview(ids)
    except TypeError:
        raise TypeError(f"token_ids is a {type(ids).__name__}, expected {_FORMS}") from None
    if view.ndim != 1:
        raise ValueError(f"token_ids has {view.ndim} dimensions, expected shape (tokens,)")
    if view.format not in _INTEGER_FORMATS:
        raise TypeError(f"token_ids has elements of type {view.format!r}, expected {_FORMS}")
    if view.itemsize == ID_BYTES and view.format.islower():
        return view.tobytes()
    return _pack_sequence(view.tolist())


def pack_salt(salt: Any) -> bytes:
    """Salt in bytes, different for what is different.

    Examples
    --------
    >>> len({pack_salt(salt) for salt in (None, "", b"", 0, "0")})
    5
    """
    if salt is None:
        return b""
    if isinstance(salt, str):
        return b"s" + salt.encode("utf-8", "surrogatepass")
    if isinstance(salt, bytes):
        return b"b" + salt
    if isinstance(salt, int):
        return b"i" + str(int(salt)).encode()
    # Not its value: it may be somebody's secret.
    raise TypeError(f"salt is a {type(salt).__name__}, expected None, a str, bytes or an int")


def common_ids(a: bytes, b: bytes, *, limit: int) -> int:
    """How many first ids of two packed sequences agree, at most ``limit``, which both have.

    Examples
    --------
    >>> common_ids(pack_ids([1, 2, 3, 4]), pack_ids([1, 2, 9, 4]), limit=4)
    2
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        part = slice(low * ID_BYTES, middle * ID_BYTES)
        if a[part] == b[part]:
            low = middle
        else:
            high = middle - 1
    return low


def digest(before: bytes, block: bytes) -> bytes:
    """Hash of a block and of all before it."""
    return hashlib.blake2b(before + block, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens and whose they are."""

    ids: bytes
    salt: bytes

    def __len__(self) -> int:
        return len(self.ids) // ID_BYTES


@dataclass(frozen=True, slots=True)
class Entry(Prompt):
    """The tokens that a row holds."""

    life: int  # of the row's content, by which the core tells it from what came after it
    digests: tuple[bytes, ...]  # of the whole blocks


class Candidate(NamedTuple):
    """A row that has the first ``n_tokens`` tokens of a prompt."""

    row: int
    life: int
    n_tokens: int
    intact: int  # tokens that the row has in all
    rank: int


class PrefixIndex:
    """Rows by the hashes of their blocks. A hash finds a row; its ids decide. Not thread-safe.

    Parameters
    ----------
    block_tokens : int
        Tokens of a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.entries: dict[int, Entry] = {}
        # The rows that have a block, oldest first (a dict, because a set has no order).
        self._rows_with: dict[bytes, dict[int, None]] = {}

    @property
    def n_blocks(self) -> int:
        """Different blocks."""
        return len(self._rows_with)

    def clear(self) -> None:
        """Forget all rows."""
        self.entries.clear()
        self._rows_with.clear()

    def digests(self, prompt: Prompt, row: int) -> tuple[bytes, ...]:
        """Hashes of all whole blocks of a prompt; those that agree with the row's are its own."""
        known: tuple[bytes, ...] = ()
        old = self.entries.get(row)
        if old is not None and old.salt == prompt.salt:
            agreed = common_ids(old.ids, prompt.ids, limit=min(len(old), len(prompt)))
            known = old.digests[: agreed // self.block_tokens]
        return (*known, *self._chain(prompt, known))

    def known_digests(self, prompt: Prompt) -> list[bytes]:
        """Hashes of the first blocks of a prompt, as long as some row has them."""
        known: list[bytes] = []
        for block in self._chain(prompt, ()):
            if block not in self._rows_with:
                break
            known.append(block)
        return known

    def put(self, row: int, entry: Entry | None) -> None:
        """Make ``entry`` what is known of a row. None: nothing."""
        old = self.entries.pop(row, None)
        gone = old.digests if old is not None else ()
        come = entry.digests if entry is not None else ()
        same = 0
        while same < min(len(gone), len(come)) and gone[same] == come[same]:
            same += 1
        for block in gone[same:]:
            rows = self._rows_with.get(block, {})
            rows.pop(row, None)
            if not rows:
                self._rows_with.pop(block, None)
        for block in come[same:]:
            self._rows_with.setdefault(block, {})[row] = None
        if entry is not None:
            self.entries[row] = entry

    def best(
        self,
        prompt: Prompt,
        digests: Sequence[bytes],
        kept: Sequence[tuple[int, int]],
        is_idle: Callable[[int], bool],
        skip: Collection[int],
    ) -> Candidate | None:
        """Find the row that has most of a prompt; forget what rows have lost.

        Parameters
        ----------
        prompt : Prompt
            At least one token; the last is never looked for.
        digests : sequence of bytes
            Its ``known_digests``.
        kept : sequence of (int, int)
            Life of each row's content and how many of its tokens are intact.
        is_idle : callable
            Whether a row is idle, so that a request that continues all of it can take it over.
        skip : collection of int
            Rows that are out of the question.
        """
        seen = set(skip)
        best: Candidate | None = None
        for level in range(len(digests), 0, -1):
            # What comes now shares less than level + 1 blocks, and its rank is at most one more.
            if best is not None and best.rank >= (level + 2) * self.block_tokens:
                break
            for row in self._rows_to_look_at(digests[level - 1], seen):
                candidate = self._candidate(row, prompt, kept[row], is_idle)
                if candidate is not None and (best is None or candidate.rank > best.rank):
                    best = candidate
        return best

    def _rows_to_look_at(self, block: bytes, seen: set[int]) -> list[int]:
        rows = [row for row in reversed(self._rows_with.get(block, {})) if row not in seen]
        del rows[MAX_ROWS_PER_LEVEL:]
        seen.update(rows)
        return rows

    def _candidate(
        self, row: int, prompt: Prompt, kept: tuple[int, int], is_idle: Callable[[int], bool]
    ) -> Candidate | None:
        entry = self._refresh(row, *kept)
        if entry is None or entry.salt != prompt.salt:
            return None
        n = common_ids(entry.ids, prompt.ids, limit=min(len(entry), len(prompt) - 1))
        if n == 0:
            return None
        # To take a row over costs and loses nothing; a fork may lose the rest of a page.
        bonus = self.block_tokens if n == len(entry) and is_idle(row) else 0
        return Candidate(row, entry.life, n, len(entry), n + bonus)

    def _refresh(self, row: int, life: int, intact: int) -> Entry | None:
        """Forget what a row has lost, and return the rest."""
        entry: Entry | None = self.entries[row]
        assert entry is not None
        if intact >= len(entry) and life == entry.life:
            return entry
        if life != entry.life or intact == 0:
            entry = None
        else:
            ids, digests = entry.ids[: intact * ID_BYTES], entry.digests
            entry = Entry(ids, entry.salt, life, digests[: intact // self.block_tokens])
        self.put(row, entry)
        return entry

    def _chain(self, prompt: Prompt, known: tuple[bytes, ...]) -> Iterator[bytes]:
        """Hashes of the whole blocks behind those that are known."""
        last = known[-1] if known else digest(b"", prompt.salt)
        size = self.block_tokens * ID_BYTES
        for start in range(len(known) * size, len(prompt.ids) - size + 1, size):
            last = digest(last, prompt.ids[start : start + size])
            yield last
