"""What generate() does with a DynamicCache it does with a VAttnCache, for model after model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import (
    DECODERS,
    VOCAB,
    assert_close,
    assert_same,
    assert_same_with,
    filled,
    followed_by,
    generate,
    given,
    left_padded,
    make_model,
    stock_cache,
    vattn_cache,
    with_attention,
)

# A page is crossed while the prompt is read and again while tokens come; windows are far exceeded.
LONG = (5, 100, 41)
# One of each kind: grouped heads, no window; all windows; windows here and there; as many heads.
KINDS = ["llama", "mistral-window", "gemma3", "gpt2"]


@pytest.mark.parametrize(("name", "attention"), with_attention(DECODERS))
def test_a_left_padded_batch_generates_the_same(name: str, attention: str) -> None:
    model = make_model(name, attention)
    assert model.config._attn_implementation == attention
    assert_same_with(model, lambda cache: generate(model, left_padded(*LONG), cache))


@pytest.mark.parametrize("name", DECODERS)
def test_keys_and_values_are_those_of_a_dynamic_cache(name: str) -> None:
    model = make_model(name)
    stock = stock_cache(model)
    with vattn_cache(model) as cache:
        for each in (cache, stock):
            generate(model, left_padded(*LONG), each, max_new_tokens=3)
            assert each.get_seq_length() == max(LONG) + 2
        assert cache.is_sliding == stock.is_sliding
        for mine, theirs in zip(cache.layers, stock.layers, strict=True):
            if hasattr(theirs, "keys"):  # not those with linear attention
                assert_close(mine.keys, theirs.keys)
                assert_close(mine.values, theirs.values)
        for kv_cache in cache.kv_caches:
            kv_cache.check()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
def test_the_layers_come_out_as_those_of_a_dynamic_cache(name: str) -> None:
    model = make_model(name)
    with filled(model, vattn_cache(model), left_padded(*LONG)) as cache:
        stock = filled(model, stock_cache(model), left_padded(*LONG))
        for (*mine, my_window), (*theirs, their_window) in zip(cache, stock, strict=True):
            assert (my_window is None) == (their_window is None)
            assert my_window is None or int(my_window) == int(their_window)
            for ours, other in zip(mine, theirs, strict=True):
                assert_close(ours, other)


@pytest.mark.parametrize("name", [*KINDS, "gpt-oss", "deepseek-v3", "qwen3-next"])
def test_samples_are_the_same(name: str) -> None:
    model = make_model(name)

    def run(cache: Any) -> Any:
        torch.manual_seed(5)
        options = {"do_sample": True, "num_return_sequences": 3, "top_k": 20}
        return generate(model, left_padded(9, 21), cache, **options)

    assert_same_with(model, run)


@pytest.mark.parametrize("name", [*KINDS, "bloom", "gpt-oss", "deepseek-v3", "qwen3-next"])
def test_beam_search_reorders_rows(name: str) -> None:
    model = make_model(name)
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0}
    assert_same_with(model, lambda cache: generate(model, left_padded(9, 21), cache, **options))


def assistant_of(model: Any) -> Any:
    """A model that is often right about what this one says, and often wrong."""
    assistant = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return assistant


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek-v3"])
def test_guesses_of_an_assistant_are_cropped(name: str) -> None:
    model = make_model(name)
    options = {"assistant_model": assistant_of(model), "eos_token_id": VOCAB}
    forwards = []
    with model.register_forward_hook(lambda *_: forwards.append(1)):
        assert_same_with(model, lambda cache: generate(model, left_padded(21), cache, **options))
    assert 20 < len(forwards) < 80, "the assistant is always right, or wrong"


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_guesses_for_a_model_with_windows_are_cropped(name: str) -> None:
    model = make_model(name)
    # The same weights, but until transformers 5.23 an assistant's own cache can have no windows.
    assistant = make_model(name, layer_types=["full_attention"] * 4)
    options = {"assistant_model": assistant, "eos_token_id": VOCAB}
    forwards = []
    with model.register_forward_hook(lambda *_: forwards.append(1)):
        assert_same_with(model, lambda cache: generate(model, left_padded(21), cache, **options))
    assert 20 < len(forwards) < 80, "the assistant is always right, or wrong"


@pytest.mark.parametrize("name", [*KINDS, "deepseek-v3"])
def test_guesses_from_the_prompt_are_cropped(name: str) -> None:
    model = make_model(name)
    # So long that most tokens are in it already.
    options = {"prompt_lookup_num_tokens": 4, "eos_token_id": VOCAB}
    assert_same_with(model, lambda cache: generate(model, left_padded(150), cache, **options))


@pytest.mark.parametrize("name", [*KINDS, "gpt-oss", "deepseek-v3"])
def test_a_prompt_may_come_in_chunks(name: str) -> None:
    model = make_model(name)
    options = {"prefill_chunk_size": 16}
    assert_same_with(model, lambda cache: generate(model, left_padded(*LONG), cache, **options))


@pytest.mark.parametrize("lengths", [(30,), (5, 30)])
@pytest.mark.parametrize("name", [*KINDS, "gpt-oss", "deepseek-v3"])
def test_a_conversation_goes_on_in_the_same_cache(name: str, lengths: tuple[int, ...]) -> None:
    model = make_model(name)

    def run(cache: Any) -> Any:
        inputs = left_padded(*lengths)
        for turn in (7, 8, 9):
            said = generate(model, inputs, cache, max_new_tokens=20)
            answer = said.sequences[:, inputs["input_ids"].shape[1] :]
            inputs = followed_by(inputs, answer, torch.full((len(lengths), 5), turn))
        return said

    assert_same_with(model, run)


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_may_come_as_embeddings(name: str) -> None:
    model = make_model(name)
    inputs = left_padded(9, 21)
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_same_with(model, lambda cache: generate(model, inputs, cache))


@pytest.mark.parametrize("name", KINDS)
def test_reset_makes_room_for_another_batch(name: str) -> None:
    model = make_model(name)
    with vattn_cache(model) as cache:
        for lengths in ((5, 30, 7), (90,), (11, 4), (5, 9, 12, 3)):
            inputs = left_padded(*lengths)
            assert_same(generate(model, inputs, cache), generate(model, inputs, stock_cache(model)))
            cache.reset()
            assert cache.get_seq_length() == 0


def test_reset_forgets_the_state_of_other_layers_too() -> None:
    model = make_model("qwen3-next")
    with vattn_cache(model) as cache:
        for lengths in ((5, 30, 7), (11, 4, 90)):
            inputs = left_padded(*lengths)
            assert_same(generate(model, inputs, cache), generate(model, inputs, stock_cache(model)))
            cache.reset()


def read_one_by_one(model: Any, cache: Any, ids: torch.Tensor) -> None:
    for position in range(ids.shape[1]):
        filled(model, cache, {"input_ids": ids[:, position : position + 1]})


@pytest.mark.parametrize("removed", [3, 20])
@pytest.mark.parametrize("name", [*KINDS, "gemma2", "gpt-oss", "deepseek-v3"])
def test_tokens_cut_off_the_end_have_left_no_trace(name: str, removed: int) -> None:
    model = make_model(name)
    ids = left_padded(70)["input_ids"]
    rest = ids[:, -removed:]
    stock = filled(model, stock_cache(model), {"input_ids": ids[:, :40]})
    read_one_by_one(model, stock, ids[:, 40:-removed])
    with vattn_cache(model) as cache, torch.no_grad():
        filled(model, cache, {"input_ids": ids[:, :40]})
        read_one_by_one(model, cache, torch.cat([ids[:, 40:-removed], rest.flip(1)], dim=1))
        cache.crop(-removed)
        assert cache.get_seq_length() == 70 - removed
        after = model(rest, **given(cache)).logits
        assert_close(after, model(rest, **given(stock)).logits)


@pytest.mark.parametrize("name", ["mistral-window", "gemma3"])
def test_a_window_that_records_its_past_is_cropped_as_in_a_dynamic_cache(name: str) -> None:
    model = make_model(name)
    ids = left_padded(40)["input_ids"]
    results = []
    for cache in (vattn_cache(model), stock_cache(model)):
        filled(model, cache, {"input_ids": ids[:, :20]})
        cache.activate_past_recording()
        filled(model, cache, {"input_ids": ids[:, 20:30]})
        cache.crop(-4)
        with torch.no_grad():
            results.append(model(ids[:, 26:], **given(cache)).logits)
    assert_close(*results)
