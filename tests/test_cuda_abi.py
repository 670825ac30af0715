"""Our declarations of the CUDA driver ABI agree with NVIDIA's headers, wherever those are found."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABI_HEADER = ROOT / "csrc" / "driver" / "cuda_abi.h"
CHECK_SOURCE = ROOT / "tests" / "cpp" / "cuda_abi_check.cc"


def _cuda_include_dirs() -> list[Path]:
    """Every include directory with cuda.h and cudaTypedefs.h: toolkits and pip packages."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(home) / "include" for home in homes if home]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent.parent / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    for packages in {*sys.path, *site.getsitepackages(), site.getusersitepackages()}:
        if packages.endswith("site-packages"):
            candidates += sorted(Path(packages).glob("nvidia/**/include"))
    found = {
        path.resolve()
        for path in candidates
        if (path / "cuda.h").is_file() and (path / "cudaTypedefs.h").is_file()
    }
    return sorted(found)


INCLUDE_DIRS = _cuda_include_dirs()
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

pytestmark = [
    pytest.mark.skipif(
        not INCLUDE_DIRS,
        reason="no cuda.h: set CUDA_HOME, install a CUDA toolkit, or pip install "
        "nvidia-cuda-runtime",
    ),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: set CXX"),
    pytest.mark.parametrize("include_dir", INCLUDE_DIRS, ids=str),
]


def _compile(csrc: Path, include_dir: Path) -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None
    command = [
        *COMPILER.split(),
        "-std=c++17",
        "-fsyntax-only",
        f"-I{csrc}",
        "-isystem",
        str(include_dir),
        str(CHECK_SOURCE),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_declarations_agree_with_cuda_h(include_dir: Path) -> None:
    result = _compile(ROOT / "csrc", include_dir)
    assert result.returncode == 0, result.stderr


# One of each kind: (pattern, replacement) in cuda_abi.h.
MUTATIONS = {
    "error_code": (r"kErrorNotReady = 600", "kErrorNotReady = 601"),
    "attribute": (r"WithVmmSupported = 110", "WithVmmSupported = 116"),
    "field_order": (
        r"(unsigned char compression_type;)\s+(unsigned char gpu_direct_rdma_capable;)",
        r"\2 \1",
    ),
    "field_size": (r"unsigned short usage;", "unsigned char usage;"),
    "missing_field": (r"void\* win32_metadata;", ""),
    "handle_size": (r"using MemHandle = unsigned long long", "using MemHandle = unsigned"),
    "parameter_removed": (r"\(DevicePtr base, size_t bytes, size_t offset,", "(DevicePtr base, "),
    "parameters_swapped": (r"StreamPtr stream, EventPtr event", "EventPtr event, StreamPtr stream"),
    "pointer_lost": (r"const MemAccessDesc\* desc, size_t", "MemAccessDesc desc, size_t"),
    "value_size": (r"unsigned char value", "unsigned value"),
    "first_form_of_copy": (r"cuMemcpyDtoDAsync, 3020", "cuMemcpyDtoDAsync, 3000"),
    "wrong_version": (r"cuMemGetInfo, 3020", "cuMemGetInfo, 10020"),
    "newer_signature": (r"cuCtxSynchronize, 2000", "cuCtxSynchronize, 13000"),
}


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_a_wrong_declaration_does_not_compile(
    mutation: str, include_dir: Path, tmp_path: Path
) -> None:
    pattern, replacement = MUTATIONS[mutation]
    text, count = re.subn(pattern, replacement, ABI_HEADER.read_text())
    assert count == 1, f"{mutation}: the pattern no longer occurs once in {ABI_HEADER.name}"
    mutated = tmp_path / "driver" / ABI_HEADER.name
    mutated.parent.mkdir()
    mutated.write_text(text)
    result = _compile(tmp_path, include_dir)
    assert result.returncode != 0
    assert "error" in result.stderr
