"""The command line: which command runs, and what a user reads when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import vattn
from vattn import cli


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A command in the place of ``plan`` that notes its calls, and raises what is put in front."""
    calls: list[object] = []

    def main(arguments: list[str], *, prog: str) -> int:
        if calls and isinstance(calls[0], BaseException):
            raise calls[0]
        calls.append((arguments, prog))
        return 7

    module = ModuleType("fake_command")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "plan", cli.Command("fake_command", "a stand-in"))
    return calls


def test_a_command_gets_its_arguments_and_its_status_is_returned(plan: list[object]) -> None:
    assert cli.main(["plan", "--model", "x"]) == 7
    assert plan == [(["--model", "x"], "vattn plan")]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"vattn {name} " in out for name in cli.COMMANDS)


def test_a_group_lists_its_commands_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "vattn bench step" in out
    assert "vattn plan" not in out


@pytest.mark.parametrize(
    ("arguments", "named"), [(["plna"], "plna"), (["bench", "stpe"], "bench stpe")]
)
def test_an_unknown_command_is_named_and_the_known_ones_listed(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert f"vattn has no command {named!r}" in err
    assert "vattn bench step" in err


def test_bench_alone_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 2
    assert "vattn bench step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("memory is 0"), "vattn plan: memory is 0\n"),
        (FileNotFoundError(2, "No such file", "x.csv"), "[Errno 2] No such file: 'x.csv'"),
        (vattn.DriverError("map failed", "map", 2), "vattn plan: map failed\n"),
        (ModuleNotFoundError("no rich", name="rich.table"), "pip install 'vattn[cli]'"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    error: Exception, sentence: str, plan: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    plan.append(error)
    assert cli.main(["plan"]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_an_interrupt_is_no_traceback(
    plan: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    plan.append(KeyboardInterrupt())
    assert cli.main(["plan"]) == 130
    assert capsys.readouterr().err == "vattn plan: interrupted\n"


def test_a_defect_of_ours_keeps_its_traceback(plan: list[object]) -> None:
    plan.append(ModuleNotFoundError("no vattn.x", name="vattn.x"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["plan"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_says_what_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: vattn {name}" in capsys.readouterr().out


def test_it_runs_as_a_module_and_says_its_version() -> None:
    command = [sys.executable, "-m", "vattn", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"vattn {vattn.__version__}\n"
