"""Elastic mode with models whose attention has a sliding window, in all layers or in some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import token_rule
from engine_cases import AMPLE, MIB, requests
from engine_rounds import Outcome, Round, serve

# A machine that does other things as well needs minutes to start an engine.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS, MAX_TOKENS = requests(16)
# Close to what the longest request needs.
BUDGETS = {"mistral": 7 * MIB // 4, "gemma": MIB}
PLAN = Round(prompts=PROMPTS, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module", params=["mistral", "gemma"])
def model(request: pytest.FixtureRequest, models: Path) -> Path:
    path: Path = getattr(tiny_models, request.param)(models).path
    return path


@pytest.fixture(scope="module")
def windows_stock(model: Path, new_folder: Callable[[], Path]) -> list[list[int]]:
    outcome = serve(model, [PLAN], None, folder=new_folder())
    assert outcome.returncode == 0, outcome.output[-4000:]
    return outcome.reports[0].tokens


@pytest.fixture(scope="module")
def outcome(model: Path, new_folder: Callable[[], Path]) -> Outcome:
    ample = Round(prompts=PROMPTS, max_tokens=MAX_TOKENS, budget=AMPLE, forget=True, wait_idle=True)
    options = {"mode": "elastic", "budget": BUDGETS[model.name], "idle_seconds": 0.5}
    return serve(model, [PLAN, ample], options, folder=new_folder())


@pytest.mark.parametrize("case", [0, 1], ids=["tight", "ample"])
def test_tokens_are_those_of_stock(
    outcome: Outcome, windows_stock: list[list[int]], model: Path, case: int
) -> None:
    assert outcome.returncode == 0, outcome.output[-4000:]
    found = outcome.reports[case]
    token_rule.assert_same(PROMPTS, windows_stock, found.tokens, token_rule.reference(model))
    assert found.disagreements == []


def test_the_budget_was_in_the_way(outcome: Outcome, model: Path) -> None:
    tight, ample = outcome.reports
    assert tight.peak_bytes is not None
    assert ample.peak_bytes is not None
    assert tight.peak_bytes <= BUDGETS[model.name] < ample.peak_bytes
    assert ample.preemptions == 0


def test_an_idle_engine_shrinks_to_its_floor(outcome: Outcome) -> None:
    assert outcome.reports[1].idle_bytes == outcome.reports[1].floor_bytes
