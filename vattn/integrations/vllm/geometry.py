"""Where blocks lie in vLLM's KV buffer, and on which pages: arithmetic only.

vLLM allocates one buffer for all layers. Layer ``l`` of block ``b`` starts at ``offset + l *
layer_stride + b * block_stride`` (``vllm/v1/worker/utils.py: allocate_kv_cache``). A *frame* is a
run of consecutive blocks that get and lose memory together: about one page in each stripe. Where
strides are no multiple of the page, neighbouring frames have a page in common.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Layouts in which every page of a layer is one piece: a block's bytes are then one run per layer.
LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")


@dataclass(frozen=True)
class Stripe:
    """One layer's blocks: block ``b`` is ``length`` bytes from ``offset + b * stride`` on."""

    offset: int
    stride: int
    length: int


def blocks_per_frame(block_bytes: int, page_bytes: int) -> int:
    """Blocks that fill about one page, so that they are backed together."""
    return max(1, page_bytes // block_bytes)


@dataclass(frozen=True)
class Geometry:
    """Blocks, frames and pages of one KV buffer."""

    num_blocks: int
    frame_blocks: int
    page_bytes: int
    n_pages: int
    stripes: tuple[Stripe, ...]

    @classmethod
    def of(cls, config: KVCacheConfig, page_bytes: int, frame_blocks: int) -> Geometry:
        """Read the buffer's plan.

        Raises
        ------
        ValueError
            A layout that scatters a block over the buffer.
        """
        if config.kv_cache_layout not in (None, *LAYOUTS):
            raise ValueError(
                f"the KV cache layout is {config.kv_cache_layout}, in which a block is scattered "
                f"over the buffer; set VLLM_KV_CACHE_LAYOUT to one of {', '.join(LAYOUTS)} that "
                "the attention backend supports"
            )
        stripes = tuple(
            Stripe(
                tensor.offset + layer * tensor.layer_stride,
                tensor.block_stride,
                min(tensor.layer_stride, tensor.block_stride),
            )
            for tensor in config.kv_cache_tensors
            for layer in range(len(tensor.layers))
        )
        size = config.kv_cache_tensors[0].size
        return cls(config.num_blocks, frame_blocks, page_bytes, -(-size // page_bytes), stripes)

    @property
    def n_frames(self) -> int:
        """Frames of the buffer; the last one may have fewer blocks."""
        return -(-self.num_blocks // self.frame_blocks)

    def blocks_of(self, frame: int) -> range:
        """Blocks of a frame."""
        first = frame * self.frame_blocks
        return range(first, min(first + self.frame_blocks, self.num_blocks))

    def frame_of(self, block: int) -> int:
        """Frame that a block is in."""
        return block // self.frame_blocks

    def pages_of(self, frame: int) -> NDArray[np.int64]:
        """Pages that the blocks of a frame touch, ascending, each once."""
        return np.unique(self.uses_by([frame]))

    def uses_by(self, frames: Iterable[int]) -> NDArray[np.int64]:
        """Pages that the blocks of frames touch: once for each frame and stripe that does."""
        starts = np.fromiter(frames, np.int64) * self.frame_blocks
        return self._touched(starts, np.minimum(starts + self.frame_blocks, self.num_blocks))

    def pages_of_blocks(self, blocks: range) -> NDArray[np.int64]:
        """Pages that consecutive blocks touch, ascending, each once."""
        return np.unique(self._touched(np.array([blocks.start]), np.array([blocks.stop])))

    def _touched(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
        offset, stride, length = self._columns
        first = (offset + starts[:, None] * stride).ravel() // self.page_bytes
        last = (offset + (stops[:, None] - 1) * stride + length - 1).ravel() // self.page_bytes
        counts = last - first + 1
        # The pages of each run one after the other: 0, 1, 2 ... counted from where it begins.
        begins = np.cumsum(counts) - counts
        pages: NDArray[np.int64] = np.repeat(first - begins, counts) + np.arange(counts.sum())
        return pages

    @cached_property
    def _columns(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        rows = np.array([(s.offset, s.stride, s.length) for s in self.stripes], np.int64)
        return rows[:, 0], rows[:, 1], rows[:, 2]

    @property
    def max_frame_pages(self) -> int:
        """Most pages that a frame can touch."""
        return max(len(self.pages_of(frame)) for frame in self._sample())

    def _sample(self) -> range:
        # Where in a page a frame starts repeats; a few hundred frames show every case that occurs.
        return range(min(self.n_frames, 512))


def permanent_pages(
    geometry: Geometry, row_frames: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pages that always have memory: the null block's, which kernels touch in dummy runs.

    Parameters
    ----------
    geometry : Geometry
        Of the buffer.
    row_frames : int, optional
        Frames of row 0, all of which kernels may read as one long request. None: they read the null
        block only.

    Returns
    -------
    own, shared
        Pages with memory of their own, and pages that may all be one. A page that other rows have a
        part of cannot be shared.
    """
    if row_frames is None:
        return geometry.pages_of_blocks(range(1)), np.zeros(0, np.int64)
    row = geometry.pages_of_blocks(range(row_frames * geometry.frame_blocks))
    others = geometry.pages_of_blocks(
        range(row_frames * geometry.frame_blocks, geometry.num_blocks)
    )
    return np.intersect1d(row, others), np.setdiff1d(row, others)


def runs_of(pages: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Write ascending pages as (first, count) of neighbours.

    Examples
    --------
    >>> runs_of(np.array([3, 4, 5, 9]))
    [(3, 3), (9, 1)]
    """
    if len(pages) == 0:
        return []
    starts = np.flatnonzero(np.diff(pages, prepend=pages[0] - 2) != 1)
    counts = np.diff(starts, append=len(pages))
    return [(int(pages[s]), int(c)) for s, c in zip(starts, counts, strict=True)]
