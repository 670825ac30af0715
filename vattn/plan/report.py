"""A plan in words, tables and JSON."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from vattn.config import CacheConfig, LayerGroup
from vattn.plan.estimate import (
    AS_GOOD,
    DEFAULT_ROWS,
    MAX_RESERVED_BYTES,
    PATCHED_ONLY,
    STOCK_CUDA_PAGE_BYTES,
    Fit,
    Question,
    cache_config,
    recommend,
)

SCHEMA = 1
ADDRESS_SPACE_BYTES = 2**47


@dataclass(frozen=True)
class Report:
    """A question, what every policy makes of it, and what else to tell.

    Attributes
    ----------
    question : Question
    fits : tuple of Fit
    notes : tuple of str
        About the model and the budget.
    """

    question: Question
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]

    @cached_property
    def chosen(self) -> Fit | None:
        """What is recommended; None if nothing can be used."""
        return recommend(list(self.fits), self.question.device)

    @cached_property
    def config(self) -> CacheConfig | None:
        """The recommendation as a configuration."""
        return None if self.chosen is None else cache_config(self.chosen, self.question)


def size(number: float) -> str:
    """Write bytes with three digits and a binary unit that fits.

    Examples
    --------
    >>> size(131072), size(1.5 * 2**30)
    ('128 KiB', '1.5 GiB')
    """
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if number >= 1024**power:
            value = number / 1024**power
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{number:.0f} B"


def exact_size(number: int) -> str:
    """Write bytes so that parse_bytes() gives the same number.

    Examples
    --------
    >>> exact_size(2 * 2**20)
    '2MiB'
    """
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if number % 1024**power == 0:
            return f"{number // 1024**power}{unit}"
    return f"{number}B"


def snippet(config: CacheConfig) -> str:
    """Write a configuration as Python that can be pasted."""
    lines = [f"    num_layers={config.num_layers},"]
    if config.layer_groups is None:
        names = ["num_kv_heads", "head_dim", "v_head_dim"]
        values = {name: getattr(config, name) for name in names}
        lines += [f"    {name}={value}," for name, value in values.items() if value is not None]
    else:
        groups = [f"        {_group(group)}," for group in config.layer_groups]
        lines += ["    layer_groups=[", *groups, "    ],"]
    for name in ("dtype", "max_batch_size", "max_seq_len", "device"):
        lines.append(f"    {name}={json.dumps(getattr(config, name))},")
    lines.append(f'    memory="{exact_size(int(config.memory or 0))}",')
    lines.append(f'    layout="{config.layout}",')
    if config.order != "NHD":
        lines.append(f'    order="{config.order}",')
    lines.append(f'    page_bytes="{exact_size(int(config.page_bytes or 0))}",')
    return "\n".join(["vattn.CacheConfig(", *lines, ")"])


def _group(group: LayerGroup) -> str:
    v_dim = "" if group.v_head_dim is None else f", v_head_dim={group.v_head_dim}"
    return (
        f"vattn.LayerGroup(layers={list(group.layers)}, num_kv_heads={group.num_kv_heads}, "
        f"head_dim={group.head_dim}{v_dim})"
    )


# What a window would save.


def _window_note(question: Question) -> str:
    """Say what layers with a window need if only it is kept; empty without windows."""
    q = question
    with_window = [w for w in q.shape.windows if w is not None]
    if not with_window:
        return ""
    kept = needed = 0.0
    tokens = q.max_seq_len if q.lengths is None else q.lengths.mean_tokens
    layer_bytes = q.shape.layer_token_bytes(q.item_bytes)
    for window, token_bytes in zip(q.shape.windows, layer_bytes, strict=True):
        kept += tokens * token_bytes
        if window is None:
            needed += tokens * token_bytes
        elif q.lengths is None:
            needed += min(window, tokens) * token_bytes
        else:
            needed += q.lengths.mean_at_most(window) * token_bytes
    sizes = ", ".join(f"{w:,}" for w in sorted(set(with_window)))
    where = f"at {q.max_seq_len:,} tokens" if q.lengths is None else "on average"
    return (
        f"{len(with_window)} of {q.shape.num_layers} layers see only the last {sizes} tokens. "
        "All figures here are for rows that keep all their tokens in every layer; with "
        f"LayerGroup(window=...) for those layers a request would need {size(needed)} and its "
        f"pages instead of {size(kept)} {where} ({1 - needed / kept:.0%} less)"
    )


def notes(report: Report) -> list[str]:
    """Everything that a reader should know beside the figures."""
    q = report.question
    window = _window_note(q)
    lines = [*report.notes, *([window] if window else [])]
    if q.lengths is None:
        lines.append(
            "no lengths given, so waste is half a page per region and concurrency is not known; "
            "say --lengths TRACE, --length-distribution or --mean-tokens"
        )
    elif q.lengths.left_out:
        lines.append(q.lengths.left_out)
    if q.device == "cuda" and any(PATCHED_ONLY in fit.obstacles for fit in report.fits):
        lines.append(
            f"{PATCHED_ONLY}: the stock CUDA driver has pages of {size(STOCK_CUDA_PAGE_BYTES)} and "
            "multiples; smaller ones need a patched driver, such as that of vAttention"
        )
    if any("mappings" in obstacle for fit in report.fits for obstacle in fit.obstacles):
        lines.append(
            f"vm.max_map_count is {q.max_map_count:,}, and every page may need a mapping; raise it "
            "or take larger pages"
        )
    lines.append("what is mapped ahead of need (lookahead) comes from spare pages: not counted")
    return lines


# Text.


def _shape_lines(report: Report) -> list[str]:
    q, shape = report.question, report.question.shape
    groups = []
    for group in shape.layer_groups:
        layers, heads, k_dim, v_dim, *_ = group.shape()
        what = f"{k_dim} (latent, no V)" if v_dim == 0 else f"{k_dim}"
        what = what if v_dim in (0, k_dim) else f"{k_dim}, V {v_dim}"
        groups.append(f"{len(layers)} layers x {heads} KV heads x {what}")
    lengths = "not given" if q.lengths is None else q.lengths.name
    if q.lengths is not None:
        lengths += f" (mean {q.lengths.mean_tokens:,.1f} tokens)"
    return [
        f"{shape.name}: {'; '.join(groups)}, {q.dtype}",
        f"{size(report.fits[0].policy.token_bytes)} "
        f"({report.fits[0].policy.token_bytes:,} bytes) per token, "
        f"up to {q.max_seq_len:,} tokens per request",
        f"budget for keys and values: {size(q.memory_bytes)} on {q.device}, order {q.order}",
        f"lengths of requests: {lengths}",
    ]


HEADINGS = (
    "layout",
    "page",
    "regions",
    "tokens/page",
    "grows by",
    "rows at max",
    "longest row",
    "waste/request",
    "concurrency",
    "rows",
    "addresses",
    "",
)

LEGEND = (
    "rows at max: of max_seq_len tokens each; longest row: tokens, if it is alone; concurrency: "
    "requests of these lengths;\nrows: max_batch_size to take; addresses: of that many rows"
)


def _tokens_per_page(fit: Fit) -> str:
    counts = [fit.policy.page_bytes / token for token, _ in fit.policy.regions]
    low, high = min(counts), max(counts)
    return _number(low) if low == high else f"{_number(low)}-{_number(high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _cells(fit: Fit, report: Report) -> list[str]:
    policy = fit.policy
    waste = size(fit.mean_waste_bytes)
    if fit.mean_mapped_bytes:
        waste += f" ({fit.mean_waste_bytes / fit.mean_mapped_bytes:.1%})"
    if policy.layout is None:
        mark = ""
    elif fit is report.chosen:
        mark = "<- recommended"
    else:
        mark = "; ".join(fit.obstacles)
    ours = policy.layout is not None
    return [
        policy.name,
        size(policy.page_bytes),
        f"{policy.n_regions:,}" if ours else "",
        _tokens_per_page(fit),
        size(policy.growth_bytes),
        f"{fit.rows_at_longest:,}",
        f"{fit.longest_row:,}",
        # Full reservation without lengths: half of it is no estimate of anything.
        "" if not ours and fit.mean_mapped_bytes is None else waste,
        "" if fit.concurrency is None else f"{fit.concurrency:,.1f}",
        f"{fit.max_batch_size:,}" if ours else "",
        size(fit.reserved_bytes) if ours else "",
        mark,
    ]


def print_text(report: Report) -> None:
    """Print tables, with rich if it is installed, and a recommendation."""
    print("\n".join(_shape_lines(report)))
    print()
    rows = [_cells(fit, report) for fit in report.fits]
    if importlib.util.find_spec("rich") is not None:
        _print_rich(rows)
    else:
        print(plain_table(HEADINGS, rows))
    print(LEGEND)
    print()
    for note in notes(report):
        print(f"- {note}")
    print()
    for line in recommendation(report):
        print(line)


def _print_rich(rows: Sequence[Sequence[str]]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in HEADINGS:
        left = heading in ("layout", "")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 180, highlight=False).print(table)


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns, the first and the last to the left.

    Examples
    --------
    >>> print(plain_table(("a", "n", ""), [("x", "10", "!"), ("yy", "5", "")]))
    a    n
    x   10  !
    yy   5
    """
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    last = len(headings) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def recommendation(report: Report) -> list[str]:
    """Say in words what to take, why, and as Python."""
    q, chosen, config = report.question, report.chosen, report.config
    if chosen is None or config is None:
        return [
            "Recommended: nothing. No layout and page size can be used: "
            "see the reasons in the table; more memory, a smaller --max-seq-len or fewer rows help."
        ]
    policy = chosen.policy
    if q.lengths is None:
        why = f"{size(chosen.mean_waste_bytes)} of waste per request"
        rows = f"{DEFAULT_ROWS} rows, or as many as have a page each, for lack of lengths"
    else:
        why = f"{size(chosen.mean_mapped_bytes or 0)} per request"
        rows = f"a quarter more rows than the {chosen.concurrency:,.1f} requests expected"
    if q.max_batch_size is not None:
        rows = "the rows that --max-batch-size says"
    least = f"the least (within {AS_GOOD - 1:.0%}) of what can be used here, in the largest pages"
    lines = [
        f"Recommended: layout {policy.layout}, pages of {size(policy.page_bytes)}: {why},",
        f"{least} that do; {rows}.",
        f"Addresses: {size(chosen.reserved_bytes)}, "
        f"{chosen.reserved_bytes / ADDRESS_SPACE_BYTES:.2%} of 47 bits; vattn reserves at most "
        f"{size(MAX_RESERVED_BYTES)}. They cost no memory.",
    ]
    if not chosen.rows_at_longest:
        lines.append(
            f"No request of max_seq_len = {q.max_seq_len:,} tokens fits: the longest that does has "
            f"{chosen.longest_row:,}."
        )
    if q.device == "cpu":
        lines.append(
            f"Mappings: at most {chosen.most_mappings:,} if no two pages are neighbours; "
            f"vm.max_map_count is {q.max_map_count:,}."
        )
    lines.append("This is by memory alone; vattn bench attention measures the speed of layouts.")
    return [*lines, "", snippet(config)]


