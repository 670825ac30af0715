"""``vattn doctor``: what this machine offers, and what to do about it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from vattn import __version__
from vattn.doctor import show
from vattn.doctor.facts import gather
from vattn.doctor.findings import findings, summary, works

SCHEMA = 1


def main(arguments: list[str] | None = None, *, prog: str = "vattn doctor") -> int:
    """Look at the machine, try a tiny cache on every device, and say what came of it.

    Returns
    -------
    int
        0, whatever is missing: saying so is what the command is for.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description="What this machine offers, and what to do about it."
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document, for bug reports"
    )
    options = parser.parse_args(arguments)
    with show.progress() as report:
        facts = gather(report)
    found, sentences = findings(facts), summary(facts)
    if options.json:
        document = {
            "schema": SCHEMA,
            "vattn": __version__,
            "works": works(facts),
            "summary": sentences,
            "findings": [asdict(finding) for finding in found],
            "facts": facts,
        }
        json.dump(document, sys.stdout, indent=1)
        print()
    else:
        show.print_report(found, sentences)
    return 0
