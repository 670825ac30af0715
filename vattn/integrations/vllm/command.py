"""``vattn vllm list`` and ``vattn vllm budget``: the memory of running vLLM engines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from vattn.integrations.vllm.channel import RemoteError
from vattn.integrations.vllm.control import InstanceStatus, instances, set_budget, status
from vattn.units import format_bytes


def main_list(arguments: list[str] | None = None, *, prog: str = "vattn vllm list") -> int:
    """List the engines of this user. Exit status 0, also if there is none."""
    parser = argparse.ArgumentParser(
        prog=prog, description="vLLM engines that run here with vattn. Sizes are per worker (GPU)."
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    options = parser.parse_args(arguments)
    found = instances()
    if options.json:
        print(json.dumps([asdict(instance) for instance in found], indent=1))
    elif found:
        print(_table(found))
    else:
        print("no vLLM engine of this user is running with vattn")
    return 0


def main_budget(arguments: list[str] | None = None, *, prog: str = "vattn vllm budget") -> int:
    """Show or set a budget. Exit status 1 if the engine failed to do it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show, or change, how much physical memory the KV cache of a running vLLM "
        "engine may take on each worker (GPU).",
    )
    parser.add_argument(
        "size", nargs="?", metavar="SIZE", help="such as 8GiB; without it the budget is shown"
    )
    parser.add_argument("--name", help="of the engine; not needed if only one is running")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    options = parser.parse_args(arguments)
    try:
        if options.size is None:
            found = status(options.name)
        else:
            found = set_budget(options.size, name=options.name)
    except RemoteError as error:
        print(f"{prog}: the engine failed: {error} ({error.kind})", file=sys.stderr)
        return 1
    print(json.dumps(asdict(found), indent=1) if options.json else _sentences(found))
    return 0


def _state(instance: InstanceStatus) -> str:
    return "idle" if instance.idle else f"{instance.running_requests} running"


def _table(found: Sequence[InstanceStatus]) -> str:
    lines = [("name", "mode", "budget", "mapped", "state")]
    lines += [
        (i.name, i.mode, format_bytes(i.budget_bytes), format_bytes(i.mapped_bytes), _state(i))
        for i in found
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _sentences(found: InstanceStatus) -> str:
    lines = [
        f"{found.name} ({found.mode}, process {found.pid}, {_state(found)}), per worker:",
        f"  budget  {format_bytes(found.budget_bytes)}",
        f"  mapped  {format_bytes(found.mapped_bytes)}",
        f"  floor   {format_bytes(found.floor_bytes)}, kept when idle",
        f"  accepts {format_bytes(found.minimum_bytes)} to {format_bytes(found.ceiling_bytes)}",
    ]
    if found.mapped_bytes > found.budget_bytes:
        over = format_bytes(found.mapped_bytes - found.budget_bytes)
        lines.append(f"  {over} above the budget follow as requests end")
    return "\n".join(lines)
