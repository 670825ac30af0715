"""vattn bench attention runs, checks what it times, and says what it did not measure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vattn
from vattn import cli
from vattn.bench.attention import cases, measure, report, results, subjects, verdict
from vattn.bench.attention.cases import GIB, MIB, TINY, Case, NotMeasured, Room
from vattn.bench.attention.measure import LIMIT, MIN_ROUNDS, OutOfTime
from vattn.bench.attention.stores import Blocks, VattnRows
from vattn.bench.attention.subjects import Setup, Subject, set_up
from vattn.bench.attention.verdict import LayoutRatio
from vattn.bench.common import NothingMeasured
from vattn.models import MODELS

SMALL = ["--quick", "--tokens", "40", "--batches", "2", "--dtypes", "float32"]


def case(**changes: Any) -> Case:
    sizes = {"phase": "decode", "shape": TINY, "dtype": "float32", "tokens": 40, "batch": 2}
    return Case(**(sizes | changes))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make tiny calls take milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the command as a user would; returns its exit status and the file it wrote."""
    status = cli.main(["bench", "attention", "--out", str(out), *arguments])
    (path,) = out.glob("*.json")
    assert path.name.startswith("attention-")
    record: dict[str, Any] = json.loads(path.read_text())
    return status, record


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("attention")
    return *run(out, *SMALL), out


def test_a_quick_run_measures_every_subject(quick: tuple[int, dict[str, Any], Path]) -> None:
    status, record, _ = quick
    assert (status, record["errors"]) == (0, [])
    assert (record["schema"], record["benchmark"], record["quick"]) == (1, "attention", True)
    names = [m["name"] for m in record["measurements"]]
    assert len(set(names)) == len(names)
    for phase, subjects_of_one in (("decode", 9), ("prefill", 8)):
        start = f"attention/{phase}/tiny/float32/40x2/"
        found = {name.removeprefix(start) for name in names if name.startswith(start)}
        assert len(found - {LIMIT}) == subjects_of_one
        assert found >= {LIMIT, "torch.empty NHD/sdpa", "blocks of 16/gather"}
        assert found >= {
            f"vattn {layout} {order}/sdpa"
            for layout in ("interleaved", "per_layer")
            for order in ("NHD", "HND")
        }
    for m in record["measurements"]:
        assert 0 < m["ns"]["min"] <= m["ns"]["median"] <= m["ns"]["p99"]
        assert m["limit"] in {None, *names}


def test_the_file_says_what_was_compared(quick: tuple[int, dict[str, Any], Path]) -> None:
    _, record, _ = quick
    decode = record["cases"][0]
    assert (decode["name"], decode["layer_bytes"]) == (case().name, 2 * 40 * 2 * 2 * 64 * 4)
    lines = {line["subject"]: line for line in decode["subjects"]}
    strides = {name: line["token_stride_bytes"] for name, line in lines.items()}
    assert strides["vattn interleaved NHD/sdpa"] == TINY.token_bytes(4)
    assert strides["vattn interleaved HND/sdpa"] == TINY.token_bytes(4) // 2, "of one of two heads"
    assert strides["torch.empty NHD/sdpa"] == strides["vattn per_layer NHD/sdpa"] == 2 * 64 * 4
    assert lines["vattn per_layer HND/sdpa"]["baseline"] == "torch.empty HND/sdpa"
    assert lines["blocks of 16/gather"]["baseline"] == "torch.empty NHD/sdpa"
    assert lines["vattn per_layer HND/sdpa"]["ratio"]["n"] == 3
    assert {r["order"] for r in decode["interleaved_over_per_layer"]} == {"NHD", "HND"}
    assert record["kernels"]["sdpa"].startswith("torch SDPA")
    assert record["verdict"]["recommended"] is None, "tiny sizes say nothing"


def test_what_is_not_there_is_named(quick: tuple[int, dict[str, Any], Path]) -> None:
    _, record, out = quick
    reasons = {entry["name"]: entry["reason"] for entry in record["not_measured"]}
    assert "mask" in reasons["attention/prefill/tiny/float32/40x2/reserved HND, masked"]
    if "vllm" not in record["kernels"]:
        assert "not installed" in reasons["attention/decode/tiny/float32/40x2/vllm"]
    pictures = {path.name.rpartition("-")[2] for path in out.iterdir() if path.suffix != ".json"}
    assert pictures == {"decode.png", "decode.svg", "prefill.png", "prefill.svg"}


