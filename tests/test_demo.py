"""The demo runs, says what it found, and fails when the caches disagree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vattn.demo.measure import Run, Sample, compare

MEBI = 2**20


def test_a_smoke_run_writes_its_figures_and_its_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vattn.demo", "--smoke", "--device", "cpu"]
    command += ["--max-new-tokens", "8", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "meaningless" in result.stdout and "--model" in result.stdout

    figures = json.loads((tmp_path / "run.json").read_text())
    assert figures["tokens_equal"] is True
    assert figures["max_logit_difference"] < 1e-5
    assert len(set(figures["prompt_tokens"])) > 1, "nothing was padded"
    stock, ours = figures["runs"]
    assert (stock["name"], ours["name"]) == ("DynamicCache", "VAttnCache")
    assert stock["tokens"] == ours["tokens"]
    assert len(ours["samples"]) == 8
    last = ours["samples"][-1]
    assert last["used_bytes"] == stock["samples"][-1]["used_bytes"]
    assert last["used_bytes"] <= last["mapped_bytes"] < ours["reserving_bytes"]
    assert figures["environment"]["torch"] == torch.__version__

    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert "reserving 4 x 2,048 tokens" in (tmp_path / "memory.svg").read_text()


def run_of(tokens: list[list[int]], logits: list[list[list[float]]]) -> Run:
    return Run(
        name="",
        tokens=torch.tensor(tokens),
        logits=[torch.tensor(step) for step in logits],
        prefill_s=1.0,
        decode_s=1.0,
        samples=[Sample(tokens=1, mapped_bytes=MEBI, used_bytes=MEBI)],
    )


# Two rows, two tokens; the second row parts at its second token, where the best two are 0.1 apart.
STOCK = run_of([[0, 0], [0, 0]], [[[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [9.1, 9.0]]])
OURS = run_of([[0, 0], [0, 1]], [[[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [9.0, 9.1]]])


def test_equal_tokens_are_no_difference() -> None:
    assert compare(STOCK, STOCK, torch.float32) is None


@pytest.mark.parametrize(("dtype", "is_tie"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_difference_is_a_tie_only_within_rounding(dtype: torch.dtype, is_tie: bool) -> None:
    difference = compare(OURS, STOCK, dtype)
    assert difference is not None
    assert (difference.row, difference.token, difference.is_tie) == (1, 1, is_tie)
    assert difference.logit_gap == pytest.approx(0.1, abs=1e-5)


def test_the_demo_fails_when_tokens_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vattn.demo import app, measure

    honest = measure.run_vattn

    def wrong_token(*arguments: object) -> Run:
        run = honest(*arguments)  # type: ignore[arg-type]
        run.tokens[2, 1] += 1
        return run

    monkeypatch.setattr(measure, "run_vattn", wrong_token)
    threads = torch.get_num_threads()
    try:
        options = ["--smoke", "--device", "cpu", "--max-new-tokens", "3", "--threads", "1"]
        status = app.main([*options, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert status == 1
    assert "row 2, token 1" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "run.json").read_text())["tokens_equal"] is False
