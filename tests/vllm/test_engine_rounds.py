"""Engines with vattn give the tokens of stock vLLM, whatever becomes of their memory meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import token_rule
from engine_cases import AMPLE, MIB, TIGHT, requests
from engine_rounds import Outcome, Report, Round, serve

# A machine that does other things as well needs minutes to start an engine.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS, MAX_TOKENS = requests()
CHANGE_AT = 25  # steps: most requests have not ended by then
ANSWERS = 3
ROUNDS = {
    "tight": Round(prompts=PROMPTS, max_tokens=MAX_TOKENS),
    "ample": Round(
        prompts=PROMPTS, max_tokens=MAX_TOKENS, budget=AMPLE, forget=True, wait_idle=True
    ),
    "cut": Round(prompts=PROMPTS, max_tokens=MAX_TOKENS, change_at=CHANGE_AT, change_to=TIGHT),
    "raised": Round(
        prompts=PROMPTS, max_tokens=MAX_TOKENS, change_at=CHANGE_AT, change_to=AMPLE, forget=True
    ),
    "answers": Round(prompts=PROMPTS[:12], max_tokens=MAX_TOKENS[:12], n=ANSWERS, budget=TIGHT),
    "abort": Round(prompts=PROMPTS, max_tokens=MAX_TOKENS, abort_at=12, wait_idle=True),
}
FORGOTTEN = "a map was left out: "
# The first time that memory grows after it was given back, and only then, nothing is mapped.
FORGET_A_MAP = f"""
from vattn import PageRange
whole_map, whole_unmap = PageRange.map, PageRange.unmap
unmapped, left_out = [], []
def unmap(self, runs, **options):
    unmapped.extend(runs)
    return whole_unmap(self, runs, **options)
def map(self, runs, **options):
    if unmapped and not left_out:
        left_out.append(runs)
        print({FORGOTTEN!r}, runs, flush=True)
    else:
        whole_map(self, runs, **options)
PageRange.map, PageRange.unmap = map, unmap
"""


@pytest.fixture(scope="module", params=["elastic", "contiguous"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def outcome(mode: str, llama: Path, new_folder: Callable[[], Path]) -> Outcome:
    options = {"mode": mode, "budget": TIGHT, "idle_seconds": 0.5}
    return serve(llama, list(ROUNDS.values()), options, folder=new_folder())


@pytest.fixture(scope="module")
def reports(outcome: Outcome) -> dict[str, Report]:
    assert outcome.returncode == 0, outcome.output[-4000:]
    return dict(zip(ROUNDS, outcome.reports, strict=True))


def test_stock_itself_is_what_it_is_taken_for(stock: Report) -> None:
    assert [len(tokens) for tokens in stock.tokens] == MAX_TOKENS
    assert stock.prefix_hits > 0  # or caching prefixes would not be tested
    assert stock.preemptions == 0
    # A model that said the same whatever it is asked would prove nothing.
    assert all(len(set(tokens)) > len(tokens) // 3 for tokens in stock.tokens)


def test_tokens_are_those_of_stock_when_a_small_budget_preempts(
    reports: dict[str, Report], stock: Report, logits: token_rule.Logits
) -> None:
    found = reports["tight"]
    token_rule.assert_same(PROMPTS, stock.tokens, found.tokens, logits)
    assert found.preemptions > 0
    assert found.peak_bytes is not None
    assert found.peak_bytes <= TIGHT


def test_tokens_are_those_of_stock_when_memory_is_ample(
    reports: dict[str, Report], stock: Report, logits: token_rule.Logits
) -> None:
    found = reports["ample"]
    token_rule.assert_same(PROMPTS, stock.tokens, found.tokens, logits)
    assert found.preemptions == 0
    assert found.peak_bytes is not None
    assert TIGHT < found.peak_bytes < AMPLE


def test_tokens_are_those_of_stock_when_the_budget_is_cut_in_the_middle(
    reports: dict[str, Report], stock: Report, logits: token_rule.Logits
) -> None:
    found = reports["cut"]
    token_rule.assert_same(PROMPTS, stock.tokens, found.tokens, logits)
    assert found.peak_before_change is not None
    assert found.end_bytes is not None
    assert found.peak_before_change > TIGHT >= found.end_bytes
    assert found.unmapped_pages


def test_tokens_are_those_of_stock_when_the_budget_is_raised_in_the_middle(
    reports: dict[str, Report], stock: Report, logits: token_rule.Logits
) -> None:
    found = reports["raised"]
    token_rule.assert_same(PROMPTS, stock.tokens, found.tokens, logits)
    assert found.peak_before_change is not None
    assert found.peak_bytes is not None
    assert found.peak_before_change <= TIGHT < found.peak_bytes


def test_several_answers_to_each_prompt_are_those_of_stock_when_a_small_budget_preempts(
    reports: dict[str, Report], stock: Report, logits: token_rule.Logits
) -> None:
    found = reports["answers"]
    prompts = [prompt for prompt in PROMPTS[:12] for _ in range(ANSWERS)]
    expected = [tokens for tokens in stock.tokens[:12] for _ in range(ANSWERS)]
    token_rule.assert_same(prompts, expected, found.tokens, logits)
    assert found.preemptions > 0


def test_an_abort_changes_nothing_for_the_others(
    reports: dict[str, Report], stock: Report, logits: token_rule.Logits
) -> None:
    found = reports["abort"].tokens
    aborted = range(0, len(PROMPTS), 2)
    assert all(len(found[i]) < MAX_TOKENS[i] for i in aborted)
    kept = range(1, len(PROMPTS), 2)
    token_rule.assert_same(
        [PROMPTS[i] for i in kept],
        [stock.tokens[i] for i in kept],
        [found[i] for i in kept],
        logits,
    )


@pytest.mark.parametrize("name", ["ample", "abort"])
def test_an_idle_engine_shrinks_to_its_floor(reports: dict[str, Report], name: str) -> None:
    found = reports[name]
    assert found.idle_bytes == found.floor_bytes
    assert found.end_bytes is not None
    assert found.floor_bytes is not None
    assert found.end_bytes > found.floor_bytes


def test_scheduler_and_worker_agree_after_every_round(reports: dict[str, Report]) -> None:
    assert {name: report.disagreements for name, report in reports.items()} == {
        name: [] for name in ROUNDS
    }


def test_prefixes_are_found_as_in_stock(
    reports: dict[str, Report], stock: Report, mode: str
) -> None:
    found = reports["ample"]
    assert found.prefix_queries == stock.prefix_queries
    # A row belongs to one request, so there is nothing to find for another one.
    assert found.prefix_hits == (stock.prefix_hits if mode == "elastic" else 0)


def test_an_engine_ends_without_leaving_a_socket(outcome: Outcome) -> None:
    assert outcome.returncode == 0, outcome.output[-4000:]
    assert outcome.sockets == []


def test_a_map_that_a_worker_forgets_does_not_go_unnoticed(
    mode: str, llama: Path, new_folder: Callable[[], Path], stock: Report
) -> None:
    few = Round(prompts=PROMPTS[:4], max_tokens=MAX_TOKENS[:4], wait_idle=True)
    outcome = serve(
        llama,
        [few, ROUNDS["tight"]],
        {"mode": mode, "budget": 16 * MIB, "idle_seconds": 0.5},
        folder=new_folder(),
        sabotage=FORGET_A_MAP,
    )
    # Until then, all is well.
    assert [report.tokens for report in outcome.reports] == [stock.tokens[:4]], outcome.output
    assert outcome.output.count(FORGOTTEN) == 1
    assert outcome.returncode == -signal.SIGSEGV
