"""What is done to all kinds of layers of a cache: to each of them, or to none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import vattn
from vattn.integrations.transformers.storage import Storage


def extend_all(storages: Sequence[Storage], new: int) -> None:
    """Make room for so many more tokens in each row. All or nothing.

    Parameters
    ----------
    storages : sequence of Storage
        All have tokens.
    new : int
        Tokens.
    """
    grown: list[tuple[Storage, int]] = []
    try:
        for storage in storages:
            before = storage.seq_len
            storage.extend(max(storage.lengths) + new)
            grown.append((storage, before))
    except (MemoryError, ValueError):
        for storage, before in grown:
            storage.step(before, storage.batch_size)
        raise


def gather_all(storages: Sequence[Storage], rows: list[int], *, empty: Callable[[], None]) -> None:
    """Put row ``rows[b]`` at row ``b`` for each ``b``; see :meth:`~.storage.Storage.gather`.

    All or nothing, but for one case that has no way back: after one kind of layers has changed,
    the driver fails, or another cache takes the memory that was there for the next.

    Parameters
    ----------
    storages : sequence of Storage
        At least one has tokens.
    rows : list of int
        Rows that there are, at least one.
    empty : callable
        What to do in that case: forget all tokens.
    """
    before = [storage.batch_size for storage in storages]
    changed = 0
    try:
        for storage in storages:
            if len(rows) > storage.batch_size:
                storage.grow_batch(rows)
        if len(storages) > 1:
            _check_room(storages, rows)
        for storage in storages:
            storage.gather(rows)
            changed += 1
    except (MemoryError, ValueError, vattn.DriverError):
        if changed:
            empty()
        for storage, batch_size in zip(storages, before, strict=True):
            if storage.batch_size > batch_size:
                storage.hold(batch_size)
        raise


def _check_room(storages: Sequence[Storage], rows: list[int]) -> None:
    """Raise if there is not memory for all kinds, before the first one changes."""
    all_stats = [storage.existing().stats() for storage in storages]
    needed = free = 0
    for storage, stats in zip(storages, all_stats, strict=True):
        pages = storage.pages_to_gather(rows)
        # What one kind can take from its own rows, the others cannot have.
        own = min(pages, stats.reclaimable_bytes // stats.page_bytes)
        needed, free = needed + pages, free + own
    first = all_stats[0]
    free += (first.budget_bytes - first.held_bytes + first.free_bytes) // first.page_bytes
    if needed > free:
        raise vattn.OutOfPagesError(
            f"to put other rows in the place of these takes up to {needed} pages of "
            f"{first.page_bytes} bytes, {free} are free of a budget of {first.budget_bytes} bytes; "
            "raise memory of VAttnCache, or take fewer beams. The cache is unchanged",
            needed,
            free,
        )
