"""The benchmarks run and write what they promise; how fast anything is, no test says."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vattn
from benchmarks import cpp_step, gpu_suite
from benchmarks.gpu_suite import Part
from vattn.bench import common
from vattn.bench.common import Distribution, NothingMeasured
from vattn.bench.latency import measure as vmm_latency
from vattn.bench.step import decode, growth, steady

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"date", "commit", "command", "cpu", "kernel", "python", "torch", "load_after"}


def run(module: str, out: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark as a user would; returns the one JSON file that it wrote."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--out", str(out)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    assert path.name.startswith(module)
    return record


def check_record(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Check what all records have in common; returns the measurements by name."""
    assert (record["schema"], record["benchmark"], record["unit"]) == (1, name, "ns")
    assert record["quick"] is True
    assert set(record["environment"]) >= ENVIRONMENT
    by_name = {m["name"]: m for m in record["measurements"]}
    assert len(by_name) == len(record["measurements"]), "two measurements have one name"
    for m in by_name.values():
        ns = m["ns"]
        assert ns["n"] >= 1
        assert 0 <= ns["min"] <= ns["median"] <= ns["p99"] <= ns["max"], m
        assert m["limit"] is None or m["limit"] in by_name, m
    return by_name


def test_step_latency_writes_targets_and_limits(tmp_path: Path) -> None:
    record = run("step_latency", tmp_path)
    by_name = check_record(record, "step_latency")
    assert set(cpp_step.CPP_SAMPLES) <= set(by_name)
    for form in ("int64", "int32", "list", "tensor", "dict"):
        assert by_name[f"python_{form}"]["limit"] == "python_empty_call"
    assert by_name["growth_super_pages"]["calls"] == {"create": 1, "map": 1}
    assert by_name["growth_single_pages"]["calls"] == {"create": 32, "map": 1}
    assert by_name["decode_waits_lookahead_0"]["calls"]["calls in step"] > 0
    assert len(record["targets"]) == 7
    assert all(set(t) == {"name", "goal", "measured", "unit", "met"} for t in record["targets"])


def test_vmm_latency_measures_both_sides(tmp_path: Path) -> None:
    by_name = check_record(run("vmm_latency", tmp_path, "-n", "2"), "vmm_latency")
    size = 2 * 2**20
    for call in ("reserve", "create", "map", "unmap", "release", "free"):
        for manner in ("one handle", "64 KiB handles"):
            assert by_name[f"raw/{manner}/{size}/{call}"]["calls"][call] >= 1
            assert by_name[f"vattn/{manner}/{size}/{call}"]["calls"][call] >= 1
    assert by_name[f"raw/64 KiB handles/{size}/create"]["calls"] == {"create": 32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the GPU tests from within a test")
def test_gpu_suite_skips_what_needs_a_gpu(tmp_path: Path) -> None:
    # Not the build: it would replace the extension under the tests that run beside this one.
    record = run("gpu_suite", tmp_path, "--skip", "build")
    statuses = {part["name"]: part["status"] for part in record["parts"]}
    assert statuses == {
        "machine": "ok",
        "tests": "skipped: no CUDA device",
        "vmm_latency_gpu": "skipped: no CUDA device",
        "step_latency_gpu": "skipped: no CUDA device",
        "hf_generate_gpu": "skipped: no CUDA device",
        "vmm_latency_host": "ok",
    }
    (host,) = (part for part in record["parts"] if part["name"] == "vmm_latency_host")
    check_record(host["result"], "vmm_latency")
    assert "vmm_latency_host: ok" in (tmp_path / "gpu_suite.log").read_text()


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


def test_the_suite_survives_parts_that_fail_or_hang(tmp_path: Path) -> None:
    log = tmp_path / "log"
    chosen = [
        Part("fails", 20, ("-c", "print('why'); raise SystemExit(3)"), needs_gpu=False),
        Part("hangs", 1, ("-c", "import time; time.sleep(60)"), needs_gpu=False),
        Part("works", 20, ("-c", "print('fine')"), needs_gpu=False),
    ]
    started = time.monotonic()
    outcomes = gpu_suite.run_all(chosen, started + 40, log, None)
    assert [o.status for o in outcomes] == ["failed", "timed out", "ok"]
    assert outcomes[0].output_tail == "why\n"
    assert [o.failed for o in outcomes] == [True, True, False]
    late = gpu_suite.run_all(chosen, time.monotonic(), log, None)
    assert [o.status for o in late] == ["not started"] * 3


def test_a_test_run_in_which_nothing_ran_is_a_failure(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    case = '<testcase classname="m" name="t"><failure/></testcase>'
    counts = 'tests="3" failures="1" errors="0" skipped="1"'
    junit.write_text(f"<testsuites><testsuite {counts}>{case}</testsuite></testsuites>")
    assert gpu_suite.read_junit(junit) == ("1 passed, 1 failed, 1 skipped", ["m::t"], 2)
    write = "open('{scratch}/junit.xml', 'w').write('<testsuite tests=\"2\" skipped=\"2\"/>')"
    outcome = gpu_suite.run_part(Part("tests", 20, ("-c", write)), 20, tmp_path / "log")
    assert (outcome.status, outcome.summary) == ("failed", "no test ran")


# A figure must have the work behind it: none of these may be measured when step() does nothing.
OWN = vmm_latency.Manner("one handle")
MEASURED: dict[str, Callable[[], object]] = {
    "steady": lambda: steady.measure_python("cpu", quick=True),
    "growth": lambda: growth.measure("cpu", quick=True, has_floor=False),
    "decode": lambda: decode.measure("cpu", quick=True),
    "vmm_latency": lambda: vmm_latency.measure("cpu", None, [2 * 2**20], 1),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_step_that_does_nothing_cannot_be_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vattn.KVCache, "step", lambda self, seq_lens: None)
    with pytest.raises(NothingMeasured):
        MEASURED[name]()


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
