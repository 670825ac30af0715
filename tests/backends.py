"""The drivers that the same tests run over."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import vattn

ROOT = Path(__file__).resolve().parent.parent
DOUBLE = ROOT / "build" / "cpp-plain" / "libcuda.so.1"

BACKENDS = ["host", "double", pytest.param("gpu", marks=pytest.mark.gpu)]

# 2 KiB a token: 32 tokens in a page of 64 KiB, 1,024 in one of 2 MiB.
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "head_dim": 64,
    "dtype": "float32",
    "layout": "interleaved",
    "max_batch_size": 4,
    "lookahead": 0,
}
TOKEN_BYTES = 2 * 2 * 2 * 64 * 4


class Backend:
    """A driver, and configurations that fit it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cpu" if name == "host" else "cuda:0"
        self.page_bytes = 64 * 1024 if name == "host" else 2 * 2**20
        self.page_tokens = self.page_bytes // TOKEN_BYTES

    def config(self, *, pages: int = 64, **options: Any) -> vattn.CacheConfig:
        """A small cache of ``pages`` pages whose rows may grow to 64 pages."""
        defaults = SHAPE | {
            "device": self.device,
            "page_bytes": self.page_bytes,
            "memory": pages * self.page_bytes,
            "max_seq_len": 64 * self.page_tokens,
        }
        return vattn.CacheConfig(**(defaults | options))


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """For what the background thread does in its own time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def fill(cache: vattn.KVCache, row: int, tokens: int, value: float) -> None:
    """Writes `value` over the first tokens of a row, in all layers."""
    for layer in range(cache.config.num_layers):
        for tensor in cache.kv(layer, rows=row, max_len=tokens):
            tensor.fill_(value)


def holds(cache: vattn.KVCache, row: int, tokens: int, value: float) -> bool:
    """Whether the first tokens of a row hold `value`, in all layers."""
    return all(
        bool((tensor == value).all())
        for layer in range(cache.config.num_layers)
        for tensor in cache.kv(layer, rows=row, max_len=tokens)
    )


def load_double() -> ctypes.CDLL:
    """The test double of libcuda: once loaded, dlopen("libcuda.so.1") finds it."""
    subprocess.run(
        ["make", "-s", "-C", str(ROOT / "tests" / "cpp"), "double"], check=True, timeout=300
    )
    library = ctypes.CDLL(str(DOUBLE))
    library.vattn_double_breach.restype = ctypes.c_char_p
    library.vattn_double_breach.argtypes = [ctypes.c_size_t]
    library.vattn_double_set_stream_busy.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.vattn_double_set_total_memory.argtypes = [ctypes.c_size_t]
    for counter in ("breaches", "live_handles", "live_mappings", "live_reservations"):
        getattr(library, f"vattn_double_{counter}").restype = ctypes.c_size_t
    return library


def breaches(library: ctypes.CDLL) -> list[str]:
    """What the double has to say against its callers."""
    return [library.vattn_double_breach(i).decode() for i in range(library.vattn_double_breaches())]


@contextmanager
def double_in_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The double instead of a driver; fails the test on a breach of the driver's contract."""
    library = load_double()
    gc.collect()  # what earlier tests left must go before the driver that it belongs to does
    library.vattn_double_reset()
    # Its memory is ordinary memory, which a torch without CUDA can read under its own name.
    monkeypatch.setattr("vattn.tensors.DLPACK_DEVICE", {"cpu": 1, "cuda": 1})
    yield library
    gc.collect()
    assert breaches(library) == []
    assert library.vattn_double_live_handles() == 0, "physical memory leaked"
    assert library.vattn_double_live_mappings() == 0, "mappings leaked"
