"""The environment variables of vattn: all of them are here."""

from __future__ import annotations

import os

from vattn import _C

LOG_LEVELS = ("error", "warning", "info", "debug")


def apply_environment() -> None:
    """Read the ``VATTN_*`` variables.

    ``VATTN_LOG_LEVEL`` : error, warning (default), info or debug. Lines go to stderr.

    Raises
    ------
    ValueError
        An unknown variable or value: a misspelt setting must not pass unnoticed.
    """
    known = {"VATTN_LOG_LEVEL"}
    unknown = sorted(name for name in os.environ if name.startswith("VATTN_") and name not in known)
    if unknown:
        raise ValueError(
            f"unknown environment variable {', '.join(unknown)}; "
            f"vattn reads {', '.join(sorted(known))}, unset the others"
        )
    level = os.environ.get("VATTN_LOG_LEVEL", "warning").lower()
    if level not in LOG_LEVELS:
        raise ValueError(f"VATTN_LOG_LEVEL is {level!r}, expected one of {', '.join(LOG_LEVELS)}")
    _C.set_log_level(LOG_LEVELS.index(level))
