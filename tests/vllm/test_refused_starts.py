"""Engines that vattn cannot serve do not start: vLLM stops with vattn's sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from engine_cases import MIB
from engine_rounds import transfer_config
from engine_starts import Start, attempt

# A machine that does other things as well needs minutes to start an engine.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

# vLLM gets its KV buffer in another way: by a call that vattn does not know, twice, or elsewhere.
OTHER_ALLOCATION = """
import torch
from vllm.v1.worker import utils
class Torch:
    def __getattr__(self, name):
        return getattr(torch, name)
    def zeros(self, *size, **options):
        {statement}
utils.torch = Torch()
"""
CHANGED = "RuntimeError: vLLM does not allocate its KV cache in the way that vattn knows"
OTHERS = [
    {"kv_connector": "VattnConnector", "kv_role": "kv_both"},
    {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
]
# How each start ends, and what its sentence has to say besides.
SENTENCES = {
    "a misspelt setting": ("ValueError: kv_connector_extra_config has 'buget'", "mean 'budget'"),
    "several connectors": ("ValueError: the layers have a FullAttentionSpec", "Connector alone"),
    "another role": ("ValueError: vattn cannot serve this engine", "kv_role must be 'kv_both'"),
    "windows in rows": ("NotImplementedError: contiguous rows", 'set "mode": "elastic"'),
    "a small budget": ("ValueError: the budget is 262144 bytes", "lower --max-model-len"),
    "another call": (CHANGED, "(0 int8 buffers of "),
    "two buffers": (CHANGED, "(2 int8 buffers of "),
    "a copy": (CHANGED, "(the KV cache of model.layers.0.self_attn.attn is not in the buffer)"),
}


def starts(llama: Path, gemma: Path) -> dict[str, Start]:
    def start(model: Path, sabotage: str = "", **transfer: Any) -> Start:
        return Start(model=str(model), engine={"kv_transfer_config": transfer}, sabotage=sabotage)

    def allocated(statement: str) -> Start:
        sabotage = OTHER_ALLOCATION.format(statement=statement)
        return start(llama, sabotage, **transfer_config({}))

    return {
        "a misspelt setting": start(llama, **transfer_config({"buget": MIB})),
        "several connectors": start(
            llama,
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"connectors": OTHERS},
        ),
        "another role": start(llama, **transfer_config({}) | {"kv_role": "kv_producer"}),
        "windows in rows": start(gemma, **transfer_config({"mode": "contiguous"})),
        "a small budget": start(llama, **transfer_config({"budget": MIB // 4})),
        "another call": allocated("return torch.empty(*size, **options)"),
        "two buffers": allocated(
            "torch.zeros(*size, **options); return torch.zeros(*size, **options)"
        ),
        "a copy": allocated("return torch.zeros(*size, **options).clone()"),
    }


@pytest.fixture(scope="module")
def ends(llama: Path, models: Path, new_folder: Callable[[], Path]) -> dict[str, str]:
    tried = starts(llama, tiny_models.gemma(models).path)
    return dict(zip(tried, attempt(list(tried.values()), new_folder()), strict=True))


@pytest.mark.parametrize("case", SENTENCES)
def test_an_engine_that_cannot_be_served_stops_with_a_sentence(
    case: str, ends: dict[str, str]
) -> None:
    begin, remedy = SENTENCES[case]
    assert ends[case].startswith(begin)
    assert remedy in ends[case]
    assert "\n" not in ends[case]
