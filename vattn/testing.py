"""For the tests of engines that build on vattn: failing driver calls, a settled background."""

from __future__ import annotations

from typing import Any

from vattn import _C
from vattn.cache import KVCache
from vattn.config import CacheConfig
from vattn.page_range import PageRange
from vattn.pool import open_pool


class Faults:
    """Makes driver calls of one cache or page range fail with :class:`vattn.DriverError`.

    Calls that give memory back cannot fail and are not counted, except unmapping.
    """

    def __init__(self, pool: _C.Pool) -> None:
        self._pool = pool

    def fail_nth(self, nth: int) -> None:
        """Fail the ``nth`` driver call from now on, counted from 1, and no other."""
        self._pool.fail_nth(nth)

    def fail_from(self, nth: int) -> None:
        """Fail the ``nth`` driver call from now on and all after it, like a broken device."""
        self._pool.fail_from(nth)

    def disarm(self) -> None:
        """Let every call pass again."""
        self._pool.disarm()

    @property
    def injected(self) -> int:
        """Failures since the last ``fail_nth`` or ``fail_from``."""
        return self._pool.injected()


def init_with_faults(config: CacheConfig) -> tuple[KVCache, Faults]:
    """Make a cache as :func:`vattn.init` does, with a handle to make its driver fail.

    Examples
    --------
    >>> import vattn
    >>> cache, faults = init_with_faults(vattn.CacheConfig(
    ...     num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", lookahead=0,
    ...     max_batch_size=1, max_seq_len=128, device="cpu", memory="1MiB"))
    >>> row = cache.alloc()
    >>> faults.fail_nth(1)
    >>> try:
    ...     cache.step({row: 5})
    ... except vattn.DriverError as error:
    ...     print(error.call)
    create
    >>> cache.step({row: 5})
    >>> cache.close()
    """
    cache = KVCache(config, open_pool(config, inject_faults=True))
    return cache, Faults(cache.pool)


def page_range_with_faults(
    size: int | str, *, device: Any = "cpu", page_bytes: int | str | None = None
) -> tuple[PageRange, Faults]:
    """Make a :class:`vattn.PageRange`, with a handle to make its driver fail.

    Examples
    --------
    >>> import vattn
    >>> pages, faults = page_range_with_faults("1MiB")
    >>> faults.fail_nth(2)
    >>> try:
    ...     pages.map([(0, 4)])
    ... except vattn.DriverError as error:
    ...     print(error.call, pages.mapped_pages)
    create 0
    >>> pages.map([(0, 4)])
    >>> pages.close()
    """
    pages = PageRange(size, device=device, page_bytes=page_bytes, inject_faults=True)
    return pages, Faults(pages.pool)


def settle(cache: KVCache, timeout_s: float = 10.0) -> None:
    """Wait until the background thread has nothing to do: all is mapped that can be mapped ahead.

    Raises
    ------
    TimeoutError
        It was still busy after ``timeout_s`` seconds.

    Examples
    --------
    >>> import vattn
    >>> cache = vattn.init(vattn.CacheConfig(
    ...     num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", lookahead=256,
    ...     max_batch_size=1, max_seq_len=1024, device="cpu", memory="1MiB", page_bytes="64KiB"))
    >>> row = cache.alloc()
    >>> cache.step({row: 1})
    >>> settle(cache)
    >>> cache.mapped_tokens(row)
    512
    >>> cache.close()
    """
    if not cache._core.wait_background(round(timeout_s * 1000)):
        raise TimeoutError(f"the background thread was still busy after {timeout_s:g} s")
