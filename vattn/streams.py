"""Streams, as the core wants them."""

from __future__ import annotations

from typing import Any

from vattn.config import CacheConfig


def stream_handle(stream: Any, config: CacheConfig) -> int:
    """Return the CUstream of a ``torch.cuda.Stream`` or an int; None is torch's current stream.

    The CPU has no streams: there it is 0 whatever is given.
    """
    if config.device_type == "cpu":
        return 0
    if stream is None:
        import torch

        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return 0  # nothing was submitted through torch
        return int(torch.cuda.current_stream(config.device_index).cuda_stream)
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    raise TypeError(f"stream is {stream!r}, expected a torch.cuda.Stream, an int or None")
