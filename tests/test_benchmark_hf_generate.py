"""hf_generate runs and writes what it promises; how fast anything is, no test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hf_generate import batching, generate, turns, update
from benchmarks.hf_generate.turns import ChildFailed, in_child, there_and_back

ROOT = Path(__file__).resolve().parent.parent


def run(out: Path, *arguments: str) -> dict[str, Any]:
    """Run the benchmark as a user would; returns the one JSON file that it wrote."""
    command = [sys.executable, "-m", "benchmarks.hf_generate", "--smoke", "--out", str(out)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["missing"] == [], done.stdout + done.stderr
    return record


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    turns.preload("benchmarks.hf_generate.generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return run(folder)


def check_times(record: dict[str, Any], part: str, names: set[str]) -> None:
    """Check that a part has exactly these measurements, and that they can be true."""
    times = {m["name"]: m["ns"] for m in record["measurements"]}
    assert {name for name in times if name.startswith(f"{part}/")} == names
    for name in names:
        ns = times[name]
        assert ns["n"] >= 1
        assert 0 < ns["min"] <= ns["median"] <= ns["p99"] <= ns["max"] < 1e12, name


def check_rate(rate: dict[str, Any]) -> None:
    assert 0 < rate["min"] <= rate["median"] <= rate["max"] < 1e9
    assert rate["rounds"]


@pytest.mark.slow
def test_the_record_has_the_form_of_the_others(record: dict[str, Any], folder: Path) -> None:
    assert (record["schema"], record["benchmark"], record["unit"]) == (1, "hf_generate", "ns")
    assert record["quick"] is True
    assert {"date", "commit", "command", "cpu", "torch"} <= set(record["environment"])
    assert "random" in record["about_the_model"]
    names = [m["name"] for m in record["measurements"]]
    assert len(set(names)) == len(names), "two measurements have one name"
    assert all(m["limit"] is None or m["limit"] in names for m in record["measurements"])
    assert all(set(t) == {"name", "goal", "measured", "unit", "met"} for t in record["targets"])
    assert len(record["targets"]) == 2 + 6 + 2
    (picture,) = folder.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_update_measures_each_cache_beside_the_limit(record: dict[str, Any]) -> None:
    cases = [f"update/{dtype}/b1" for dtype in ("float32", "bfloat16")]
    subjects = (*update.CACHES, "limit")
    check_times(record, "update", {f"{case}/{subject}" for case in cases for subject in subjects})
    for row in record["update"]:
        assert row["token_bytes"] == 2 * 2 * 2 * 16 * {"float32": 4, "bfloat16": 2}[row["dtype"]]
        assert row["dynamic_over_vattn"] > 0
        assert row["copied_bytes_per_s"] > 0


@pytest.mark.slow
def test_generate_measures_each_subject_in_each_case(record: dict[str, Any]) -> None:
    rows = record["generate"]
    cases = {(row["dtype"], row["context"], row["batch"]) for row in rows}
    assert cases == {(dtype, 64, n) for dtype in ("float32", "bfloat16") for n in (1, 2)}
    subjects = [subject.name for subject in generate.SUBJECTS]
    with_heap = [*subjects, *(subject.name for subject in generate.HEAP_SUBJECTS)]
    wanted = [*with_heap * 2, *subjects * 2]  # the first batch in two types, then the second
    assert [row["subject"] for row in rows] == wanted
    names = {"generate/{dtype}/{context}/b{batch}/{subject}".format(**row) for row in rows}
    check_times(record, "generate", names)
    for row in rows:
        check_rate(row["tokens_per_s"])
        token_bytes = 2 * 2 * 2 * 16 * {"float32": 4, "bfloat16": 2}[row["dtype"]]
        assert row["kv_bytes"] >= token_bytes * row["context"] * row["batch"]
        assert row["peak_growth_bytes"] > 0
        assert row["mlp_share"] > 0
    large = [row for row in rows if row["subject"] == "StaticCache 32K + sdpa"]
    assert all(row["peak_growth_bytes"] >= row["kv_bytes"] >= 2**23 for row in large)


@pytest.mark.slow
def test_batching_measures_each_subject_in_each_scenario(record: dict[str, Any]) -> None:
    wanted = [(s.name, subject) for s in batching.scenarios(True) for subject in s.rounds]
    assert [(row["scenario"], row["subject"]) for row in record["batching"]] == wanted
    check_times(record, "batching", {f"batching/{s}/{subject}" for s, subject in wanted})
    for row in record["batching"]:
        check_rate(row["tokens_per_s"])
        check_rate(row["tokens_per_s_serving"])
        assert row["equal_requests"] == row["requests"] == 4
        assert row["equal_tokens"] == row["new_tokens"]


def test_requests_are_spread_evenly_and_always_the_same() -> None:
    mixed, _, uneven = batching.scenarios(False)
    assert mixed.requests() == mixed.requests()
    lengths = sorted(len(request.prompt) for request in mixed.requests())
    assert (len(lengths), lengths[0], lengths[-1]) == (32, 8, 199)
    assert all(5 <= after - before <= 7 for before, after in pairwise(lengths))
    assert {request.new_tokens for request in mixed.requests()} == {48}
    assert sorted(request.new_tokens for request in uneven.requests())[::31] == [12, 120]
    assert sorted(len(request.prompt) for request in uneven.requests())[::31] == [64, 640]


def test_turns_go_there_and_back() -> None:
    assert there_and_back({"a": 4, "b": 2, "c": 4}) == [*"abc", *"cba", *"ac", *"ca"]


def test_what_has_no_room_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "no_room", lambda needed, device: f"takes {needed} bytes")
    sizes = generate.Sizes(contexts=(64, 65536), batches=(1,), dtypes=("float32",), rounds=1)
    part = generate.measure(generate.Shape(), sizes, "cpu", time.monotonic() + 60)
    assert part.measurements == part.targets == part.rows == []
    assert len(part.missing) == 2 * len(generate.SUBJECTS) + len(generate.HEAP_SUBJECTS)
    assert {entry["status"] for entry in part.missing} == {"skipped"}
    reasons = {entry["name"]: entry["reason"] for entry in part.missing}
    assert reasons["generate/float32/65536/b1/StaticCache 32K + sdpa"].startswith("no larger")
    assert reasons["generate/float32/64/b1/DynamicCache + sdpa"].startswith("takes ")


def test_after_the_deadline_nothing_is_started() -> None:
    sizes = generate.Sizes(contexts=(64,), batches=(1,), dtypes=("float32",), rounds=1)
    part = generate.measure(generate.Shape(), sizes, "cpu", time.monotonic() - 1)
    assert {entry["reason"] for entry in part.missing} == {"no time was left"}
    part = batching.measure(True, "cpu", time.monotonic() - 1)
    assert [entry["reason"] for entry in part.missing] == ["no time was left"] * 2


def count_to(n: int) -> Iterator[int]:
    yield from range(n)


def count_and_raise() -> Iterator[int]:
    yield 1
    raise KeyError("why")


def count_and_die() -> Iterator[int]:
    yield 1
    os._exit(3)


def hang() -> Iterator[int]:
    time.sleep(60)
    yield 1


def test_a_child_hands_over_what_it_yields() -> None:
    assert list(in_child(count_to, 3, limit_s=120)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("child", "message"),
    [(count_and_raise, "KeyError: 'why'"), (count_and_die, "ended with 3")],
)
def test_a_child_that_fails_says_how(child: Callable[[], Iterator[int]], message: str) -> None:
    items = in_child(child, limit_s=120)
    assert next(items) == 1
    with pytest.raises(ChildFailed, match=message):
        next(items)


def test_a_child_that_hangs_is_ended() -> None:
    with pytest.raises(ChildFailed, match="nothing came for 1 s"):
        next(in_child(hang, limit_s=1))
