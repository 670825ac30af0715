"""What a cache is made from."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vattn.device import parse_device
from vattn.units import DTYPES, dtype_name, parse_bytes

LAYOUTS = ("interleaved", "per_layer")
ORDERS = ("NHD", "HND")
SCRUBS = ("never", "on_reuse")


def _check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an int")
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected at least {minimum}")


class _KnownOptions:
    """Names the misspelt option, and what was meant."""

    def __new__(cls, *_args: Any, **options: Any) -> Any:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise TypeError(
                    f"{cls.__name__} has no option {name!r}; {hint}It has {', '.join(known)}"
                )
        return super().__new__(cls)


@dataclass(frozen=True, kw_only=True)
class LayerGroup(_KnownOptions):
    """Layers whose KV tensors have one shape, for models whose layers differ.

    Parameters
    ----------
    layers : sequence of int
        Indices of the layers. Every layer of the model is in exactly one group.
    num_kv_heads : int
        Heads of K and V.
    head_dim : int
        Elements of one head of K.
    v_head_dim : int, optional
        Elements of one head of V; like ``head_dim`` by default. 0: there is no V, as in MLA, where
        V is a part of the latent stripe.
    window : int, optional
        Tokens of a row that stay readable, the last ones, for layers with sliding-window attention:
        ``KVCache.kv_window`` instead of ``kv`` then gives them. The physical memory of a row in
        these layers is that of ``window`` tokens and less than a page per region more, however long
        the row becomes; whole pages, so a window smaller than one costs one. Tokens before the
        window are overwritten. Default: all tokens stay.
    sink : int
        First tokens of a row that stay readable too, outside the window: attention sinks, see
        ``KVCache.kv_sink``. Less than a page per region more than the tokens themselves.

    Examples
    --------
    >>> LayerGroup(layers=[0, 2], num_kv_heads=4, head_dim=64, window=1024, sink=4).window
    1024
    """

    layers: Sequence[int]
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    window: int | None = None
    sink: int = 0

    def __post_init__(self) -> None:
        _check_int("num_kv_heads", self.num_kv_heads, 1)
        _check_int("head_dim", self.head_dim, 1)
        if self.v_head_dim is not None:
            _check_int("v_head_dim", self.v_head_dim, 0)
        if self.window is not None:
            _check_int("window", self.window, 1)
        _check_int("sink", self.sink, 0)
        if self.sink and self.window is None:
            raise ValueError(
                f"sink is {self.sink}, but there is no window that it would stay beside; set window"
            )
        for layer in self.layers:
            _check_int("layers", layer, 0)

    def shape(self) -> tuple[list[int], int, int, int, int, int]:
        """Layers, heads, head dim of K and of V, window (0: none) and sink."""
        v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        window = 0 if self.window is None else self.window
        return list(self.layers), self.num_kv_heads, self.head_dim, v_head_dim, window, self.sink


@dataclass(frozen=True, kw_only=True)
class CacheConfig(_KnownOptions):
    """Shape, place and budget of a KV cache.

    Parameters
    ----------
    num_layers : int
        Layers that have a KV cache.
    num_kv_heads, head_dim : int
        Shape of a token's K in one layer, on this device. Not with ``layer_groups``.
    v_head_dim : int, optional
        Head dim of V; like ``head_dim`` by default. 0: no V, one latent stripe (MLA).
    window, sink : int, optional
        Keep only the last ``window`` tokens of a row readable, and the first ``sink`` ones: sliding
        window attention in all layers, with bounded memory. See :class:`LayerGroup`.
    layer_groups : sequence of LayerGroup, optional
        Instead of the five above, for models whose layers differ.
    dtype : torch.dtype or str
        float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8 or uint8.
    max_batch_size : int
        Rows, that is requests that can be active or idle at a time.
    max_seq_len : int
        Tokens that a row can grow to. Costs addresses, not memory: take the model's limit. In
        layers with a window not even addresses.
    device : str or torch.device
        "cuda", "cuda:1" or "cpu".
    memory : int or str
        Budget of physical memory, in bytes or as "60GiB".
    layout : {"interleaved", "per_layer"}, optional
        Whether a token's K and V of all layers lie together, so that a row grows by single pages,
        or each tensor of each layer on its own. Default: interleaved on CUDA, per_layer on the CPU.
    order : {"NHD", "HND"}
        Whether a row is [token, head, dim], as FlashAttention has it, or [head, token, dim], on
        which torch's SDPA on the CPU is about twice as fast.
    page_bytes : int or str, optional
        Unit in which rows grow: a power of two and a multiple of the driver's granularity, 2 MiB on
        CUDA, which is the default there. On the CPU the default is what 64 tokens of one region
        need, or its window if that is less, at least 64 KiB and at most 2 MiB.
    lookahead : int
        Tokens that the background thread maps ahead of every row. 0: none.
    max_extent_bytes : int or str, optional
        Largest piece of physical memory that is mapped by one call. Default: 128 MiB, less if
        ``memory`` is.
    scrub : {"never", "on_reuse"}
        With "on_reuse", memory that a freed request wrote is zeroed before another row can read it.
        This costs a memset of that memory when it is used again; on CUDA of new memory too, as the
        driver does not promise that it is zero. With "never" a row may show what an earlier request
        wrote, to whoever reads tokens that the row itself has not written.

    Raises
    ------
    ValueError, TypeError
        The message names the value, the limit and the remedy.

    Examples
    --------
    >>> config = CacheConfig(num_layers=2, num_kv_heads=8, head_dim=128, dtype="bfloat16",
    ...                      max_batch_size=4, max_seq_len=4096, device="cpu", memory="64MiB")
    >>> config.memory_bytes
    67108864
    """

    num_layers: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    window: int | None = None
    sink: int = 0
    layer_groups: Sequence[LayerGroup] | None = None
    dtype: Any = "bfloat16"
    max_batch_size: int
    max_seq_len: int
    device: Any = "cuda:0"
    memory: int | str | None = None
    layout: str | None = None
    order: str = "NHD"
    page_bytes: int | str | None = None
    lookahead: int = 16
    max_extent_bytes: int | str | None = None
    scrub: str = "never"

    def __post_init__(self) -> None:
        for name in ("num_layers", "max_batch_size", "max_seq_len"):
            _check_int(name, getattr(self, name), 1)
        _check_int("lookahead", self.lookahead, 0)
        self._check_shape()
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}")
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}, expected one of {', '.join(ORDERS)}")
        if self.scrub not in SCRUBS:
            raise ValueError(f"scrub is {self.scrub!r}, expected one of {', '.join(SCRUBS)}")
        # Parsed here so that a bad value fails where it was written.
        _ = self.dtype_name, self.device_type, self.groups
        for size in ("memory", "page_bytes", "max_extent_bytes"):
            if getattr(self, size) is not None:
                parse_bytes(getattr(self, size), size)

    def _check_shape(self) -> None:
        if self.layer_groups is None:
            for name in ("num_kv_heads", "head_dim"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is missing; pass it, or layer_groups")
            return
        for name in ("num_kv_heads", "head_dim", "v_head_dim", "window", "sink"):
            if getattr(self, name) != (0 if name == "sink" else None):
                raise ValueError(f"{name} and layer_groups are both given; leave {name} out")
        named = sorted(layer for group in self.layer_groups for layer in group.layers)
        if named != list(range(self.num_layers)):
            raise ValueError(
                f"layer_groups name the layers {named}, expected each of 0 to "
                f"{self.num_layers - 1} exactly once"
            )

    @property
    def groups(self) -> list[LayerGroup]:
        """The layer groups; one for a model whose layers are all alike."""
        if self.layer_groups is not None:
            return list(self.layer_groups)
        assert self.num_kv_heads is not None and self.head_dim is not None
        return [
            LayerGroup(
                layers=range(self.num_layers),
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                v_head_dim=self.v_head_dim,
                window=self.window,
                sink=self.sink,
            )
        ]

    @property
    def has_window(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(group.window is not None for group in self.groups)

    @property
    def dtype_name(self) -> str:
        """Name of the element type, such as "bfloat16"."""
        return dtype_name(self.dtype)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype_name].bits // 8

    @property
    def device_type(self) -> str:
        """Either "cuda" or "cpu"."""
        return parse_device(self.device).device_type

    @property
    def device_index(self) -> int:
        """Ordinal of the CUDA device; 0 on the CPU."""
        return parse_device(self.device).device_index

    @property
    def memory_bytes(self) -> int | None:
        """The budget in bytes; None if the cache is to share the pool of another."""
        return None if self.memory is None else parse_bytes(self.memory, "memory")

    @property
    def layout_name(self) -> str:
        """The layout, by default or by choice."""
        default = "interleaved" if self.device_type == "cuda" else "per_layer"
        return self.layout or default
