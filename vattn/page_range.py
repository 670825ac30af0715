"""One range of addresses of which any page may have memory: for engines with block tables."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vattn import _C, tensors
from vattn.device import parse_device
from vattn.environment import apply_environment
from vattn.streams import stream_handle
from vattn.units import DTYPES, dtype_name, parse_bytes

if TYPE_CHECKING:
    import torch

DEFAULT_HOST_PAGE_BYTES = 64 * 2**10


class PageRange:
    """A range of addresses, reserved as a whole and backed with memory page by page.

    For engines that keep block tables of their own: they get one tensor over the whole range, for
    instance as the buffer of all their blocks, and say which of its pages are to have memory.
    :class:`vattn.KVCache` is for those that do not.

    Parameters
    ----------
    size : int or str
        Bytes of addresses, as a number or as "60GiB"; rounded up to pages. It may be larger than
        the memory of the device: only what is mapped takes memory, at most all that exists.
    device : str or torch.device
        "cuda", "cuda:1" or "cpu".
    page_bytes : int or str, optional
        Unit of mapping: a power of two and a multiple of the driver's granularity, 2 MiB on CUDA,
        which is the default there. On the CPU the default is 64 KiB.
    inject_faults : bool
        Whether driver calls can be made to fail; see :mod:`vattn.testing`.

    Attributes
    ----------
    size, page_bytes, n_pages : int
        Bytes of the range, bytes of a page, and how many pages that is.
    pool : vattn._C.Pool
        Where the memory comes from; it counts the driver calls.

    Raises
    ------
    ValueError
        A size, device or ``page_bytes`` that cannot be, or an unknown ``VATTN_*`` variable.
    DriverError
        The device has no virtual memory management, or has not that many addresses.

    Notes
    -----
    Thread-safe: any thread may call any method at any time; all of them but ``tensor`` release the
    GIL. Not usable in a forked child, where every method but ``close`` raises
    :class:`vattn.DriverError`.

    Reading a page that has no memory gives zeros on the CPU; on CUDA it is an illegal address.
    Writing it is an illegal address on both. A page that was just mapped reads as zeros on the CPU
    and as anything on CUDA.

    Examples
    --------
    >>> import vattn
    >>> with vattn.PageRange("64GiB") as pages:
    ...     pages.map([(0, 4), (1000, 2)])
    ...     buffer = pages.tensor("float32")
    ...     buffer[: 4 * 16384] = 1.0
    ...     pages.unmap([(1, 2)])
    ...     pages.mapped_runs()
    2
    [(0, 1), (3, 1), (1000, 2)]
    """

    def __init__(
        self,
        size: int | str,
        *,
        device: Any = "cpu",
        page_bytes: int | str | None = None,
        inject_faults: bool = False,
    ) -> None:
        apply_environment()
        wanted = parse_bytes(size, "size")
        self._device = parse_device(device)
        if page_bytes is not None:
            page = parse_bytes(page_bytes, "page_bytes")
        else:
            # 0 is the driver's granularity.
            page = 0 if self._device.device_type == "cuda" else DEFAULT_HOST_PAGE_BYTES
        self.pool = _C.open_page_pool(
            device_type=self._device.device_type,
            device_index=self._device.device_index,
            page_bytes=page,
            range_bytes=wanted,
            inject_faults=inject_faults,
        )
        self.page_bytes = self.pool.page_bytes
        self.n_pages = -(-wanted // self.page_bytes)
        self.size = self.n_pages * self.page_bytes
        self._core = _C.PageRange(self.pool, self.n_pages)

    # Memory.

    def map(self, runs: Sequence[tuple[int, int]], *, populate: bool = True) -> None:
        """Put memory under pages that have none.

        Parameters
        ----------
        runs : sequence of (int, int)
            First page and count of each run, in any order. Neighbours are one driver call.
        populate : bool
            On the CPU, fault the memory in as well. Without it, whoever writes first does, or a
            call of :meth:`populate` on another thread.

        Raises
        ------
        OutOfPagesError
            There is not so much memory: ``e.needed`` pages were asked for, ``e.free`` are there.
            On the CPU a 64th of the machine's memory is left alone.
        ValueError
            A page that is mapped already, is outside, or is named twice.
        DriverError
            The driver failed.

        Notes
        -----
        All or nothing: whatever is raised, nothing has changed. The one exception is a driver that
        fails and then also refuses to undo: what it left mapped stays so and is counted, see
        ``mapped_runs``. Waits for no device work.
        """
        self._core.map(runs)
        if populate:
            self._core.populate(runs)

    def populate(self, runs: Sequence[tuple[int, int]]) -> None:
        """Fault in, on the CPU, pages that were mapped without. A hint that changes nothing else.

        Parameters
        ----------
        runs : sequence of (int, int)
            First page and count of each run. A run that has a page without memory meanwhile is
            faulted in up to there.

        Raises
        ------
        ValueError
            A page that is outside, or is named twice.
        """
        self._core.populate(runs)

    def alias(self, first: int, count: int) -> None:
        """Put one physical page under ``count`` pages: they read and write the same memory.

        A place for what kernels do with dummy data: it takes one page however long it is.

        Parameters
        ----------
        first, count : int
            The first page, and how many.

        Raises
        ------
        OutOfPagesError, ValueError, DriverError
            As ``map``; nothing has changed.

        Notes
        -----
        On the CPU every page of it is a mapping of its own, of which a process can have
        ``vm.max_map_count``. The memory goes back when the last of the pages is unmapped.
        """
        self._core.alias(first, count)

    def unmap(self, runs: Sequence[tuple[int, int]], *, stream: Any = None) -> int:
        """Take the memory from under pages and return it to the driver.

        Parameters
        ----------
        runs : sequence of (int, int)
            First page and count of each run, in any order.
        stream : torch.cuda.Stream or int, optional
            Waits for the work that was submitted to this stream so far; torch's current one by
            default. No other work may use the pages.

        Returns
        -------
        int
            Pages that have no memory any more. Fewer than asked for if the driver refused some:
            those stay mapped, see ``mapped_runs``, and may be unmapped again later.

        Raises
        ------
        ValueError
            A page that is not mapped, is outside, or is named twice. Nothing changed.
        DriverError
            The driver failed to wait for the stream. Nothing changed.

        Notes
        -----
        Other threads can map and look meanwhile; the call waits for the device without the lock.
        """
        return self._core.unmap(runs, stream_handle(stream, self._device))

    def tensor(self, dtype: Any = "int8") -> torch.Tensor:
        """Return the whole range as one tensor, zero-copy.

        Parameters
        ----------
        dtype : torch.dtype or str
            float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8 or uint8.

        Returns
        -------
        torch.Tensor
            Of shape ``(size // itemsize,)``. It keeps the addresses reserved, and what is mapped in
            them, until it goes; ``close`` takes the memory from under it.

        Raises
        ------
        ValueError
            Another dtype, or the range is closed.
        """
        import torch

        if self.closed:
            raise ValueError("the range is closed; make a new vattn.PageRange")
        name = dtype_name(dtype)
        kind = DTYPES[name]
        capsule = self._core.capsule(
            type_code=kind.dlpack_code,
            bits=kind.bits,
            device_type=tensors.DLPACK_DEVICE[self._device.device_type],
            device_id=self._device.device_index,
        )
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
        return tensor.view(getattr(torch, name)) if kind.reinterpret else tensor

    # What it knows about itself.

    @property
    def mapped_pages(self) -> int:
        """Physical pages in use: those under an alias count once."""
        return self._core.mapped_pages()

    def is_mapped(self, page: int) -> bool:
        """Whether a page has memory."""
        return self._core.is_mapped(page)

    def mapped_runs(self) -> list[tuple[int, int]]:
        """First page and count of every run of pages that have memory, in order."""
        return self._core.mapped_runs()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._core.closed

    def check(self) -> None:
        """Check every invariant: that each page is in exactly one place, and that the sums agree.

        Raises
        ------
        RuntimeError
            One is broken, which is a bug of vattn. The message names it.
        """
        self._core.check()

    # Giving memory back.

    def close(self) -> None:
        """Wait for the device and give all memory back; the addresses follow the last tensor.

        Idempotent; afterwards ``map``, ``alias``, ``unmap`` and ``tensor`` raise ``ValueError``.
        Does nothing in a forked child, where the memory is the parent's.
        """
        self._core.close()

    def __enter__(self) -> PageRange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.mapped_pages} mapped, {self.pool.describe()}"
        return f"<vattn.PageRange {self.n_pages} pages of {self.page_bytes} bytes, {state}>"
