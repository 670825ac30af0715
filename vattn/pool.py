"""Physical memory of a budget."""

from __future__ import annotations

from vattn import _C
from vattn.config import CacheConfig
from vattn.units import parse_bytes

# Others measured 64 handles of 2 MiB at 5.3 ms and one of 128 MiB at 0.09 ms.
DEFAULT_MAX_EXTENT_BYTES = 128 * 2**20


def open_pool(
    config: CacheConfig, *, inject_faults: bool = False, rehearsal: bool = False
) -> _C.Pool:
    """Open the driver of the configuration's device, and a pool of its budget over it.

    Parameters
    ----------
    config : CacheConfig
        ``memory`` is required; ``page_bytes`` and ``max_extent_bytes`` have defaults.
    inject_faults : bool
        Whether driver calls can be made to fail; see :mod:`vattn.testing`.
    rehearsal : bool
        On the CPU only: lengths are played through and nobody touches the memory. Mappings are
        real, but nothing is populated, and the budget may be larger than the machine's memory.
    """
    memory = config.memory_bytes
    if memory is None:
        raise ValueError("memory is missing; say how much physical memory to use, like '60GiB'")
    if config.page_bytes is not None:
        page_bytes = parse_bytes(config.page_bytes, "page_bytes")
    elif config.device_type == "cuda":
        page_bytes = 0  # the driver's granularity
    else:
        page_bytes = _C.default_host_page_bytes(
            layout=config.layout_name,
            order=config.order,
            item_bytes=config.item_bytes,
            groups=[group.shape() for group in config.groups],
        )
    if config.max_extent_bytes is not None:
        max_extent_bytes = parse_bytes(config.max_extent_bytes, "max_extent_bytes")
    else:
        largest = 1 << (memory.bit_length() - 1)
        max_extent_bytes = max(page_bytes, min(DEFAULT_MAX_EXTENT_BYTES, largest))
    return _C.Pool(
        device_type=config.device_type,
        device_index=config.device_index,
        page_bytes=page_bytes,
        max_extent_bytes=max_extent_bytes,
        memory_bytes=memory,
        inject_faults=inject_faults,
        rehearsal=rehearsal,
    )
