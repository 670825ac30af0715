"""The questions' logic, over memory of the host or the double of libcuda; answers need a GPU."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from backends import load_double

import vattn
from benchmarks.gpu_questions import (
    dlpack_over_unmapped,
    driver,
    flash_attention,
    graph_replay,
    map_while_running,
    partial_handle,
    torch_attention,
    unmap_waits,
    work,
)
from benchmarks.gpu_questions.answers import Answer, Evidence
from benchmarks.gpu_questions.driver import Driver

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    return Evidence(Answer("name", "Is it?"), tmp_path / "answer")


def noted(evidence: Evidence, path: Path) -> dict[str, Any]:
    """What was written to the file."""
    record: dict[str, Any] = json.loads((path / "answer").read_text())
    return dict(record["evidence"])


class Event:
    """In place of torch.cuda.Event: everything is done at once."""

    def __init__(self, **options: bool) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        return

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return max(end._at - self._at, 1e-6) * 1000


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets questions that need no driver run without a GPU."""
    for module in (work, dlpack_over_unmapped, flash_attention, graph_replay, torch_attention):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (work, dlpack_over_unmapped, flash_attention, torch_attention):
        monkeypatch.setattr(module, "LENS", (30, 1, 7, 150))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    plain = work.make_cache

    def make_cache(**options: Any) -> vattn.KVCache:
        return plain(page_bytes="2MiB", layout=options.pop("layout", "interleaved"), **options)

    for module in (dlpack_over_unmapped, flash_attention, graph_replay, torch_attention):
        monkeypatch.setattr(module, "make_cache", make_cache)


@without_gpu
@pytest.mark.usefixtures("on_the_host")
def test_dlpack_over_unmapped_is_told(evidence: Evidence, tmp_path: Path) -> None:
    assert dlpack_over_unmapped.ask(evidence)[0] is True
    found = noted(evidence, tmp_path)
    assert found["interleaved"]["through torch.from_dlpack again"] is True
    assert found["per_layer layer 1"]["rows right"] == found["per_layer layer 1"]["of"] == 8


class Graph:
    """In place of torch.cuda.CUDAGraph: replays the body that was captured last."""

    body: Callable[[], object]

    def replay(self) -> None:
        self.body()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, on_the_host: None) -> None:
    def capture(body: Callable[[], object]) -> Graph:
        graph = Graph()
        graph.body = body
        return graph

    monkeypatch.setattr(graph_replay, "_capture", capture)
    monkeypatch.setattr(graph_replay, "_step_in_capture", lambda cache, row: "not tried")


@without_gpu
@pytest.mark.usefixtures("graphs")
def test_graph_replay_is_told(evidence: Evidence, tmp_path: Path) -> None:
    answer, said = graph_replay.ask(evidence)
    assert (answer, said) == (True, "5 replays right; not tried")
    assert noted(evidence, tmp_path)["remap 3"]["unmap"] >= 1


@without_gpu
@pytest.mark.usefixtures("graphs")
def test_a_graph_that_reads_what_was_there_before_is_told(
    evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "replay", lambda self: None)
    assert graph_replay.ask(evidence)[0] is False


def fake_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """What varlen_attn is documented to do, for one query or none in a sequence."""
    out = torch.full_like(q, torch.nan)
    for i in range(len(cu_q) - 1):
        first, end = int(cu_k[i]), int(cu_k[i + 1])
        if seqused_k is not None:
            end = first + int(seqused_k[i])
        if cu_q[i + 1] > cu_q[i]:
            assert end - first <= max_k
            out[cu_q[i]] = work.attention(q[cu_q[i]], k[first:end], v[first:end])
    return out


@without_gpu
@pytest.mark.usefixtures("on_the_host")
def test_torch_attention_is_told(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen)
    answer, said = torch_attention.ask(evidence)
    assert answer is True, said
    assert len(noted(evidence, tmp_path)["worst_difference"]) == 2 * 5


def test_a_kernel_that_is_far_off_or_raises_is_named() -> None:
    assert torch_attention.judge({"sdpa": 0.01, "varlen": 0.001})[0] is True
    found: dict[str, float | str] = {"sdpa": 0.01, "varlen": 4.5, "gqa": "TypeError: no"}
    answer, said = torch_attention.judge(found)
    assert (answer, said) == (False, "1 of 3 right; varlen: 4.5; gqa: TypeError: no")
    assert torch_attention.judge({"sdpa": float("inf")})[0] is False


