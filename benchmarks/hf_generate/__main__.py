"""What HuggingFace generate costs with DynamicCache, StaticCache and VAttnCache, in one run.

Parts: ``update``, one token into the cache; ``generate``, a decode with each cache and attention;
``batching``, many requests of different lengths. The model has random weights, so nothing is
downloaded. Takes about 25 minutes on two cores. Besides the JSON file it draws a picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.hf_generate import batching, generate, report, turns, update
from benchmarks.hf_generate.model import Shape
from benchmarks.hf_generate.results import Part
from vattn.bench import common

PARTS = ("update", "batching", "generate")  # in this order


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hf_generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_arguments(parser)
    parser.set_defaults(out=RESULTS)
    parser.add_argument("--smoke", dest="quick", action="store_true", help="the same as --quick")
    parser.add_argument("--parts", type=_names, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--contexts", type=_numbers, help="tokens, such as 8192,32768")
    parser.add_argument("--batches", type=_numbers, help="rows of generate, such as 1,4")
    parser.add_argument("--dtypes", type=_names, help="such as float32,bfloat16")
    parser.add_argument("--rounds", type=int, help="of generate, with the first context and batch")
    parser.add_argument("--tokens", type=int, help="that generate makes at most in a round")
    parser.add_argument(
        "--deadline", type=float, default=1440, help="seconds after which nothing more is started"
    )
    shape = parser.add_argument_group("the model of update and generate")
    for field in fields(Shape):
        option = "--" + field.name.replace("_", "-")
        shape.add_argument(option, type=int, help=f"default: {field.default}")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}")
    return options


def _sizes(options: argparse.Namespace) -> tuple[Shape, update.Sizes, generate.Sizes]:
    """Say how much is measured: by the device, --quick, and the options given."""
    shape, of_update, of_generate = Shape(), update.Sizes(), generate.Sizes()
    if options.device.startswith("cuda"):
        of_update = replace(of_update, batches=(1, 16))
        of_generate = replace(of_generate, contexts=(8192, 32768, 65536), tokens=65)
    if options.quick:
        shape = Shape(
            layers=2, heads=4, kv_heads=2, head_dim=16, hidden_size=64, intermediate_size=128
        )
        of_update = replace(of_update, context=64, turns=2, per_turn=2, copied_bytes=2**20)
        of_generate = replace(
            of_generate, contexts=(64,), batches=(1, 2), tokens=4, heap_tokens=4, rounds=1
        )
    given = {name: value for name, value in vars(options).items() if value is not None}
    shape = replace(shape, **{f.name: given[f.name] for f in fields(Shape) if f.name in given})
    own = {f.name: given[f.name] for f in fields(generate.Sizes) if f.name in given}
    of_update = replace(of_update, dtypes=own.get("dtypes", of_update.dtypes))
    return shape, of_update, replace(of_generate, **own)


def _measure(
    options: argparse.Namespace,
    shape: Shape,
    of_update: update.Sizes,
    of_generate: generate.Sizes,
) -> dict[str, Part]:
    """Run the chosen parts and print the tables of each when it is done."""
    deadline = time.monotonic() + options.deadline
    parts = {}
    if "update" in options.parts:
        part = parts["update"] = update.measure(shape, of_update, options.device)
        common.print_measurements(
            f"One token into the cache, on {options.device}", part.measurements
        )
        report.print_update(part.rows)
    if "batching" in options.parts:
        part = parts["batching"] = batching.measure(options.quick, options.device, deadline)
        report.print_batching(part.rows)
    if "generate" in options.parts:
        part = parts["generate"] = generate.measure(shape, of_generate, options.device, deadline)
        report.print_generate(part.rows, part.measurements, shape)
    return parts


def _draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    try:
        from benchmarks.hf_generate import picture
    except ImportError as error:
        common.console.print(f"no picture: {error}", markup=False, highlight=False)
        return
    picture.draw(rows, device, path)
    common.console.print(f"written: {path}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, save, draw."""
    options = _parse(arguments)
    skipped = common.skip_reason(options.device)
    if skipped:
        common.console.print(f"hf_generate on {options.device}: {skipped}")
        return 0
    env = common.environment(options.commit)
    turns.preload("benchmarks.hf_generate.__main__")
    shape, of_update, of_generate = _sizes(options)
    parts = _measure(options, shape, of_update, of_generate)
    measurements = [measurement for part in parts.values() for measurement in part.measurements]
    targets = [target for part in parts.values() for target in part.targets]
    missing = [entry for part in parts.values() for entry in part.missing]
    if targets:
        common.print_targets(targets)
    more = {name: part.rows for name, part in parts.items()}
    sizes = {"update": asdict(of_update), "generate": asdict(of_generate)}
    notes = {"model": asdict(shape), "about_the_model": report.mlp_note(shape), "sizes": sizes}
    path = common.save(
        "hf_generate", options, env, measurements, targets, missing=missing, **notes, **more
    )
    if more.get("generate"):
        _draw(more["generate"], options.device, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
