"""One ``step()`` without Python: a C++ program that is compiled here, and what its limits are."""

from __future__ import annotations

import json
import os
import subprocess

from vattn.bench.common import ROOT, Distribution, Measurement, Target, at_most, expect_calls
from vattn.bench.step.steady import ROWS

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
