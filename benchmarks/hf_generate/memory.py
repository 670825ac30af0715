"""How much memory there is, and how far its use rises."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

SHARE = 0.8  # of what is free: the rest is for whatever else runs
_SELF = Path("/proc/self")


def _field(path: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def allocate_from_heap() -> None:
    """Let glibc's malloc take blocks of up to 1 GiB from its heap instead of mapping each."""
    m_mmap_threshold = -3  # malloc.h
    if ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**30) != 1:
        raise RuntimeError("mallopt(M_MMAP_THRESHOLD) failed; this malloc is not glibc's")


def no_room(needed: int, device: str) -> str | None:
    """Say why a measurement that takes ``needed`` bytes must not be tried; None if it can be."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _field(Path("/proc/meminfo"), "MemAvailable")
    if needed <= SHARE * free:
        return None
    return (
        f"takes about {needed / 2**30:.1f} GiB, {SHARE:.0%} of {free / 2**30:.1f} GiB may be used"
    )


class HostPeak:
    """Growth of the resident memory of this process, shared memory included."""

    def __init__(self) -> None:
        (_SELF / "clear_refs").write_text("5")  # VmHWM begins again at VmRSS
        self._before = _field(_SELF / "status", "VmRSS")

    def growth(self) -> int:
        """Bytes between the highest point since this was made, and the start."""
        return _field(_SELF / "status", "VmHWM") - self._before

    def torch_growth(self) -> None:
        """Nothing: on the CPU torch keeps no account."""


class CudaPeak:
    """Growth of what the driver has given out. torch's allocator gives nothing back by itself."""

    def __init__(self, device: str) -> None:
        self._device = device
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        self._allocated = torch.cuda.memory_allocated(device)
        self._free, _ = torch.cuda.mem_get_info(device)

    def growth(self) -> int:
        """Bytes that are free no more."""
        return self._free - torch.cuda.mem_get_info(self._device)[0]

    def torch_growth(self) -> int:
        """Most bytes in torch's tensors, without those from the start; knows no other memory."""
        return torch.cuda.max_memory_allocated(self._device) - self._allocated


def watch_peak(device: str) -> HostPeak | CudaPeak:
    """Begin to watch."""
    return CudaPeak(device) if device.startswith("cuda") else HostPeak()
