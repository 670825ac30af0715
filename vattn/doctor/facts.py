"""All facts about a machine. Whatever cannot be found out is None, and the reason is kept."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import vattn
from vattn import _C
from vattn.doctor import trial
from vattn.doctor.finding import Facts
from vattn.doctor.host import HOST, first_line
from vattn.environment import apply_environment

# By the name that people know, the distributions that it comes in.
PACKAGES = {
    "torch": ("torch",),
    "numpy": ("numpy",),
    "transformers": ("transformers",),
    "vLLM": ("vllm",),
    "flash-attn": ("flash-attn",),
    "FlashInfer": ("flashinfer-python", "flashinfer"),
    "cuda-python": ("cuda-bindings", "cuda-python"),
    "rich": ("rich",),
    "matplotlib": ("matplotlib",),
}

# What else changes how CUDA and torch behave. Nothing that could hold a secret or a path of a user.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def installed_version(distributions: tuple[str, ...]) -> str | None:
    """Return the version of the first that is installed, without importing it."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def variables() -> dict[str, str]:
    """Return the environment variables that matter, those that are set."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in VARIABLES or name.startswith("VATTN_")
    }


def environment_error() -> str:
    """Say what :func:`vattn.init` has against the VATTN_* variables; empty if nothing."""
    try:
        apply_environment()
    except ValueError as error:
        return str(error)
    return ""


def uses_mps() -> bool:
    """Whether CUDA programs of this user share the GPU by the Multi-Process Service."""
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return (Path(pipes) / "control").exists()


SECTIONS: dict[str, dict[str, Callable[[], object]]] = {
    "host": HOST,
    "nvidia": {
        "kernel_module": lambda: first_line("/proc/driver/nvidia/version"),
        "device_files": lambda: sorted(str(path) for path in Path("/dev").glob("nvidia*")),
        "wsl_library": lambda: Path("/usr/lib/wsl/lib/libcuda.so.1").exists(),
        "mps": uses_mps,
    },
    "python": {
        "version": platform.python_version,
        "vattn": lambda: vattn.__version__,
        "extension": lambda: Path(_C.__file__).name,
    },
    "packages": {
        name: partial(installed_version, distributions) for name, distributions in PACKAGES.items()
    },
    "settings": {"variables": variables, "vattn_error": environment_error},
}


def ask(questions: Mapping[str, Callable[[], object]]) -> Facts:
    """Ask each question on its own.

    Returns
    -------
    dict
        The answers; None for a question that raised, and the reason in ``problems``.

    Examples
    --------
    >>> ask({"one": lambda: 1, "none": lambda: 1 // 0})["problems"]
    {'none': 'ZeroDivisionError: integer division or modulo by zero'}
    """
    answers = {name: _ask_one(question) for name, question in questions.items()}
    problems = {name: problem for name, (_, problem) in answers.items() if problem}
    return {name: answer for name, (answer, _) in answers.items()} | {"problems": problems}


def _ask_one(question: Callable[[], object]) -> tuple[Any, str]:
    try:
        return question(), ""
    except Exception as error:  # whatever it is, the other questions are worth asking
        return None, f"{type(error).__name__}: {error}"


def gather(report: Callable[[str], None]) -> Facts:
    """Find out everything; takes seconds. Never raises because something is missing.

    Parameters
    ----------
    report : callable
        Told what is being tried.

    Returns
    -------
    dict
        By section; ``trial`` has what only a process of its own can find out safely: CUDA, torch,
        and caches that were really used.
    """
    facts = {name: ask(questions) for name, questions in SECTIONS.items()}
    tried = ask({"trial": lambda: trial.run(report)})
    facts["trial"] = tried["trial"] or {"problem": tried["problems"]["trial"]}
    return facts
