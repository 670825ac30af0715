"""What `vattn doctor` tries in a process of its own, which may die of it."""

from __future__ import annotations

import ctypes

import pytest
from backends import DOUBLE, load_double
from doctor_facts import facts

from vattn.doctor import trial


# A real child, on the double of libcuda: a machine with a GPU, and a torch without CUDA.
def test_a_gpu_is_probed_and_its_cache_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this torch needs a real libcuda")
    load_double()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(DOUBLE.parent))
    tried: list[str] = []
    found = trial.run(tried.append)
    assert found["problem"] == ""
    assert tried == ["torch", "a cache on the CPU", "the CUDA driver", "a cache on cuda:0"]
    healthy = facts()["trial"]
    assert set(found) == set(healthy)
    assert set(found["cuda"]) == set(healthy["cuda"])
    device, like = found["cuda"]["devices"][0], healthy["cuda"]["devices"][0]
    assert found["cuda"]["driver_version"] == 13000
    assert device["name"] == "test double (memfd)"
    for key in ("attributes", "bytes"):
        assert set(device[key]) == set(like[key])
    assert device["pages"] == {"plain": "", "posix_fd": "", "gpudirect_rdma": ""}
    assert found["caches"]["cpu"]["works"]
    assert found["caches"]["cuda:0"]["stage"] == "tensors"


@pytest.mark.gpu
def test_a_cache_on_a_real_gpu_works() -> None:
    found = trial.run(lambda doing: None)
    assert found["problem"] == ""
    assert found["caches"]["cuda:0"] == {"works": True, "stage": "close", "error": ""}
    assert found["cuda"]["devices"][0]["pages"]["plain"] == ""


def test_a_cache_on_a_device_is_written_and_read(libcuda_double: ctypes.CDLL) -> None:
    assert trial.try_cache("cuda:0") == {"works": True, "stage": "close", "error": ""}
    libcuda_double.vattn_double_fail(b"cuMemMap", 0, 100, 1)
    refused = trial.try_cache("cuda:0")
    assert (refused["works"], refused["stage"]) == (False, "step")
    assert "cuMemMap failed (1)" in refused["error"]


def test_a_cache_that_loses_what_is_written_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.Tensor, "fill_", lambda self, value: self)
    lost = trial.try_cache("cpu")
    assert (lost["works"], lost["stage"]) == (False, "read")


CHILD = 'print(\'{"doing": "the CUDA driver"}\', flush=True); '


@pytest.mark.parametrize(
    ("code", "limit_s", "problem"),
    [
        (CHILD + "import os; os.kill(os.getpid(), 11)", 60.0, "ended by SIGSEGV"),
        (CHILD + "import time; time.sleep(60)", 0.5, "no answer within 0.5 s"),
        (CHILD + "raise SystemExit('no such thing')", 60.0, "exit status 1: no such thing"),
    ],
)
def test_a_driver_that_takes_the_process_with_it_is_reported(
    code: str, limit_s: float, problem: str
) -> None:
    found = trial.run(lambda doing: None, limit_s=limit_s, code=code)
    assert (found["problem"], found["doing"]) == (problem, "the CUDA driver")


def test_what_other_libraries_print_is_ignored() -> None:
    code = "print('hello'); print('[1]'); print('{\"torch\": {\"problem\": \"x\"}}')"
    found = trial.run(lambda doing: None, code=code)
    assert found == {"caches": {}, "doing": "start", "problem": "", "torch": {"problem": "x"}}