def test_when_the_time_is_up_the_rest_is_listed(tmp_path: Path) -> None:
    status, record = run(tmp_path, *SMALL, "--budget-s", "1e-9")
    assert status == 0
    assert record["measurements"] == record["cases"] == []
    assert [entry["reason"] for entry in record["not_measured"]] == ["the time is up"] * 2


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--models", "llama-3-8b,gpt", "'gpt', expected some of llama-3-8b"),
        ("--tokens", "1K,0", "'0', expected numbers like 1K,8192"),
        ("--batches", "many", "'many', expected numbers"),
        ("--dtypes", "int8", "'int8', expected some of float32"),
        ("--phases", "training", "'training', expected some of decode,prefill"),
        ("--device", "tpu", "'tpu', expected cpu or cuda:N"),
        ("--budget-s", "-1", "-1, expected seconds above 0"),
    ],
)
def test_bad_options_are_named(
    option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "attention", option, value]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert option in error


# A figure must have the right result behind it.


def test_a_store_with_other_contents_has_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Blocks.write

    def forget_last_token(self: Blocks, layer: int, kv: Any) -> None:
        write(self, layer, kv)
        self.kv(layer)[1][self.table.ids[-1, -1], self.table.last_block_tokens - 1] = 0

    monkeypatch.setattr(Blocks, "write", forget_last_token)
    status, record = run(tmp_path, *SMALL, "--phases", "decode")
    assert status == 1
    (error,) = record["errors"]
    assert "40x2/blocks of 16/gather: layer 0 is off by" in error
    assert not any("gather" in m["name"] for m in record["measurements"])
    assert len(record["measurements"]) == 9, "all others are measured"


def test_rows_that_are_not_mapped_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vattn.KVCache, "step", lambda self, seq_lens: None)
    with pytest.raises(NothingMeasured, match="has not mapped"):
        VattnRows(case(), "per_layer", "NHD", "cpu")


def planted(*kernels_and_calls: tuple[str, Any], dtype: str = "float32") -> Setup:
    some = [
        Subject(f"store {at}", kernel, None, [call])
        for at, (kernel, call) in enumerate(kernels_and_calls)
    ]
    return Setup(case(dtype=dtype), some, [], {}, [torch.ones(1, 4)], [])


RIGHT = torch.ones(2, 3, 1, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        RIGHT * 1.001,
        RIGHT.clone().index_fill(0, torch.tensor(1), 0),
        RIGHT * float("nan"),
        RIGHT[:, :, :, :2],
    ],
    ids=["a little", "second row", "nan", "shape"],
)
def test_a_planted_wrong_subject_is_refused(wrong: torch.Tensor) -> None:
    setup = planted(("sdpa", lambda: RIGHT), ("sdpa", lambda: wrong))
    right, missing, errors = measure.check_outputs(setup)
    assert [subject.store for subject in right] == ["store 0"]
    assert missing == []
    assert len(errors) == 1
    assert "store 1/sdpa: layer 0 is off by" in errors[0]


def test_where_all_agree_on_a_wrong_result_none_is_right() -> None:
    setup = planted(("sdpa", lambda: RIGHT * 2), ("sdpa", lambda: RIGHT * 2))
    right, _, errors = measure.check_outputs(setup)
    assert (right, len(errors)) == ([], 2)


def refuse() -> torch.Tensor:
    raise RuntimeError("head_dim 64 is not supported\nmore")


def test_a_kernel_may_refuse() -> None:
    setup = planted(("sdpa", lambda: RIGHT), ("flashinfer", refuse))
    right, missing, errors = measure.check_outputs(setup)
    assert (len(right), errors) == (1, [])
    assert missing == [
        NotMeasured("store 1/flashinfer", "RuntimeError: head_dim 64 is not supported")
    ]


