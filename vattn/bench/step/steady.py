"""One ``step()`` with everything mapped, from Python, with each form of argument."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import vattn
from vattn import _C
from vattn.bench.common import (
    Distribution,
    Measurement,
    Target,
    at_most,
    expect_calls,
    progress,
    time_calls,
)
from vattn.bench.step.timed import wait_until_quiet

ROWS = 256
TOKENS = 200  # less than a page holds on any device


def _arguments() -> dict[str, list[Any]]:
    """Eight batches of lengths in every form that step() takes."""
    import torch

    random = np.random.default_rng(0)
    batches = [random.integers(1, TOKENS, ROWS) for _ in range(8)]
    return {
        "int64": [batch.astype(np.int64) for batch in batches],
        "int32": [batch.astype(np.int32) for batch in batches],
        "list": [batch.tolist() for batch in batches],
        "tensor": [torch.from_numpy(batch.astype(np.int64)) for batch in batches],
        "dict": [dict(enumerate(batch.tolist())) for batch in batches],
    }


def mapped_cache(device: str, rows: int = ROWS) -> vattn.KVCache:
    """Make a cache of active rows, each with memory for ``TOKENS`` tokens and the lookahead."""
    row_bytes = 4 * 2**20 if device.startswith("cuda") else 2**19  # more than a row maps
    config = vattn.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=64,
        dtype="float32",
        max_batch_size=rows,
        max_seq_len=4096,
        device=device,
        memory=rows * row_bytes,
    )
    cache = vattn.init(config)
    for _ in range(rows):
        cache.alloc(seq_len=TOKENS)
    cache.step([TOKENS] * rows)
    wait_until_quiet(cache)
    return cache


def measure_python(device: str, quick: bool) -> tuple[list[Measurement], list[Target]]:
    """Time ``cache.step(argument)``. Expected: C++'s time and twice that of an empty call."""
    rounds, per_round = (2, 20) if quick else (40, 250)
    arguments = _arguments()
    two_kib = np.zeros(ROWS, np.int64)
    functions: dict[str, Any] = {
        "empty_call": (_C.set_log_level, [1], "Python: an empty pybind11 call"),
        "copyto": (partial(np.copyto, two_kib), arguments["int64"], "Python: np.copyto of 2 KiB"),
    }
    with mapped_cache(device) as cache:
        for form, batches in arguments.items():
            functions[form] = (cache.step, batches, f"Python: step({form}), 256 rows, all mapped")
        samples: dict[str, list[int]] = {name: [] for name in functions}
        before = cache.stats()
        # In turns, so that what disturbs one disturbs all.
        for _ in progress(range(rounds), "step() from Python"):
            for name, (function, batches, _) in functions.items():
                samples[name] += time_calls(function, batches, per_round)
        after = cache.stats()
    steps = len(arguments) * rounds * per_round
    expect_calls(after.steps - before.steps, steps, "step() from Python")
    if after.calls("step") != before.calls("step"):
        raise RuntimeError("a step() with everything mapped called the driver")
    limits = {"empty_call": None, "copyto": None}
    measurements = [
        Measurement(
            name=f"python_{name}",
            what=what,
            ns=Distribution.of(samples[name]),
            limit=limits.get(name, "python_empty_call"),
        )
        for name, (_, _, what) in functions.items()
    ]
    medians = {m.name: m.ns.median / 1e3 for m in measurements}
    return measurements, [
        at_most("step(int64 array) from Python", medians["python_int64"], 3.0, "us"),
        at_most("step(list) from Python", medians["python_list"], 10.0, "us"),
    ]
