"""The command line: ``vattn COMMAND``, the same as ``python -m vattn COMMAND``."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from vattn import __version__
from vattn.errors import DriverError


class Command(NamedTuple):
    """A command: where its ``main(arguments, prog)`` is, and what it is for."""

    module: str
    summary: str
    function: str = "main"


# Imported only when called: most of them need more than the library does.
COMMANDS = {
    "doctor": Command("vattn.doctor.command", "what this machine offers, and what to do about it"),
    "bench latency": Command("vattn.bench.latency.command", "what each driver call costs"),
    "bench step": Command("vattn.bench.step.command", "what KVCache.step costs"),
    "bench attention": Command(
        "vattn.bench.attention.command", "attention over vattn's tensors, and over others"
    ),
    "replay": Command("vattn.replay.command", "a trace of requests through the allocator"),
    "plan": Command("vattn.plan.command", "what a model's KV cache needs, and what fits"),
    "vllm list": Command(
        "vattn.integrations.vllm.command", "vLLM engines that run here with vattn", "main_list"
    ),
    "vllm budget": Command(
        "vattn.integrations.vllm.command", "show or change the memory of one", "main_budget"
    ),
}


def usage(group: str = "") -> str:
    """List the commands, all or those of a group such as "bench"."""
    shown = {name: c.summary for name, c in COMMANDS.items() if name.startswith(group)}
    width = max(len(name) for name in shown)
    lines = [f"  vattn {name:<{width}}  {summary}" for name, summary in shown.items()]
    return "\n".join(
        [f"vattn {__version__}", "", *lines, "", "vattn COMMAND --help lists its options."]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns
    -------
    int
        Exit status: what the command returned; 2 for a command that does not exist, bad input, or
        something that is not installed, after one sentence on stderr; 130 if interrupted.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] in (["-V"], ["--version"]):
        print(f"vattn {__version__}")
        return 0
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return _run(name, words[length:])
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    rest = words[1:] if group else words
    if rest and rest[0] not in ("-h", "--help"):
        print(f"vattn has no command {' '.join(words[:2])!r}\n\n{usage(group)}", file=sys.stderr)
        return 2
    print(usage(group))
    return 0 if rest or not words else 2


def _run(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    try:
        main = getattr(importlib.import_module(command.module), command.function)
        status: int = main(arguments, prog=f"vattn {name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "vattn":
            raise
        message = f"it needs {error.name}; install it with: pip install 'vattn[cli]'"
    except (ValueError, OSError, MemoryError, DriverError) as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"vattn {name}: interrupted", file=sys.stderr)
        return 130
    else:
        return status
    print(f"vattn {name}: {message}", file=sys.stderr)
    return 2
