"""One ``step()`` with everything mapped: in C++, and from Python with each form of argument."""

from __future__ import annotations

import json
import os
import subprocess
import time
from functools import partial
from typing import Any

import numpy as np

import vattn
from benchmarks.common import (
    ROOT,
    Distribution,
    Measurement,
    Target,
    at_most,
    expect_calls,
    progress,
    time_calls,
)
from vattn import _C

ROWS = 256
TOKENS = 200  # less than a page holds on any device
GROWTH_BYTES = 2**30

# What a sample of the C++ program is, and the sample that it cannot fall below.
CPP_SAMPLES = {
    "clock": ("C++: reading the clock, part of every sample", None),
    "memcpy": ("C++: memcpy of 256 int64, 2 KiB", None),
    "lock": ("C++: locking and unlocking a free mutex", None),
    "step_lookahead_0": ("C++: step(), 256 rows, all mapped, lookahead 0", "memcpy"),
    "step_lookahead_16": ("C++: step(), 256 rows, all mapped, lookahead 16", "memcpy"),
    "page_fault": ("C++: first write to a 4 KiB page of a memfd", None),
    "mmap_whole": ("C++: mmap of all bytes at once", None),
    "mmap_neighbours": ("C++: mmap of 2 MiB after 2 MiB, neighbours in the file", None),
    "mmap_scattered": ("C++: mmap of 2 MiB after 2 MiB, scattered in the file", None),
    "madvise_pieces": ("C++: mmap of all bytes, then madvise of each 2 MiB", None),
}


def build_cpp() -> str:
    """Compile the C++ program; quick when nothing has changed."""
    jobs = f"-j{os.cpu_count()}"
    command = ["make", "-s", jobs, "-C", str(ROOT / "benchmarks" / "cpp")]
    subprocess.run(command, check=True, timeout=300)
    return str(ROOT / "build" / "bench" / "step_bench")


def measure_cpp(quick: bool) -> tuple[list[Measurement], list[Target]]:
    """Run the C++ program. Expected: 256 rows are four arrays of 2 KiB, so about 0.3 us."""
    n, growth = (200, 64 * 2**20) if quick else (20_000, GROWTH_BYTES)
    command = [build_cpp(), str(ROWS), str(n), str(growth)]
    output = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    result = json.loads(output.stdout)
    samples: dict[str, list[int]] = result["samples"]
    expect_calls(result["steps"], 2 * n, "C++ step()")
    measurements = [
        Measurement(name=name, what=what, ns=Distribution.of(samples[name]), limit=limit)
        for name, (what, limit) in CPP_SAMPLES.items()
    ]
    medians = {m.name: m.ns.median / 1e3 for m in measurements}
    return measurements, [at_most("step() in C++", medians["step_lookahead_16"], 1.0, "us")]


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


def _mapped_cache(device: str) -> vattn.KVCache:
    """A cache of 256 active rows with everything mapped."""
    config = vattn.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=64,
        dtype="float32",
        max_batch_size=ROWS,
        max_seq_len=4096,
        device=device,
        memory="1GiB" if device.startswith("cuda") else "128MiB",
    )
    cache = vattn.init(config)
    for _ in range(ROWS):
        cache.alloc(seq_len=TOKENS)
    cache.step([TOKENS] * ROWS)
    calls = -1
    while calls != cache.stats().calls("background"):
        calls = cache.stats().calls("background")
        time.sleep(0.05)
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
    with _mapped_cache(device) as cache:
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
