"""Streams, as the core wants them."""

from __future__ import annotations

from typing import Any, Protocol


class _OnDevice(Protocol):
    @property
    def device_type(self) -> str: ...
    @property
    def device_index(self) -> int: ...


def stream_handle(stream: Any, place: _OnDevice) -> int:
    """Return the CUstream of a ``torch.cuda.Stream`` or an int; None is torch's current stream.

    The CPU has no streams: there it is 0 whatever is given.
    """
    if place.device_type == "cpu":
        return 0
    if stream is None:
        import torch

        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return 0  # nothing was submitted through torch
        return int(torch.cuda.current_stream(place.device_index).cuda_stream)
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    raise TypeError(f"stream is {stream!r}, expected a torch.cuda.Stream, an int or None")
