"""``vattn replay`` prints, draws and saves what it promises; no test looks at its times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vattn.cli import main
from vattn.replay.outcome import Iteration, Outcome, Summary, summarise
from vattn.replay.report import targets_of
from vattn.replay.trace import make_trace

TRACE = "num_prefill_tokens,num_decode_tokens\n" + "".join(
    f"{100 + 37 * i % 211},{1 + i % 7}\n" for i in range(60)
)
POLICIES = ["vattn", "full reservation", "paged, 16 tokens", "per layer, 2 MiB"]
FIGURES = {"utilisation", "used_of_mapped", "running_mean", "queue_empty", "makespan_s", "late"}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.csv"
    path.write_text(TRACE)
    return path


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run as a user would; returns the one JSON file that it wrote."""
    out = tmp_path / "out"
    assert main(["replay", *arguments, "--out", str(out), "--commit", "abc"]) == 0
    (path,) = out.glob("*.json")

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record: dict[str, Any] = json.loads(path.read_text(), parse_constant=no_constant)
    assert (record["schema"], record["benchmark"]) == (1, "replay")
    return record


def test_all_policies_are_replayed_drawn_and_saved(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(tmp_path, str(trace), "--quick")
    assert record["quick"] is True
    assert record["trace"]["requests"] == 50
    assert record["trace"]["last_arrival_s"] is None
    assert record["targets"] == []
    assert set(record["definitions"]) >= {"used", "granted", "mapped", "utilisation"}
    assert [policy["policy"] for policy in record["policies"]] == POLICIES
    for policy in record["policies"]:
        assert set(policy) >= FIGURES
        assert policy["completed"] == 50
        assert 0 < policy["used_of_mapped"] <= policy["utilisation"] <= 1
        series = policy["series"]
        assert set(series) == set(Iteration._fields)
        assert {len(values) for values in series.values()} == {min(500, policy["iterations"])}
        assert series["used_bytes"][0] > 0
    vattn = record["policies"][0]
    # Whether the first step maps its pages or alloc() had them mapped is a race.
    by_origin = vattn["driver_calls"]
    assert sum(calls.get("map", 0) for calls in by_origin.values()) >= 1
    assert vattn["calls_in_step"] == sum(by_origin["step"].values())
    names = {m["name"] for m in record["measurements"]}
    assert names == {"step_decode", "step_prefill", "settle"}
    settings = record["settings"]
    assert (settings["max_batch_size"], settings["max_seq_len"]) == (256, 1024)
    pictures = sorted(path.name.split("-")[-1] for path in (tmp_path / "out").glob("*.[ps][nv]g"))
    assert pictures == ["memory.png", "memory.svg", "steps.png", "steps.svg"]
    shown = capsys.readouterr().out
    assert "decode steps without a driver call" in shown
    assert "bytes that no other request can have" in shown


def test_policies_can_be_chosen_and_models_read(trace: Path, tmp_path: Path) -> None:
    llama = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 512,
        "max_position_embeddings": 4096,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama))
    arguments = [str(trace), "--limit", "7", "--policies", "paged", "--model", str(path)]
    record = run(tmp_path, *arguments, "--dtype", "float32", "--memory", "64MiB")
    (paged,) = record["policies"]
    # 2 layers x K and V x 2 heads x 64 x 4 bytes
    tokens = paged["series"]["used_bytes"][0] / 2048
    assert tokens == sum(100 + 37 * i % 211 for i in range(7))
    assert record["measurements"] == []


