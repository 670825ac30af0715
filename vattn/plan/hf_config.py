"""The shape of a KV cache from the ``config.json`` of a transformers model, without transformers.

Nothing is guessed in silence: a field that may change what the cache holds and that is not
understood is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vattn.config import LayerGroup
from vattn.models import ModelShape
from vattn.plan.families import FALCON, KNOWN, NO_CACHE, PARALLEL_HYBRID, REFUSED, ZAMBA
from vattn.plan.fields import Fields
from vattn.plan.layer_kinds import Kind, Kinds, read_kinds

# Heads, head dim of K, head dim of V (0: none).
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """What a configuration says about the KV cache.

    Attributes
    ----------
    shape : ModelShape
        With the layers that have a KV cache, numbered from 0, on one device.
    dtype : str or None
        Element type that the configuration names.
    notes : tuple of str
        What is not evident from the shape.
    """

    shape: ModelShape
    dtype: str | None
    notes: tuple[str, ...]


def read_config(
    config: Mapping[str, Any], *, name: str = "model", max_seq_len: int | None = None
) -> HfModel:
    """Read a configuration.

    Parameters
    ----------
    config : mapping
        What is in ``config.json``.
    name : str
        For people.
    max_seq_len : int, optional
        The longest sequence, where the configuration has none or another is wanted.

    Raises
    ------
    ValueError
        A field is missing, has a value that cannot be, or is not understood. The message names the
        field and the ``model_type``.

    Examples
    --------
    >>> model = read_config({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
    ...     "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192})
    >>> model.shape.token_bytes(item_bytes=2)
    131072
    """
    fields = Fields(config)
    _refuse(fields)
    kinds = read_kinds(fields)
    shapes, query_heads = _shapes(fields, kinds)
    shapes = _without_shared(fields, shapes)
    longest = max_seq_len or _longest(fields)
    dtype = fields.outer("dtype", "torch_dtype")
    fields.expect_all_understood(
        knows_recurrent_layers=kinds.listed or fields.model_type in PARALLEL_HYBRID,
        knows_kinds=kinds.listed,
    )
    cached = [(shape, kind) for shape, kind in zip(shapes, kinds.layers, strict=True) if shape]
    if not cached:
        raise fields.wrong("layer_types", "has no layer with a KV cache; there is nothing to plan")
    return HfModel(
        shape=ModelShape(
            name=name,
            num_layers=len(cached),
            num_query_heads=query_heads,
            layer_groups=_groups([shape for shape, _ in cached]),
            max_seq_len=longest,
            windows=_windows([kind for _, kind in cached]),
        ),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        notes=tuple([*_notes(fields, kinds), *fields.notes]),
    )


def _refuse(fields: Fields) -> None:
    if fields.outer("is_encoder_decoder"):
        raise fields.wrong(
            "is_encoder_decoder", "is true; only models of a decoder alone can be planned"
        )
    if fields.model_type in NO_CACHE:
        raise ValueError(
            f"a model of model_type {fields.model_type!r} has no KV cache; there is nothing to plan"
        )
    if fields.model_type in REFUSED:
        raise fields.wrong(*REFUSED[fields.model_type].split(": ", maxsplit=1))


def _shapes(fields: Fields, kinds: Kinds) -> tuple[list[Shape | None], int]:
    """Return the shape of every layer, None for those without a KV cache, and the query heads."""
    query = fields.get("num_attention_heads", "n_head", "n_heads", "num_query_heads")
    if query is None:
        raise fields.wrong("num_attention_heads", "is missing; add it to the configuration")
    if isinstance(query, list):  # OpenELM
        query = max(fields.checked("num_query_heads", heads) for heads in query)
    query = fields.checked("num_attention_heads", query)
    n = len(kinds.layers)
    if (rank := fields.integer("kv_lora_rank")) is not None:
        rope = fields.needed("qk_rope_head_dim")
        fields.understood(["head_dim", "v_head_dim", "num_key_value_heads"])
        fields.notes.append(
            f"MLA: counted as the latent stripe of {rank} + {rope} elements per layer that serving "
            "engines keep; code that keeps expanded K and V needs far more"
        )
        every: list[Shape | None] = [(1, rank + rope, 0)] * n
    else:
        dim = _head_dim(fields, query)
        v_dim = fields.integer("v_head_dim") or dim
        heads = _kv_heads(fields, query, n)
        every = [None if h is None else (h, dim, v_dim) for h in heads]
        _override(fields, every, kinds.layers)
    shapes = [
        shape if kind.has_kv else None for shape, kind in zip(every, kinds.layers, strict=True)
    ]
    return shapes, query


def _head_dim(fields: Fields, query_heads: int) -> int:
    names = ["head_dim", "attention_head_dim"]
    if fields.model_type in {"chatglm", "jetmoe"}:
        names.append("kv_channels")
    given = fields.integer(*names)
    if fields.model_type in ZAMBA:
        fields.understood(["kv_channels", "attention_hidden_size"])
    if given is not None:
        return given
    hidden = fields.needed("hidden_size", "n_embd", "d_model", "model_dim")
    if fields.model_type in ZAMBA:
        hidden *= 2
    if hidden % query_heads:
        raise fields.wrong(
            "hidden_size",
            f"is {hidden}, which {query_heads} heads do not divide; add head_dim",
        )
    return hidden // query_heads


def _kv_heads(fields: Fields, query_heads: int, n: int) -> list[int | None]:
    """KV heads of every layer; None where its attention was removed."""
    if blocks := fields.sequence("block_configs"):  # Nemotron-NAS
        fields.understood(["num_key_value_heads"])
        return [
            _heads_of_block(fields, block, query_heads) for block in _as_long(fields, blocks, n)
        ]
    given = fields.get("num_key_value_heads_per_layer")
    if given is None:
        given = _old_names(fields, query_heads)
    if isinstance(given, list):
        heads = _as_long(fields, given, n)
        return [fields.checked("num_key_value_heads", h) for h in heads]
    return [fields.checked("num_key_value_heads", given)] * n


def _as_long(fields: Fields, entries: list[Any], n: int) -> list[Any]:
    if len(entries) != n:
        raise fields.wrong(
            "num_key_value_heads",
            f"has {len(entries)} entries, expected one for each of {n} layers",
        )
    return entries


def _old_names(fields: Fields, query_heads: int) -> Any:
    """KV heads by whichever name; without any, as many as query heads."""
    if fields.model_type in FALCON:
        heads = fields.get("num_kv_heads", "n_head_kv")
        if fields.get("new_decoder_architecture") or fields.model_type == "RefinedWeb":
            fields.notes.append(
                "KV heads as serving engines keep them; transformers' own Falcon copies them to as "
                "many as query heads"
            )
            return heads or query_heads
        return 1 if fields.get("multi_query") else query_heads
    if fields.get("multi_query"):  # GPT-BigCode
        fields.understood(["num_key_value_heads"])
        return 1
    if fields.get("multi_query_attention"):  # ChatGLM
        return fields.needed("multi_query_group_num")
    if isinstance(attention := fields.get("attn_config"), Mapping):  # DBRX, MPT
        fields.understood(["num_key_value_heads"])
        if attention.get("attn_type") == "multiquery_attention":
            return 1
        return attention.get("kv_n_heads") or query_heads
    heads = fields.get("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
    return query_heads if heads is None else heads


def _heads_of_block(fields: Fields, block: Any, query_heads: int) -> int | None:
    attention = block.get("attention") if isinstance(block, Mapping) else None
    if not isinstance(attention, Mapping):
        raise fields.wrong("block_configs", f"has {block!r}, expected an entry with attention")
    if attention.get("no_op") or attention.get("replace_with_linear"):
        return None
    for name in ("window_length", "num_sink_tokens", "sparsify"):
        if attention.get(name):
            raise fields.wrong(f"block_configs.attention.{name}", "is not understood")
    per_group = fields.checked(
        "block_configs.attention.n_heads_in_group", attention.get("n_heads_in_group")
    )
    return query_heads // per_group


def _override(fields: Fields, shapes: list[Shape | None], kinds: list[Kind]) -> None:
    """Give single layers heads of their own: per_layer_config, or Gemma 4's global layers."""
    dim = fields.integer("global_head_dim")
    heads = fields.integer("num_global_key_value_heads") if fields.get("attention_k_eq_v") else None
    fields.understood(["num_global_key_value_heads"])
    overrides = fields.get("per_layer_config")
    if overrides is None:
        own = {"head_dim": dim, "num_key_value_heads": heads}
        globals_ = [layer for layer, kind in enumerate(kinds) if kind.window is None]
        overrides = {} if dim is None else dict.fromkeys(globals_, own)
    if not isinstance(overrides, Mapping):
        raise fields.wrong("per_layer_config", f"is {overrides!r}, expected an object")
    for layer, own in overrides.items():
        field = f"per_layer_config[{layer!r}]"
        known = {"head_dim", "num_key_value_heads"}
        if not str(layer).isdecimal() or not int(layer) < len(shapes) or not set(own) <= known:
            raise fields.wrong(field, f"is {own!r}, which is not understood")
        shape = shapes[int(layer)]
        if shape is not None:
            k_dim, v_dim = (own.get("head_dim") or shape[1], own.get("head_dim") or shape[2])
            shapes[int(layer)] = (own.get("num_key_value_heads") or shape[0], k_dim, v_dim)


def _without_shared(fields: Fields, shapes: list[Shape | None]) -> list[Shape | None]:
    """Take out the last layers, where they use the keys and values of earlier ones."""
    shared = fields.get("num_kv_shared_layers")
    if not shared:
        return shapes
    shared = fields.checked("num_kv_shared_layers", shared)
    if shared >= len(shapes):
        raise fields.wrong("num_kv_shared_layers", f"is {shared} of {len(shapes)} layers")
    fields.notes.append(
        f"the last {shared} layers use the keys and values of earlier ones (num_kv_shared_layers): "
        "not counted, as transformers does"
    )
    return [*shapes[:-shared], *[None] * shared]


def _longest(fields: Fields) -> int:
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    length = fields.integer(*names, "max_sequence_length", "max_context_length")
    if length is None:
        raise fields.wrong("max_position_embeddings", "is missing; say --max-seq-len")
    return length


def _groups(shapes: list[Shape]) -> tuple[LayerGroup, ...]:
    layers: dict[Shape, list[int]] = {}
    for layer, shape in enumerate(shapes):
        layers.setdefault(shape, []).append(layer)
    return tuple(
        LayerGroup(
            layers=range(len(shapes)) if len(layers) == 1 else tuple(indices),
            num_kv_heads=heads,
            head_dim=k_dim,
            v_head_dim=None if v_dim == k_dim else v_dim,
        )
        for (heads, k_dim, v_dim), indices in layers.items()
    )


def _windows(kinds: list[Kind]) -> tuple[int | None, ...]:
    windows = tuple(kind.window for kind in kinds)
    return windows if any(windows) else ()


def _notes(fields: Fields, kinds: Kinds) -> list[str]:
    notes = []
    if fields.model_type not in KNOWN:
        notes.append(
            f"model_type {fields.model_type!r} is not one that vattn knows: read by its fields, "
            "all of which were understood"
        )
    without = sum(not kind.has_kv for kind in kinds.layers)
    if without:
        notes.append(
            f"{without} of {len(kinds.layers)} layers have no keys and values (recurrent, linear "
            "attention or none): not counted, nor is the state that they keep per request"
        )
    if more := fields.get("num_nextn_predict_layers"):
        notes.append(f"{more} layer(s) for multi-token prediction: not counted")
    return notes
