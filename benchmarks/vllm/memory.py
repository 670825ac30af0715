"""How much physical memory a KV cache has, from the kernel: whatever vattn counts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

VATTN_FILE = "/memfd:vattn"
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S{4} [0-9a-f]+ \S+ \d+\s*(.*)")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Mapped:
    """One mapping of a process: its size, what it is of, and what of it is resident."""

    size: int
    path: str
    rss: int


def parse_smaps(text: str) -> list[Mapped]:
    """Read ``/proc/PID/smaps``. ``path`` is empty for anonymous memory.

    >>> parse_smaps('''7f00-8f00 rw-p 00000000 00:00 0 \\nSize: 4 kB\\nRss: 2 kB\\n''')
    [Mapped(size=4096, path='', rss=2048)]
    """
    found: list[Mapped] = []
    for line in text.splitlines():
        head = _HEAD.fullmatch(line)
        if head:
            start, end = (int(address, 16) for address in head.group(1, 2))
            found.append(Mapped(end - start, head[3], 0))
        elif line.startswith("Rss:"):
            found[-1] = Mapped(found[-1].size, found[-1].path, int(line.split()[1]) * 1024)
    return found


def of_vattn(mappings: Iterable[Mapped]) -> int:
    """Resident bytes of memory that vattn mapped."""
    return sum(m.rss for m in mappings if m.path.startswith(VATTN_FILE))


def of_buffer(mappings: Iterable[Mapped], size: int) -> int:
    """Resident bytes of the one anonymous mapping that a buffer of ``size`` bytes is in.

    The kernel may have joined it with a neighbour, so it can be a little larger than the buffer.

    Raises
    ------
    ValueError
        There is none so large.
    """
    largest = max((m for m in mappings if not m.path), key=lambda m: m.size, default=None)
    if largest is None or largest.size < size:
        found = 0 if largest is None else largest.size
        raise ValueError(f"the largest anonymous mapping has {found} bytes, the buffer has {size}")
    return min(largest.rss, size)


def descendants(pid: int) -> list[int]:
    """All processes below one, children before their children."""
    found = []
    for path in _PROC.glob(f"{pid}/task/*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def smaps(pid: int) -> list[Mapped]:
    """Read the mappings of a process."""
    return parse_smaps((_PROC / str(pid) / "smaps").read_text())


def files_of_vattn(pid: int) -> list[Path]:
    """Open files of a process that hold vattn's memory."""
    return [path for path in (_PROC / str(pid) / "fd").iterdir() if _is_vattns(path)]


def _is_vattns(descriptor: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith(VATTN_FILE)
    except FileNotFoundError:  # closed meanwhile
        return False


def file_bytes(files: Iterable[Path]) -> int:
    """Bytes that the kernel holds for files in memory; takes microseconds, unlike smaps."""
    return sum(path.stat().st_blocks * 512 for path in files)
