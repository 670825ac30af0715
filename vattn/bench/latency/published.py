"""What vAttention's authors published, to be printed beside."""

from __future__ import annotations

from typing import Any

from vattn.bench.latency.calls import MIB

SOURCE = "vAttention, arXiv 2405.04437v3, Table 3, column 2M, A100"
# The columns of its smaller pages, which need a changed driver, are not here: nobody whom we could
# check quotes them.
CALL_NS = {
    "reserve": 2_000,
    "create": 29_000,
    "map": 2_000,
    "set_access": 38_000,
    "unmap": 34_000,
    "release": 23_000,
    "free": 1_000,
}
PAGE_BYTES = 2 * MIB
MAP_NS = CALL_NS["map"] + CALL_NS["set_access"]


def loop_ns(mappings: int) -> dict[str, int]:
    """Nanoseconds of a loop of mappings, derived from the times of single calls."""
    loop = {call: ns * mappings for call, ns in CALL_NS.items()}
    return loop | {"map+set_access": MAP_NS * mappings}


def record(mappings: int) -> dict[str, Any]:
    """Put the figures, where they are from and what was made of them into the JSON record."""
    return {
        "published_ns": {"source": SOURCE, **CALL_NS},
        "published_loop_ns": {
            "source": f"derived: {mappings} times the calls of {SOURCE}",
            "mappings": mappings,
            **loop_ns(mappings),
        },
    }
