"""Measurements of this source tree; those that users run are ``vattn bench``."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