def test_a_made_up_trace_at_a_real_pace(tmp_path: Path) -> None:
    arguments = ["--synthetic", "6", "--qps", "100", "--rate", "2", "--pace", "real"]
    fast = ["--decode-ms", "0.1", "--prefill-tokens-per-s", "1e6", "--admit", "now"]
    record = run(tmp_path, *arguments, *fast, "--policies", "vattn", "--lookahead", "0")
    assert record["trace"]["source"] == "synthetic, seed 0"
    assert record["settings"]["real_pace"] is True
    assert record["settings"]["admit_ahead"] is False
    assert record["policies"][0]["completed"] == 6
    assert record["policies"][0]["calls_in_background"] == 0
    assert "settle" not in {m["name"] for m in record["measurements"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "exactly one of them"),
        (["TRACE", "--synthetic", "5"], "exactly one of them"),
        (["TRACE", "--rate", "2"], "small has no arrivals; use --qps"),
        (["TRACE", "--rate", "0"], "--rate is 0, expected more than 0"),
        (["TRACE", "--decode-ms", "-1"], "--decode-ms is -1"),
        (["TRACE", "--limit", "0"], "--limit is 0, expected at least 1"),
        (["TRACE", "--policies", "vattn,best"], "'best', expected some of vattn, full, paged"),
        (["TRACE", "--model", "gpt-9"], "'gpt-9', expected llama-3-8b"),
        (["TRACE", "--memory", "lots"], "memory is 'lots'"),
        (["TRACE", "--memory", "2MiB"], "all 60 requests are refused: none fits 2MiB"),
        (["TRACE", "--page-bytes", "3MiB"], "page_bytes is 3145728"),
        (["nowhere.csv"], "nowhere.csv"),
        (["--synthetic", "5", "--qps", "0"], "qps is 0"),
    ],
)
def test_bad_input_is_one_sentence(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    arguments = [str(trace) if word == "TRACE" else word for word in arguments]
    assert main(["replay", *arguments]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("vattn replay: ")
    assert words in message


def test_arrivals_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n")
    assert main(["replay", str(path), "--qps", "3"]) == 2
    assert "azure has arrivals; use --rate" in capsys.readouterr().err


# The figures.


def outcome_of(*iterations: dict[str, float]) -> Outcome:
    """Make an outcome whose fields are 1 where nothing else is said."""
    rows = [[it.get(name, 1.0) for name in Iteration._fields] for it in iterations]
    return Outcome(
        policy="vattn",
        budget_bytes=100,
        iterations=np.array(rows),
        queueing_s=np.array([0.0, 1.0, 5.0]),
        completed=3,
        refused=0,
        preemptions=0,
        recomputed_tokens=0,
        wall_s=1,
        cpu_s=1,
    )


def example() -> Summary:
    summary = summarise(
        outcome_of(
            {"start_s": 0, "duration_s": 3, "used_bytes": 5, "needed_bytes": 8, "granted_bytes": 10,
             "mapped_bytes": 20, "calls_in_step": 2, "settle_ns": 4e9},
            {"start_s": 3, "duration_s": 1, "used_bytes": 9, "needed_bytes": 10,
             "granted_bytes": 10, "mapped_bytes": 10, "calls_in_step": 2, "prefill_tokens": 0,
             "waiting": 0, "running": 4, "settle_ns": 5e8},
            {"start_s": 6, "duration_s": 2, "used_bytes": 10, "needed_bytes": 10,
             "granted_bytes": 10, "mapped_bytes": 10, "calls_in_step": 5, "prefill_tokens": 0,
             "waiting": 0, "running": 4},
        )
    )  # fmt: skip
    assert summary is not None
    return summary


def test_figures_are_weighted_by_virtual_time() -> None:
    summary = example()
    assert summary.utilisation == pytest.approx((3 * 0.5 + 0.9 + 2 * 1) / 6)
    assert summary.used_of_mapped == pytest.approx((3 * 0.25 + 0.9 + 2) / 6)
    assert summary.kept_whole == pytest.approx(3 * 0.2 / 6)
    assert (summary.utilisation_min, summary.utilisation_median) == (0.5, 0.5)
    assert (summary.running_mean, summary.running_peak) == (pytest.approx(2.5), 4)
    assert summary.makespan_s == 8
    assert summary.queue_empty == pytest.approx(5 / 8), "the second without requests counts"
    assert (summary.queueing_mean_s, summary.late) == (2, 1)
    assert (summary.iterations, summary.decode_iterations) == (3, 2)
    assert summary.steps_without_call == pytest.approx(1 / 3)
    assert summary.decode_steps_without_call == 0.5
    assert (summary.calls_in_step, summary.calls_in_background) == (5, 1)


def test_targets_are_those_of_the_whole_trace_by_name() -> None:
    azure = make_trace("azure_conv_2023", "", np.ones(19_366), np.ones(19_366))
    latency = make_trace("vattention_decode_latency", "", np.ones(3_965), np.ones(3_965))
    good = replace(example(), utilisation=0.9931, decode_steps_without_call=0.9991)
    bad = replace(example(), utilisation=0.9929, decode_steps_without_call=0.9989)
    other = replace(good, policy="paged")
    subject = "llama-3-8b, interleaved"
    for trace, n in ((azure, 2), (latency, 1)):
        assert [t.met for t in targets_of(trace, [good], subject=subject, wall_s=59)] == [True] * n
        assert not any(t.met for t in targets_of(trace, [bad], subject=subject, wall_s=61))
        assert targets_of(trace, [other, None], subject=subject, wall_s=1) == []
        assert targets_of(trace, [good], subject="yi-6b, interleaved", wall_s=1) == []
        assert targets_of(trace.head(50), [good], subject=subject, wall_s=1) == []
