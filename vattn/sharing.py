"""Rows that share tokens, or lose some: forks, beams, speculation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vattn.streams import stream_handle

if TYPE_CHECKING:
    from vattn import _C
    from vattn.config import CacheConfig


class Sharing:
    """The part of :class:`vattn.KVCache` in which rows get tokens of others, or fewer of their own.

    Notes
    -----
    Physical memory is mapped at several rows (the driver allows that: CUDA Driver API, Virtual
    Memory Management; CUDA Programming Guide, Virtual Aliasing Support: what one kernel writes
    through one address, later kernels read through the other). Only whole extents are shared, and
    only those that lie wholly inside the tokens shared; tokens in the next one are copied. In rows
    that grew by ``step`` that is the partly filled last page of each region, because it is always
    an extent of its own. Where a fork ends inside a larger extent (at fewer tokens than the row
    has), all tokens of that extent are copied: less than ``max_extent_bytes`` in each region.

    A shared page is never written: the next ``step`` of a row whose next token lies in one first
    copies the tokens before it to a page of the row's own. For that it waits for the row's stream,
    the one that it got from ``alloc`` or ``fork``. It happens only after a row was cut to fewer
    tokens than it shares.
    """

    config: CacheConfig
    _core: _C.KVCache

    def fork(
        self, row: int, seq_len: int | None = None, n: int = 1, *, stream: Any = None
    ) -> list[int]:
        """Make new rows with the first tokens of a row, sharing its memory.

        For parallel sampling, branches of a token tree, or beams. Costs a map call for each run of
        extents and the copy of at most a page in each region, whatever the number of tokens.

        Parameters
        ----------
        row : int
            An active row.
        seq_len : int, optional
            How many of its tokens; all by default.
        n : int
            How many new rows. Free rows are taken first; then idle rows lose their memory, the
            oldest first.
        stream : torch.cuda.Stream or int, optional
            Stream that will use the new rows: the copy is submitted to it. Its work from now on
            comes after the work so far in the row's own stream. torch's current one by default.

        Returns
        -------
        list of int
            The new rows: active, with ``seq_len`` tokens each. Free them like others.

        Raises
        ------
        OutOfRowsError
            Fewer than ``n`` rows are not active.
        OutOfPagesError
            No page for the copies: ``e.needed - e.free`` are short.
        ValueError
            The row is not active, or has fewer tokens than ``seq_len``; in a sliding window, the
            window at ``seq_len`` is overwritten.
        DriverError
            The driver failed. Whatever is raised, no active row has changed.

        Notes
        -----
        Thread-safe; releases the GIL. Makes driver calls, and waits for the device if it takes
        idle rows that are still in use there. The rings of sliding windows are copied.

        Examples
        --------
        >>> import vattn
        >>> cache = vattn.init(vattn.CacheConfig(
        ...     num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", layout="interleaved",
        ...     max_batch_size=4, max_seq_len=4096, device="cpu", memory="4MiB"))
        >>> row = cache.alloc()
        >>> cache.step({row: 1000})
        >>> _ = cache.kv(0)[0][row, :1000].fill_(7)
        >>> samples = cache.fork(row, n=3)
        >>> cache.seq_lens
        [1000, 1000, 1000, 1000]
        >>> cache.kv(0)[0][samples[2], 999, 0, 0].item()
        7.0
        >>> cache.stats().aliased_bytes // cache.page_bytes     # of 8 pages, the last is copied
        21
        >>> cache.close()
        """
        return self._core.fork(row, seq_len, n, stream_handle(stream, self.config))

    def truncate(self, row: int, seq_len: int) -> None:
        """Drop the last tokens of a row, such as rejected speculative ones. No driver call.

        A ``step`` with a shorter length does the same. Memory stays mapped for the tokens to come.

        Parameters
        ----------
        row : int
            An active row.
        seq_len : int
            Tokens that it keeps, at most what it has.

        Raises
        ------
        ValueError
            The row is not active or has fewer tokens. In a sliding window, the window at
            ``seq_len`` is overwritten; 0 is always allowed. Nothing has changed.

        Examples
        --------
        >>> import vattn
        >>> cache = vattn.init(vattn.CacheConfig(
        ...     num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32",
        ...     max_batch_size=1, max_seq_len=128, device="cpu", memory="1MiB"))
        >>> row = cache.alloc()
        >>> cache.step({row: 12})           # 8 tokens, and 4 that a draft model proposed
        >>> cache.truncate(row, 9)          # the first of them was accepted
        >>> cache.seq_lens
        [9]
        >>> cache.close()
        """
        self._core.truncate(row, seq_len)

    def reorder(self, rows: Sequence[int], parents: Sequence[int], *, stream: Any = None) -> None:
        """Give rows the tokens of other rows, all at once: a step of beam search.

        Parameters
        ----------
        rows : sequence of int
            Active rows, each once.
        parents : sequence of int
            ``rows[i]`` gets the tokens and the length that the active row ``parents[i]`` has now. A
            row that is its own parent is not touched.
        stream : torch.cuda.Stream or int, optional
            Stream that all of them are used on; torch's current one by default.

        Raises
        ------
        ValueError
            Lengths that differ, a row named twice, rows that are not active.
        OutOfPagesError, DriverError
            As for :meth:`fork`. No row has changed.

        Notes
        -----
        Thread-safe; releases the GIL. Waits for the stream, because it unmaps what rows had. What a
        row shares with its new parent already stays where it is.

        Examples
        --------
        >>> import vattn
        >>> cache = vattn.init(vattn.CacheConfig(
        ...     num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32",
        ...     max_batch_size=2, max_seq_len=128, device="cpu", memory="1MiB"))
        >>> beams = [cache.alloc(), cache.alloc()]
        >>> cache.step([5, 3])
        >>> cache.kv(0)[0][0, :5] = 1.0
        >>> cache.reorder(beams, [0, 0])
        >>> cache.seq_lens, cache.kv(0)[0][1, 4, 0, 0].item()
        ([5, 5], 1.0)
        >>> cache.close()
        """
        self._core.reorder(list(rows), list(parents), stream_handle(stream, self.config))

    def compact(
        self, row: int, keep_token_indices: Sequence[int], *, start: int = 0, stream: Any = None
    ) -> None:
        """Keep some tokens of a row, moved together: the accepted path of a token tree.

        With a tree of draft tokens in one row (SpecInfer, arXiv 2305.09781), verified in one
        forward pass under a tree mask, the accepted path is scattered over the row's end.

        Parameters
        ----------
        row : int
            An active row.
        keep_token_indices : sequence of int
            Positions to keep, ascending, from ``start`` to the row's length. The first comes to
            position ``start``, the next to ``start + 1`` and so on.
        start : int
            Tokens before it are kept as they are.
        stream : torch.cuda.Stream or int, optional
            Stream whose work has written the tokens: the copies are submitted to it. torch's
            current one by default.

        Raises
        ------
        ValueError
            The row is not active, positions do not ascend or are not in the row, or a layer has a
            sliding window. Nothing has changed.
        OutOfPagesError
            Pages that other rows share would be written, and there are none for copies of them.
            Nothing has changed.
        DriverError
            If it was a copy that failed, the row has only the tokens that stayed in place.

        Notes
        -----
        Thread-safe; releases the GIL. A copy for each run of neighbours, layer stripe and region.
        Keys keep the position encoding that they were written with: a tree gives each token that of
        its depth.

        Examples
        --------
        >>> import vattn
        >>> cache = vattn.init(vattn.CacheConfig(
        ...     num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32",
        ...     max_batch_size=1, max_seq_len=128, device="cpu", memory="1MiB"))
        >>> row = cache.alloc()
        >>> cache.step({row: 7})                                     # 3 tokens and a tree of 4
        >>> k, _ = cache.kv(0)
        >>> for token in range(7):
        ...     k[row, token] = token
        >>> cache.compact(row, [3, 5], start=3)
        >>> cache.seq_lens, k[row, :5, 0, 0].tolist()
        ([5], [0.0, 1.0, 2.0, 3.0, 5.0])
        >>> cache.close()
        """
        self._core.compact(row, list(keep_token_indices), start, stream_handle(stream, self.config))
