"""A double of the calls under vattn that checks their order and knows what was not given back."""

from __future__ import annotations

import threading
from collections import Counter

PAGE_BYTES = 2 * 2**20


class RawVmmDouble:
    """As the CUDA driver has it: mapped whole, access before use, unmapped before freed."""

    page_bytes = PAGE_BYTES
    has_access = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.reservations: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.mappings: dict[int, tuple[int, int]] = {}  # by address: size, handle
        self.accessible: set[int] = set()
        self.attached: set[int] = set()
        self.callers: set[int] = set()
        self._next = PAGE_BYTES
        self._lock = threading.Lock()

    @property
    def counts(self) -> Counter[str]:
        return Counter(call for call in self.calls if call not in ("touch", "floor"))

    def check_nothing_left(self) -> None:
        assert (self.reservations, self.handles, self.mappings) == ({}, {}, {})

    def _record(self, call: str) -> None:
        self.calls.append(call)
        self.callers.add(threading.get_ident())

    def _take(self, size: int) -> int:
        assert size > 0
        assert size % PAGE_BYTES == 0
        with self._lock:
            self._next += size + PAGE_BYTES
            return self._next - size - PAGE_BYTES

    def _inside(self, address: int, size: int) -> list[int]:
        """Mappings that fill the range, without a gap, and none that reaches out of it."""
        at, found = address, []
        while at < address + size:
            found.append(at)
            at += self.mappings[at][0]
        assert at == address + size
        return found

    def reserve(self, size: int) -> int:
        self._record("reserve")
        base = self._take(size)
        self.reservations[base] = size
        return base

    def create(self, size: int) -> int:
        self._record("create")
        handle = self._take(size)
        self.handles[handle] = size
        return handle

    def map(self, address: int, size: int, handle: int) -> None:
        self._record("map")
        assert self.handles[handle] == size, "a handle is mapped whole"
        assert any(b <= address and address + size <= b + n for b, n in self._reserved())
        assert all(at + n <= address or address + size <= at for at, n in self._mapped())
        self.mappings[address] = size, handle

    def _reserved(self) -> list[tuple[int, int]]:
        with self._lock:
            return list(self.reservations.items())

    def _mapped(self) -> list[tuple[int, int]]:
        with self._lock:
            return [(at, size) for at, (size, _) in list(self.mappings.items())]

    def set_access(self, address: int, size: int) -> None:
        self._record("set_access")
        self.accessible.update(self._inside(address, size))

    def populate(self, address: int, size: int) -> None:
        self._record("populate")
        self._inside(address, size)

    def unmap(self, address: int, size: int) -> None:
        self._record("unmap")
        for at in self._inside(address, size):
            assert at in self.accessible, "was mapped, but could not have been used"
            self.accessible.discard(at)
            del self.mappings[at]

    def release(self, handle: int, size: int) -> None:
        self._record("release")
        assert all(mapped != handle for _, mapped in list(self.mappings.values()))
        assert self.handles.pop(handle) == size

    def free(self, address: int, size: int) -> None:
        self._record("free")
        assert all(at + n <= address or address + size <= at for at, n in self._mapped())
        assert self.reservations.pop(address) == size

    def attach(self) -> None:
        self.attached.add(threading.get_ident())

    def floor(self) -> None:
        self._record("floor")

    def touch(self, address: int, size: int) -> None:
        """Write to a part of one mapping, from its start."""
        self._record("touch")
        assert address in self.accessible
        assert size <= self.mappings[address][0]
