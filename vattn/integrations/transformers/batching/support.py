"""Which models a continuous batch serves, and what it needs to know of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from vattn.integrations.transformers.batching.attention import (
    ATTENTION,
    AttentionOptions,
    attention_is,
)
from vattn.integrations.transformers.batching.rows import LayerShape
from vattn.integrations.transformers.cpu_attention import attend
from vattn.integrations.transformers.naming import cache_argument


def check_model(model: Any) -> None:
    """Say why a model cannot be served, as far as that shows without running it.

    Raises
    ------
    NotImplementedError
        Of its architecture.
    ValueError
        Its configuration names no limit for the length of a sequence.
    """
    name = type(model).__name__
    config = model.config
    instead = "a continuous batch does not serve that; use model.generate()"
    if config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder model; {instead}")
    if not model.can_generate():
        raise NotImplementedError(f"{name} has no language model head; take the model that has one")
    if not model._supports_attention_backend:
        raise NotImplementedError(
            f"{name} does not use the attention interface of transformers; {instead}"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise NotImplementedError(f"{name} takes no position_ids; {instead}")
    text_config = config.get_text_config(decoder=True)
    chunk = getattr(text_config, "attention_chunk_size", None)
    layer_types = getattr(text_config, "layer_types", None) or ()
    if chunk is not None or "chunked_attention" in layer_types:
        raise NotImplementedError(f"{name} has layers with chunked attention ({chunk}); {instead}")
    for index, layer in enumerate(DynamicCache(config=config).layers):
        # Not isinstance: subclasses hold more than keys and values.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotImplementedError(
                f"layer {index} of {name} keeps its state in a {type(layer).__name__}; {instead}"
            )
    max_seq_len(model)


def max_seq_len(model: Any) -> int:
    """Tokens that a sequence can have, prompt included."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        raise ValueError(
            f"{type(model.config).__name__} has no max_position_embeddings, so that the length of "
            "a row is not known; set it to the tokens that prompt and answer may have together"
        )
    return int(limit)


def switch_attention(model: Any) -> Callable[[], None]:
    """Let a model use ``vattn_ragged``. Call what is returned to let it use what it used before.

    Raises
    ------
    ValueError
        It uses it already: it is part of another continuous batch.
    """
    if model.config._attn_implementation == ATTENTION:
        raise ValueError(
            f"this {type(model).__name__} is part of another ContinuousBatch; close that one "
            "first, or add the requests to it"
        )
    before = [(config, config._attn_implementation) for config in _configs(model)]

    def switch_back() -> None:
        for config, implementation in before:
            config._attn_implementation = implementation

    try:
        model.set_attn_implementation(ATTENTION)
        if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
            raise NotImplementedError(
                f"{type(model).__name__} does not let its attention be replaced, as a continuous "
                "batch needs to; use model.generate()"
            )
    except BaseException:
        switch_back()
        raise
    return switch_back


def _configs(model: Any) -> Iterator[Any]:
    """Every configuration in a model, each before those inside it, which assigning also changes."""

    def visit(config: Any) -> Iterator[Any]:
        yield config
        for name in config.sub_configs:
            if getattr(config, name, None) is not None:
                yield from visit(getattr(config, name))

    seen: set[int] = set()
    for module in model.modules():
        for config in visit(module.config) if isinstance(module, PreTrainedModel) else ():
            if id(config) not in seen:
                seen.add(id(config))
                yield config


class Probe:
    """Looks at what a model hands to its attention function, in a forward over one token."""

    def __init__(self) -> None:
        self.calls = 0
        self.windows: dict[int, int | None] = {}

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attend to the one token; see :class:`~.attention.Attention`."""
        self.calls += 1
        self.windows[int(getattr(module, "layer_idx", -1))] = options.window
        return attend(query, key, value, softcap=options.softcap).transpose(1, 2)


def probe_layers(model: Any) -> tuple[list[LayerShape], torch.dtype, torch.device]:
    """Run a model, whose attention is switched, on one token: to see what it keeps of that.

    Returns
    -------
    layers : list of LayerShape
        One for each layer of the model's cache.
    dtype, device
        Of the keys and values.

    Raises
    ------
    NotImplementedError
        A layer does something that a continuous batch does not serve.
    """
    name = type(model).__name__
    cache = DynamicCache(config=model.config)
    probe = Probe()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with attention_is(probe):
        model(
            input_ids=token,
            position_ids=token,
            use_cache=True,
            return_dict=True,
            **{cache_argument(model): cache},
        )
    layers: list[Any] = list(cache.layers)
    if probe.calls < len(layers) or any(layer.keys is None for layer in layers):
        raise NotImplementedError(
            f"{probe.calls} of the {len(layers)} layers of {name} use the attention interface of "
            "transformers, a continuous batch needs all of them to; use model.generate()"
        )
    for index, layer in enumerate(layers):
        window = layer.sliding_window if layer.is_sliding else None
        if index in probe.windows and probe.windows[index] != window:
            raise NotImplementedError(
                f"layer {index} of {name} has a window of {window} tokens in its cache and of "
                f"{probe.windows[index]} in its attention; use model.generate()"
            )
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) > 1:
        raise NotImplementedError(
            f"the layers of {name} keep their keys as {sorted(map(str, kinds))}; a continuous "
            "batch serves one type on one device, use model.generate()"
        )
    shapes = [LayerShape(x.keys.shape[1], x.keys.shape[3], x.values.shape[3]) for x in layers]
    return shapes, tensors[0].dtype, tensors[0].device
