"""benchmarks.sharing runs and writes what it promises; how fast anything is, no test says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vattn
from benchmarks.sharing import __main__ as sharing
from benchmarks.sharing import fork, memory, picture, prefix, samples, shapes, window
from benchmarks.sharing.calls import CallWatch
from benchmarks.sharing.replay import Played
from benchmarks.sharing.requests import BLOCK_TOKENS, Request
from vattn.bench.common import NothingMeasured
from vattn.testing import settle

# The parts, with tiny sizes.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    assert sharing.main(["--quick", "--memory", "2GiB,1TiB", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    assert record["missing"] == []
    return record


def test_the_record_has_the_form_of_the_others(record: dict[str, Any], folder: Path) -> None:
    assert (record["schema"], record["benchmark"], record["quick"]) == (1, "sharing", True)
    assert {"date", "commit", "command", "cpu", "torch"} <= set(record["environment"])
    names = [m["name"] for m in record["measurements"]]
    assert len(set(names)) == len(names), "two measurements have one name"
    for measurement in record["measurements"]:
        assert measurement["limit"] is None or measurement["limit"] in names
        ns = measurement["ns"]
        assert 0 < ns["min"] <= ns["median"] <= ns["p99"] <= ns["max"]
    assert len({target["name"] for target in record["targets"]}) == len(record["targets"])
    assert set(record["sizes"]) == set(record["seconds"]) == set(sharing.PARTS)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".png", ".svg"}


def test_prefix_plays_both_caches_by_one_schedule(record: dict[str, Any]) -> None:
    assert record["trace"]["name"] == "made up"
    small, large = record["prefix"]
    for row in (small, large):
        ours, ideal = row["vattn"], row["ideal"]
        assert ours["requests"] + ours["refused"] == ideal["requests"] + ideal["refused"] == 60
        assert row["hit_ratio"] == ours["hit_tokens"] / ideal["hit_tokens"] > 0
        assert 0 < ours["hit_tokens"] <= ours["possible_tokens"]
        assert 0 <= row["most_copied_bytes"] <= 2 * 2**20
        assert row["copied_bytes_per_hit"] == row["copied_bytes"] / ours["hits"]
        assert row["driver_calls"]["match"]["map"] > 0 < row["driver_calls"]["step"]["map"]
        assert row["prefix_stats"]["hits"] == ours["hits"]
    assert small["vattn"]["hit_tokens"] < large["vattn"]["hit_tokens"], "memory makes no difference"
    assert small["vattn"]["ended_early"] > 0 == large["vattn"]["ended_early"]


def test_fork_measures_each_end_in_each_layout(record: dict[str, Any]) -> None:
    cases = [(row["layout"], row["end"]) for row in record["fork"]]
    assert cases == [(layout, end) for layout in shapes.LAYOUTS for end in fork.ENDS]
    for row in record["fork"]:
        assert row["aliased_bytes"] + row["copied_bytes"] == row["bytes"]
        assert (row["copied_bytes"] == 0) == (row["end"] == "page")
        assert row["copy_over_fork"] == row["ns"]["copy"] / row["ns"]["fork"]
        assert row["copy_over_fork_and_first_read"] < row["copy_over_fork"]


def test_samples_agree_with_the_kernel(record: dict[str, Any]) -> None:
    assert len(record["samples"]) == 4
    for row in record["samples"]:
        assert row["one_mapped_bytes"] >= row["prompt_tokens"] * 32 * 1024
        assert row["all_physical_bytes"] <= row["all_mapped_bytes"]
        assert row["all_physical_bytes"] >= row["one_physical_bytes"] + row["own_bytes"] / 8
        assert row["all_aliased_bytes"] > 0


def test_window_rows_are_noted_beside_full_ones(record: dict[str, Any]) -> None:
    assert len(record["window"]) == 2 * 2 * 2
    for row in record["window"]:
        assert row["mapped_bytes"] > 0
        assert (row["physical_bytes"] is None) == (row["kind"] == "full")
        if row["kind"] == "window":
            assert row["physical_bytes"] <= row["mapped_bytes"] <= row["bound_bytes"]


def test_the_picture_has_a_panel_for_each_part_there_is(
    record: dict[str, Any], tmp_path: Path
) -> None:
    assert picture.draw({}, tmp_path / "none") == []
    for name in sharing.PARTS:
        files = picture.draw({name: record[name]}, tmp_path / name)
        assert [path.suffix for path in files] == [".png", ".svg"]


def test_the_trace_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sharing.main([])
    assert "--trace FILE" in capsys.readouterr().err


def test_without_the_host_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sharing.main(["--quick", "--device", "cuda:0"]) == 0
    assert "skipped: it measures the host" in capsys.readouterr().out


# The guards: no figure without the work behind it.


def make_anew(cache: vattn.KVCache, row: int, n: int = 1) -> list[int]:
    """What fork() would be if it shared nothing."""
    rows = [cache.alloc() for _ in range(n)]
    cache.step(dict.fromkeys(rows, cache.seq_lens[row]))
    return rows


def make_anew_from_nothing(cache: vattn.KVCache, row: int, n: int = 1) -> list[int]:
    """Also give up what the row before had."""
    cache.trim()
    return make_anew(cache, row, n)


def growing(blocks: int) -> Request:
    """Make a prompt that begins as all shorter ones."""
    return Request(blocks * BLOCK_TOKENS, 1, tuple(range(blocks)))


def test_forks_that_share_nothing_give_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vattn.KVCache, "fork", make_anew)
    with pytest.raises(NothingMeasured, match="without a map call"):
        fork.measure(sharing._sizes(quick=True)[0])
    monkeypatch.setattr(vattn.KVCache, "fork", make_anew_from_nothing)
    with pytest.raises(NothingMeasured, match="shares no byte"):
        fork.measure(sharing._sizes(quick=True)[0])
    monkeypatch.setattr(samples, "_memory", lambda *_: 2**27)
    with pytest.raises(NothingMeasured, match="does not read the prompt"):
        samples.measure(sharing._sizes(quick=True)[1])


@pytest.mark.parametrize(("end", "copies"), [("page", 1), ("in_page", 0), ("in_extent", 0)])
def test_forks_copy_exactly_what_is_partly_filled(end: str, copies: int) -> None:
    case = fork.Case("interleaved", 256, end)
    with shapes.make_cache("interleaved", rows=2, tokens=256, memory=2**25) as cache:
        parent = cache.alloc()
        cache.step({parent: case.tokens})
        (child,) = cache.fork(parent)
        with pytest.raises(NothingMeasured, match=r"copies where nothing|no copy of"):
            fork._check_fork(cache, child, case, Counter(map=1, copy=copies))


def test_samples_that_share_nothing_give_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vattn.KVCache, "fork", make_anew)
    monkeypatch.setattr(samples, "_memory", lambda *_: 2**27)
    monkeypatch.setattr(samples, "_check_contents", lambda *_: None)
    with pytest.raises(NothingMeasured, match="share no byte"):
        samples.measure(sharing._sizes(quick=True)[1])


def test_a_prefix_cache_that_finds_nothing_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = prefix.Sizes(budgets=("1TiB",))
    monkeypatch.setattr(vattn.PrefixCache, "insert", lambda *_: None)
    with pytest.raises(NothingMeasured, match="vattn: none of 8 requests shared"):
        prefix.measure([growing(2)] * 8, sizes)
    with pytest.raises(NothingMeasured, match="ideal: none of 3 requests shared"):
        prefix._check(None, Played(hits=1, requests=3), Played(requests=3))  # type: ignore[arg-type]
    nothing: Any = SimpleNamespace(calls={"step": Counter()}, hits_without_a_call=0)
    with pytest.raises(NothingMeasured, match="mapped nothing"):
        prefix._check(nothing, Played(hits=1, requests=3), Played(hits=1, requests=3))


def test_a_request_that_was_never_ended_gives_no_figure() -> None:
    side = prefix.VattnSide("1TiB", 1024, prefix.Sizes(rows=2))
    with side.cache:
        side.match(growing(1))
        with pytest.raises(NothingMeasured, match="1 rows are still active"):
            side.finish()


def test_hits_that_share_no_memory_give_no_figure() -> None:
    sizes = prefix.Sizes(budgets=("1TiB",), at_a_time=1)
    with pytest.raises(NothingMeasured, match="none shared its memory"):
        prefix.measure([growing(n) for n in (1, 2, 3, 4)], sizes)


def test_full_rows_that_do_not_grow_give_no_figure() -> None:
    sizes = window.Sizes(window=128, rows=1, noted=(4,))
    with pytest.raises(NothingMeasured, match="did not grow"):
        window.measure(sizes)


def copies(cache: vattn.KVCache, layer: int, rows: Sequence[int]) -> list[torch.Tensor]:
    """What kv_window() would be if it were no view."""
    return [torch.zeros(len(rows), 128, 8, 128) for _ in "kv"]


def test_windows_that_are_no_views_give_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = window.Sizes(window=128, rows=1, noted=(1, 4))
    monkeypatch.setattr(vattn.KVCache, "kv_window", copies)
    with pytest.raises(NothingMeasured, match="does not read what was written"):
        window.measure(sizes)
    with pytest.raises(NothingMeasured, match="a window shows 128 tokens, expected 64"):
        window.measure(replace(sizes, window=64))


def test_the_kernel_counts_what_was_written_and_each_page_once() -> None:
    before = memory.physical_bytes()
    with shapes.make_cache("interleaved", rows=2, tokens=256, memory=2**24) as cache:
        row = cache.alloc()
        cache.step({row: 128})
        assert memory.physical_bytes() == before, "mapping alone takes no memory"
        (view,) = memory.flat_row(cache, row, 128)
        view.fill_(1)
        assert memory.physical_bytes() - before == 128 * 32 * 1024
        (child,) = cache.fork(row)
        assert memory.touch(memory.flat_row(cache, child, 128)) == 128 * 32 * 1024 / 4096
        assert memory.physical_bytes() - before == 128 * 32 * 1024
    assert memory.physical_bytes() == before


def test_calls_and_copied_bytes_are_the_callers() -> None:
    with shapes.make_cache("interleaved", rows=2, tokens=256, memory=2**25) as cache:
        parent = cache.alloc()
        cache.step({parent: 255})
        watch = CallWatch(cache)
        assert watch.copied_bytes(0) == 0
        (child,) = cache.fork(parent)
        calls = watch.look()
        assert (calls["copy"], watch.look().total()) == (1, 0)
        assert watch.copied_bytes(1) == 63 * 32 * 1024
        with pytest.raises(NothingMeasured, match="2 copies, the log of calls has 1"):
            watch.copied_bytes(2)
        cache.free(child)
        settle(cache)
        assert "unmap" not in watch.look()
        assert watch.background()["unmap"] == 1
