"""Tables: one for each phase, model and type, subjects down and sizes across."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rich.table import Table

from vattn.bench import common
from vattn.bench.attention.cases import Case, NotMeasured
from vattn.bench.attention.results import Line, Result
from vattn.bench.attention.verdict import Verdict
from vattn.bench.common import Target, duration

_LEGEND = (
    "Attention of one layer, tokens x rows: times where K and V are torch.empty, elsewhere the "
    "ratio to them with the same kernel and order."
)
_CASE_WORDS = 5  # attention/decode/llama-3-8b/bfloat16/8192x1


def size_name(case: Case) -> str:
    """Name tokens and batch in a few letters.

    >>> from vattn.bench.attention.cases import TINY
    >>> size_name(Case(phase="decode", shape=TINY, dtype="float32", tokens=8192, batch=4))
    '8K x 4'
    """
    tokens = f"{case.tokens // 1024}K" if case.tokens % 1024 == 0 else str(case.tokens)
    return f"{tokens} x {case.batch}"


def tables(results: Sequence[Result]) -> Iterator[Table]:
    """Make the tables: times where there is no baseline, else the ratio to torch.empty."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        case = result.case
        groups.setdefault((case.phase, case.shape.name, case.dtype), []).append(result)
    for (phase, model, dtype), some in sorted(groups.items()):
        shape = some[0].case
        some.sort(key=lambda result: (result.case.tokens, result.case.batch))
        heads = f"{shape.shape.num_query_heads}/{shape.kv_heads}/{shape.head_dim}"
        table = Table(
            title=f"{phase}, {model} ({heads}), {dtype}",
            title_justify="left",
        )
        table.add_column("subject/kernel", overflow="fold")
        for result in some:
            table.add_column(size_name(result.case), justify="right", no_wrap=True)
        names = dict.fromkeys(line.subject for result in some for line in result.lines)
        for name in names:
            lines = [next((x for x in r.lines if x.subject == name), None) for r in some]
            table.add_row(name, *(_cell(line) for line in lines))
            if phase == "decode" and all(x is None or x.baseline is None for x in lines):
                speeds = [f"{x.gb_per_s:.3g} GB/s" if x else "" for x in lines]
                table.add_row("  K and V read", *speeds)
        limits = [duration(result.limit_ns) for result in some]
        table.add_row("limit: copy" if phase == "decode" else "limit: matrix product", *limits)
        if phase == "decode":
            speeds = [f"{r.case.layer_bytes / r.limit_ns:.3g} GB/s" for r in some]
            table.add_row("  bytes moved", *speeds)
        yield table


def _cell(line: Line | None) -> str:
    if line is None:
        return "-"
    return duration(line.median_ns) if line.ratio is None else f"{line.ratio.median:.2f}x"


def targets(device: str, results: Sequence[Result]) -> list[Target]:
    """The goal of the project: on a GPU, within 1% of torch.empty."""
    if not device.startswith("cuda"):
        return []
    found = []
    ratios: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for line in result.lines:
            if line.store.startswith("vattn") and line.ratio is not None:
                key = (result.case.phase, line.subject)
                ratios.setdefault(key, []).append(line.ratio.median)
    for (phase, subject), some in sorted(ratios.items()):
        name = f"{phase} over {subject} against torch.empty, median of {len(some)} cases"
        found.append(common.at_most(name, statistics.median(some), 1.01, "x"))
    return found


def grouped(not_measured: Sequence[NotMeasured]) -> list[tuple[str, str]]:
    """Say once what several cases have in common.

    >>> tail = "llama-3-8b/float32/8192x1"
    >>> grouped([NotMeasured(f"attention/{p}/{tail}/vllm", "gone") for p in ("decode", "prefill")])
    [('vllm, in 2 cases', 'gone')]
    """
    groups: dict[tuple[str, str], int] = {}
    for entry in not_measured:
        subject = "/".join(entry.name.split("/")[_CASE_WORDS:])
        key = (subject or entry.name, entry.reason)
        groups[key] = groups.get(key, 0) + 1
    return [(what if n == 1 else f"{what}, in {n} cases", why) for (what, why), n in groups.items()]


def show(
    results: Sequence[Result],
    not_measured: Sequence[NotMeasured],
    errors: Sequence[str],
    verdict: Verdict,
) -> None:
    """Print everything."""
    common.console.print(_LEGEND, highlight=False, soft_wrap=True)
    for table in tables(results):
        common.console.print(table)
    if not_measured:
        table = Table(title="Not measured", title_justify="left")
        table.add_column("what", overflow="fold")
        table.add_column("why", overflow="fold")
        for what, why in grouped(not_measured):
            table.add_row(what, why)
        common.console.print(table)
    for error in errors:
        common.console.print(f"[red]no figure:[/] {error}", soft_wrap=True)
    common.console.print(f"Verdict: {verdict.sentence}.", highlight=False, soft_wrap=True)
