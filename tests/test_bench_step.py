"""`vattn bench step` writes what it promises, and refuses figures without the work behind them."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import vattn
from benchmarks import cpp_step
from vattn.bench.common import Distribution, Measurement, NothingMeasured
from vattn.bench.step import (
    batch,
    command,
    decode,
    growth,
    layouts,
    pace,
    patterns,
    picture,
    steady,
    timed,
)
from vattn.bench.step.layouts import Geometry
from vattn.bench.step.patterns import Bench, Walk

ROOT = Path(__file__).resolve().parent.parent
SMALL = layouts.INTERLEAVED[0]
ENVIRONMENT = {"date", "commit", "command", "cpu", "kernel", "python", "torch", "load_after"}
LAYOUTS = [variant.name for variant in layouts.variants("cpu")]


def read(out: Path) -> dict[str, Any]:
    """Return the one JSON file of a folder; what all of them have in common is checked."""
    (path,) = out.glob("step_latency-*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    assert (record["schema"], record["benchmark"], record["unit"]) == (1, "step_latency", "ns")
    assert record["quick"] is True
    assert set(record["environment"]) >= ENVIRONMENT
    by_name = {m["name"]: m for m in record["measurements"]}
    assert len(by_name) == len(record["measurements"]), "two measurements have one name"
    for m in by_name.values():
        assert m["ns"]["n"] >= 1
        assert 0 <= m["ns"]["min"] <= m["ns"]["median"] <= m["ns"]["p99"] <= m["ns"]["max"], m
        assert m["limit"] is None or m["limit"] in by_name, m
    assert all(set(t) == {"name", "goal", "measured", "unit", "met"} for t in record["targets"])
    record["by_name"] = by_name
    return record


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the benchmark as a user would, once; the folder that it wrote to."""
    folder = tmp_path_factory.mktemp("out")
    words = [sys.executable, "-m", "benchmarks.step_latency", "--quick", "--period-ms", "2"]
    done = subprocess.run(
        [*words, "--out", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_everything_has_a_limit_and_there_is_a_picture(out: Path) -> None:
    record = read(out)
    by_name = record["by_name"]
    assert set(cpp_step.CPP_SAMPLES) <= set(by_name)
    for form in ("int64", "int32", "list", "tensor", "dict"):
        assert by_name[f"python_{form}"]["limit"] == "python_empty_call"
    for rows in batch.QUICK_ROWS:
        for what in ("int64", "copyto"):
            assert by_name[f"python_{what}_rows_{rows}"]["limit"] == "python_empty_call_rows"
    assert by_name["growth_super_pages"]["calls"] == {"create": 1, "map": 1}
    assert by_name["growth_single_pages"]["calls"] == {"create": 32, "map": 1}
    assert by_name["decode_waits_lookahead_0"]["calls"]["calls in step"] > 0
    assert len(record["targets"]) == 7
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".png", ".svg"]


def test_growth_pays_for_every_region_of_a_layout(out: Path) -> None:
    by_name = read(out)["by_name"]
    regions = dict(zip(LAYOUTS, (1, 8, 64, 512, 64), strict=True))
    for layout, n in regions.items():
        prompt = by_name[f"growth_prefill_512_{layout}"]
        assert prompt["calls"] == {"create": n, "map": n}
        assert prompt["limit"] == f"growth_prefill_512_{layout}_floor"
        assert by_name[f"growth_prefill_512_{layout}_driver"]["ns"]["median"] > 0
        assert by_name[f"growth_together_{layout}"]["calls"]["map"] == 2 * n
        staggered = by_name[f"growth_staggered_growing_{layout}"]
        assert staggered["calls"] == {"steps": 2, "create": 2 * n, "map": 2 * n}
        assert by_name[f"growth_by_token_{layout}"]["calls"]["map"] == 2 * n
        assert by_name[f"growth_by_token_growing_{layout}"]["ns"]["n"] == 2
        assert by_name[f"growth_adopt_512_{layout}"]["calls"] == {"create": 0, "map": 0}


def test_decoding_says_what_the_critical_path_paid(out: Path) -> None:
    record = read(out)
    found = {(p["layout"], p["rows"], p["lookahead"]): p for p in record["critical_path"]}
    layouts = ("interleaved", "per_layer")
    assert set(found) == set(itertools.product(layouts, pace.QUICK_ROWS, pace.QUICK_LOOKAHEADS))
    for (layout, rows, lookahead), p in found.items():
        page_tokens, regions = (16, 1) if layout == "interleaved" else (64, 8)
        assert (p["steps"], p["period_ms"]) == (page_tokens, 2.0)
        line = record["by_name"][f"pace_{layout}_rows_{rows}_lookahead_{lookahead}"]
        assert line["limit"] == f"python_int64_rows_{rows}"
        assert line["calls"].get("map", 0) == p["calls"].get("map", 0)
        if lookahead:
            assert p["background_calls"] > 0
            continue
        assert p["background_calls"] == 0
        assert p["without_calls_percent"] < 100
        assert p["driver_ns_per_step"] > 0
        assert p["calls"]["map"] == rows * regions, "every row starts one page"


def test_a_part_can_be_measured_alone(tmp_path: Path) -> None:
    assert command.main(["--quick", "--parts", "steady", "--out", str(tmp_path)]) == 0
    names = set(read(tmp_path)["by_name"])
    assert names
    assert all(name.startswith("python_") for name in names)
    assert len(list(tmp_path.iterdir())) == 3
    assert picture.draw([], [], tmp_path / "nothing") == []


def test_limits_of_parts_that_did_not_run_are_left_out() -> None:
    ns = Distribution.of([1])
    lines = [
        Measurement(name="step", what="", ns=ns, limit="floor"),
        Measurement(name="more", what="", ns=ns, limit="step"),
    ]
    assert [line.limit for line in command.with_known_limits(lines)] == [None, "step"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "steady,grow"], "'grow' is no part; choose from steady, growth, decode"),
        (["--parts", ""], "'' is no part"),
        (["--period-ms", "0"], "'0' is no pace; give milliseconds a decode step, 0.1 to 1000"),
        (["--period-ms", "nan"], "'nan' is no pace"),
        (["--period-ms", "fast"], "'fast' is no pace"),
    ],
)
def test_bad_options_say_what_is_expected(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(words)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_there_are_figures_but_no_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "vattn.bench.step.picture", raising=False)
    monkeypatch.delattr("vattn.bench.step.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    results = command.Results(sized=batch.measure("cpu", quick=True))
    assert command.draw(results, tmp_path / "picture") == []
    assert "install matplotlib" in capsys.readouterr().out


def bench() -> Bench:
    return Bench.of("cpu", SMALL, quick=True)


def walk(name: str) -> list[patterns.Growth]:
    (found,) = (walk for walk in patterns.walks(bench(), quick=True) if walk.name == name)
    return patterns.measure_walk(bench(), found)


def decode_with(lookahead: int, rows: int = 2) -> pace.Pace:
    setting = pace.settings("cpu")[0]
    shape = Geometry.of(setting.config("cpu", 1, 1, 2**28, 0))
    return pace.decode(
        "cpu", setting, shape, rows=rows, lookahead=lookahead, n_steps=32, period_s=0.0001
    )


# A figure must have the work behind it.
MEASURED: dict[str, Callable[[], object]] = {
    "steady": lambda: steady.measure_python("cpu", quick=True),
    "batch": lambda: batch.measure("cpu", quick=True),
    "growth": lambda: growth.measure("cpu", quick=True, has_floor=False),
    "prefill": lambda: walk("prefill_512"),
    "together": lambda: walk("together"),
    "staggered": lambda: walk("staggered"),
    "by token": lambda: walk("by_token"),
    "adoption": lambda: patterns.measure_adoption(bench(), 512),
    "decode": lambda: decode.measure("cpu", quick=True),
    "pace": lambda: decode_with(lookahead=0),
    "pace with prefetch": lambda: decode_with(lookahead=16),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_step_that_does_nothing_cannot_be_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vattn.KVCache, "step", lambda self, seq_lens: None)
    with pytest.raises(NothingMeasured):
        MEASURED[name]()


def step_of_nothing(self: vattn.KVCache, seq_lens: object) -> None:
    self._core.step([0] * self.config.max_batch_size)


@pytest.mark.parametrize("name", [n for n in MEASURED if n not in ("steady", "batch")])
def test_a_step_that_maps_nothing_cannot_be_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vattn.KVCache, "step", step_of_nothing)
    with pytest.raises(NothingMeasured):
        MEASURED[name]()


