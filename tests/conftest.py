"""Fixtures of all tests. Those marked `gpu` are skipped where there is no CUDA device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from tempfile import TemporaryDirectory

import pytest
from backends import Backend, double_in_use

import vattn


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # here, because it takes seconds

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def libcuda_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The test double of libcuda, checked for breaches and leaks at the end of the test."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a real libcuda is loaded; the double needs a process of its own")
    with double_in_use(monkeypatch) as library:
        yield library


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """A runtime directory for the sockets of this test, and what is closed before it goes."""
    with TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        with ExitStack() as opened:
            yield opened


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """Parametrize indirectly with backends.BACKENDS."""
    if request.param == "double":
        request.getfixturevalue("libcuda_double")
    return Backend(request.param)


@pytest.fixture
def make_cache(backend: Backend) -> Iterator[Callable[..., vattn.KVCache]]:
    """Makes caches of a backend; closes and checks them at the end of the test."""
    caches: list[vattn.KVCache] = []

    def make(**options: object) -> vattn.KVCache:
        cache = vattn.init(backend.config(**options))
        caches.append(cache)
        return cache

    yield make
    for cache in caches:
        if not cache.closed:
            cache.check()
        cache.close()
