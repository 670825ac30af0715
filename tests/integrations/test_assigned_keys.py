"""Attention sees the keys and values that someone else put there, as KV compression does."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import (
    assert_close,
    cache_in,
    filled,
    given,
    left_padded,
    make_model,
    stock_cache,
    vattn_cache,
)

LENGTH = 90
PROMPT = {"input_ids": left_padded(LENGTH, LENGTH)["input_ids"]}
GATHERED = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))[:33]
KEEP: dict[str, Any] = {
    "prefix": slice(0, 33),
    "suffix": slice(-33, None),
    "strided": slice(None, None, 3),
    "overlapping": slice(20, 80),
    "gathered": GATHERED,
    "sorted": GATHERED.sort().values,
    "all": slice(None),
    "repeated": torch.arange(LENGTH + 60) % LENGTH,
}
# Each layer another length, in an order that neither grows nor shrinks.
UNEVEN = [slice(0, 50), GATHERED, slice(1, None), slice(-70, None, 2)]


def compress(layer: Any, keep: Any) -> None:
    layer.keys = layer.keys[:, :, keep]
    layer.values = layer.values[:, :, keep]


def compressible(cache: Any) -> list[Any]:
    """Layers that hold all tokens; in a window, their number cannot be changed."""
    return [layer for layer in cache.layers if hasattr(layer, "keys") and not layer.is_sliding]


def read(model: Any, cache: Any, batch: int = 2, tokens: int = 12) -> torch.Tensor:
    """Logits of more tokens, one by one, at the positions they had without compression."""
    ids = left_padded(*[tokens] * batch)["input_ids"]
    logits = []
    with torch.no_grad():
        for i in range(tokens):
            position = torch.full((batch, 1), LENGTH + i)
            out = model(ids[:, i : i + 1], position_ids=position, **given(cache))
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def assert_same_with(model: Any, run: Callable[[Any], torch.Tensor], **options: Any) -> None:
    stock = run(filled(model, stock_cache(model), PROMPT))
    with vattn_cache(model, **options) as cache:
        assert_close(run(filled(model, cache, PROMPT)), stock)
        for kv_cache in cache.kv_caches:
            kv_cache.check()


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa")]
)
def test_what_is_kept_is_what_attention_sees(name: str, attention: str, keep: Any) -> None:
    model = make_model(name, attention)

    def run(cache: Any) -> torch.Tensor:
        for layer in cache.layers:
            compress(layer, keep)
        assert cache.get_seq_length() == PROMPT["input_ids"][:, keep].shape[1]
        return read(model, cache)

    assert_same_with(model, run)


@pytest.mark.parametrize("keep", [KEEP["suffix"], KEEP["gathered"]], ids=["suffix", "gathered"])
@pytest.mark.parametrize("name", ["gemma3", "deepseek-v3", "qwen3-next"])
def test_layers_of_other_kinds_stay_as_they_are(name: str, keep: Any) -> None:
    model = make_model(name)

    def run(cache: Any) -> torch.Tensor:
        for layer in compressible(cache):
            compress(layer, keep)
            assert layer.keys.shape[-2] == 33
        return read(model, cache)

    assert_same_with(model, run)


def compress_unevenly(cache: Any) -> None:
    for layer, keep in zip(cache.layers, UNEVEN, strict=True):
        compress(layer, keep)


def test_layers_may_keep_different_numbers_of_tokens() -> None:
    model = make_model("llama", num_hidden_layers=4)

    def run(cache: Any) -> torch.Tensor:
        compress_unevenly(cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [50, 33, 89, 35]
        return read(model, cache)

    assert_same_with(model, run)


def test_each_head_may_keep_other_tokens() -> None:
    model = make_model("llama")
    scores = torch.rand(2, 2, LENGTH, generator=torch.Generator().manual_seed(3))
    best = scores.topk(33, dim=-1).indices.unsqueeze(-1).expand(-1, -1, -1, 256)

    def run(cache: Any) -> torch.Tensor:
        for layer in cache.layers:
            layer.keys = layer.keys.gather(2, best)
            layer.values = layer.values.gather(2, best)
        return read(model, cache)

    assert_same_with(model, run)


def test_values_may_come_before_keys() -> None:
    model = make_model("llama")

    def run(cache: Any) -> torch.Tensor:
        for layer in cache.layers:
            layer.values = layer.values[:, :, 5:40]
            layer.keys = layer.keys[:, :, 5:40]
        return read(model, cache)

    assert_same_with(model, run)


def test_keys_may_be_changed_where_they_are() -> None:
    model = make_model("gemma3")

    def run(cache: Any) -> torch.Tensor:
        for layer in cache.layers:
            layer.keys = layer.keys * 0.5
            layer.values = -layer.values.flip(2)
        return read(model, cache)

    assert_same_with(model, run)


def test_tokens_are_compressed_again_and_again() -> None:
    model = make_model("llama")

    def run(cache: Any) -> torch.Tensor:
        logits = []
        for _ in range(4):
            for layer in cache.layers:
                compress(layer, slice(-20, None))
            logits.append(read(model, cache))
        assert cache.get_seq_length() == 32
        return torch.cat(logits)

    assert_same_with(model, run)


@contextlib.contextmanager
def compressing_while_reading(model: Any, keep: list[Any]) -> Iterator[None]:
    """Each layer is compressed as soon as it has read a prompt, when others have not yet."""

    def hook(module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        if kwargs["hidden_states"].shape[1] > 1:
            layer_idx = module.layer_idx
            compress(cache_in(kwargs).layers[layer_idx], keep[layer_idx])

    with contextlib.ExitStack() as hooks:
        for layer in model.model.layers:
            hooks.enter_context(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        yield


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_hook_compresses_layer_by_layer(attention: str) -> None:
    model = make_model("llama", attention, num_hidden_layers=4)
    even = [KEEP["suffix"], GATHERED, KEEP["prefix"], GATHERED.flip(0)]
    # With eager attention one mask serves all layers, so that their lengths must be the same.
    results = []
    for make in (vattn_cache, stock_cache):
        with compressing_while_reading(model, UNEVEN if attention == "sdpa" else even):
            cache = filled(model, make(model), PROMPT)
        results.append(read(model, cache))
    assert_close(*results)


def repeated(cache: Any) -> Any:
    cache.batch_repeat_interleave(2)
    return cache


def selected(cache: Any) -> Any:
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    return cache


def reordered(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def cropped(cache: Any) -> Any:
    cache.crop(-7)
    return cache


@pytest.mark.parametrize("change", [copy.deepcopy, repeated, selected, reordered, cropped])
def test_uneven_layers_are_handled_like_others(change: Callable[[Any], Any]) -> None:
    model = make_model("llama", num_hidden_layers=4)
    batch = {"repeated": 4, "selected": 3}.get(change.__name__, 2)

    def run(cache: Any) -> torch.Tensor:
        compress_unevenly(cache)
        return read(model, change(cache), batch)

    assert_same_with(model, run)


def test_tokens_that_no_layer_keeps_are_let_go() -> None:
    model = make_model("llama")
    with vattn_cache(model) as cache:
        filled(model, cache, PROMPT)
        for layer in cache.layers[1:]:
            compress(layer, slice(0, 10))
        assert cache.kv_caches[0].seq_lens == [LENGTH, LENGTH]
        compress(cache.layers[0], slice(0, 12))
        assert cache.kv_caches[0].seq_lens == [12, 12]


def test_what_cannot_be_kept_is_refused() -> None:
    model = make_model("gemma3")
    with vattn_cache(model) as cache:
        filled(model, cache, PROMPT)
        windowed, full = cache.layers[:2]
        with pytest.raises(ValueError, match="only layers without a window"):
            compress(windowed, slice(0, 3))
        with pytest.raises(ValueError, match="only the number of tokens may change"):
            full.keys = full.keys[:1]
        assert cache.get_seq_length() == LENGTH
        stock = filled(model, stock_cache(model), PROMPT)
        assert_close(read(model, cache), read(model, stock))
