"""How vLLM's one allocation of KV memory becomes a range that nobody has backed yet.

vLLM allocates the KV buffer of all layers by one ``torch.zeros(n, dtype=torch.int8)`` inside a
context that a KV connector may give it (``KVConnectorBase_V1.get_mem_pool_context``, used by
``GPUWorker.initialize_from_config``). A memory pool would not do: ``zeros`` fills what it gets, and
so commits it all. This context answers the call itself, and insists that it was asked exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CHANGED = (
    "vLLM does not allocate its KV cache in the way that vattn knows ({what}); this version of "
    "vLLM is not supported: use one that docs/vllm.md lists, or leave --kv-transfer-config out"
)


class KvAllocation(TorchFunctionMode):
    """Answers ``torch.zeros(size, dtype=torch.int8)`` with a buffer; passes all else on.

    Parameters
    ----------
    size : int
        Bytes that vLLM will ask for.
    buffer : callable
        Makes the tensor: int8, at least ``size`` bytes.

    Raises
    ------
    RuntimeError
        On leaving, if vLLM asked for no such tensor or for several: it has changed.
    """

    def __init__(self, size: int, buffer: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._size = size
        self._buffer = buffer
        self._answered = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        asked = func is torch.zeros and args == (self._size,) and options.get("dtype") is torch.int8
        if not asked:
            return func(*args, **options)
        self._answered += 1
        return self._buffer()[: self._size]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if error is None and self._answered != 1:
            what = f"{self._answered} int8 buffers of {self._size} bytes, expected 1"
            raise RuntimeError(_CHANGED.format(what=what))


def check_views(buffer: torch.Tensor, kv_caches: dict[str, torch.Tensor]) -> None:
    """Check that every layer's KV cache lies in the buffer.

    Raises
    ------
    RuntimeError
        One does not: it would have memory that vattn knows nothing of.
    """
    start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    for layer, cache in kv_caches.items():
        if not start <= cache.data_ptr() < end:
            raise RuntimeError(
                _CHANGED.format(what=f"the KV cache of {layer} is not in the buffer")
            )
