"""The metrics inside vLLM are those that the documentation lists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def exported() -> set[str]:
    """Names that the module gives prometheus_client, which appends ``_total`` to a counter's."""
    source = (ROOT / "vattn" / "integrations" / "vllm" / "metrics.py").read_text()
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Dict)
    }
    assert tables.keys() == {"GAUGES", "COUNTERS"}
    return {f"vattn:kv_{name}" for name in tables["GAUGES"]} | {
        f"vattn:kv_{name}_total" for name in tables["COUNTERS"]
    }


def test_the_documentation_lists_exactly_the_metrics_that_there_are() -> None:
    page = (ROOT / "docs" / "vllm.md").read_text()
    section = page.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(vattn:\w+)`", row)]
    assert sorted(listed) == sorted(exported())
