"""A sentence about a machine, with a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# By section and name; None is what could not be found out, and the section has its `problems`.
Facts = dict[str, Any]
Verdict = Literal["fine", "limited", "missing"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Parameters
    ----------
    area, name : str
        What it is about.
    verdict : {"fine", "limited", "missing"}
        Whether vattn has what it wants.
    text : str
        What was found, and what it means.
    remedy : str
        What to do about it; "" if nothing needs to or can be done.
    """

    area: str
    name: str
    verdict: Verdict
    text: str
    remedy: str = ""


def size(n: int) -> str:
    """Write bytes with a unit that fits.

    Examples
    --------
    >>> size(2 * 2**20), size(100), size(150_754_820_096)
    ('2 MiB', '100 bytes', '140.4 GiB')
    """
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 2**power:
            return f"{n / 2**power:.1f}".removesuffix(".0") + f" {unit}"
    return f"{n} bytes"


def release(version: str) -> tuple[int, int]:
    """Return major and minor number of a version; zeros if there are none.

    Examples
    --------
    >>> release("2.11.0+cu130"), release("5.14-rc1"), release("unknown")
    ((2, 11), (5, 14), (0, 0))
    """
    numbers = []
    for part in version.split(".")[:2]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    major, minor = (*numbers, 0, 0)[:2]
    return major, minor


def unknown(area: str, name: str, section: Facts, key: str) -> Finding:
    """Say why a fact is not known."""
    reason = section.get("problems", {}).get(key, "not asked")
    return Finding(
        area=area, name=name, verdict="limited", text=f"Could not be found out: {reason}."
    )