def test_an_idle_row_that_was_reclaimed_is_no_adoption(monkeypatch: pytest.MonkeyPatch) -> None:
    free = vattn.KVCache.free

    def free_and_trim(self: vattn.KVCache, row: int) -> None:
        free(self, row)
        self.trim()

    monkeypatch.setattr(vattn.KVCache, "free", free_and_trim)
    with pytest.raises(NothingMeasured, match="row 0 is not idle"):
        patterns.measure_adoption(bench(), 512)
    states = itertools.cycle(["idle", "active"])
    monkeypatch.setattr(vattn.KVCache, "row_state", lambda self, row: next(states))
    with pytest.raises(NothingMeasured, match="adopting a row made 2 driver calls, not 0"):
        patterns.measure_adoption(bench(), 512)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (lambda self, seq_lens: None, r"step\(\) was counted 0 times, not 1"),
        (step_of_nothing, "tokens of the adopted row: 0 calls were made, expected 512"),
    ],
)
def test_an_adopted_row_gets_its_tokens(
    later: Callable[..., None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.chain([vattn.KVCache.step] * 2, itertools.repeat(later))
    monkeypatch.setattr(vattn.KVCache, "step", lambda self, lens: next(steps)(self, lens))
    with pytest.raises(NothingMeasured, match=message):
        patterns.measure_adoption(bench(), 512)


def test_another_row_than_the_idle_one_is_no_adoption(monkeypatch: pytest.MonkeyPatch) -> None:
    alloc = vattn.KVCache.alloc

    def alloc_unless_expected(self: vattn.KVCache, seq_len: int = 0) -> int:
        return alloc(self) if seq_len == 0 else 1

    monkeypatch.setattr(vattn.KVCache, "alloc", alloc_unless_expected)
    with pytest.raises(NothingMeasured, match=r"alloc\(\) did not adopt row 0"):
        patterns.measure_adoption(bench(), 512)


def test_growth_in_other_steps_than_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "growing_rows", lambda self, shape: [1] * (2 * shape.page_tokens))
    with pytest.raises(NothingMeasured, match=r"by_token, interleaved NHD, 2 MiB: map: 2 calls"):
        walk("by_token")
    monkeypatch.setattr(Walk, "growing_rows", lambda self, shape: [2])
    with pytest.raises(NothingMeasured, match="by_token: steps that grow: 2 calls were made"):
        walk("by_token")


def test_a_background_thread_that_never_rests_is_not_waited_for_forever() -> None:
    class Busy:
        calls = itertools.count().__next__

        def stats(self) -> Any:
            return argparse.Namespace(calls=lambda origin: Busy.calls())

    with pytest.raises(NothingMeasured, match=r"still busy after 0\.05 s"):
        timed.wait_until_quiet(cast("vattn.KVCache", Busy()), limit_s=0.05)


def test_decoding_that_stops_half_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.chain([vattn.KVCache.step] * 9, itertools.repeat(step_of_nothing))
    monkeypatch.setattr(vattn.KVCache, "step", lambda self, lens: next(steps)(self, lens))
    with pytest.raises(NothingMeasured, match="no memory for the 32 tokens they decoded"):
        decode_with(lookahead=16)


def test_decoding_counts_its_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Geometry, "of", lambda config: Geometry(regions=2, page_bytes=2**17, page_tokens=16)
    )
    with pytest.raises(NothingMeasured, match="map: 4 calls were made, expected 8"):
        decode_with(lookahead=0)


