"""Shapes of models, as far as their KV cache and their attention go."""

from __future__ import annotations

from dataclasses import dataclass

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

    def token_bytes(self, item_bytes: int) -> int:
        """Bytes of K and V of all layers of one token."""
        elements = 0
        for group in self.layer_groups:
            layers, heads, k_dim, v_dim = group.shape()
            elements += len(layers) * heads * (k_dim + v_dim)
        return elements * item_bytes


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
