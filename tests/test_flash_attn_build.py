"""What is built of flash-attn, and that nothing it refers to is missing; without a compiler."""

from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu_suite import flash_attn_build as build

ROOT = "flash_attn-0/"
DEFINED = re.compile(r"(run_mha_\w+?)<cutlass::(\w+), (\d+), (\w+)>\(")


def kernel_files(dims: tuple[int, ...] = build.HEAD_DIMS) -> list[str]:
    kinds = itertools.product(("split_", ""), dims, ("bf16", "fp16"), ("causal_", ""))
    return [f"csrc/flash_attn/src/flash_fwd_{s}hdim{d}_{t}_{c}sm80.cu" for s, d, t, c in kinds]


def sdist(folder: Path, names: list[str]) -> Path:
    """A source distribution of empty files."""
    path = folder / "flash_attn-0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(ROOT + name), io.BytesIO())
    return path


def whole(folder: Path) -> Path:
    others = ["csrc/cutlass/include/cutlass/cutlass.h", "csrc/cutlass/docs/x.md", "hopper/x.cu"]
    names = ["csrc/flash_attn/flash_api.cpp", "flash_attn/__init__.py", "setup.py"]
    return sdist(folder, [*names, *others, *kernel_files()])


def test_only_what_is_needed_is_unpacked(tmp_path: Path) -> None:
    folder = build.unpack(whole(tmp_path), tmp_path / "into")
    assert folder == tmp_path / "into" / "flash_attn-0"
    assert sorted(path.name for path in folder.iterdir()) == ["csrc", "flash_attn"]
    assert not (folder / "csrc/cutlass/docs").exists()


def test_a_distribution_without_what_is_needed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no CUTLASS headers"):
        build.unpack(sdist(tmp_path, ["csrc/flash_attn/flash_api.cpp"]), tmp_path)
    with pytest.raises(ValueError, match="give flash-attn's own"):
        build.unpack(sdist(tmp_path, ["README.md"]), tmp_path)


def test_the_kernels_of_the_chosen_head_dims_are_compiled(tmp_path: Path) -> None:
    folder = build.unpack(whole(tmp_path), tmp_path)
    names = [path.name for path in build.kernel_sources(folder, [128, 64])]
    assert len(names) == 2 * 2 * 2
    assert all("bf16" in name and ("hdim128" in name or "hdim64" in name) for name in names)
    assert names[0] == "flash_fwd_split_hdim128_bf16_causal_sm80.cu", "the longest first"
    with pytest.raises(ValueError, match=r"head dims are \[80\]"):
        build.kernel_sources(folder, [80])
    (folder / "csrc/flash_attn/src" / names[0]).unlink()
    with pytest.raises(ValueError, match="is not in this flash-attn"):
        build.kernel_sources(folder, [128])


@pytest.mark.parametrize("head_dims", [[128], [64, 128], list(build.HEAD_DIMS)])
def test_every_kernel_that_the_api_can_ask_for_is_defined_once(head_dims: list[int]) -> None:
    # What flash_api.cpp refers to: its switches over type, head dim and causal.
    asked = {
        (name, dtype, str(dim), causal)
        for name in ("run_mha_fwd_", "run_mha_fwd_splitkv_dispatch", "run_mha_bwd_")
        for dtype in ("half_t", "bfloat16_t")
        for dim in (32, 64, 96, 128, 192, 256)
        for causal in ("false", "true")
    }
    compiled = {
        (name, "bfloat16_t", str(dim), causal)
        for name in ("run_mha_fwd_", "run_mha_fwd_splitkv_dispatch")
        for dim in head_dims
        for causal in ("false", "true")
    }
    stubs = Counter(DEFINED.findall(build.stub_text(head_dims)))
    assert set(stubs.values()) == {1}
    assert set(stubs) == asked - compiled


def test_the_commands_name_every_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    folder = build.unpack(whole(tmp_path), tmp_path)
    jobs = build.compilations(folder, tmp_path, [128], "90")
    assert len({job.target for job in jobs}) == len(jobs) == 4 + 2
    for job in jobs:
        is_cuda = job.source.suffix == ".cu"
        assert (job.command[0] == str(nvcc)) == is_cuda
        assert ("arch=compute_90,code=sm_90" in job.command) == is_cuda
        assert job.command[-4:] == ("-c", str(job.source), "-o", str(job.target))
        assert "-DTORCH_EXTENSION_NAME=flash_attn_2_cuda" in job.command
        assert job.source.is_file()
    link = build.link_command([job.target for job in jobs], tmp_path / "m.so")
    assert "-ltorch_cuda" in link
    assert link[-2:] == ["-o", str(tmp_path / "m.so")]


def test_without_nvcc_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="there is no nvcc; install the CUDA toolkit"):
        build.cuda_home()


def test_nvcc_that_is_a_script_leads_to_its_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"]))
    assert build.cuda_home() == tmp_path / "toolkit"


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        build.run(["/bin/sh", "-c", "echo 'no such thing' >&2; exit 1"])
