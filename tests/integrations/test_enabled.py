"""Inside ``enabled()`` every generate() uses vattn, whoever calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import GREEDY, VOCAB, cache_in, generate, left_padded, make_model, stock_cache
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.cache_utils import DynamicLayer

import vattn
from vattn.integrations.transformers import VAttnCache, enabled
from vattn.integrations.transformers.storage import Storage


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def toy_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{i}": i for i in range(VOCAB)}
    model = Tokenizer(WordLevel(words, unk_token="t0"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="t0")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[vattn.KVCache]:
    """The caches that were opened, in order."""
    caches: list[vattn.KVCache] = []
    before = Storage._open

    def spy(self: Storage, k: torch.Tensor, v: torch.Tensor) -> vattn.KVCache:
        caches.append(before(self, k, v))
        return caches[-1]

    monkeypatch.setattr(Storage, "_open", spy)
    return caches


def test_generate_uses_it_and_says_the_same(llama: Any) -> None:
    stock = generate(llama, left_padded(5, 9), None)
    with enabled(memory="64MiB"):
        ours = generate(llama, left_padded(5, 9), None)
    assert type(cache_in(ours)) is VAttnCache
    assert ours.sequences.equal(stock.sequences)
    assert type(cache_in(generate(llama, left_padded(5), None))) is DynamicCache


def test_a_pipeline_uses_it(llama: Any, opened: list[vattn.KVCache], toy_tokenizer: Any) -> None:
    options = {"generation_config": GenerationConfig(**GREEDY, max_new_tokens=5)}
    generator = pipeline("text-generation", model=llama, tokenizer=toy_tokenizer)
    stock = generator("t1 t2 t3", **options)
    assert not opened
    with enabled(memory="64MiB"):
        assert generator("t1 t2 t3", **options) == stock
    assert len(opened) == 1


def test_the_assistant_uses_it_too(llama: Any, opened: list[vattn.KVCache]) -> None:
    assistant = make_model("llama", seed=1, num_hidden_layers=1)
    options = {"assistant_model": assistant, "eos_token_id": VOCAB, "max_new_tokens": 12}
    stock = generate(llama, left_padded(9), None, **options).sequences
    with enabled(memory="64MiB"):
        ours = generate(llama, left_padded(9), None, **options).sequences
    assert ours.equal(stock)
    assert {cache.config.num_layers for cache in opened} == {1, 3}
    assert len({id(cache.pool) for cache in opened}) == 1, "they share one budget"


def test_both_caches_of_an_encoder_decoder_are_ours() -> None:
    bart = make_model("bart")
    stock = generate(bart, left_padded(5, 9), None)
    with enabled(memory="64MiB"):
        ours = generate(bart, left_padded(5, 9), None)
    assert ours.sequences.equal(stock.sequences)
    both = cache_in(ours)
    assert isinstance(both, EncoderDecoderCache)
    assert type(both.self_attention_cache) is type(both.cross_attention_cache) is VAttnCache


def test_the_settings_hold_inside(llama: Any) -> None:
    with enabled(max_cache_len=12, memory="64MiB"):
        with pytest.raises(ValueError, match="the cache takes 12"):
            generate(llama, left_padded(9), None)
        with enabled(max_cache_len=64, memory="64MiB"):
            generate(llama, left_padded(9), None)
        with pytest.raises(ValueError, match="the cache takes 12"):
            generate(llama, left_padded(9), None)


def test_a_budget_is_for_all_together_and_comes_back(llama: Any) -> None:
    # A row of up to 64 tokens has a page of 64 KiB for each of 3 layers, 2 heads, K and V.
    with enabled(memory=12 * 64 * 1024):
        kept = generate(llama, left_padded(9), None)
        with pytest.raises(vattn.OutOfPagesError):
            generate(llama, left_padded(9), None)
        del kept
        for _ in range(3):
            generate(llama, left_padded(9), None)


def test_what_is_not_ours_stays_as_it_is(llama: Any) -> None:
    mamba = make_model("qwen3-next", layer_types=["linear_attention"] * 2, num_hidden_layers=2)
    with enabled(memory="64MiB"):
        mine = stock_cache(llama)  # made with gradients recorded
        assert type(mine) is DynamicCache
        with torch.no_grad():
            assert type(DynamicCache()) is DynamicCache
            assert type(stock_cache(mamba)) is DynamicCache
            offloading = DynamicCache(config=llama.config, offloading=True)
            assert all(type(layer) is DynamicLayer for layer in offloading.layers)
        ids = left_padded(9)["input_ids"]
        llama(ids, labels=ids).loss.backward()
    assert llama.lm_head.weight.grad is not None
    llama.zero_grad()


def test_an_exception_ends_it(llama: Any) -> None:
    with pytest.raises(KeyError), enabled(memory="64MiB"):
        raise KeyError
    assert type(cache_in(generate(llama, left_padded(5), None))) is DynamicCache
