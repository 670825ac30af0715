"""Which layers of a configuration have a KV cache, and how far each of them looks back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vattn.plan.families import (
    CHUNKED,
    FULL,
    SLIDING,
    WINDOW_IN_ALL_LAYERS,
    WINDOW_IN_LAST_LAYERS,
    WITHOUT_KV,
    ZAMBA,
)
from vattn.plan.fields import Fields


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Whether a layer has a KV cache, and how many of the last tokens it sees; None: all."""

    has_kv: bool = True
    window: int | None = None


_ALL = Kind()
_NONE = Kind(has_kv=False)


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Kinds of all layers; ``listed`` if the configuration tells layers apart."""

    layers: list[Kind]
    listed: bool


def read_kinds(fields: Fields) -> Kinds:
    """Read the kinds of all layers from whichever field tells.

    Raises
    ------
    ValueError
        A kind that is not known, or a window of which it is not known whose it is.
    """
    pattern = fields.get("hybrid_override_pattern")
    if isinstance(pattern, str):  # Nemotron-H, where it also tells how many layers there are
        fields.understood(["num_hidden_layers"])
        listed = [_by_letter(fields, letter) for letter in pattern]
        return Kinds(
            layers=[_kind(fields, "hybrid_override_pattern", n) for n in listed], listed=True
        )
    names = fields.sequence("layer_types")
    source = "layer_types"
    if names is None:
        source = "layers_block_type"
        names = fields.sequence(source)
    n = len(names) if names is not None and fields.model_type == "nemotron_h" else _count(fields)
    if names is None:
        source, names = _derived_names(fields, n)
    if names is None:
        window = _common_window(fields, n)
        return Kinds(layers=window or [_ALL] * n, listed=window is not None)
    if len(names) != n:
        raise fields.wrong(source, f"has {len(names)} entries, expected one for each of {n} layers")
    return Kinds(layers=[_kind(fields, source, name) for name in names], listed=True)


def _count(fields: Fields) -> int:
    names = ["num_hidden_layers", "n_layer", "n_layers", "num_transformer_layers"]
    if fields.model_type == "chatglm":
        names.append("num_layers")
    return fields.needed(*names)


def _by_letter(fields: Fields, letter: str) -> str:
    kinds = {"*": "attention", "M": "mamba", "-": "mlp", "E": "moe"}
    if letter not in kinds:
        raise fields.wrong("hybrid_override_pattern", f"has {letter!r}, which is not understood")
    return kinds[letter]


def _kind(fields: Fields, source: str, name: Any) -> Kind:
    if name in FULL:
        return _ALL
    if name in WITHOUT_KV:
        return _NONE
    if name in SLIDING:
        return Kind(window=fields.needed("sliding_window", "attention_window_size"))
    if name in CHUNKED:
        return Kind(window=fields.needed("attention_chunk_size"))
    raise fields.wrong(
        source,
        f"has {name!r}, which is not understood; known are full_attention, "
        "sliding_attention, chunked_attention, linear_attention and mamba",
    )


def _derived_names(fields: Fields, n: int) -> tuple[str, list[str] | None]:
    """Names of kinds from fields that do not list them, and the field that it was."""
    full, recurrent = "full_attention", "linear_attention"

    def only(layers: Iterable[int]) -> list[str]:
        with_attention = set(layers)
        return [full if i in with_attention else recurrent for i in range(n)]

    if blocks := fields.sequence("block_types"):  # RecurrentGemma, whose attention is local
        names = ["sliding_attention" if b == "attention" else b for b in blocks]
        return "block_types", (names * n)[:n]
    if types := fields.sequence("attn_type_list"):  # MiniMax
        return "attn_type_list", [full if kind == 1 else recurrent for kind in types]
    for field in ("attn_layer_indices", "full_attn_idxs"):  # Bamba, LFM2
        if (layers := fields.sequence(field)) is not None:
            return field, only(layers)
    if period := fields.integer("attn_layer_period"):
        offset = fields.get("attn_layer_offset") or 0
        if fields.model_type in ZAMBA:
            rest = [full if i % period == offset else recurrent for i in range(n - 3)]
            return "attn_layer_period", [recurrent, recurrent, full, *rest][:n]
        return "attn_layer_period", only(range(offset, n, period))
    if isinstance(linear := fields.get("linear_attn_config"), dict):  # Kimi Linear counts from 1
        layers = linear.get("full_attn_layers")
        if not isinstance(layers, list):
            raise fields.wrong("linear_attn_config", "has no list full_attn_layers")
        return "linear_attn_config", only(layer - 1 for layer in layers)
    if period := fields.integer("full_attention_interval"):  # Qwen3-Next
        return "full_attention_interval", only(range(period - 1, n, period))
    return _derived_windows(fields, n)


def _derived_windows(fields: Fields, n: int) -> tuple[str, list[str] | None]:
    """Names of kinds of models all of whose layers have attention."""
    if ropes := fields.sequence("no_rope_layers"):  # Llama 4: those with positions are chunked
        return "no_rope_layers", ["chunked_attention" if r else "full_attention" for r in ropes]
    if fields.get("attention_chunk_size") is not None:
        period = fields.needed("no_rope_layer_interval")
        return "no_rope_layer_interval", _every(period, n, "chunked_attention")
    if fields.model_type in WINDOW_IN_LAST_LAYERS or fields.get("use_sliding_window") is False:
        return "", None
    if fields.get("sliding_window") is None:
        return "", None
    pattern = fields.integer("sliding_window_pattern", "_sliding_window_pattern")
    if pattern is not None:
        return "sliding_window_pattern", _every(pattern, n, "sliding_attention")
    return "", None


def _every(period: int, n: int, others: str) -> list[str]:
    return ["full_attention" if (i + 1) % period == 0 else others for i in range(n)]


def _common_window(fields: Fields, n: int) -> list[Kind] | None:
    """Kinds by a window that no field assigns to layers; None if there is no window."""
    in_last = fields.model_type in WINDOW_IN_LAST_LAYERS
    used = fields.get("use_sliding_window")
    if used is False or (in_last and used is None):
        fields.understood(["sliding_window", "max_window_layers"])
        return None
    window = fields.integer("sliding_window")
    if window is None:
        fields.understood(["max_window_layers"])
        return None
    if in_last:
        without = fields.get("max_window_layers") or 0
        return [_ALL if i < without else Kind(window=window) for i in range(n)]
    if fields.model_type in WINDOW_IN_ALL_LAYERS:
        return [Kind(window=window)] * n
    raise fields.wrong(
        "sliding_window", f"is {window}, but no field says in which layers; add layer_types"
    )