# JSON.


def as_json(report: Report) -> dict[str, Any]:
    """Everything as plain data; sizes in bytes."""
    q = report.question
    return {
        "schema": SCHEMA,
        "model": asdict(q.shape)
        | {"layer_groups": [_group_json(group) for group in q.shape.layer_groups]},
        "dtype": q.dtype,
        "device": q.device,
        "order": q.order,
        "memory_bytes": q.memory_bytes,
        "max_seq_len": q.max_seq_len,
        "token_bytes": report.fits[0].policy.token_bytes,
        "lengths": None
        if q.lengths is None
        else {"name": q.lengths.name, "mean_tokens": q.lengths.mean_tokens},
        "max_map_count": q.max_map_count,
        "max_reserved_bytes": MAX_RESERVED_BYTES,
        "policies": [_fit_json(fit, recommended=fit is report.chosen) for fit in report.fits],
        "notes": notes(report),
        "recommendation": None if report.config is None else snippet(report.config),
    }


def _group_json(group: LayerGroup) -> dict[str, Any]:
    layers, heads, k_dim, v_dim, *_ = group.shape()
    return {"layers": layers, "num_kv_heads": heads, "head_dim": k_dim, "v_head_dim": v_dim}


def _fit_json(fit: Fit, *, recommended: bool) -> dict[str, Any]:
    policy = fit.policy
    return {
        "name": policy.name,
        "layout": policy.layout,
        "page_bytes": policy.page_bytes,
        "regions": [{"token_bytes": token, "count": n} for token, n in policy.regions],
        "tokens_per_page": [policy.page_bytes / token for token, _ in policy.regions],
        "growth_bytes": policy.growth_bytes,
        "recommended": recommended,
        **{name: value for name, value in vars(fit).items() if name != "policy"},
    }


def print_json(report: Report) -> None:
    """Print :func:`as_json`."""
    print(json.dumps(as_json(report), indent=1))
