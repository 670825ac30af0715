"""The cache: rows of contiguous KV memory, backed on demand."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vattn import _C
from vattn.config import CacheConfig
from vattn.environment import apply_environment
from vattn.pool import open_pool
from vattn.sharing import Sharing
from vattn.stats import CacheStats, CallStats
from vattn.streams import stream_handle
from vattn.tensors import LayerTensors, flatten
from vattn.windows import WindowViews

if TYPE_CHECKING:
    import torch


def init(config: CacheConfig, *, share_pool_with: KVCache | None = None) -> KVCache:
    """Make a KV cache: reserve the addresses of all rows, map nothing yet.

    Parameters
    ----------
    config : CacheConfig
        Shape, place and budget.
    share_pool_with : KVCache, optional
        Take physical memory from that cache's pool, as a draft model beside its target does. Then
        leave ``memory``, ``page_bytes`` and ``max_extent_bytes`` out of the configuration.

    Returns
    -------
    KVCache
        Use it in a ``with`` statement, or call its ``close``.

    Raises
    ------
    ValueError
        A setting that cannot be met: more memory than there is, a device that is not there, less
        than one page for each region of a row, an unknown ``VATTN_*`` variable.
    DriverError
        The device has no virtual memory management, or the driver refused.

    Examples
    --------
    >>> import vattn
    >>> config = vattn.CacheConfig(num_layers=2, num_kv_heads=2, head_dim=64, dtype="float32",
    ...                            max_batch_size=2, max_seq_len=1024, device="cpu", memory="8MiB")
    >>> with vattn.init(config) as cache:
    ...     row = cache.alloc(seq_len=5)
    ...     cache.step({row: 5})
    ...     k, v = cache.kv(layer=0)
    ...     tuple(k.shape)
    (2, 1024, 2, 64)
    """
    apply_environment()
    if share_pool_with is None:
        return KVCache(config, open_pool(config))
    for name in ("memory", "page_bytes", "max_extent_bytes"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} and share_pool_with are both given; leave {name} out")
    theirs = share_pool_with.config
    if (config.device_type, config.device_index) != (theirs.device_type, theirs.device_index):
        raise ValueError(
            f"device is {config.device!s}, but the shared pool is on {theirs.device!s}; "
            "both must be the same"
        )
    return KVCache(config, share_pool_with.pool)


class KVCache(Sharing, WindowViews):
    """Contiguous KV memory for ``max_batch_size`` requests. Made by :func:`init`.

    Every request has a *row*: an index in dimension 0 of the KV tensors, the same as
    FlashAttention's ``cache_batch_idx``. Call ``alloc`` when a request starts, ``step`` once per
    iteration before the forward pass, ``free`` when it ends.

    Notes
    -----
    Thread-safe: any thread may call any method at any time; every method but ``config`` and the
    other plain attributes releases the GIL. Not usable in a forked child, where every method but
    ``close`` raises :class:`DriverError`.

    Reading a token that has no memory gives zeros on the CPU, for a tensor there is an ordinary
    mapping; on CUDA it is an illegal address, as no kernel can be told otherwise. Writing it is an
    illegal address on both (the kernel ends the process with SIGSEGV): write only what ``step`` has
    backed. Tensors stay valid as long as they live, even if the cache object is dropped; ``close``
    takes the memory from under them, as if no token had any.
    """

    def __init__(self, config: CacheConfig, pool: _C.Pool) -> None:
        self.config = config
        self.pool = pool
        self._core = _C.KVCache(
            pool,
            layout=config.layout_name,
            order=config.order,
            item_bytes=config.item_bytes,
            max_batch_size=config.max_batch_size,
            max_seq_len=config.max_seq_len,
            lookahead=config.lookahead,
            scrub=config.scrub == "on_reuse",
            groups=[group.shape() for group in config.groups],
        )
        self._tensors = LayerTensors(self._core, config)
        # Nobody can call step() any more when this object is gone, or at exit; tensors may live on.
        weakref.finalize(self, self._core.stop_background)

    # The life of a request.

    def alloc(self, seq_len: int = 0, *, stream: Any = None) -> int:
        """Get a row for a new request.

        Adopts the idle row whose memory fits ``seq_len`` best, so that mostly nothing needs to be
        mapped; maps nothing itself, but tells the background thread what is expected.

        Parameters
        ----------
        seq_len : int
            Tokens expected in the first ``step``, 0 if not known. Given, and called before the step
            that needs it, they are mapped ahead of it, and an adopted row loses extents that are
            too large for them, which otherwise nobody else could have.
        stream : torch.cuda.Stream or int, optional
            Stream that the request's work will be submitted to; torch's current one by default. Its
            work from now on comes after the work that was using the row's memory before.

        Returns
        -------
        int
            The row, ``0 <= row < max_batch_size``.

        Raises
        ------
        OutOfRowsError
            Every row is active.
        ValueError
            ``seq_len`` is negative or beyond ``max_seq_len``.
        """
        return self._core.alloc(seq_len, stream_handle(stream, self.config))

    def step(self, seq_lens: Sequence[int] | Mapping[int, int] | Any) -> None:
        """Back every row with memory for its tokens. Call once per iteration, before the forward.

        Parameters
        ----------
        seq_lens : list, tuple, numpy array or torch CPU tensor of shape (max_batch_size,), or dict
            Tokens per row *after* this iteration, int32 or int64; 0 for rows not in use. A dict
            ``{row: tokens}`` changes the rows it names and leaves the others. Shrinking unmaps
            nothing.

        Raises
        ------
        OutOfPagesError
            The budget is short by ``e.needed - e.free`` pages. No active row changed: preempt a
            request and call again.
        ValueError, TypeError
            Wrong shape or type, a negative length, a length beyond ``max_seq_len``, or tokens for a
            row that is not allocated. Nothing changed.
        DriverError
            The driver failed. No active row changed.

        Notes
        -----
        Releases the GIL. Makes no driver call and allocates nothing when everything is mapped
        already, which is the common case. Waits for at most one run of pages that the background
        thread is mapping. Only when memory is short does it wait for the device: for work that uses
        rows freed before. An int64 array is the fastest form.

        Examples
        --------
        >>> import vattn
        >>> cache = vattn.init(vattn.CacheConfig(
        ...     num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32",
        ...     max_batch_size=2, max_seq_len=128, device="cpu", memory="1MiB"))
        >>> row = cache.alloc()
        >>> cache.step({row: 5})
        >>> cache.seq_lens
        [5, 0]
        >>> cache.close()
        """
        self._core.step(seq_lens)

    def free(self, row: int, *, stream: Any = None) -> None:
        """End a request. Its row becomes idle: still mapped, until it is adopted or reclaimed.

        Parameters
        ----------
        row : int
            A row from ``alloc``.
        stream : torch.cuda.Stream or int, optional
            The memory is reused only after the work submitted to this stream so far; torch's
            current one by default.

        Raises
        ------
        ValueError
            The row is not allocated: freed before, or never.
        DriverError
            The driver failed to record the fence. The row is still active.
        """
        self._core.free(row, stream_handle(stream, self.config))

    # The tensors.

    def kv(
        self,
        layer: int,
        *,
        rows: int | slice | Sequence[int] | None = None,
        max_len: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """K and V of one layer, as zero-copy views of all rows.

        Parameters
        ----------
        layer : int
            Index of the layer.
        rows : int, slice or evenly spaced sequence of int, optional
            Only these rows, in a view with as many. An int gives a view of one row.
        max_len : int, optional
            Only the first tokens, for kernels whose work grows with the padded length.

        Returns
        -------
        k, v : torch.Tensor
            [rows, tokens, num_kv_heads, head_dim] in order NHD, [rows, num_kv_heads, tokens,
            head_dim] in order HND; strided, the last dimension contiguous. ``v`` is None for a
            latent stripe (``v_head_dim=0``).

        Raises
        ------
        IndexError, ValueError
            No such layer or row; rows that are not evenly spaced, which no view can select: use
            ``cache_batch_idx`` of the kernel, or index the tensor, which copies.

        Notes
        -----
        The addresses never change, so CUDA graphs may hold them. ``copy.deepcopy`` and
        ``torch.save`` of a view would read all that is reserved: ``clone`` what has tokens.
        """
        if self.closed:
            raise ValueError("the cache is closed; make a new one with vattn.init()")
        return self._tensors.select(layer, rows, max_len)

    def kv_flat(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """K and V of one layer with rows and tokens in one dimension, for varlen kernels.

        Returns
        -------
        k, v : torch.Tensor
            [tokens, num_kv_heads, head_dim]; token ``t`` of row ``b`` is at
            ``b * row_stride_tokens + t``.

        Raises
        ------
        ValueError
            The order is HND, which has no such view.
        """
        if self.config.order != "NHD":
            raise ValueError("order is 'HND', which has no flat view; use order='NHD'")
        k, v = self.kv(layer)
        return flatten(k), None if v is None else flatten(v)

    @property
    def row_stride_tokens(self) -> int:
        """Tokens from one row to the next in ``kv_flat``: at least ``max_seq_len``."""
        k, _ = self.kv(0)
        return k.stride(0) // k.stride(1 if self.config.order == "NHD" else 2)

    # What it knows about itself.

    @property
    def seq_lens(self) -> list[int]:
        """Tokens per row after the last ``step``."""
        return self._core.seq_lens()

    def row_state(self, row: int) -> str:
        """State of a row: "free", "active", "idle" (still mapped) or "retiring"."""
        return self._core.row_state(row)

    def mapped_tokens(self, row: int) -> int:
        """Tokens of a row that have memory, needed or ahead of need."""
        return self._core.mapped_tokens(row)

    @property
    def page_bytes(self) -> int:
        """Smallest unit of physical memory."""
        return self.pool.page_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self._core.token_bytes

    @property
    def regions_per_row(self) -> int:
        """Contiguous ranges that a row consists of. A row wastes less than a page in each."""
        return self._core.regions_per_row

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._core.closed

    def stats(self) -> CacheStats:
        """Bytes, rows and driver calls at this moment.

        Takes tens of microseconds, 150 for 256 rows of 64 regions: at most once in an iteration.
        """
        calls = {
            origin: {
                name: CallStats(**{**entry, "histogram": tuple(entry["histogram"])})
                for name, entry in by_name.items()
            }
            for origin, by_name in self.pool.driver_calls().items()
        }
        return CacheStats(page_bytes=self.page_bytes, driver_calls=calls, **self._core.stats())

    def recent_calls(self) -> list[str]:
        """Return the last 64 driver calls of the pool, oldest first, one line each."""
        return self.pool.recent_calls()

    def check(self) -> None:
        """Check every invariant: that each page is in exactly one place, and that the sums agree.

        Raises
        ------
        RuntimeError
            One is broken, which is a bug of vattn. The message names it.
        """
        self._core.check()

    # Giving memory back.

    def trim(self) -> int:
        """Give the memory of idle rows and of free pages back to the driver.

        Returns
        -------
        int
            Bytes given back so far. Rows that the device still uses follow when it is done.
        """
        return self._core.trim()

    def close(self) -> None:
        """Wait for the device, give all memory back and end the background thread.

        Idempotent; afterwards every method that uses memory raises ``ValueError``. Does nothing in
        a forked child, where the memory is the parent's.
        """
        self._tensors.clear()
        self._core.close()

    def __enter__(self) -> KVCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        c = self.config
        state = "closed" if self.closed else f"{len(c.groups)} group(s), {self.pool.describe()}"
        return (
            f"<vattn.KVCache {c.num_layers} layers, {c.max_batch_size} rows x {c.max_seq_len} "
            f"tokens, {c.dtype_name}, {c.layout_name} {c.order}, {state}>"
        )
