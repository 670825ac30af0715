"""The KV memory as torch tensors: zero-copy, strided, one pair per layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vattn import _C
from vattn.config import CacheConfig
from vattn.units import DTYPES

if TYPE_CHECKING:
    import torch

DLPACK_DEVICE = {"cpu": 1, "cuda": 2}


class LayerTensors:
    """K and V of every layer, made when first asked for.

    The tensors keep the addresses reserved; this object can be dropped before them.
    """

    def __init__(self, core: _C.KVCache, config: CacheConfig) -> None:
        self._core = core
        self._config = config
        # Window and sink of the layers that have one, as the core has them.
        self._windows = {
            layer: (min(group.window, config.max_seq_len), min(group.sink, config.max_seq_len))
            for group in config.groups
            if group.window is not None
            for layer in group.layers
        }
        self._token_dim = 1 if config.order == "NHD" else 2
        self._by_layer: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def clear(self) -> None:
        """Let go of the tensors."""
        self._by_layer.clear()

    def select(
        self, layer: int, rows: int | slice | Sequence[int] | None, max_len: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return views of some rows and of the first tokens; see :meth:`vattn.KVCache.kv`."""
        self._check(layer)
        if layer in self._windows:
            raise ValueError(
                f"layer {layer} has a sliding window, whose tokens are not where kv() would show "
                "them; use kv_window() and kv_sink()"
            )
        return self._both(layer, lambda tensor: self._view(tensor, rows, max_len))

    def window(
        self, layer: int, rows: slice, n_tokens: int, page_bytes: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return views of the window of rows that all have ``n_tokens`` tokens.

        See :meth:`vattn.KVCache.kv_window`. The tokens behind the sink run through a ring that is
        mapped twice, so wherever in the first mapping a window starts, it goes on without a gap.
        ``csrc/core/layout.h`` has the arithmetic.
        """
        window, sink = self._window_of(layer)
        start = max(sink, n_tokens - window)

        def view(tensor: torch.Tensor) -> torch.Tensor:
            token = tensor.stride(self._token_dim)  # in elements, as the offsets below
            page = page_bytes // tensor.element_size()
            ring = -(-window * token // page) * page
            offset = sink * token + (start - sink) * token % ring
            some = tensor[rows]
            shape = list(some.shape)
            shape[self._token_dim] = max(0, n_tokens - start)
            return some.as_strided(shape, some.stride(), some.storage_offset() + offset)

        return self._both(layer, view)

    def sink(
        self, layer: int, rows: slice, n_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return views of the sink of rows that all have ``n_tokens`` tokens."""
        _, sink = self._window_of(layer)
        n = min(sink, n_tokens)
        return self._both(layer, lambda tensor: tensor[rows].narrow(self._token_dim, 0, n))

    def _check(self, layer: int) -> None:
        if not 0 <= layer < self._config.num_layers:
            raise IndexError(f"layer is {layer}, expected 0 to {self._config.num_layers - 1}")

    def _window_of(self, layer: int) -> tuple[int, int]:
        self._check(layer)
        if layer not in self._windows:
            raise ValueError(f"layer {layer} has no sliding window; use kv()")
        return self._windows[layer]

    def _both(
        self, layer: int, view: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`view` of K and of V."""
        if layer not in self._by_layer:
            k = self._import(layer, is_v=False)
            assert k is not None
            self._by_layer[layer] = k, self._import(layer, is_v=True)
        k, v = self._by_layer[layer]
        return view(k), None if v is None else view(v)

    def _import(self, layer: int, *, is_v: bool) -> torch.Tensor | None:
        import torch

        dtype = DTYPES[self._config.dtype_name]
        capsule = self._core.capsule(
            layer=layer,
            is_v=is_v,
            type_code=dtype.dlpack_code,
            bits=dtype.bits,
            device_type=DLPACK_DEVICE[self._config.device_type],
            device_id=self._config.device_index,
        )
        if capsule is None:
            return None
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
        return tensor.view(getattr(torch, self._config.dtype_name)) if dtype.reinterpret else tensor

    def _view(
        self, tensor: torch.Tensor, rows: int | slice | Sequence[int] | None, max_len: int | None
    ) -> torch.Tensor:
        if max_len is not None:
            limit = self._config.max_seq_len
            if not 0 <= max_len <= limit:
                raise ValueError(f"max_len is {max_len}, expected 0 to max_seq_len = {limit}")
            tensor = tensor.narrow(self._token_dim, 0, max_len)
        return tensor if rows is None else tensor[as_slice(rows, self._config.max_batch_size)]


def as_slice(rows: int | slice | Sequence[int], n_rows: int) -> slice:
    """Turn a choice of rows into the slice that selects them, which is what a view can do.

    Examples
    --------
    >>> as_slice([1, 3, 5], n_rows=8)
    slice(1, 6, 2)
    """
    if isinstance(rows, slice):
        return rows
    wanted = [rows] if isinstance(rows, int) else [int(row) for row in rows]
    for row in wanted:
        if not 0 <= row < n_rows:
            raise IndexError(f"row is {row}, expected 0 to {n_rows - 1}")
    stride = wanted[1] - wanted[0] if len(wanted) > 1 else 1
    if not wanted or stride < 1 or wanted != list(range(wanted[0], wanted[-1] + 1, stride)):
        raise ValueError(
            f"rows are {wanted}, expected ascending and evenly spaced ones: only those can be a "
            "view. Pass cache_batch_idx to the kernel, or index the tensor, which copies"
        )
    return slice(wanted[0], wanted[-1] + 1, stride)


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, tokens, heads, dim] as [tokens, heads, dim], with the gaps between the rows."""
    rows, tokens, heads, dim = tensor.shape
    stride_tokens = tensor.stride(0) // tensor.stride(1)
    size = ((rows - 1) * stride_tokens + tokens, heads, dim)
    return tensor.as_strided(size, tensor.stride()[1:])
