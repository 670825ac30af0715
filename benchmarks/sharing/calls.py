"""Driver calls of a cache, and the bytes that it copied."""

from __future__ import annotations

import re
from collections import Counter

from vattn.bench.common import NothingMeasured
from vattn.cache import KVCache

_COPY = re.compile(r"call=copy .*?bytes=(\d+)")


class CallWatch:
    """What the driver was asked for since the last look, but for the background thread's calls."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._before = self._now()

    def _now(self) -> Counter[str]:
        calls: Counter[str] = Counter()
        for origin, by_name in self._cache.pool.driver_calls().items():
            if origin != "background":
                calls.update({name: call["count"] for name, call in by_name.items()})
        return calls

    def look(self) -> Counter[str]:
        """Return the calls in the callers' time since the last look, by name."""
        now = self._now()
        since = now - self._before
        self._before = now
        return since

    def background(self) -> Counter[str]:
        """Return all calls of the background thread so far."""
        by_name = self._cache.pool.driver_calls()["background"]
        return +Counter({name: call["count"] for name, call in by_name.items()})

    def copied_bytes(self, copies: int) -> int:
        """Bytes of the last so many copies.

        Raises
        ------
        NothingMeasured
            The driver does not remember so many.
        """
        if copies == 0:
            return 0
        lines = map(_COPY.search, self._cache.recent_calls())
        sizes = [int(line[1]) for line in lines if line]
        if len(sizes) < copies:
            raise NothingMeasured(f"{copies} copies, the log of calls has {len(sizes)} of them")
        return sum(sizes[-copies:])
