"""The layouts in which growth is measured, and how many rows of each a machine can hold."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import vattn
from vattn.models import MODELS

GIB = 2**30
MODEL = MODELS["llama-3-8b"]
# Of memory that is mapped; nothing touches it on the host, but a pool must not promise more than
# the machine has.
MOST_BYTES = 16 * GIB


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A layout of Llama-3-8B in bfloat16. ``page_bytes`` None: what the layout takes by default."""

    name: str
    what: str
    layout: str
    order: str = "NHD"
    page_bytes: int | None = None

    def config(self, device: str, rows: int, tokens: int, memory: int) -> vattn.CacheConfig:
        """Configure ``rows`` rows of up to ``tokens`` tokens each, nothing mapped ahead of need."""
        return vattn.CacheConfig(
            num_layers=MODEL.num_layers,
            layer_groups=MODEL.layer_groups,
            dtype="bfloat16",
            max_batch_size=rows,
            max_seq_len=tokens,
            device=device,
            memory=memory,
            layout=self.layout,
            order=self.order,
            page_bytes=self.page_bytes,
            lookahead=0,  # and so nothing populates: on the host no memory is touched
        )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a row consists of: its regions, and the tokens in a page of one."""

    regions: int
    page_bytes: int
    page_tokens: int

    @classmethod
    def of(cls, config: vattn.CacheConfig) -> Geometry:
        """Ask a cache of this configuration."""
        with vattn.init(config) as cache:
            return cls(
                regions=cache.regions_per_row,
                page_bytes=cache.page_bytes,
                page_tokens=cache.page_bytes * cache.regions_per_row // cache.token_bytes,
            )

    def pages(self, tokens: int) -> int:
        """Pages in each region that back this many tokens."""
        return -(-tokens // self.page_tokens)

    def row_bytes(self, tokens: int) -> int:
        """Physical memory that backs this many tokens of a row."""
        return self.regions * self.pages(tokens) * self.page_bytes


INTERLEAVED = (
    Variant(name="interleaved_NHD", what="interleaved NHD", layout="interleaved", page_bytes=2**21),
    Variant(
        name="interleaved_HND",
        what="interleaved HND",
        layout="interleaved",
        order="HND",
        page_bytes=2**21,
    ),
)
PER_LAYER = (
    Variant(name="per_layer_NHD", what="per_layer NHD", layout="per_layer"),
    Variant(name="per_layer_HND", what="per_layer HND", layout="per_layer", order="HND"),
)
# vAttention's: one tensor per layer on the stock driver's granularity.
PER_LAYER_2M = Variant(
    name="per_layer_NHD_2MiB", what="per_layer NHD", layout="per_layer", page_bytes=2**21
)


def variants(device: str) -> list[Variant]:
    """List what is compared on a device; on CUDA 2 MiB is what all take by default."""
    if device == "cpu":
        return [*INTERLEAVED, *PER_LAYER, PER_LAYER_2M]
    return [*INTERLEAVED, *PER_LAYER]


def _first_number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max": no limit


def memory_limit(device: str) -> int:
    """Bytes that a pool may be given: what the device has, at most 16 GiB."""
    if device == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = _first_number("/sys/fs/cgroup/memory.max")
        return min(MOST_BYTES, total if limit is None else min(limit, total))
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return min(MOST_BYTES, int(free * 0.8))


def rows_that_fit(wanted: int, row_bytes: int, regions: int, limit_bytes: int) -> int:
    """Halve ``wanted`` until memory and ``vm.max_map_count`` suffice; 0 if one row is too much.

    >>> rows_that_fit(64, row_bytes=2**28, regions=64, limit_bytes=2**33)
    32
    """
    # A region is up to three mappings: its pages, often two, and the rest of its addresses.
    most_regions = (_first_number("/proc/sys/vm/max_map_count") or 65_530) // 2 // 3
    rows = wanted
    while rows and (rows * row_bytes > limit_bytes or rows * regions > most_regions):
        rows //= 2
    return rows
