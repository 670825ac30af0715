"""What the doctor says, on a terminal: with rich if it is installed, as plain text otherwise."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from vattn.doctor.finding import Finding

COLOURS = {"fine": "green", "limited": "yellow", "missing": "red"}
PLAIN_WIDTH = 100


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being tried: it takes seconds. Yields the function to tell."""
    try:
        from rich.console import Console
    except ImportError:
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        print("vattn doctor: looking, which takes some seconds", file=sys.stderr)
        yield lambda doing: None
        return
    with console.status("looking") as status:
        yield lambda doing: status.update(f"trying {doing}")


def print_report(findings: Sequence[Finding], summary: Sequence[str]) -> None:
    """Print every finding under its area, then what works."""
    try:
        import rich  # noqa: F401
    except ImportError:
        _print_plain(findings, summary)
    else:
        _print_rich(findings, summary)


def _by_area(findings: Sequence[Finding]) -> Iterator[tuple[str, list[Finding]]]:
    for area, members in groupby(findings, key=lambda finding: finding.area):
        yield area, list(members)


def _print_plain(findings: Sequence[Finding], summary: Sequence[str]) -> None:
    for area, members in _by_area(findings):
        print(area)
        width = max(len(finding.name) for finding in members)
        for finding in members:
            start = f"  {finding.verdict:<8} {finding.name:<{width}}  "
            _print_wrapped(start, finding.text)
            if finding.remedy:
                # On one line however long it is, so that a command can be copied.
                print(f"{'':<{len(start)}}-> {finding.remedy}")
        print()
    for sentence in summary:
        _print_wrapped("", sentence)


def _print_wrapped(start: str, text: str) -> None:
    print(
        textwrap.fill(
            text,
            PLAIN_WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
            break_long_words=False,
        )
    )


def _print_rich(findings: Sequence[Finding], summary: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    for area, members in _by_area(findings):
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for finding in members:
            text = Text(finding.text)
            if finding.remedy:
                text.append(f"\n-> {finding.remedy}", style="cyan")
            verdict = Text(finding.verdict, style=COLOURS[finding.verdict])
            table.add_row(verdict, Text(finding.name), text)
        console.print(Text(area, style="bold underline"))
        console.print(table)
        console.print()
    for sentence in summary:
        console.print(Text(sentence, style="bold"))
