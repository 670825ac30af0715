"""How subjects take turns: there and back, each measurement in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")

_LEAVE_S = 30  # for a child that is done to clean up after itself

# Forked from a server that has imported torch, but has used no thread and no device yet.
_CONTEXT = multiprocessing.get_context("forkserver")


class ChildFailed(RuntimeError):
    """A measurement did not come to its end."""


def preload(*modules: str) -> None:
    """Let the server import these, so that a child starts at once. Before the first child."""
    # An import that asks whether there is a GPU must not make CUDA unusable after a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    _CONTEXT.set_forkserver_preload(list(modules))


def there_and_back(rounds: Mapping[Item, int]) -> list[Item]:
    """Put items in turns, each as often as it says; every second turn goes backwards."""
    order: list[Item] = []
    for turn in range(max(rounds.values())):
        items = [item for item, n in rounds.items() if n > turn]
        order += reversed(items) if turn % 2 else items
    return order


def in_child(
    function: Callable[..., Iterator[Any]], *arguments: Any, limit_s: float
) -> Iterator[Any]:
    """Run a generator in a new process: memory starts clean and is all given back.

    Raises ChildFailed if it fails, dies, or takes more than ``limit_s`` to the next item.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send_all, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(limit_s):
                raise ChildFailed(f"nothing came for {limit_s:.0f} s")
            kind, item = receiver.recv()
            if kind == "failed":
                raise ChildFailed(item)
            if kind == "end":
                process.join(_LEAVE_S)
                return
            yield item
    except EOFError:
        process.join()
        raise ChildFailed(f"the process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send_all(
    sender: Connection, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]
) -> None:
    try:
        for item in function(*arguments):
            sender.send(("item", item))
        sender.send(("end", None))
    except Exception as error:
        traceback.print_exc()
        sender.send(("failed", f"{type(error).__name__}: {error}"))
