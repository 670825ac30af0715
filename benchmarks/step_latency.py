"""What ``KVCache.step`` costs: when all is mapped, when a row grows, and while decoding."""

from __future__ import annotations

import argparse
import sys

from benchmarks import common, decode, growth, steady


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save. Exit status 1 if ``--check`` is given and a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_latency", description=__doc__)
    common.add_arguments(parser)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    skipped = common.skip_reason(options.device)
    if skipped:
        common.console.print(f"step_latency on {options.device}: {skipped}")
        return 0
    env = common.environment(options.commit)
    on_host = options.device == "cpu"
    parts = [steady.measure_python(options.device, options.quick)]
    if on_host:
        parts.insert(0, steady.measure_cpp(options.quick))
    parts.append(growth.measure(options.device, options.quick, has_floor=on_host))
    parts.append(decode.measure(options.device, options.quick))
    measurements = [measurement for some, _ in parts for measurement in some]
    targets = [target for _, some in parts for target in some]
    common.print_measurements(f"step() on {options.device}", measurements)
    common.print_targets(targets)
    common.save("step_latency", options, env, measurements, targets)
    return 1 if options.check and not all(target.met for target in targets) else 0


if __name__ == "__main__":
    sys.exit(main())
