"""Devices by name."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Device(NamedTuple):
    """A device, as the core wants it."""

    device_type: str  # "cuda" or "cpu"
    device_index: int  # ordinal of the CUDA device; 0 on the CPU


def parse_device(device: Any) -> Device:
    """Turn a ``torch.device`` or a string into a device, without importing torch.

    Examples
    --------
    >>> parse_device("cuda:1")
    Device(device_type='cuda', device_index=1)
    """
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", str(device))
    if match is None or (match[1] == "cpu" and match[2] not in (None, "0")):
        raise ValueError(f"device is {str(device)!r}, expected 'cpu', 'cuda' or 'cuda:N'")
    return Device(match[1], int(match[2] or 0))
