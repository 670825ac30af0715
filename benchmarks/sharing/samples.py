"""Part ``samples``: the memory of many samples of one prompt, beside that of one.

Everything is written and read as a model would, so that what vattn counts can be compared with what
the kernel has given: ``st_blocks`` of the file in memory that all pages come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import vattn
from benchmarks.hf_generate.memory import no_room
from benchmarks.hf_generate.results import Part
from benchmarks.sharing import shapes
from benchmarks.sharing.memory import flat_row, physical_bytes
from benchmarks.sharing.shapes import TOKEN_BYTES, make_cache
from vattn.bench.common import NothingMeasured, at_most, progress

GOAL = 1.05


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured. Each sample has ``own_tokens`` after the prompt."""

    prompts: tuple[int, ...] = (32768, 32768 - 7)  # whole pages; the last one partly filled
    layouts: tuple[str, ...] = shapes.LAYOUTS
    samples: int = 8
    own_tokens: int = 256


def measure(sizes: Sizes) -> Part:
    """Measure each prompt in each layout."""
    part = Part()
    cases = [(layout, prompt) for layout in sizes.layouts for prompt in sizes.prompts]
    for layout, prompt in progress(cases, "sampling from one prompt"):
        name = f"samples/{layout}/{prompt}"
        reason = no_room(_memory(prompt, sizes), "cpu")
        if reason:
            part.miss(name, "skipped", reason)
        else:
            _measure(part, layout, prompt, sizes)
    return part


def _memory(prompt: int, sizes: Sizes) -> int:
    """Twice what is expected: what is missed shall be measured too."""
    return 2 * (prompt + sizes.samples * (sizes.own_tokens + shapes.PAGE_TOKENS)) * TOKEN_BYTES


def _measure(part: Part, layout: str, prompt: int, sizes: Sizes) -> None:
    nobody = physical_bytes()
    end = prompt + sizes.own_tokens
    cache = make_cache(layout, rows=sizes.samples, tokens=end + 1, memory=_memory(prompt, sizes))
    with cache:
        first = cache.alloc()
        cache.step({first: prompt})
        for view in flat_row(cache, first, prompt):
            view.fill_(-1)
        one, one_physical = cache.stats().mapped_bytes, physical_bytes() - nobody
        rows = [first, *cache.fork(first, n=sizes.samples - 1)]
        forked = cache.stats()
        cache.step(dict.fromkeys(rows, end))
        for row in rows:
            _write_own(cache, row, prompt, end)
        _check_contents(cache, rows, prompt, end)
        all_, all_physical = cache.stats(), physical_bytes() - nobody
        cache.check()
    own = sizes.samples * sizes.own_tokens * TOKEN_BYTES
    if forked.aliased_bytes == 0 or one == 0 or one_physical == 0:
        raise NothingMeasured(f"{sizes.samples} samples of {prompt} tokens share no byte")
    part.rows.append(
        {
            "layout": layout,
            "prompt_tokens": prompt,
            "samples": sizes.samples,
            "own_bytes": own,
            "one_mapped_bytes": one,
            "one_physical_bytes": one_physical,
            "forked_mapped_bytes": forked.mapped_bytes,
            "all_mapped_bytes": all_.mapped_bytes,
            "all_physical_bytes": all_physical,
            "all_aliased_bytes": all_.aliased_bytes,
            "mapped_ratio": (all_.mapped_bytes - own) / one,
            "physical_ratio": (all_physical - own) / one_physical,
        }
    )
    case = f"{sizes.samples} samples of {prompt} tokens, {layout}"
    for kind in ("mapped", "physical"):
        measured = part.rows[-1][f"{kind}_ratio"]
        part.targets.append(
            at_most(f"{case}: {kind} bytes without own tokens", measured, GOAL, "of one")
        )


def _write_own(cache: vattn.KVCache, row: int, prompt: int, end: int) -> None:
    for view in flat_row(cache, row, end):
        view[prompt * view.numel() // end :] = row + 1


def _check_contents(cache: vattn.KVCache, rows: Sequence[int], prompt: int, end: int) -> None:
    """Every sample reads the prompt and its own tokens: no figure for memory that is not there."""
    for row in rows:
        for view in flat_row(cache, row, end):
            cut = prompt * view.numel() // end
            for part, value in ((view[:cut], -1), (view[cut:], row + 1)):
                least, most = part.aminmax()
                if not least == most == value:
                    raise NothingMeasured(f"row {row} does not read the prompt and its own tokens")