def test_a_kernel_that_refuses_only_our_tensors_is_an_error() -> None:
    setup = planted(("sdpa", lambda: RIGHT), ("sdpa", refuse))
    setup.subjects[1].store = "vattn interleaved NHD"
    setup.subjects[1].baseline = setup.subjects[0].name
    _, _, errors = measure.check_outputs(setup)
    assert len(errors) == 1
    assert errors[0].endswith(
        "vattn interleaved NHD/sdpa: RuntimeError: head_dim 64 is not supported"
    )
    setup.subjects[1].baseline = "something that refused as well"
    assert measure.check_outputs(setup)[2] == []


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_reference_is_attention(phase: str) -> None:
    of_one = case(phase=phase)
    query = torch.randn(2, 4, of_one.queries, 64)
    k, v = torch.randn(2, 2, 40, 64), torch.randn(2, 2, 40, 64)
    right = torch.nn.functional.scaled_dot_product_attention(
        query, k, v, is_causal=phase == "prefill", enable_gqa=True
    )
    assert measure.difference(subjects.reference(query, (k, v)), right[0, 0]) < 1e-5


# Turns.


class CountingClock:
    """A second for each call, and a note of which."""

    def __init__(self, calls_per_sample: int) -> None:
        self.calls_per_sample = calls_per_sample
        self.seconds = 0.0
        self.seen: list[Any] = []

    def ns_per_call(self, calls: Any) -> float:
        self.seconds += len(calls)
        self.seen += [call() for call in calls]
        return 1e9


def turns(clock: CountingClock, **more: Any) -> measure.Samples:
    two = [
        Subject(name, "sdpa", None, [lambda n=name, i=i: (n, i) for i in range(3)])  # type: ignore[misc]
        for name in "ab"
    ]
    limits = {"max_rounds": 6, "seconds": 1e9, "deadline_s": 1e9} | more
    return measure.take_turns(two, [lambda: LIMIT], clock, now=lambda: clock.seconds, **limits)  # type: ignore[arg-type]


def test_subjects_take_turns_and_go_around_layers() -> None:
    clock = CountingClock(calls_per_sample=1)
    samples = turns(clock)
    assert {name: len(some) for name, some in samples.items()} == {
        "a/sdpa": 6,
        "b/sdpa": 6,
        LIMIT: 6,
    }
    assert clock.seen[:9] == [
        *(("a", 0), ("b", 0), LIMIT),
        *(("b", 1), LIMIT, ("a", 1)),
        *(LIMIT, ("a", 2), ("b", 2)),
    ]
    clock = CountingClock(calls_per_sample=2)
    turns(clock, max_rounds=1)
    assert [call for call in clock.seen if call[0] == "a"] == [("a", i) for i in (0, 1, 2, 0)]


def test_turns_end_in_time() -> None:
    samples = turns(CountingClock(1), max_rounds=50, seconds=1)
    assert len(samples[LIMIT]) == MIN_ROUNDS, "as few as give a figure"
    samples = turns(CountingClock(1), max_rounds=50, seconds=40)
    assert len(samples[LIMIT]) == 13, "three seconds a round, one of them to warm up"
    with pytest.raises(OutOfTime, match="after 1 of 5 rounds"):
        turns(CountingClock(1), max_rounds=50, seconds=1, deadline_s=5)
    samples = turns(CountingClock(1), max_rounds=50, deadline_s=28)
    assert [len(some) for some in samples.values()] == [8] * 3, "a round that was cut short is none"


def test_a_baseline_that_was_refused_leaves_no_ratio() -> None:
    lone = [Subject("vattn interleaved NHD", "sdpa", "torch.empty NHD/sdpa", [])]
    result = results.summarize(case(), lone, {lone[0].name: [2.0], LIMIT: [1.0]})
    assert result.lines[0].ratio is None
    assert result.layouts == []


# What fits.


