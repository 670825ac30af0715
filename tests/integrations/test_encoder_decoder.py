"""Models with an encoder have two caches: one grows, the other keeps what the encoder said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import (
    ENCODER_DECODER,
    VOCAB,
    assert_close,
    assert_same,
    assert_varied,
    generate,
    given,
    left_padded,
    make_model,
    stock_cache,
    vattn_cache,
    with_attention,
)
from transformers import EncoderDecoderCache

PROMPTS = left_padded(5, 100, 41)
# Of themselves, these random models come to say one token for ever.
VARIED = {"no_repeat_ngram_size": 1}


def pair_of(make: Callable[[Any], Any], model: Any) -> EncoderDecoderCache:
    return EncoderDecoderCache(make(model), make(model))


def assert_same_with_pairs(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> None:
    stock = generate(model, inputs, pair_of(stock_cache, model), **VARIED, **options)
    assert_varied(stock)
    assert_same(generate(model, inputs, pair_of(vattn_cache, model), **VARIED, **options), stock)


@pytest.mark.parametrize(("name", "attention"), with_attention(ENCODER_DECODER))
def test_a_padded_batch_generates_the_same(name: str, attention: str) -> None:
    # So many tokens that T5, with 64 to a page, crosses one.
    assert_same_with_pairs(make_model(name, attention), PROMPTS, max_new_tokens=80)


@pytest.mark.parametrize(("name", "attention"), with_attention(ENCODER_DECODER))
def test_beam_search_reorders_rows(name: str, attention: str) -> None:
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0}
    assert_same_with_pairs(make_model(name, attention), PROMPTS, **options)


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_samples_are_the_same(name: str) -> None:
    model = make_model(name)
    results = []
    for make in (vattn_cache, stock_cache):
        torch.manual_seed(5)
        options = VARIED | {"do_sample": True, "num_return_sequences": 3, "top_k": 20}
        results.append(generate(model, PROMPTS, pair_of(make, model), **options))
    assert_varied(results[1])
    assert_same(*results)


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_guesses_of_an_assistant_are_cropped(name: str) -> None:
    model = make_model(name)
    options = {
        "assistant_model": make_model(name, seed=1),
        "eos_token_id": VOCAB,
        "max_new_tokens": 20,
    }
    assert_same_with_pairs(model, left_padded(41), **options)


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_both_caches_hold_what_the_model_gave_them(name: str) -> None:
    model = make_model(name)
    pair = pair_of(vattn_cache, model)
    generate(model, PROMPTS, pair, max_new_tokens=7)
    assert pair.self_attention_cache.get_seq_length() == 7
    assert pair.cross_attention_cache.get_seq_length() == 100
    for cache in (pair.self_attention_cache, pair.cross_attention_cache):
        for kv_cache in cache.kv_caches:
            kv_cache.check()


def read(model: Any, pair: EncoderDecoderCache, rows: torch.Tensor, *ids: int) -> torch.Tensor:
    with torch.no_grad():
        return model(
            decoder_input_ids=torch.tensor([ids] * len(rows)),
            encoder_outputs=(model.get_encoder()(**PROMPTS)[0][rows],),
            attention_mask=PROMPTS["attention_mask"][rows],
            **given(pair),
        ).logits


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_a_pair_is_copied_and_its_rows_selected(name: str) -> None:
    model = make_model(name)
    all_rows, rows = torch.arange(3), torch.tensor([2, 0])
    results = []
    for make in (vattn_cache, stock_cache):
        pair = pair_of(make, model)
        read(model, pair, all_rows, 1, 2, 3)
        twin = copy.deepcopy(pair)
        twin.batch_select_indices(rows)
        results.append([read(model, twin, rows, 4, 5), read(model, pair, all_rows, 6, 7)])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs)
