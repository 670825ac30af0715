"""What ``KVCache.step`` costs: when all is mapped, when a row grows, and while decoding."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from vattn.bench import common
from vattn.bench.common import Measurement, Target
from vattn.bench.step import decode, growth, steady

Part = tuple[list[Measurement], list[Target]]


def main(
    arguments: list[str] | None = None,
    *,
    prog: str = "vattn bench step",
    host_floor: Callable[[bool], Part] | None = None,
) -> int:
    """Measure, print, save.

    ``host_floor(quick)`` measures what physics allows on the host; the source tree has one in C++.
    Exit status 1 if ``--check`` is given and a target was missed.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    common.add_arguments(parser)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    skipped = common.skip_reason(options.device)
    if skipped:
        common.console.print(f"step_latency on {options.device}: {skipped}")
        return 0
    env = common.environment(options.commit)
    floor = host_floor if options.device == "cpu" else None
    parts = [floor(options.quick)] if floor else []
    parts.append(steady.measure_python(options.device, options.quick))
    parts.append(growth.measure(options.device, options.quick, has_floor=floor is not None))
    parts.append(decode.measure(options.device, options.quick))
    measurements = [measurement for some, _ in parts for measurement in some]
    targets = [target for _, some in parts for target in some]
    common.print_measurements(f"step() on {options.device}", measurements)
    common.print_targets(targets)
    common.save("step_latency", options, env, measurements, targets)
    return 1 if options.check and not all(target.met for target in targets) else 0
