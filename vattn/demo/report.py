"""The table of a run, and the file with all of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

import vattn
from vattn.demo.measure import Difference, Run
from vattn.demo.model import Subject


def human_bytes(value: float) -> str:
    """Bytes as people read them.

    Examples
    --------
    >>> human_bytes(3 * 2**20)
    '3 MiB'
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    unit = units[0]
    return f"{value:.0f} {unit}" if value >= 10 or value == int(value) else f"{value:.1f} {unit}"


def make_table(ours: Run, stock: Run, difference: Difference | None, logits_apart: float) -> Table:
    """Both runs, side by side."""
    d = ours.details
    table = Table(title="One batch, both caches; times are the better of two runs")
    table.add_column("")
    for run in (stock, ours):
        table.add_column(run.name, justify="right")

    def both(label: str, form: Any) -> None:
        table.add_row(label, form(stock), form(ours))

    equal = "yes" if difference is None else f"no, from token {difference.token}"
    table.add_row("tokens equal", "-", equal)
    table.add_row("logits, largest difference", "-", f"{logits_apart:.2g}")
    both("prefill, s", lambda run: f"{run.prefill_s:.2f}")
    both("decode, tokens/s", lambda run: f"{run.tokens_per_s:.2f}")
    both("KV memory, peak", lambda run: human_bytes(run.peak_bytes))
    both("of it used at the end", lambda run: human_bytes(run.samples[-1].used_bytes))
    table.add_row("addresses reserved", "-", human_bytes(d["address_bytes"]))
    reserving = human_bytes(d["reserving_bytes"])
    table.add_row("reserving the model's limit would take", reserving, reserving)
    table.add_row("driver calls in step()", "-", f"{d['calls_in_step']} in {d['steps']} steps")
    table.add_row("steps that had to map memory", "-", str(d["steps_with_growth"]))
    table.add_row("driver calls by the background thread", "-", str(d["calls_in_background"]))
    return table


def write_json(
    path: Path,
    *,
    subject: Subject,
    inputs: dict[str, torch.Tensor],
    runs: list[Run],
    difference: Difference | None,
    max_logit_difference: float,
) -> None:
    """Write all figures of a run, with what is needed to repeat it."""
    device = inputs["input_ids"].device
    result = {
        "command": [sys.executable, "-m", "vattn.demo", *sys.argv[1:]],
        "commit": _commit(),
        "environment": {
            "vattn": vattn.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "model": {
            "name": subject.name,
            "trained": subject.trained,
            "parameters": subject.model.num_parameters(),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "max_seq_len": subject.max_seq_len,
        },
        "prompt_tokens": inputs["attention_mask"].sum(dim=1).tolist(),
        "tokens_equal": difference is None,
        "difference": None if difference is None else asdict(difference),
        "max_logit_difference": max_logit_difference,
        "runs": [_as_dict(run) for run in runs],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def _as_dict(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "prefill_s": run.prefill_s,
        "decode_s": run.decode_s,
        "decode_tokens_per_s": run.tokens_per_s,
        "peak_kv_bytes": run.peak_bytes,
        **run.details,
        "samples": [asdict(sample) for sample in run.samples],
        "tokens": run.tokens.tolist(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that the package lies in; None if it lies in none."""
    root = Path(vattn.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
