"""What the suite consists of."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import dropwhile
from pathlib import Path

DEADLINE_S = 530
FLASH_ATTN = "flash_attn"  # folder for it

SHOW_MACHINE = """
import subprocess, sys, torch
print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.is_available())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), torch.cuda.mem_get_info())
    subprocess.run(["nvidia-smi"], check=True)
subprocess.run(["g++", "--version"], check=True)
"""

# Where memcheck pays: kernels over rows that are mapped in part, or mapped again. Not what compares
# the device's free memory, of which the sanitizer takes its share.
SANITIZED = (
    "tests/gpu/test_cuda_cache.py",
    "tests/gpu/test_cuda_graphs.py",
    "--deselect",
    "tests/gpu/test_cuda_cache.py::test_close_returns_the_memory_to_the_driver",
)
SANITIZER_FOUND = 9


@dataclass(frozen=True)
class Part:
    """One process of the suite.

    In an argument ``{scratch}`` is a folder for its results and ``{seconds}`` the time in which it
    should end by itself.

    Attributes
    ----------
    budget_s : float
        Seconds that are kept for it, whatever the parts before it do.
    most_s : float
        Seconds after which it is ended, if the parts before it left it so many.
    beside : bool
        Whether it runs beside the parts that follow, until the first that ``waits``.
    measures : bool
        Whether it must have the machine to itself.
    """

    name: str
    budget_s: float
    most_s: float
    arguments: tuple[str, ...]
    program: str = sys.executable
    needs_gpu: bool = True
    needs_module: str | None = None
    needs_file: Path | None = None
    lacks: str | None = None
    beside: bool = False
    measures: bool = False

    @property
    def waits(self) -> bool:
        """Whether it starts only when what runs beside others has ended."""
        return self.measures or self.needs_file is not None

    def why_skip(self, gpu_missing: str | None) -> str | None:
        """Say why it cannot be run; None if it can."""
        if self.lacks:
            return f"skipped: {self.lacks}"
        if self.needs_gpu and gpu_missing:
            return gpu_missing
        if self.needs_module and find_spec(self.needs_module) is None:
            return f"skipped: no {self.needs_module}"
        if self.needs_file and not self.needs_file.exists():
            return f"skipped: there is no {self.needs_file.name}, which an earlier part makes"
        return None


def find_sdist(given: Path | None, carried: Path | None) -> tuple[Path | None, str | None]:
    """Find flash-attn's source distribution, or say why there is none to build."""
    if given is not None:
        return given, None if given.is_file() else f"there is no {given}"
    if carried is None:
        return None, "no --flash-attn and no --carry was given"
    found = sorted(carried.glob("flash_attn-*.tar.gz"))
    return (found[-1], None) if found else (None, f"no flash_attn-*.tar.gz in {carried}")


def find_sanitizer() -> str | None:
    """Find compute-sanitizer, which is not always on the PATH."""
    beside_nvcc = Path(shutil.which("nvcc") or "nvcc").resolve().parent
    folders = (beside_nvcc, Path("/usr/local/cuda/bin"))
    found = shutil.which("compute-sanitizer")
    return found or next(
        (str(f / "compute-sanitizer") for f in folders if (f / "compute-sanitizer").is_file()), None
    )


def _pytest(*arguments: str) -> tuple[str, ...]:
    # -v: of a run that is killed, the log says how far it came.
    return (
        *("-m", "pytest", "-m", "gpu", "-v", "--timeout", "100", "-p", "no:cacheprovider"),
        *("--junitxml", "{scratch}/junit.xml", "--continue-on-collection-errors", *arguments),
    )


def _builds(sdist: Path | None, lacks: str | None, work: Path) -> list[Part]:
    into = ("--into", str(work / FLASH_ATTN), "--out", "{scratch}")
    flash = ("-m", "benchmarks.gpu_suite.flash_attn_build", str(sdist), *into)
    build = ("setup.py", "build_ext", "--inplace")
    return [
        Part("flash_attn_build", 30, 240, flash, lacks=lacks, beside=True),
        Part("machine", 15, 60, ("-c", SHOW_MACHINE), needs_gpu=False),
        Part("build", 45, 150, build, needs_gpu=False),
    ]


def _checks(work: Path) -> list[Part]:
    built = work / FLASH_ATTN / "site/flash_attn_2_cuda.so"
    doctor = ("-m", "vattn", "doctor", "--json")
    questions = ("-m", "benchmarks.gpu_questions", "--out", "{scratch}")
    questions += ("--deadline", "{seconds}")
    flash = _pytest("-k", "flash_attn", "tests/gpu")
    return [
        Part("doctor", 10, 30, doctor, needs_gpu=False),
        Part("tests", 70, 180, _pytest("tests")),
        Part("questions", 70, 150, questions, measures=True),
        Part("tests_flash_attn", 15, 40, flash, needs_file=built),
    ]


def _sanitizer() -> Part:
    program = find_sanitizer()
    memcheck = ("--tool", "memcheck", "--error-exitcode", str(SANITIZER_FOUND))
    # The driver's contract is tested by calls that fail on purpose; here only accesses count.
    memcheck += ("--report-api-errors", "no", sys.executable, *_pytest(*SANITIZED))
    lacks = None if program else "there is no compute-sanitizer"
    return Part("sanitizer", 40, 150, memcheck, program or "", lacks=lacks, measures=True)


def _measurements(small: tuple[str, ...]) -> list[Part]:
    gpu, out = ("--device", "cuda:0"), (*small, "--out", "{scratch}")
    vmm = ("-m", "benchmarks.vmm_latency", *out, "-n", "30")
    step = ("-m", "benchmarks.step_latency", *out, *gpu)
    attention = ("-m", "vattn", "bench", "attention", *out, *gpu, "--budget-s", "{seconds}")
    replay = ("-m", "vattn", "replay", "--synthetic", "1000", "--policies", "vattn", *out, *gpu)
    hf = ("-m", "benchmarks.hf_generate", *out, *gpu, "--dtypes", "bfloat16")
    hf += ("--deadline", "{seconds}")
    cpu = ("--device", "cpu")
    return [
        Part("attention_gpu", 75, 135, attention, measures=True),
        Part("vmm_latency_gpu", 50, 120, (*vmm, *gpu), measures=True),
        Part("step_latency_gpu", 35, 150, step, measures=True),
        Part("replay_gpu", 20, 60, replay, measures=True),
        _sanitizer(),
        Part("vmm_latency_host", 15, 60, (*vmm, *cpu), needs_gpu=False, measures=True),
        Part("hf_generate_gpu", 35, 200, hf, needs_module="transformers", measures=True),
    ]


def parts(
    *, work: Path, quick: bool = False, sdist: Path | None = None, lacks: str | None = None
) -> list[Part]:
    """List what is run, in this order: what is needed first, then what matters most.

    Parameters
    ----------
    work : Path
        Folder for what one part makes and others use.
    quick : bool
        Tiny sizes.
    sdist : Path, optional
        flash-attn's source distribution; if there is none, ``lacks`` says why.
    """
    small = ("--quick",) if quick else ()
    return [*_builds(sdist, lacks, work), *_checks(work), *_measurements(small)]


def limit_of(chosen: Sequence[Part], left: float) -> float:
    """Seconds that the first part may take, so that each later one still has its budget."""
    first, *later = chosen
    if first.beside:
        later = list(dropwhile(lambda part: not part.waits, later))
    return min(first.most_s, left - sum(part.budget_s for part in later))
