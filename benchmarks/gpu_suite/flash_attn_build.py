"""Build the part of flash-attn that decoding over a KV cache needs, from its source distribution.

All of it takes an hour; the forward and split-KV kernels of bfloat16 in the head sizes used here
take a minute or two on 16 cores. What is left out raises when it is called. Afterwards
`import flash_attn` works with <into>/site on PYTHONPATH. Needs nvcc, a C++ compiler and torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # those that flash_api.cpp can ask for
DTYPES = ("half_t", "bfloat16_t")
BUILT_DTYPE = "bfloat16_t"
WANTED = ("csrc/flash_attn/", "csrc/cutlass/include/", "flash_attn/")
LEFT_OUT = ("BACKWARD", "DROPOUT", "ALIBI", "SOFTCAP", "UNEVEN_K", "LOCAL")
MODULE = "flash_attn_2_cuda"

# Fewer than the package asks for would do; these are what its own setup.py passes.
NVCC_FLAGS = (
    *("-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"),
    *("-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__"),
    *("-U__CUDA_NO_HALF2_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"),
    *("-Xcompiler", "-fPIC"),
)

STUB_HEAD = """\
// What this build leaves out, so that the linker finds it and a caller is told.
#include <stdexcept>
#include <cutlass/numeric_types.h>
#include "namespace_config.h"
#include "flash.h"
namespace FLASH_NAMESPACE {
"""


@dataclass(frozen=True)
class Compilation:
    """One file to compile."""

    source: Path
    target: Path
    command: tuple[str, ...]


def unpack(sdist: Path, into: Path) -> Path:
    """Unpack what is needed of the source distribution; returns its folder."""
    with tarfile.open(sdist) as archive:
        members = [m for m in archive if m.name.partition("/")[2].startswith(WANTED)]
        if not members:
            raise ValueError(f"{sdist} has no {WANTED[0]}; give flash-attn's own .tar.gz from PyPI")
        archive.extractall(into, members, filter="data")
    folder = into / members[0].name.partition("/")[0]
    if not (folder / "csrc/cutlass/include/cutlass/cutlass.h").is_file():
        raise ValueError(
            f"{sdist} has no CUTLASS headers; take the source distribution, not a git archive"
        )
    return folder


def kernel_sources(folder: Path, head_dims: Sequence[int]) -> list[Path]:
    """List the .cu files of the kernels that are built."""
    unknown = sorted(set(head_dims) - set(HEAD_DIMS))
    if unknown:
        raise ValueError(f"head dims are {unknown}, flash-attn has {HEAD_DIMS}")
    names = [
        f"flash_fwd_{split}hdim{dim}_bf16_{causal}sm80.cu"
        # The longest to compile first, or the last one runs alone.
        for dim, split, causal in product(sorted(head_dims)[::-1], ("split_", ""), ("causal_", ""))
    ]
    paths = [folder / "csrc/flash_attn/src" / name for name in names]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path.name} is not in this flash-attn; 2.5 to 2.8 have it")
    return paths


def _stub(name: str, parameters: str, what: str) -> str:
    body = f'throw std::runtime_error("flash-attn was built without {what}");'
    return f"template <> void {name}({parameters}&, cudaStream_t) {{ {body} }}"


def stub_text(head_dims: Sequence[int]) -> str:
    """Define everything that flash_api.cpp refers to and that is not compiled."""

    def lines() -> Iterator[str]:
        for dtype, dim, causal in product(DTYPES, HEAD_DIMS, ("false", "true")):
            kind = f"<cutlass::{dtype}, {dim}, {causal}>"
            if dtype != BUILT_DTYPE or dim not in head_dims:
                for name in ("run_mha_fwd_", "run_mha_fwd_splitkv_dispatch"):
                    yield _stub(f"{name}{kind}", "Flash_fwd_params", f"{dtype} {dim}")
            yield _stub(f"run_mha_bwd_{kind}", "Flash_bwd_params", "backward")

    return STUB_HEAD + "\n".join(lines()) + "\n}  // namespace FLASH_NAMESPACE\n"


def cuda_home() -> Path:
    """Folder of the CUDA toolkit: CUDA_HOME, or where nvcc is."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if (Path(os.environ.get(name, "/nowhere")) / "bin/nvcc").is_file():
            return Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ValueError("there is no nvcc; install the CUDA toolkit, or set CUDA_HOME")
    shown = subprocess.run(
        [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    ).stderr  # nvcc on the PATH may be a script that calls the one in the toolkit
    tops = [line.partition("TOP=")[2] for line in shown.splitlines() if "TOP=" in line]
    return Path(tops[0]).resolve() if tops else Path(nvcc).resolve().parent.parent


def device_arch() -> str:
    """Compute capability of the first device, such as "90"; Hopper's where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "90"
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}"


def compilations(
    folder: Path, objects: Path, head_dims: Sequence[int], arch: str
) -> list[Compilation]:
    """Say how each file is compiled."""
    import torch

    cuda = cuda_home()
    api = folder / "csrc/flash_attn/flash_api.cpp"
    stub = objects / "left_out.cpp"
    stub.write_text(stub_text(head_dims))
    torch_include = Path(torch.__file__).parent / "include"
    includes = [folder / "csrc/flash_attn", folder / "csrc/flash_attn/src"]
    includes += [folder / "csrc/cutlass/include", torch_include]
    includes += [torch_include / "torch/csrc/api/include", cuda / "include"]
    # Where CUDA 13 keeps the headers that nvcc finds by itself and g++ does not.
    includes += [cuda / "include/cccl"]
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    shared = (
        "-std=c++20" if version >= (2, 12) else "-std=c++17",  # torch's headers demand it
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-DTORCH_EXTENSION_NAME={MODULE}",
        *(f"-DFLASHATTENTION_DISABLE_{feature}" for feature in LEFT_OUT),
        *(f"-I{path}" for path in includes),
        *("-isystem", sysconfig.get_path("include")),
    )
    nvcc = (str(cuda / "bin/nvcc"), *NVCC_FLAGS, "-gencode", f"arch=compute_{arch},code=sm_{arch}")
    cxx = (os.environ.get("CXX", "g++"), "-O2", "-fPIC")
    jobs = []
    for source in [*kernel_sources(folder, head_dims), api, stub]:
        target = objects / f"{source.stem}.o"
        compiler = nvcc if source.suffix == ".cu" else cxx
        command = (*compiler, *shared, "-c", str(source), "-o", str(target))
        jobs.append(Compilation(source, target, command))
    return jobs


def run(command: Sequence[str]) -> float:
    """Run a compiler; returns the seconds. Raises RuntimeError with what it said."""
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{' '.join(command[:1])} ... {command[-1]}: {done.returncode}\n{said}")
    return time.monotonic() - started


def link_command(objects: Sequence[Path], target: Path) -> list[str]:
    """Say how the objects become the module. libcudart comes with torch's own libraries."""
    import torch

    libraries = Path(torch.__file__).parent / "lib"
    names = ("c10", "c10_cuda", "torch_cpu", "torch_cuda", "torch", "torch_python")
    return [
        *(os.environ.get("CXX", "g++"), "-shared", *(str(path) for path in objects)),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", *(f"-l{name}" for name in names)),
        *("-o", str(target)),
    ]


def build(sdist: Path, into: Path, head_dims: Sequence[int], arch: str) -> dict[str, float]:
    """Build and lay out <into>/site; returns the seconds of each file."""
    folder = unpack(sdist, into)
    objects, site = into / "objects", into / "site"
    objects.mkdir(parents=True, exist_ok=True)
    site.mkdir(exist_ok=True)
    jobs = compilations(folder, objects, head_dims, arch)

    def compiled(job: Compilation) -> float:
        seconds = run(job.command)
        print(f"{job.source.name}: {seconds:.0f} s", flush=True)
        return seconds

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(compiled, job) for job in jobs]
        try:
            seconds = {job.source.name: f.result() for job, f in zip(jobs, futures, strict=True)}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    seconds["link"] = run(link_command([job.target for job in jobs], site / f"{MODULE}.so"))
    shutil.copytree(folder / "flash_attn", site / "flash_attn", dirs_exist_ok=True)
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """Build, import, say how long it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite.flash_attn_build")
    parser.add_argument("sdist", type=Path, help="flash_attn-*.tar.gz from PyPI")
    parser.add_argument("--into", type=Path, required=True, help="folder to build in")
    parser.add_argument("--head-dims", default="128", help="such as 64,128 (default: 128)")
    parser.add_argument("--arch", help="compute capability, such as 90 (default: the device's)")
    parser.add_argument("--out", type=Path, help="folder for a JSON file of what was done")
    options = parser.parse_args(arguments)
    head_dims = [int(dim) for dim in options.head_dims.split(",")]
    started = time.monotonic()
    arch = options.arch or device_arch()
    seconds = build(options.sdist.resolve(), options.into.resolve(), head_dims, arch)
    site = options.into.resolve() / "site"
    check = "import torch, flash_attn; print(flash_attn.__version__)"
    version = subprocess.run(
        [sys.executable, "-c", check],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    total = time.monotonic() - started
    summary = f"flash-attn {version.stdout.strip()}, head dims {options.head_dims}, {total:.0f} s"
    if version.returncode != 0:
        print(version.stderr)
        summary = "built, but cannot be imported"
    print(f"{summary}\n{site}")
    if options.out:
        record = {"summary": summary, "seconds": seconds, "arch": arch, "site": str(site)}
        (options.out / "flash_attn_build.json").write_text(json.dumps(record, indent=1) + "\n")
    return 1 if version.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
