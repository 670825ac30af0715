"""What the host's kernel charges for as many mappings as a step makes, without vattn."""

from __future__ import annotations

import time

from vattn.bench.latency.raw import HostVmm


class MapFloor:
    """``runs`` mappings of ``run_bytes`` bytes, each one mmap through ctypes."""

    def __init__(self, runs: int, run_bytes: int) -> None:
        self.runs = runs
        self.run_bytes = run_bytes
        self.ns: list[int] = []
        self._raw = HostVmm()
        # A gap between them: neighbours would become one mapping, which is cheaper.
        stride = run_bytes + self._raw.page_bytes
        self._reserved_bytes = runs * stride
        self._base = self._raw.reserve(self._reserved_bytes)
        handles = [self._raw.create(run_bytes) for _ in range(runs)]
        self._calls = [(self._base + i * stride, h) for i, h in enumerate(handles)]

    def once(self) -> None:
        """Map all runs, one clock around them, and take them out again."""
        map_run, run_bytes = self._raw.map, self.run_bytes
        start = time.perf_counter_ns()
        for address, handle in self._calls:
            map_run(address, run_bytes, handle)
        self.ns.append(time.perf_counter_ns() - start)
        self._raw.unmap(self._base, self._reserved_bytes)

    def close(self) -> None:
        """Give the addresses back."""
        self._raw.free(self._base, self._reserved_bytes)