def test_prefetch_that_is_off_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pace.Setting.config
    monkeypatch.setattr(
        pace.Setting, "config", lambda self, *arguments: config(self, *arguments[:-1], lookahead=0)
    )
    with pytest.raises(NothingMeasured, match="lookahead 16: no page was mapped ahead"):
        decode_with(lookahead=16)


def test_a_steady_step_that_calls_the_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "TOKENS", 600)  # beyond what the caches have mapped
    with pytest.raises(RuntimeError, match="all mapped, called the driver"):
        batch.measure("cpu", quick=True)


def test_a_walk_knows_which_steps_start_pages() -> None:
    shape = Geometry(regions=8, page_bytes=2**21, page_tokens=4)
    start = np.array([1, 4, 4], np.int64)
    by_token = Walk(name="", what="", start=start, stride=1, n_steps=5)
    # 1 4 4 -> 2 5 5 -> 3 6 6 -> 4 7 7 -> 5 8 8 -> 6 9 9
    assert by_token.growing_rows(shape) == [2, 1, 2]
    assert (shape.pages(4), shape.pages(5), shape.row_bytes(5)) == (1, 2, 8 * 2 * 2**21)


def test_what_does_not_fit_on_the_machine_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, int]:
        return {w.name: len(w.start) for w in patterns.walks(bench(), quick=True)}

    assert found() == {"prefill_512": 1, "together": 2, "staggered": 2, "by_token": 1}
    monkeypatch.setattr(patterns, "memory_limit", lambda device: 4 * 2**20)
    assert found() == {"together": 1, "staggered": 1, "by_token": 1}
    monkeypatch.setattr(patterns, "memory_limit", lambda device: 2**20)
    assert found() == {}
