"""The tables, the targets, and what goes into the JSON file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from vattn.bench import common
from vattn.bench.common import Distribution, Measurement, Target
from vattn.replay.outcome import DEFINITIONS, Outcome, Summary
from vattn.replay.policies import VattnPolicy
from vattn.replay.trace import Trace

_Form = Callable[[Any], str]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s"


# Field of Summary, what it is called, how it is written; None: a line.
_ROWS: tuple[tuple[str, str, _Form] | None, ...] = (
    ("utilisation", "utilisation, mean (used / granted)", _percent),
    ("utilisation_median", "  median over time", _percent),
    ("utilisation_p5", "  lowest 5% of the time, at most", _percent),
    ("utilisation_min", "  minimum", _percent),
    ("kept_whole", "granted in pages that no token needs", _percent),
    ("used_of_mapped", "used / mapped, idle and ahead included", _percent),
    None,
    ("running_mean", "requests at a time, mean", lambda value: f"{value:.1f}"),
    ("running_peak", "  peak", _count),
    ("queue_empty", "time with nobody waiting", _percent),
    ("queueing_mean_s", "wait for the start, mean", _seconds),
    ("queueing_p99_s", "  p99", _seconds),
    ("makespan_s", "makespan, virtual", _seconds),
    ("iterations", "iterations", _count),
    ("completed", "requests completed", _count),
    ("refused", "  refused: would not fit alone", _count),
    ("preemptions", "preemptions", _count),
    ("recomputed_tokens", "  tokens computed again", _count),
    None,
    ("wall_s", "wall time of the replay", _seconds),
    ("cpu_s", "  processor time", _seconds),
)
_VATTN_ROWS: tuple[tuple[str, str, _Form], ...] = (
    ("decode_steps_without_call", "decode steps without a driver call", _percent),
    ("steps_without_call", "all steps without a driver call", _percent),
    ("calls_in_step", "driver calls in step()", _count),
    ("calls_in_background", "driver calls in the background", _count),
    ("late", "iterations in which the background was late", _count),
)


def comparison_table(trace: Trace, summaries: Sequence[Summary]) -> Table:
    """Put the policies side by side."""
    table = Table(title=f"{trace.name}: {len(trace):,} requests", title_justify="left")
    table.add_column("", no_wrap=True)
    for summary in summaries:
        table.add_column(summary.policy, justify="right", no_wrap=True)
    for row in _ROWS:
        if row is None:
            table.add_section()
            continue
        name, words, form = row
        table.add_row(words, *(form(getattr(summary, name)) for summary in summaries))
    return table


def driver_table(summary: Summary) -> Table:
    """Say where vattn's driver calls were made."""
    table = Table(title="vattn: in and out of the critical path", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for name, words, form in _VATTN_ROWS:
        table.add_row(words, form(getattr(summary, name)))
    return table


def measurements_of(outcome: Outcome) -> list[Measurement]:
    """Summarize the times of vattn's steps, and of what followed them in the background."""
    decoding = outcome.decoding()
    grow_ns, settle_ns = outcome.column("grow_ns"), outcome.column("settle_ns")
    parts = (
        ("step_decode", "step() without a prefill", grow_ns[decoding]),
        ("step_prefill", "step() with a prefill", grow_ns[~decoding]),
        ("settle", "after step(): admission, and mapping ahead until nothing is left", settle_ns),
    )
    return [
        Measurement(
            name=name, what=what, ns=Distribution.of(samples.tolist()), calls={"step": len(samples)}
        )
        for name, what, samples in parts
        if samples.any()
    ]


def targets_of(
    trace: Trace, summaries: Sequence[Summary | None], *, subject: str, wall_s: float
) -> list[Target]:
    """Goals of the project for this trace; for most there are none.

    Parameters
    ----------
    trace : Trace
        All of it: a part has another utilisation and takes no time.
    summaries : sequence of Summary or None
        What came of it, with vattn among the policies or not.
    subject : str
        Model and layout, such as "llama-3-8b, interleaved".
    wall_s : float
        Real seconds of all policies together.
    """
    vattn = _vattn(summaries)
    if vattn is None or subject != "llama-3-8b, interleaved":
        return []
    if (trace.name, len(trace)) == ("azure_conv_2023", 19_366):
        utilisation = 100 * vattn.utilisation
        name = f"{trace.name}: utilisation (used / granted), {subject}"
        return [
            common.at_least(name, utilisation, 99.3, "%"),
            common.at_most(f"{trace.name}: wall time, all policies", wall_s, 60, "s"),
        ]
    if (trace.name, len(trace)) == ("vattention_decode_latency", 3_965):
        share = 100 * vattn.decode_steps_without_call
        name = f"{trace.name}: decode steps without a driver call, {subject}"
        return [common.at_least(name, share, 99.9, "%")]
    return []


def _vattn(summaries: Sequence[Summary | None]) -> Summary | None:
    return next((s for s in summaries if s is not None and s.policy == VattnPolicy.name), None)


def trace_facts(trace: Trace) -> dict[str, Any]:
    """Return what to know about a trace beside a figure."""
    return {
        "name": trace.name,
        "source": trace.source,
        "requests": len(trace),
        "prompt_tokens_mean": float(trace.prompt_tokens.mean()),
        "generated_tokens_mean": float(trace.generated_tokens.mean()),
        "longest": int((trace.prompt_tokens + trace.generated_tokens).max()),
        "last_arrival_s": None if trace.arrival_s is None else float(trace.arrival_s[-1]),
    }


def as_json(outcome: Outcome, summary: Summary | None) -> dict[str, Any]:
    """Return everything about one policy: figures, and how they came about over time."""
    if summary is None:
        return {"policy": outcome.policy, "refused": outcome.refused}
    return {
        **asdict(summary),
        "budget_bytes": outcome.budget_bytes,
        "driver_calls": outcome.driver_calls,
        "series": {
            name: (values if name.endswith("_s") else values.astype(np.int64)).tolist()
            for name, values in outcome.series().items()
        },
    }


def show(
    trace: Trace,
    summaries: Sequence[Summary | None],
    measurements: Sequence[Measurement],
    targets: Sequence[Target],
) -> None:
    """Print everything, and what the words mean."""
    out = common.console
    out.print(comparison_table(trace, [summary for summary in summaries if summary is not None]))
    for word, meaning in DEFINITIONS.items():
        out.print(f"[bold]{word}[/]: {meaning}", highlight=False)
    vattn = _vattn(summaries)
    if vattn is not None:
        out.print(driver_table(vattn))
        common.print_measurements("vattn: real time", measurements)
    if targets:
        common.print_targets(targets)
