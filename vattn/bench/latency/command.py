"""What each driver call costs: by size, one handle or many, access set per run or per page.

Through vattn's own driver, and side by side through mmap (ctypes) or the CUDA driver (cuda-python).
"""

from __future__ import annotations

import argparse

from vattn.bench import common
from vattn.bench.latency.measure import (
    PIECE,
    PUBLISHED_2M_US,
    SIZES,
    measure,
    open_raw,
    print_table,
)


def main(arguments: list[str] | None = None, *, prog: str = "vattn bench latency") -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    common.add_arguments(parser)
    parser.add_argument("-n", type=int, default=100, help="repetitions (default: 100)")
    options = parser.parse_args(arguments)
    skipped = common.skip_reason(options.device)
    if skipped:
        common.console.print(f"vmm_latency on {options.device}: {skipped}")
        return 0
    env = common.environment(options.commit)
    kind = "cpu" if options.device == "cpu" else "cuda"
    raw, beside = open_raw(options.device)
    n, sizes = (3, SIZES[kind][1:3]) if options.quick else (options.n, SIZES[kind])
    measurements = measure(options.device, raw, sizes, n)
    if kind == "cuda" and raw is not None and raw.page_bytes != PIECE["cuda"]:
        common.console.print(f"granularity is {raw.page_bytes} bytes, not 2 MiB")
    title = f"Median of n = {n}, all calls for the size together; raw: {beside}. map of vattn "
    title += "includes set_access" if kind == "cuda" else "includes madvise(MADV_HUGEPAGE)"
    print_table(title, measurements, published=kind == "cuda")
    published = {call: us * 1000 for call, us in PUBLISHED_2M_US.items()}
    source = "vAttention, arXiv 2405.04437v3, Table 3, column 2M, A100"
    published_ns = {"source": source, **published}
    common.save("vmm_latency", options, env, measurements, raw=beside, published_ns=published_ns)
    return 0
