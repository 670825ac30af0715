"""Starts of engines that are to fail, several in one process: most of a start is importing vLLM.

:func:`attempt` starts this file as a program.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine_rounds import ENGINE_TIMEOUT_S, Engine, environment


@dataclass(frozen=True, kw_only=True)
class Start:
    """An engine: its model, arguments of ``vllm.LLM``, and a break in the code below vattn."""

    model: str
    engine: dict[str, Any] = field(default_factory=dict)
    sabotage: str = ""  # statements that are executed before


def attempt(starts: list[Start], folder: Path) -> list[str]:
    """Try to start engines, one after the other.

    Returns
    -------
    list of str
        The type and message of the exception that each start ended with; empty if it came up.
    """
    (folder / "starts.json").write_text(json.dumps([asdict(start) for start in starts]))
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", XDG_RUNTIME_DIR=str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENGINE_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    ends: list[str] = json.loads((folder / "ends.json").read_text())
    return ends


def _end_of(start: Start) -> str:
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.v1.attention.selector import _cached_get_attn_backend

    # vLLM keeps both for the life of a process: the next engine would have them of this one.
    ensure_kv_transfer_shutdown()
    _cached_get_attn_backend.cache_clear()
    exec(start.sabotage, {})  # a break that a test planted
    try:
        Engine(start.model, start.engine)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    """Do the job that lies in a folder."""
    starts = [Start(**described) for described in json.loads((folder / "starts.json").read_text())]
    (folder / "ends.json").write_text(json.dumps([_end_of(start) for start in starts]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
