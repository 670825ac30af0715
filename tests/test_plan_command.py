"""`vattn plan`: where models are found, what is subtracted, what comes out."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vattn
from vattn import cli
from vattn.plan import command, report, source

KIB, MIB, GIB = 2**10, 2**20, 2**30

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "torch_dtype": "float16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command and returns its JSON."""

    def run(*arguments: object) -> Any:
        assert command.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_the_recommendation_runs(model: Path, plan: Callable[..., Any]) -> None:
    for more in ((), ("--order", "HND"), ("--length-distribution", "fixed:100")):
        options = ("--memory", "16MiB", "--device", "cpu", *more)
        text = plan("--model", model, *options)["recommendation"]
        with vattn.init(eval(text, {"vattn": vattn})) as cache:
            assert cache.config.memory_bytes == 16 * MIB
            row = cache.alloc()
            cache.step({row: 1024})


def test_the_json_has_every_policy(model: Path, plan: Callable[..., Any]) -> None:
    result = plan("--model", model.parent, "--memory", "1GiB", "--mean-tokens", 100)
    assert result["model"]["name"] == "tiny-llama"
    assert result["dtype"] == "float16"
    assert result["token_bytes"] == 2 * 2 * 2 * 64 * 2
    names = [(p["name"], p["page_bytes"]) for p in result["policies"]]
    sizes = (64 * KIB, 128 * KIB, 256 * KIB, 2 * MIB)
    assert names[:8] == [(n, s) for n in ("interleaved", "per_layer") for s in sizes]
    assert [name for name, _ in names[8:]] == ["paged, 16-token blocks", "full reservation"]
    assert sum(policy["recommended"] for policy in result["policies"]) == 1
    assert result["schema"] == report.SCHEMA
    for policy in result["policies"]:
        assert policy["concurrency"] > 0
        assert policy["mean_waste_bytes"] >= 0


def test_weights_are_those_of_the_files(model: Path, plan: Callable[..., Any]) -> None:
    gpu = ("--model", model, "--gpu-memory", "10GiB", "--reserve", "1GiB")
    without = plan(*gpu)
    assert without["memory_bytes"] == 9 * GIB
    assert any("NO WEIGHTS SUBTRACTED" in note for note in without["notes"])
    assert plan(*gpu, "--weights", "3GiB")["memory_bytes"] == 6 * GIB
    (model.parent / "a.safetensors").write_bytes(bytes(MIB))
    assert plan(*gpu)["memory_bytes"] == 9 * GIB - MIB
    index = {"metadata": {"total_size": 4 * GIB}}
    (model.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    assert plan(*gpu)["memory_bytes"] == 5 * GIB
    assert plan(*gpu, "--tp", "2")["memory_bytes"] == 7 * GIB
    assert plan(*gpu[:4])["memory_bytes"] == 5 * GIB  # 10% reserved


def test_a_trace_gives_the_lengths(
    model: Path, plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = types.ModuleType("vattn.replay.trace")
    trace = types.SimpleNamespace(
        prompt_tokens=np.array([99, 10], np.int64), generated_tokens=np.array([1, 0], np.int64)
    )
    stub.read_trace = lambda path: trace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vattn.replay.trace", stub)
    result = plan("--model", model, "--memory", "1GiB", "--lengths", "azure.csv")
    assert result["lengths"] == {"name": "azure.csv", "mean_tokens": 100.0}


def test_a_trace_on_disk_is_read(model: Path, plan: Callable[..., Any], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n99,1\n49,1\n")
    result = plan("--model", model, "--memory", "1GiB", "--lengths", trace)
    assert result["lengths"]["mean_tokens"] == 75.0


# What is said.


def test_what_a_window_would_save_is_said(tmp_path: Path, plan: Callable[..., Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"model_type": "mistral", "sliding_window": 64}))
    result = plan("--model", path, "--memory", "1GiB", "--length-distribution", "fixed:256")
    note = next(note for note in result["notes"] if "see only the last" in note)
    assert "2 of 2 layers see only the last 64 tokens" in note
    assert "would need 64 KiB and its pages instead of 256 KiB on average (75% less)" in note


def test_copied_heads_are_said(model: Path, plan: Callable[..., Any]) -> None:
    result = plan("--model", model, "--memory", "1GiB", "--tp", "4")
    assert any("each head is kept 2 times" in note for note in result["notes"])
    assert result["token_bytes"] == 2 * 1 * 2 * 64 * 2


def test_dtypes_have_short_names(model: Path, plan: Callable[..., Any]) -> None:
    result = plan("--model", model, "--memory", "1GiB", "--dtype", "fp8")
    assert (result["dtype"], result["token_bytes"]) == ("float8_e4m3fn", 512)


def test_the_table_is_readable_with_and_without_rich(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", str(model), "--memory", "1GiB", "--mean-tokens", "100"]
    for without_rich in (False, True):
        if without_rich:
            monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
        assert command.main(arguments) == 0
        text = capsys.readouterr().out
        for what in ("tokens/page", "per_layer", "full reservation", "<- recommended",
                     "vattn.CacheConfig(", "patched driver only", "47 bits"):  # fmt: skip
            assert what in text


# Where models are.


def test_a_name_of_the_library_is_a_model(plan: Callable[..., Any]) -> None:
    result = plan("--model", "llama-3-8b", "--memory", "1GiB", "--max-seq-len", "4096")
    assert (result["token_bytes"], result["max_seq_len"]) == (128 * KIB, 4096)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face Hub, and no network."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub"


def put(hub: Path, revision: str, layers: int) -> Path:
    folder = hub / "models--org--tiny" / "snapshots" / revision
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return folder


def test_an_id_is_looked_up_in_the_local_cache(
    hub: Path, plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, "aaa", layers=3)
    assert plan("--model", "org/tiny", "--memory", "1GiB")["model"]["num_layers"] == 3
    put(hub, "bbb", layers=5)
    refs = hub / "models--org--tiny" / "refs"
    refs.mkdir()
    for revision, layers in (("aaa", 3), ("bbb", 5)):
        (refs / "main").write_text(revision)
        assert plan("--model", "org/tiny", "--memory", "1GiB")["model"]["num_layers"] == layers
    put(hub.parent / "elsewhere", "ccc", layers=7)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub.parent / "elsewhere"))
    assert plan("--model", "org/tiny", "--memory", "1GiB")["model"]["num_layers"] == 7


def stub_hub(monkeypatch: pytest.MonkeyPatch, download: Callable[[str, str], str]) -> None:
    stub = types.ModuleType("huggingface_hub")
    stub.hf_hub_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)