def test_memory_counts_what_becomes_physical() -> None:
    llama = case(shape=MODELS["llama-3-8b"], dtype="bfloat16", tokens=8192, batch=4)
    assert llama.layer_bytes == 8192 * 4 * 4096 == 128 * MIB
    assert llama.layers_timed == 2
    # Small pages: two of 32 layers are touched, 8 KiB of each token, or a page for each head.
    assert cases.touched_bytes(llama, "NHD", cases.CPU_PAGE) == 256 * MIB
    assert cases.touched_bytes(llama, "HND", cases.CPU_PAGE) == GIB
    # Pages of a GPU, or huge ones: all layers.
    assert cases.touched_bytes(llama, "NHD", cases.GPU_PAGE) == 4 * GIB
    on_gpu = cases.memory_bytes(llama, cases.GPU_PAGE)
    assert on_gpu > 8 * GIB + 4 * 256 * MIB
    # 1,024 tokens of a head and layer are 256 KiB, in a page of 2 MiB each.
    short = case(shape=MODELS["llama-3-8b"], dtype="bfloat16", tokens=1024, batch=1)
    assert cases.mapped_bytes(short, "per_layer", "HND", cases.GPU_PAGE) == 32 * 2 * 8 * 2 * MIB
    assert cases.mapped_bytes(short, "interleaved", "NHD", cases.GPU_PAGE) == 128 * MIB


def test_a_case_that_does_not_fit_says_why() -> None:
    llama = case(shape=MODELS["llama-3-8b"], dtype="bfloat16", tokens=8192, batch=4)
    needed = cases.memory_bytes(llama, cases.CPU_PAGE)
    assert cases.refusal(llama, Room(2 * needed, 64 * GIB, cases.CPU_PAGE)) is None
    reason = cases.refusal(llama, Room(2 * needed - 2, 64 * GIB, cases.CPU_PAGE))
    assert reason == "needs 3.6 GiB, half of the free memory is 3.6 GiB"
    reason = cases.refusal(llama, Room(64 * GIB, 4 * GIB, cases.CPU_PAGE))
    assert reason == "the KV of all layers is 4.0 GiB, of 4.0 GiB"


def test_the_estimate_covers_what_is_held() -> None:
    of_one = case(tokens=64)
    with set_up(of_one, "cpu") as setup:
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for subject in setup.subjects
            for call in subject.calls
            for cell in call.__closure__ or ()
            for tensor in (cell.cell_contents if isinstance(cell.cell_contents, tuple) else ())
            if isinstance(tensor, torch.Tensor) and "vattn" not in subject.store
        }
    layers = of_one.layer_bytes * of_one.layers_timed
    assert sum(held.values()) >= 4 * layers, "the tensors were not found"
    assert cases.memory_bytes(of_one, cases.CPU_PAGE) > sum(held.values())


def test_defaults_ask_for_what_the_benchmark_is_about() -> None:
    on_gpu = cases.chosen("cuda:0", ["decode"])
    assert {c.shape.name for c in on_gpu} == set(MODELS)
    assert {c.tokens for c in on_gpu} >= {1024, 128 * 1024}
    assert {c.batch for c in on_gpu} >= {1, 256}
    on_cpu = cases.chosen("cpu", ["decode", "prefill"])
    assert [c.work for c in on_cpu] == sorted(c.work for c in on_cpu), "cheap ones first"


# What the figures say.


def test_the_verdict_follows_the_figures() -> None:
    fast = [LayoutRatio("a", "NHD", 1.004), LayoutRatio("b", "NHD", 1.0)]
    slow = [LayoutRatio("a", "NHD", 1.2), LayoutRatio("a", "HND", 2.0)]
    assert verdict.decide("cuda:0", fast).recommended == "interleaved"
    assert "should be the default, and is" in verdict.decide("cuda:0", fast).sentence
    assert verdict.decide("cuda:0", slow).recommended == "per_layer"
    assert "but interleaved is" in verdict.decide("cuda:0", slow).sentence
    on_cpu = verdict.decide("cpu", slow)
    assert (on_cpu.recommended, on_cpu.default) == ("per_layer", "per_layer")
    assert on_cpu.worst == {"NHD": 1.2, "HND": 2.0}
    assert verdict.decide("cpu", []).recommended is None


def test_the_goal_is_one_of_gpus() -> None:
    both = [
        Subject("torch.empty NHD", "sdpa", None, []),
        Subject("vattn interleaved NHD", "sdpa", "torch.empty NHD/sdpa", []),
    ]
    samples = {both[0].name: [100.0], both[1].name: [102.0], LIMIT: [50.0]}
    result = results.summarize(case(), both, samples)
    assert report.targets("cpu", [result]) == []
    (target,) = report.targets("cuda:0", [result])
    assert (target.measured, target.met) == (1.02, False)
