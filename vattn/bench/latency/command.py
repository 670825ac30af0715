"""What each driver call costs: by size, one handle or many, access set per run or per page.

Through vattn's own driver, and side by side through mmap (ctypes) or the CUDA driver (cuda-python);
from one thread and two, beside compute, for first use and re-use, and in vAttention's own loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from vattn.bench import common
from vattn.bench.common import Measurement, NothingMeasured, console
from vattn.bench.latency import (
    computing,
    floors,
    loop,
    measure,
    published,
    reuse,
    tables,
    together,
)
from vattn.bench.latency.calls import MIB, free_bytes, kind_of
from vattn.bench.latency.raw import RawVmm

PARTS = ("sizes", "threads", "compute", "reuse", "vattention")
QUICK_SIZES = {"cpu": [512 * 2**10, 2 * MIB], "cuda": [8 * MIB, 32 * MIB]}
QUICK_REQUESTS = 2


def _parse(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    common.add_arguments(parser)
    parser.add_argument(
        "-n",
        type=int,
        default=100,
        help="repetitions (default: 100); fewer, as a line's n says, where they take long",
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="what to measure (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        raise ValueError(f"--parts names {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    if options.n < 1:
        raise ValueError(f"-n is {options.n}, expected at least 1")
    return options


class _Run:
    """One run of the benchmark: each part measures, prints and remembers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device: str = options.device
        self.kind = kind_of(options.device)
        self.quick: bool = options.quick
        self.n: int = 3 if options.quick else options.n
        self.raw, self.raw_name = measure.open_raw(options.device)
        self.requests = loop.requests_that_fit(free_bytes(self.device))
        if self.quick:
            self.requests = min(self.requests, QUICK_REQUESTS)
        self.measurements: list[Measurement] = []
        self.by_size: list[Measurement] = []

    def floors(self) -> None:
        used = {*self._sizes(), *reuse.SIZES[self.kind]}
        filled = sorted(size for size in used if size <= measure.LARGEST_POPULATED)
        found = floors.measure(self.kind, self.raw, filled, self.n)
        self.measurements += found
        if found:
            common.print_measurements("The least that anything costs here", found)

    def _sizes(self) -> list[int]:
        return QUICK_SIZES[self.kind] if self.quick else measure.SIZES[self.kind]

    def sizes(self) -> None:
        self.by_size = measure.measure(self.device, self.raw, self._sizes(), self.n)
        self.measurements += self.by_size
        title = f"Median, all calls for the size together; raw: {self.raw_name}. map of vattn "
        cuda = self.kind == "cuda"
        title += "includes set_access" if cuda else "includes madvise(MADV_HUGEPAGE)"
        tables.print_sizes(title, self.by_size, published=cuda)

    def threads(self) -> None:
        sizes = together.SIZES[:1] if self.quick else together.SIZES
        found = together.measure(self.device, self.raw, self.n, sizes=sizes)
        self.measurements += found
        title = "The same calls from one thread, and from two at once on ranges of their own"
        tables.print_pairs(title, together.STATES, found, together.CAPTION)

    def compute(self) -> None:
        sizes = computing.SIZES[:1] if self.quick else computing.SIZES
        work = computing.open_work(self.device)
        found = computing.measure(self.device, self._raw(), self.n, work=work, sizes=sizes)
        self.measurements += found
        title = "The same calls while nothing is computed, and while something is"
        tables.print_pairs(title, computing.STATES, found, computing.CAPTION)

    def reuse(self) -> None:
        sizes = reuse.SIZES[self.kind][: 2 if self.quick else None]
        found = reuse.measure(self.device, self._raw(), self.n, sizes=sizes)
        self.measurements += found
        named = {m.limit for m in found} - {m.name for m in found}
        limits = [m for m in self.measurements if m.name in named]
        common.print_measurements("First use of a handle, and re-use", [*limits, *found])

    def vattention(self) -> None:
        rounds = 1 if self.quick else loop.ROUNDS
        found = loop.measure(self.device, self.raw, requests=self.requests, rounds=rounds)
        self.measurements += found
        loop.print_table(self.requests, self.device, self.raw_name, found)

    def why_skip(self, part: str) -> str | None:
        """Say what a part lacks; None if it can be measured."""
        if self.raw is None and part in ("compute", "reuse"):
            return self.raw_name
        if self.requests < 1 and part == "vattention":
            return "there is no memory for one request of vAttention's loop"
        return None

    def _raw(self) -> RawVmm:
        assert self.raw is not None, "why_skip() said so"
        return self.raw

    def picture(self, stem: Path) -> None:
        try:
            from vattn.bench.latency import picture
        except ImportError as error:
            console.print(f"no picture: {error}")
            return
        floor = [m.ns.median for m in self.measurements if m.name == floors.CALL]
        for path in picture.draw(self.device, self.by_size, floor, stem):
            console.print(f"written: {path}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None, *, prog: str = "vattn bench latency") -> int:
    """Measure, print, save. Exit status 1 if a part could not be measured."""
    options = _parse(arguments, prog)
    skipped = common.skip_reason(options.device)
    if skipped:
        console.print(f"vmm_latency on {options.device}: {skipped}")
        return 0
    env = common.environment(options.commit)
    run = _Run(options)
    if run.kind == "cuda" and run.raw is not None and run.raw.page_bytes != published.PAGE_BYTES:
        console.print(f"granularity is {run.raw.page_bytes} bytes, not 2 MiB")
    parts: dict[str, Callable[[], None]] = {part: getattr(run, part) for part in PARTS}
    lacking = {part: run.why_skip(part) for part in PARTS if part in options.parts}
    not_measured: dict[str, str] = {}
    run.floors()
    for part, why in lacking.items():
        if why is not None:
            console.print(f"{part}: skipped: {why}")
            continue
        try:
            parts[part]()
        except NothingMeasured as error:
            not_measured[part] = str(error)
            console.print(f"[red]{part}: nothing was measured:[/] {error}")
    mappings = run.requests * loop.REGIONS
    path = common.save(
        "vmm_latency",
        options,
        env,
        run.measurements,
        raw=run.raw_name,
        parts=options.parts,
        skipped={part: why for part, why in lacking.items() if why is not None},
        not_measured=not_measured,
        bandwidth_gb_per_s=floors.bandwidth_gb_s(run.measurements),
        vattention_mappings=mappings,
        vattention_scaled_down=run.requests < loop.REQUESTS,
        **published.record(mappings),
    )
    if run.by_size:
        run.picture(path.with_suffix(""))
    return 1 if not_measured else 0
