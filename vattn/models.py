"""Shapes of models, as far as their KV cache and their attention go."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vattn.config import LayerGroup


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model on one device: with tensor parallelism, the heads of that device.

    Attributes
    ----------
    name : str
        For people.
    num_layers : int
        Layers that have a KV cache.
    num_query_heads : int
        Query heads, which decide what attention computes, not what the cache holds.
    layer_groups : tuple of LayerGroup
        As in :class:`vattn.CacheConfig`.
    max_seq_len : int
        The longest sequence that the model takes.
    windows : tuple of (int or None)
        Per layer, how many of the last tokens its attention sees; None: all of them. Empty: all
        layers see all.

    Examples
    --------
    >>> shape = MODELS["llama-3-8b"]
    >>> shape.token_bytes(item_bytes=2)  # 32 layers x K and V x 8 heads x 128 x 2 bytes
    131072
    """

    name: str
    num_layers: int
    num_query_heads: int
    layer_groups: tuple[LayerGroup, ...]
    max_seq_len: int
    windows: tuple[int | None, ...] = ()

    def token_bytes(self, item_bytes: int) -> int:
        """Bytes of K and V of all layers of one token."""
        elements = 0
        for group in self.layer_groups:
            layers, heads, k_dim, v_dim, *_ = group.shape()
            elements += len(layers) * heads * (k_dim + v_dim)
        return elements * item_bytes

    def layer_token_bytes(self, item_bytes: int) -> list[int]:
        """Bytes of K and V of one token, layer by layer."""
        by_layer = [0] * self.num_layers
        for group in self.layer_groups:
            layers, heads, k_dim, v_dim, *_ = group.shape()
            for layer in layers:
                by_layer[layer] = heads * (k_dim + v_dim) * item_bytes
        return by_layer

    def split(self, devices: int) -> ModelShape:
        """Return what one of ``devices`` tensor-parallel devices holds of this shape.

        KV heads are divided; where there are fewer of them than devices, each device has a copy of
        one, as in serving engines. A latent stripe (MLA) is one head: all have it.

        Raises
        ------
        ValueError
            Heads that cannot be divided evenly.

        Examples
        --------
        >>> MODELS["llama-3-8b"].split(16).layer_groups[0].num_kv_heads
        1
        """
        if devices < 1:
            raise ValueError(f"tensor parallelism over {devices} devices, expected at least 1")
        if self.num_query_heads % devices:
            raise ValueError(
                f"{self.name} has {self.num_query_heads} query heads, which {devices} devices "
                "cannot divide evenly; choose a divisor"
            )
        return replace(
            self,
            name=self.name if devices == 1 else f"{self.name} TP{devices}",
            num_query_heads=self.num_query_heads // devices,
            layer_groups=tuple(_divide(group, devices) for group in self.layer_groups),
        )


def _divide(group: LayerGroup, devices: int) -> LayerGroup:
    heads = group.num_kv_heads
    if heads % devices and devices % heads:
        raise ValueError(
            f"{heads} KV heads cannot be divided over {devices} devices, nor copied evenly; "
            "choose a divisor or a multiple of the heads"
        )
    return replace(group, num_kv_heads=max(heads // devices, 1))


def uniform(
    name: str,
    *,
    num_layers: int,
    num_query_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seq_len: int,
) -> ModelShape:
    """Make the shape of a model whose layers are all alike."""
    group = LayerGroup(layers=range(num_layers), num_kv_heads=num_kv_heads, head_dim=head_dim)
    return ModelShape(
        name=name,
        num_layers=num_layers,
        num_query_heads=num_query_heads,
        layer_groups=(group,),
        max_seq_len=max_seq_len,
    )


MODELS = {
    shape.name: shape
    for shape in (
        uniform(
            "llama-3-8b",
            num_layers=32,
            num_query_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_seq_len=8192,
        ),
        uniform(
            "yi-6b",
            num_layers=32,
            num_query_heads=32,
            num_kv_heads=4,
            head_dim=128,
            max_seq_len=200_000,
        ),
        uniform(
            "yi-34b-tp2",
            num_layers=60,
            num_query_heads=28,
            num_kv_heads=4,
            head_dim=128,
            max_seq_len=200_000,
        ),
        uniform(
            "qwen3-8b",
            num_layers=36,
            num_query_heads=32,
            num_kv_heads=8,
            head_dim=128,
            max_seq_len=40_960,
        ),
    )
}
