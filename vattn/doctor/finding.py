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