def test_what_is_not_in_the_cache_is_fetched(
    hub: Path, model: Path, plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(model)

    stub_hub(monkeypatch, download)
    assert plan("--model", "org/tiny", "--memory", "1GiB")["model"]["name"] == "org/tiny"
    assert asked == [("org/tiny", "config.json")]


def test_an_error_of_the_hub_becomes_one_sentence(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, name: str) -> str:
        raise RuntimeError("401 Client Error.\n\nAccess is restricted.")

    stub_hub(monkeypatch, download)
    with pytest.raises(ValueError, match=r"failed \(401 Client Error\. Access") as error:
        source.find("org/tiny")
    assert "pass the path of its config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_offline_is_offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_hub(monkeypatch, lambda repository, name: pytest.fail("the network was asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; pass the path"):
        source.find("org/tiny")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="or install huggingface_hub to fetch it"):
        source.find("org/tiny")


# Bad input: one line, exit status 2.

GPU = ("--gpu-memory", "10GiB")
BAD = [
    (("--model", "{model}", "--memory", "1GiB", "--weights", "1GB"), "--weights is taken from"),
    (("--model", "{model}", "--memory", "lots"), "--memory is 'lots'"),
    (("--model", "{model}", *GPU, "--weights", "16GB"), "nothing is left for keys and values"),
    (("--model", "{model}", *GPU, "--reserve", "120%"), "--reserve is '120%'"),
    (("--model", "{model}", *GPU, "--tp", "3"), "4 query heads, which 3 devices"),
    (("--model", "{model}", *GPU, "--dtype", "int4"), "dtype is 'int4'"),
    (("--model", "{model}", *GPU, "--page-bytes", "3MiB"), "--page-bytes is '3MiB'"),
    (("--model", "{model}", *GPU, "--mean-tokens", "2000"), "beyond max_seq_len = 1024"),
    (("--model", "{model}x.json", *GPU), "no such file or folder"),
    (("--model", "{folder}", *GPU), "there is no {folder}/config.json"),
    (("--model", "{folder}/text", *GPU), "is not JSON"),
    (("--model", "{folder}/list", *GPU), "holds a list"),
    (("--model", "{folder}/gpt2", *GPU), "names no dtype; say --dtype"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[bad[1] for bad in BAD])
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_text("{")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "gpt2").write_text(json.dumps(CONFIG | {"torch_dtype": None}))
    names = {"model": model, "folder": tmp_path}
    assert cli.main(["plan", *[word.format(**names) for word in arguments]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vattn plan: ")
    assert message.format(**names) in error
    assert error.count("\n") == 1
