"""``vattn vllm``, and the functions below it, against engines that are a few lines of Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from typing import Any

import pytest

from vattn import cli
from vattn.integrations.vllm import channel, control, sockets
from vattn.integrations.vllm.control import InstanceStatus, instances, set_budget, status

Json = dict[str, Any]
GIB = 2**30

CHAT = InstanceStatus(
    name="chat",
    mode="elastic",
    pid=4711,
    budget_bytes=8 * GIB,
    floor_bytes=GIB // 2,
    minimum_bytes=GIB // 4,
    ceiling_bytes=40 * GIB,
    mapped_bytes=2 * GIB + GIB // 8,
    idle=False,
    running_requests=3,
)


class Engine:
    """What the scheduler's process does for clients."""

    def __init__(self, told: InstanceStatus) -> None:
        self.told = told

    def answer(self, request: Json) -> Json:
        if request["op"] == "budget":
            size = request["bytes"]
            if size > self.told.ceiling_bytes:
                raise ValueError(f"budget is {size}, at most {self.told.ceiling_bytes}; lower it")
            if size == 666:
                raise RuntimeError("worker 1: no memory")
            self.told = replace(self.told, budget_bytes=size)
        return {"status": asdict(self.told)}


@pytest.fixture(autouse=True)
def run(stack: ExitStack) -> Callable[..., Engine]:
    """Run an engine until the end of the test."""

    def make(name: str = "chat", **told: Any) -> Engine:
        engine = Engine(replace(CHAT, name=name, **told))
        stack.enter_context(closing(channel.Server(name, engine.answer)))
        return engine

    return make


# Functions


def test_the_only_engine_needs_no_name(run: Any) -> None:
    engine = run()
    assert status() == status("chat") == CHAT
    assert set_budget("6GiB") == replace(CHAT, budget_bytes=6 * GIB)
    assert engine.told.budget_bytes == 6 * GIB


def test_of_several_engines_one_has_to_be_named(run: Any) -> None:
    run("chat")
    batch = run("batch")
    for call in (status, lambda: set_budget(1)):
        with pytest.raises(ValueError, match="2 engines are running; name one of batch, chat"):
            call()
    assert set_budget(5 * GIB, name="batch").budget_bytes == batch.told.budget_bytes == 5 * GIB
    assert status("chat") == CHAT
    assert [found.name for found in instances()] == ["batch", "chat"]


def test_without_an_engine_it_says_how_to_start_one() -> None:
    assert instances() == []
    with pytest.raises(ValueError, match=r"no vLLM engine .* start one with --kv-transfer-config"):
        status()
    with pytest.raises(ValueError, match="no engine named 'chat'"):
        status("chat")


def test_a_refused_budget_is_a_value_error_with_the_engines_words(run: Any) -> None:
    engine = run()
    with pytest.raises(ValueError, match=f"budget is {41 * GIB}, at most {40 * GIB}; lower it"):
        set_budget("41GiB")
    assert engine.told == CHAT


@pytest.mark.parametrize("budget", ["much", "0", 0, -1])
def test_a_budget_that_is_no_size_is_not_sent(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget is"):
        set_budget(budget)


def test_another_failure_keeps_its_kind(run: Any) -> None:
    run()
    with pytest.raises(channel.RemoteError, match="worker 1: no memory") as caught:
        set_budget(666)
    assert caught.value.kind == "RuntimeError"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"status": None},
        {"status": {**asdict(CHAT), "more": 1}},
        {"status": {**asdict(CHAT), "pid": "4711"}},
        {"status": {**asdict(CHAT), "idle": 0}},
        {"status": {k: v for k, v in asdict(CHAT).items() if k != "mode"}},
    ],
)
def test_what_is_no_status_is_refused_and_not_listed(
    answer: Json, run: Any, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    run()
    stack.enter_context(closing(channel.Server("other", lambda request: answer)))
    with pytest.raises(ValueError, match=r"'other' answered .* use the vattn that it runs with"):
        status("other")
    assert instances() == [CHAT]
    assert "other is left out: 'other' answered" in caplog.text


# Commands


def test_the_list_is_a_table(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    run("batch-2", mode="contiguous", idle=True, mapped_bytes=0, running_requests=0)
    assert cli.main(["vllm", "list"]) == 0
    assert capsys.readouterr().out == (
        "name     mode        budget  mapped   state\n"
        "batch-2  contiguous  8 GiB   0 bytes  idle\n"
        "chat     elastic     8 GiB   2.1 GiB  3 running\n"
    )


def test_the_list_as_json(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["vllm", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    run()
    assert cli.main(["vllm", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [asdict(CHAT)]


def test_an_empty_list_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["vllm", "list"]) == 0
    assert capsys.readouterr().out == "no vLLM engine of this user is running with vattn\n"


def test_a_budget_is_shown(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = run()
    assert cli.main(["vllm", "budget"]) == 0
    assert capsys.readouterr().out == (
        "chat (elastic, process 4711, 3 running), per worker:\n"
        "  budget  8 GiB\n"
        "  mapped  2.1 GiB\n"
        "  floor   512 MiB, kept when idle\n"
        "  accepts 256 MiB to 40 GiB\n"
    )
    assert engine.told == CHAT


def test_a_budget_is_set_and_what_is_above_it_is_said(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run("batch")
    engine = run()
    assert cli.main(["vllm", "budget", "2GiB", "--name", "chat"]) == 0
    out = capsys.readouterr().out
    assert "  budget  2 GiB\n" in out
    assert out.endswith("  128 MiB above the budget follow as requests end\n")
    assert engine.told.budget_bytes == 2 * GIB


def test_a_budget_as_json(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert cli.main(["vllm", "budget", "6GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == asdict(replace(CHAT, budget_bytes=6 * GIB))


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["41GiB"], 2, "vattn vllm budget: budget is 44023414784, at most 42949672960; lower it\n"),
        (["much"], 2, "vattn vllm budget: budget is 'much', expected a number"),
        (["1GiB", "--name", "x"], 2, "vattn vllm budget: no engine named 'x'"),
        (["--name", "a/b"], 2, "vattn vllm budget: name is 'a/b'"),
        (["666"], 1, "budget: the engine failed: worker 1: no memory (RuntimeError)\n"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    arguments: list[str], code: int, sentence: str, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    assert cli.main(["vllm", "budget", *arguments]) == code
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


def test_an_engine_that_hangs_is_one_sentence(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listener, _ = sockets.listen(channel.socket_path("chat"))
    stack.enter_context(listener)
    monkeypatch.setattr(
        control, "ask", lambda name, request: channel.ask(name, request, timeout_s=0.05)
    )
    assert cli.main(["vllm", "budget"]) == 2
    assert "'chat' did not answer within 0.05 s" in capsys.readouterr().err
