"""The benchmarks run and write what they promise; how fast anything is, no test says."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vattn.bench import common
from vattn.bench.common import Distribution, NothingMeasured

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize("module", ["step_latency", "vmm_latency"])
def test_without_a_gpu_a_gpu_benchmark_says_so(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--device", "cuda:0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "skipped: no CUDA device" in done.stdout


def test_no_samples_and_no_calls_are_refused() -> None:
    with pytest.raises(NothingMeasured, match="no samples"):
        Distribution.of([])
    with pytest.raises(NothingMeasured, match="0 calls were made, expected 0"):
        common.expect_calls(0, 0, "nothing")
    with pytest.raises(NothingMeasured, match="3 calls were made, expected 4"):
        common.expect_calls(3, 4, "map")


def test_percentiles_are_samples() -> None:
    hundred = Distribution.of(range(100, 0, -1))
    assert (hundred.n, hundred.min, hundred.median, hundred.p99, hundred.max) == (
        *(100, 1, 50.5),
        *(99, 100),
    )
    assert Distribution.of([7]) == Distribution(1, 7, 7, 7, 7)
    assert Distribution.of(range(1, 31)).p99 == 30, "of 30 samples, 99% do not exceed the largest"


def test_where_there_is_no_git_the_commit_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common.commit() == "unknown"
    env = common.environment("abc123")
    assert env["commit"] == "abc123"
    options = argparse.Namespace(out=tmp_path / "new", quick=True, device="cpu")
    path = common.save("name", options, env)
    assert path.parent == tmp_path / "new"
    assert path.name.endswith("-abc123.json")
