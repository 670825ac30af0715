"""Which pages blocks lie on, against a map of every byte."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from vattn.integrations.vllm.geometry import (
    LAYOUTS,
    Geometry,
    blocks_per_frame,
    permanent_pages,
    runs_of,
)


@dataclass
class Tensor:
    """As vLLM's KVCacheTensor."""

    size: int
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0


@dataclass
class Config:
    """As much of vLLM's KVCacheConfig as a geometry reads."""

    num_blocks: int
    kv_cache_tensors: list[Tensor]
    kv_cache_layout: str | None = "LBNHC"


def tensor(layout: str, num_blocks: int, layers: int, block: int, **more: Any) -> Tensor:
    """One tensor of ``layers`` layers whose blocks have ``block`` bytes in each."""
    outermost = layout.startswith("L")
    return Tensor(
        size=num_blocks * layers * block,
        layers=[str(n) for n in range(layers)],
        layer_stride=block * num_blocks if outermost else block,
        block_stride=block if outermost else block * layers,
        **more,
    )


def pages_of_bytes(config: Config, block: int, page_bytes: int, block_bytes: int) -> set[int]:
    """Pages of a block, byte by byte, from vLLM's formula."""
    return {
        (t.offset + layer * t.layer_stride + block * t.block_stride + byte) // page_bytes
        for t in config.kv_cache_tensors
        for layer in range(len(t.layers))
        for byte in range(block_bytes)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_blocks", [1, 12, 13])
@pytest.mark.parametrize("block_bytes", [16, 24, 64, 100])
@pytest.mark.parametrize("layers", [1, 3])
def test_pages_are_those_of_the_bytes(
    layout: str, num_blocks: int, block_bytes: int, layers: int
) -> None:
    page_bytes = 64
    config = Config(num_blocks, [tensor(layout, num_blocks, layers, block_bytes)], layout)
    stride = config.kv_cache_tensors[0].block_stride
    geometry = Geometry.of(config, page_bytes, blocks_per_frame(stride, page_bytes))  # type: ignore[arg-type]
    assert geometry.n_pages * page_bytes >= config.kv_cache_tensors[0].size
    assert (geometry.n_pages - 1) * page_bytes < config.kv_cache_tensors[0].size
    seen = []
    for frame in range(geometry.n_frames):
        blocks = geometry.blocks_of(frame)
        expected = set().union(
            *(pages_of_bytes(config, block, page_bytes, block_bytes) for block in blocks)
        )
        found = geometry.pages_of(frame)
        assert found.tolist() == sorted(expected)
        assert len(found) <= geometry.max_frame_pages
        assert all(geometry.frame_of(block) == frame for block in blocks)
        seen += list(blocks)
    assert seen == list(range(num_blocks))


def test_several_tensors_lie_behind_each_other_or_over_each_other() -> None:
    first = tensor("LBNHC", 12, 2, 24)
    over = tensor("LBNHC", 12, 2, 24)
    behind = tensor("LBNHC", 12, 1, 40, offset=first.size)
    for tensors in ([first, over], [first, behind]):
        config = Config(12, tensors)
        geometry = Geometry.of(config, 64, 2)  # type: ignore[arg-type]
        for frame in range(geometry.n_frames):
            expected = {
                (t.offset + layer * t.layer_stride + block * t.block_stride + byte) // 64
                for t in tensors
                for layer in range(len(t.layers))
                for block in geometry.blocks_of(frame)
                for byte in range(t.block_stride)
            }
            assert geometry.pages_of(frame).tolist() == sorted(expected)


def test_a_layout_that_scatters_blocks_is_refused() -> None:
    config = Config(4, [tensor("LBNHC", 4, 1, 64)], "LHBNC")
    with pytest.raises(ValueError, match=r"layout is LHBNC.*set VLLM_KV_CACHE_LAYOUT to one of"):
        Geometry.of(config, 64, 1)  # type: ignore[arg-type]


def test_a_frame_fills_about_a_page() -> None:
    assert blocks_per_frame(16, 64) == 4
    assert blocks_per_frame(24, 64) == 2
    assert blocks_per_frame(64, 64) == 1
    assert blocks_per_frame(100, 64) == 1


def test_the_null_blocks_pages_stay() -> None:
    geometry = Geometry.of(Config(12, [tensor("LBNHC", 12, 2, 100)]), 64, 1)  # type: ignore[arg-type]
    own, shared = permanent_pages(geometry, None)
    assert own.tolist() == [0, 1, 18, 19, 20]
    assert shared.tolist() == []


def test_row_0_shares_the_pages_that_no_other_row_has_a_part_of() -> None:
    geometry = Geometry.of(Config(12, [tensor("LBNHC", 12, 2, 100)]), 64, 1)  # type: ignore[arg-type]
    # Row 0 is bytes 0 to 299 and 1200 to 1499; the buffer's other bytes belong to other rows.
    own, shared = permanent_pages(geometry, 3)
    assert own.tolist() == [4, 18, 23]
    assert shared.tolist() == [0, 1, 2, 3, 19, 20, 21, 22]


def test_runs_hold_each_page_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        pages = np.flatnonzero(rng.random(40) < 0.5)
        runs = runs_of(pages)
        assert [page for first, n in runs for page in range(first, first + n)] == pages.tolist()
        assert all(a + n < b for (a, n), (b, _) in pairwise(runs))
