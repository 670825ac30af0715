"""Fixtures of the tests inside vLLM. Where vLLM is not installed there are no such tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from engine_cases import requests
from engine_rounds import Report, Round, serve
from token_rule import Logits, reference

# This folder itself can be imported as `vllm`, but then there is no file behind the name.
_spec = find_spec("vllm")
collect_ignore_glob = [] if _spec is not None and _spec.origin is not None else ["*.py"]


@pytest.fixture(scope="session")
def models() -> Iterator[Path]:
    """Folder for models."""
    with TemporaryDirectory(prefix="vattn-models-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def new_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders with short paths: those of sockets may have 107 bytes."""
    with TemporaryDirectory(prefix="vattn-") as base:
        numbers = count()

        def make() -> Path:
            made = Path(base) / str(next(numbers))
            made.mkdir(mode=0o700)
            return made

        yield make


@pytest.fixture(scope="session")
def llama(models: Path) -> Path:
    """The model that most engines serve."""
    import tiny_models  # here, because it takes seconds

    return tiny_models.llama(models).path


@pytest.fixture(scope="session")
def logits(llama: Path) -> Logits:
    """What the model of :func:`llama` really says."""
    return reference(llama)


@pytest.fixture(scope="session")
def stock(llama: Path, new_folder: Callable[[], Path]) -> Report:
    """What vLLM without vattn does with the requests of all."""
    prompts, max_tokens = requests()
    plan = Round(prompts=prompts, max_tokens=max_tokens)
    outcome = serve(llama, [plan], None, folder=new_folder())
    assert outcome.returncode == 0, outcome.output[-4000:]
    return outcome.reports[0]
