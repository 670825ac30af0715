"""Copies of a VAttnCache go on with the same prefix, each in its own way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import (
    SMALL,
    assert_close,
    assert_same,
    assert_varied,
    filled,
    followed_by,
    generate,
    left_padded,
    make_model,
    stock_cache,
    vattn_cache,
)

ATTENTION_ONLY = ["llama", "mistral-window", "gemma3", "gpt2", "gpt-oss", "deepseek-v3"]
PREFIX = left_padded(70)
PROMPTS = [followed_by(PREFIX, torch.tensor([tail])) for tail in ([1, 2, 3], [4, 5, 6, 7, 8])]


# With linear attention, part of the state is in layers that stay transformers' own.
@pytest.mark.parametrize("name", [*ATTENTION_ONLY, "qwen3-next"])
def test_a_prefix_is_copied_for_each_prompt(name: str) -> None:
    model = make_model(name)
    results = []
    for make in (vattn_cache, stock_cache):
        prefix = filled(model, make(model), PREFIX)
        said = [generate(model, prompt, copy.deepcopy(prefix)) for prompt in PROMPTS]
        assert prefix.get_seq_length() == 70
        # Last, as this one is used up.
        said.append(generate(model, PROMPTS[0], prefix))
        results.append(said)
    for ours, stock in zip(*results, strict=True):
        assert_varied(stock)
        assert_same(ours, stock)
    assert results[0][0].sequences.equal(results[0][2].sequences), "the original has changed"


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_rows_of_a_copy_are_repeated_and_selected(name: str) -> None:
    model = make_model(name)
    tails = torch.tensor([[1, 2, 3], [4, 5, 6]])
    prompts = followed_by({key: rows.repeat(2, 1) for key, rows in PREFIX.items()}, tails)
    results = []
    for make in (vattn_cache, stock_cache):
        prefix = filled(model, make(model), PREFIX)
        twin = copy.deepcopy(prefix)
        twin.batch_repeat_interleave(3)
        twin.batch_select_indices(torch.tensor([2, 0]))
        results.append(generate(model, prompts, twin))
        assert prefix.get_seq_length() == 70
        generate(model, PROMPTS[0], prefix, max_new_tokens=2)
    assert_varied(results[1])
    assert_same(*results)


@pytest.mark.parametrize("name", ATTENTION_ONLY)
def test_rows_of_a_padded_batch_are_selected(name: str) -> None:
    model = make_model(name)
    batch = left_padded(5, 80, 33)
    rows = torch.tensor([2, 0])
    prompts = followed_by(
        {key: whole[rows] for key, whole in batch.items()}, torch.tensor([[1, 2, 3], [4, 5, 6]])
    )
    results = []
    for make in (vattn_cache, stock_cache):
        cache = filled(model, make(model), batch)
        cache.batch_select_indices(rows)
        results.append(generate(model, prompts, cache))
    assert_varied(results[1])
    assert_same(*results)


@pytest.mark.parametrize(
    ("method", "argument"),
    [("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([1, 0, 0]))],
)
def test_rows_stay_when_a_layer_of_transformers_cannot_change_its_own(
    method: str, argument: Any
) -> None:
    model = make_model("qwen3-next")
    with filled(model, vattn_cache(model), left_padded(5, 8)) as cache:
        keys = cache.layers[1].keys.clone()
        with pytest.raises((AttributeError, NotImplementedError), match=method):
            getattr(cache, method)(argument)
        assert cache.layers[1].keys.equal(keys)


def test_an_empty_cache_can_be_copied() -> None:
    model = make_model("gemma3")
    stock = generate(model, PREFIX, stock_cache(model))
    with vattn_cache(model) as cache, copy.deepcopy(cache) as twin:
        assert_same(generate(model, PREFIX, twin), stock)
        assert cache.get_seq_length() == 0
        assert_same(generate(model, PREFIX, cache), stock)


def test_a_copy_outlives_the_original() -> None:
    model = make_model("llama")
    stock = generate(model, PROMPTS[0], filled(model, stock_cache(model), PREFIX))
    cache = filled(model, vattn_cache(model), PREFIX)
    with copy.deepcopy(cache) as twin:
        cache.close()
        assert_same(generate(model, PROMPTS[0], twin), stock)


def test_what_is_written_to_one_is_not_in_the_other() -> None:
    model = make_model("gemma3")
    with vattn_cache(model) as cache:
        filled(model, cache, PREFIX)
        with copy.deepcopy(cache) as twin:
            for theirs, mine in zip(twin.layers, cache.layers, strict=True):
                assert mine.keys.equal(theirs.keys) and mine.values.equal(theirs.values)
                before = mine.keys.clone()
                theirs.keys.zero_()
                theirs.values.zero_()
                assert mine.keys.equal(before)
                assert mine.values.any()


def test_a_copy_that_is_cut_leaves_the_original_whole() -> None:
    model = make_model("llama")
    rows = torch.tensor([1, 0])
    batch = left_padded(70, 30)
    prompts = followed_by({key: whole[rows] for key, whole in batch.items()}, rows[:, None])
    stock = filled(model, stock_cache(model), batch)
    with filled(model, vattn_cache(model), batch) as cache, copy.deepcopy(cache) as twin:
        twin.crop(-60)
        results = []
        for each in (cache, stock):
            each.reorder_cache(rows)
            results.append(generate(model, prompts, each))
        assert_same(*results)


def mapped_bytes(cache: Any) -> int:
    return sum(kv_cache.stats().mapped_bytes for kv_cache in cache.kv_caches)


def used_bytes(cache: Any) -> int:
    return sum(kv_cache.stats().used_bytes for kv_cache in cache.kv_caches)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_only_live_tokens_are_copied(name: str) -> None:
    model = make_model(name)
    with vattn_cache(model) as cache:
        # Three rows of seven pages, of which one row with two pages is still in use.
        filled(model, cache, left_padded(400, 100, 30))
        cache.crop(-300)
        cache.batch_select_indices(torch.tensor([1]))
        with copy.deepcopy(cache) as twin:
            assert used_bytes(twin) == used_bytes(cache)
            assert twin.get_seq_length() == 100
            # At 100 tokens the second page is begun, and another one may be mapped ahead.
            assert mapped_bytes(twin) < mapped_bytes(cache) / 4


def test_a_copy_of_a_copy_is_a_copy() -> None:
    model = make_model("llama")
    stock = generate(model, PROMPTS[1], filled(model, stock_cache(model), PREFIX))
    with (
        filled(model, vattn_cache(model), PREFIX) as cache,
        copy.deepcopy(cache) as twin,
        copy.deepcopy(twin) as third,
    ):
        generate(model, PROMPTS[0], twin)
        assert_same(generate(model, PROMPTS[1], third), stock)


def test_copies_share_one_budget() -> None:
    model = make_model("llama")
    tensors = 2 * SMALL["num_key_value_heads"] * SMALL["num_hidden_layers"]
    # Four rows of two pages of 64 KiB in each tensor, and a bit for what is mapped ahead.
    with vattn_cache(model, memory=(4 * 2 + 2) * tensors * 64 * 1024) as cache:
        filled(model, cache, left_padded(100))
        twins = []
        with pytest.raises(MemoryError, match="raise memory of VAttnCache"):
            twins.extend(copy.deepcopy(cache) for _ in range(20))
        after = filled(model, cache, {"input_ids": torch.tensor([[7]])})
        stock = filled(model, stock_cache(model), left_padded(100))
        filled(model, stock, {"input_ids": torch.tensor([[7]])})
        for mine, theirs in zip(after.layers, stock.layers, strict=True):
            assert_close(mine.keys, theirs.keys)
