"""Several engines share a machine: budgets move while they serve, and idle ones hold little."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import token_rule
from engine_cases import MIB, TIGHT, requests
from engine_rounds import Outcome, Report, Round, serve
from openai_server import wait_until

from benchmarks.vllm.memory import file_bytes, files_of_vattn
from vattn.integrations.vllm import InstanceStatus, instances, set_budget

# A machine that does other things as well needs minutes to start an engine.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS, MAX_TOKENS = requests()
MODES = {"blocks": "elastic", "rows": "contiguous"}  # by name
MUCH = 8 * MIB
BUDGETS = {"blocks": TIGHT, "rows": MUCH}  # when they start
GROUP_BYTES = 64 * 2**10  # a page for the one group of layers that the model has
NULL_BLOCK_BYTES = 3 * GROUP_BYTES  # a page in each of its layers
GATES = ("go", "enough", "end")  # files that the engines wait for
START_S = 300.0
SERVE_S = 60.0
SHRINK_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What another program saw of two engines."""

    started: list[InstanceStatus]
    listed: str
    moves: list[tuple[InstanceStatus, InstanceStatus]]  # after each: who gave, and who got
    idle: list[InstanceStatus]
    resident: dict[str, int]  # by the kernel's account, when they were idle


def engines() -> dict[str, InstanceStatus]:
    return {engine.name: engine for engine in instances()}


def resident(engine: InstanceStatus) -> int:
    return file_bytes(files_of_vattn(engine.pid))


def move(giver: str, taker: str) -> tuple[InstanceStatus, InstanceStatus]:
    """Move a budget when the giver makes use of it; return when the taker does."""
    wait_until(lambda: resident(engines()[giver]) > TIGHT, SERVE_S, engines)
    set_budget(TIGHT, name=giver)
    wait_until(lambda: resident(engines()[giver]) <= TIGHT, SERVE_S, engines)
    gave = engines()[giver]
    got = set_budget(MUCH, name=taker)
    wait_until(lambda: resident(got) > TIGHT, SERVE_S, engines)
    return gave, got


def watch(folders: dict[str, Path], runs: list[Future[Outcome]]) -> Seen:
    """Let two engines serve that are starting, and look at them until they are idle again."""

    def have_started() -> bool:
        assert not any(run.done() for run in runs), [run.result() for run in runs if run.done()]
        return len(engines()) == len(MODES)

    wait_until(have_started, START_S, engines)
    started = instances()
    command = [sys.executable, "-m", "vattn", "vllm", "list"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    for folder in folders.values():
        (folder / "go").touch()
    moves = [move("rows", "blocks"), move("blocks", "rows")]
    for folder in folders.values():
        (folder / "enough").touch()
    wait_until(lambda: all(engine.idle for engine in instances()), SERVE_S, engines)
    wait_until(
        lambda: all(engine.mapped_bytes == engine.floor_bytes for engine in instances()),
        SHRINK_S,
        engines,
    )
    idle = instances()
    return Seen(
        started=started,
        listed=listed.stdout,
        moves=moves,
        idle=idle,
        resident={engine.name: resident(engine) for engine in idle},
    )


@pytest.fixture(scope="module")
def pair(llama: Path, new_folder: Callable[[], Path]) -> Iterator[tuple[Seen, dict[str, Outcome]]]:
    runtime = new_folder()
    folders = {name: runtime / name for name in MODES}

    def run(name: str) -> Outcome:
        options = {"mode": MODES[name], "budget": BUDGETS[name], "idle_seconds": 0.5, "name": name}
        go, enough, end = (str(folders[name] / gate) for gate in GATES)
        rounds = [
            Round(prompts=PROMPTS, max_tokens=MAX_TOKENS, wait_for=go, until=enough),
            Round(prompts=[], max_tokens=[], wait_for=end),  # until then it is idle
        ]
        return serve(llama, rounds, options, folder=folders[name], runtime=runtime)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(MODES)) as pool:
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        runs = {name: pool.submit(run, name) for name in MODES}
        try:
            seen = watch(folders, list(runs.values()))
        finally:
            for folder in folders.values():
                folder.mkdir(exist_ok=True)
                for gate in GATES:
                    (folder / gate).touch()
        yield seen, {name: ended.result() for name, ended in runs.items()}


@pytest.fixture(scope="module")
def seen(pair: tuple[Seen, dict[str, Outcome]]) -> Seen:
    return pair[0]


@pytest.fixture(scope="module")
def reports(pair: tuple[Seen, dict[str, Outcome]]) -> dict[str, Report]:
    for outcome in pair[1].values():
        assert outcome.returncode == 0, outcome.output[-4000:]
    return {name: outcome.reports[0] for name, outcome in pair[1].items()}


def test_both_engines_are_listed(seen: Seen) -> None:
    assert {engine.name: engine.mode for engine in seen.started} == MODES
    assert {engine.name: engine.budget_bytes for engine in seen.started} == BUDGETS
    assert len({engine.pid for engine in seen.started}) == len(MODES)
    rows = [line.split() for line in seen.listed.splitlines()[1:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        (name, mode, "idle") for name, mode in MODES.items()
    ]


def test_budgets_moved_while_both_engines_served(seen: Seen) -> None:
    for gave, got in seen.moves:
        assert gave.name != got.name
        assert gave.running_requests > 0
        assert got.running_requests > 0
        assert (gave.budget_bytes, got.budget_bytes) == (TIGHT, MUCH)
        # Memory has followed, while requests were running.
        assert gave.mapped_bytes <= TIGHT


def test_no_engine_had_more_than_its_budget(reports: dict[str, Report]) -> None:
    for report in reports.values():
        assert report.peak_bytes is not None
        assert TIGHT < report.peak_bytes <= MUCH


@pytest.mark.parametrize("name", MODES)
def test_tokens_are_those_of_stock_in_both_engines(
    name: str, reports: dict[str, Report], stock: Report, logits: token_rule.Logits
) -> None:
    found = reports[name]
    token_rule.assert_same(PROMPTS, stock.tokens, found.tokens, logits)
    assert found.again
    token_rule.assert_same_again(PROMPTS, stock.tokens, found.again, logits)
    assert found.disagreements == []


def test_idle_engines_hold_a_page_above_their_floor_at_most(seen: Seen) -> None:
    for engine in seen.idle:
        assert engine.floor_bytes == NULL_BLOCK_BYTES
        assert seen.resident[engine.name] <= engine.floor_bytes + GROUP_BYTES


def test_engines_leave_no_socket(pair: tuple[Seen, dict[str, Outcome]]) -> None:
    assert instances() == []
    assert [outcome.sockets for outcome in pair[1].values()] == [[], []]
