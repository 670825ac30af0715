"""The contract that every driver keeps (tests/cpp/driver_contract.cc), on a real device."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from backends import ROOT


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, in a folder without the double, which it would find beside itself."""
    subprocess.run(
        ["make", "-s", "-C", str(ROOT / "tests" / "cpp"), "contract"], check=True, timeout=300
    )
    folder = tmp_path_factory.mktemp("contract")
    return Path(shutil.copy(ROOT / "build" / "cpp-plain" / "driver_contract_test", folder))


@pytest.mark.gpu
def test_the_cuda_driver_keeps_the_contract_on_a_gpu(contract: Path) -> None:
    result = subprocess.run(
        [contract, "--gpu"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "gpu: a_run_lies_in_order_and_is_writable" in result.stdout


def test_the_program_never_takes_the_double_for_a_gpu(contract: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a real device")
    result = subprocess.run(
        [contract, "--gpu"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode != 0
    assert "0 passed" in result.stdout
    assert "libcuda.so.1" in result.stdout