def fake_flash_attn(appends: bool) -> ModuleType:
    """What flash_attn_with_kvcache is documented to do."""

    def with_kvcache(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        *,
        cache_seqlens: torch.Tensor,
        cache_batch_idx: torch.Tensor,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        for i, row in enumerate(cache_batch_idx.tolist()):
            n = int(cache_seqlens[i])
            if k is not None and v is not None and appends:
                k_cache[row, n], v_cache[row, n] = k[i, 0], v[i, 0]
                n += 1
            out[i, 0] = work.attention(q[i, 0], k_cache[row, :n], v_cache[row, :n])
        return out

    module = ModuleType("flash_attn")
    vars(module).update(
        flash_attn_with_kvcache=with_kvcache, __version__="0", __file__="fake", __spec__=None
    )
    return module


@without_gpu
@pytest.mark.usefixtures("on_the_host")
def test_flash_attn_is_told(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(appends=True))
    answer, said = flash_attention.ask(evidence)
    assert answer is True, said
    assert noted(evidence, tmp_path)["per_layer"]["appended in place"] is True
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(appends=False))
    answer, said = flash_attention.ask(evidence)
    assert answer is False
    assert "interleaved appended in place: False" in said


@pytest.fixture
def double() -> Iterator[ctypes.CDLL]:
    """The double of libcuda, which ctypes then finds in place of the real one."""
    if torch.cuda.is_available():
        pytest.skip("a real libcuda is loaded; the double needs a process of its own")
    library = load_double()
    library.vattn_double_reset()
    yield library
    library.vattn_double_reset()  # what is asked for is a breach of the driver's contract


def test_partial_handle_is_told(double: ctypes.CDLL, evidence: Evidence, tmp_path: Path) -> None:
    answer, said = partial_handle.ask(evidence)
    results = noted(evidence, tmp_path)["results"]
    from_offset = results["last page of 4, from an offset"]
    assert from_offset == {"cuMemMap": "CUDA_ERROR_INVALID_VALUE", "same_memory": None}
    assert answer is results["first page of 4"]["same_memory"] or answer is False
    assert said.endswith("from an offset: no (CUDA_ERROR_INVALID_VALUE)")
    assert double.vattn_double_live_handles() == double.vattn_double_live_mappings() == 0


def test_the_structures_have_the_size_that_the_driver_expects() -> None:
    sizes = [ctypes.sizeof(kind) for kind in (driver._AllocationProp, driver._AccessDesc)]
    assert sizes == [32, 12]


def test_pages_are_mapped_and_given_back(double: ctypes.CDLL) -> None:
    mapper = map_while_running.Mapper(Driver())
    mapper.run(threading.Event(), most=5)
    assert (mapper.error, len(mapper.samples_us)) == ("", 5)
    assert double.vattn_double_live_mappings() == 5
    mapper.give_back()
    assert double.vattn_double_live_mappings() == double.vattn_double_live_handles() == 0


@pytest.mark.parametrize(
    ("wrong", "answer"), [(False, True), (True, False)], ids=["right", "wrong"]
)
@pytest.mark.usefixtures("on_the_host")
def test_mapping_beside_kernels_is_told(
    double: ctypes.CDLL,
    evidence: Evidence,
    monkeypatch: pytest.MonkeyPatch,
    wrong: bool,
    answer: bool,
) -> None:
    class Work:
        def __init__(self, seconds: float) -> None:
            self.result = torch.ones(2)
            self.times = 0

        def timed_ms(self, meanwhile: Callable[[], object]) -> float:
            meanwhile()
            self.times += 1
            self.result.fill_(self.times if wrong else 1)
            return 1.0

    class Slow(Event):
        def query(self) -> bool:
            return time.perf_counter() - self._at > 0.02

    monkeypatch.setattr(map_while_running, "Matmuls", Work)
    monkeypatch.setattr(map_while_running, "DEVICE", "cpu")
    monkeypatch.setattr(map_while_running.torch, "cuda", SimpleNamespace(Event=Slow))
    assert map_while_running.ask(evidence)[0] is answer


def sample(*, before: bool = True, after: bool) -> dict[str, float | bool]:
    return {"running_before": before, "running_after": after, "call_us": 1.0}


def test_a_call_waits_if_the_work_never_outlasts_it() -> None:
    found = {
        "cuMemUnmap": {"spin": [sample(after=True)], "products": [sample(after=True)]},
        "cuMemCreate": {"spin": [sample(after=False)], "products": [sample(after=False)]},
        "cuMemMap": {"spin": [sample(after=False)], "products": [sample(after=True)]},
        # The work had ended before the call: that says nothing.
        "cuMemRelease": {"spin": [sample(before=False, after=False), sample(after=True)]},
    }
    answer, said = unmap_waits.judge(found)
    assert answer is False
    assert said == (
        "cuMemUnmap does not wait; cuMemCreate waits; cuMemMap waits at times; "
        "cuMemRelease does not wait"
    )
    assert (
        unmap_waits.judge({"cuMemUnmap": {"spin": [sample(before=False, after=False)]}})[0] is None
    )


def test_the_calls_of_a_page_leave_nothing_behind(double: ctypes.CDLL) -> None:
    names = []
    for name, call in unmap_waits._calls(Driver()):
        call()
        names.append(name)
    assert names[:2] == ["cuMemUnmap", "cuMemRelease"]
    assert len(names) == 6
    assert double.vattn_double_live_reservations() == double.vattn_double_live_handles() == 0
    assert double.vattn_double_breaches() == 0
