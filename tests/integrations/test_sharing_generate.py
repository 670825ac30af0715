"""Beams and samples of one prompt have it in the same memory, and say what they say anyway."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from families import (
    assert_same,
    assert_varied,
    filled,
    generate,
    left_padded,
    make_model,
    stock_cache,
    vattn_cache,
)
from rows_in_common import aliased, contents, count_reorders, mapped, row_bytes, whole_bytes

import vattn
from vattn.integrations.transformers import storage

# A page of 64 KiB is 64 tokens of one head: rows of four whole pages and a part of one.
LONG = (300, 271)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_reorders(monkeypatch)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


class Watch:
    """A processor of scores that looks at the cache with every token."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.aliased: list[int] = []
        self.mapped: list[int] = []

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.aliased.append(aliased(self.cache))
        self.mapped.append(mapped(self.cache))
        return scores


# Generation.


# Few tokens are copied, which shared memory must stand as well.
@pytest.mark.parametrize("copied_pages", [0, 3])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_beams_share_memory_and_are_those_of_the_stock_cache(
    name: str, copied_pages: int, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_COPIED_PAGES", copied_pages)
    model = make_model(name)
    inputs = left_padded(*LONG)
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0}
    options |= {"max_new_tokens": 24}
    stock = generate(model, inputs, stock_cache(model), **options)
    assert_varied(stock)
    with vattn_cache(model) as cache:
        watch = Watch(cache)
        assert_same(generate(model, inputs, cache, logits_processor=[watch], **options), stock)
        kinds = len(cache.kv_caches)
        assert calls["reorder"] == kinds if copied_pages else calls["reorder"] > 10 * kinds
        assert min(watch.aliased) > 0
        # Two prompts, eight beams.
        assert max(watch.mapped) < 5 * row_bytes(cache)
        for kv_cache in cache.kv_caches:
            kv_cache.check()


def test_beams_of_an_encoder_decoder_share_memory() -> None:
    from transformers import EncoderDecoderCache

    model = make_model("bart", d_model=512)
    inputs = left_padded(300)
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0}
    # Of itself, this random model comes to say one token for ever.
    options |= {"no_repeat_ngram_size": 1}
    stock = generate(model, inputs, None, **options)
    assert_varied(stock)
    with vattn_cache(model) as own, vattn_cache(model) as cross:
        both = EncoderDecoderCache(own, cross)
        watch = Watch(cross)
        assert_same(generate(model, inputs, both, logits_processor=[watch], **options), stock)
        assert min(watch.aliased) > 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_eight_samples_of_a_prompt_have_it_once(name: str) -> None:
    model = make_model(name)
    inputs = left_padded(300)
    options = {"do_sample": True, "num_return_sequences": 8, "top_k": 20}
    results = []
    for make in (vattn_cache, stock_cache):
        torch.manual_seed(5)
        cache = make(model)
        watched = {"logits_processor": [Watch(cache)]} if make is vattn_cache else {}
        results.append(generate(model, inputs, cache, **watched, **options))
        if watched:
            (watch,) = watched["logits_processor"]
            peak = max(kv_cache.stats().peak_mapped_bytes for kv_cache in cache.kv_caches)
            # Three pages once, and two at most for each: the last of the prompt, and what follows.
            assert max(*watch.mapped, peak) <= whole_bytes(cache) + 8 * 2 * row_bytes(cache, 1)
            assert watch.mapped[0] < 8 * row_bytes(cache) / 2
            assert min(watch.aliased) >= 7 * whole_bytes(cache)
            cache.close()
    assert_varied(results[1])
    assert_same(*results)


def test_a_prompt_that_was_computed_once_is_sampled_eight_times(llama: Any) -> None:
    inputs = left_padded(300)
    options = {"do_sample": True, "num_return_sequences": 8, "top_k": 20}
    torch.manual_seed(5)
    stock = generate(llama, inputs, stock_cache(llama), **options)
    forwards = []
    with vattn_cache(llama, max_batch_size=8) as cache:
        filled(llama, cache, {key: tensor[:, :-1] for key, tensor in inputs.items()})
        once = mapped(cache)
        cache.batch_repeat_interleave(8)
        assert mapped(cache) <= once + 8 * row_bytes(cache, 1)
        hook = llama.register_forward_pre_hook(
            lambda _module, _args, given: forwards.append(given["input_ids"].shape),
            with_kwargs=True,
        )
        torch.manual_seed(5)
        with hook:
            ours = generate(llama, inputs, cache, **options)
        # Not the same bits: one prompt is computed in another way than eight.
        assert ours.sequences.equal(stock.sequences)
    assert forwards[0] == (8, 1), "all but the last token was there"


def test_another_prompt_in_the_same_cache(llama: Any) -> None:
    options = {"do_sample": True, "num_return_sequences": 4, "top_k": 20}
    with vattn_cache(llama) as cache:
        for lengths in ((200,), (30,), (130, 140)):
            results = []
            for each in (cache, stock_cache(llama)):
                torch.manual_seed(6)
                results.append(generate(llama, left_padded(*lengths), each, **options))
            assert_same(*results)
            cache.reset()
            cache.kv_caches[0].check()


# When memory is short.


def test_a_beam_step_without_memory_changes_nothing(llama: Any) -> None:
    with vattn_cache(llama, max_batch_size=4) as cache:
        filled(llama, cache, left_padded(300, 290))
        budget = mapped(cache)
    with vattn_cache(llama, memory=budget, max_batch_size=4) as cache:
        filled(llama, cache, left_padded(300, 290))
        before, rows = contents(cache), cache.kv_caches[0].stats().rows_active
        with pytest.raises(vattn.OutOfPagesError, match="raise memory of VAttnCache") as raised:
            cache.batch_repeat_interleave(2)
        assert raised.value.needed > raised.value.free
        assert all(map(torch.equal, contents(cache), before))
        assert cache.kv_caches[0].stats().rows_active == rows == 2
        cache.kv_caches[0].check()


def test_rows_are_copied_when_there_is_no_memory_to_share_them(
    llama: Any, calls: Counter[str]
) -> None:
    with vattn_cache(llama, max_batch_size=2) as cache:
        filled(llama, cache, left_padded(300, 290))
        budget = mapped(cache)
    with vattn_cache(llama, memory=budget, max_batch_size=2) as cache:
        filled(llama, cache, left_padded(300, 290))
        expected = [rows.flip(0) for rows in contents(cache)]
        cache.reorder_cache(torch.tensor([1, 0]))
        assert calls["reorder"] == 1, "it was tried"
        assert all(map(torch.equal, contents(cache), expected))


def test_all_kinds_of_layers_change_or_none() -> None:
    gemma = make_model("gemma3")
    with vattn_cache(gemma, max_batch_size=3) as cache:
        filled(gemma, cache, left_padded(300, 290))
        budget = mapped(cache)
        a_page = row_bytes(cache, 1)
    # Enough for the last page of a new row in one of the two kinds.
    with vattn_cache(gemma, memory=budget + a_page // 2, max_batch_size=3) as cache:
        filled(gemma, cache, left_padded(300, 290))
        before = contents(cache)
        with pytest.raises(vattn.OutOfPagesError, match="The cache is unchanged") as raised:
            cache.batch_select_indices(torch.tensor([0, 1, 1]))
        assert raised.value.needed > raised.value.free
        assert all(map(torch.equal, contents(cache), before))
        assert [kv.stats().rows_active for kv in cache.kv_caches] == [2, 2]
        cache.batch_select_indices(torch.tensor([1]))
        for now, old in zip(contents(cache), before, strict=True):
            assert now.equal(old[1:])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_driver_that_fails_between_two_kinds_leaves_no_mixture(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma = make_model("gemma3")
    with vattn_cache(gemma, max_batch_size=3) as cache:
        filled(gemma, cache, left_padded(300, 290))
        before = contents(cache)

        def fail(*_: Any, **__: Any) -> None:
            raise vattn.DriverError("refused", "map", 1)

        monkeypatch.setattr(cache.kv_caches[failing], "reorder", fail)
        with pytest.raises(vattn.DriverError):
            cache.batch_select_indices(torch.tensor([0, 1, 1]))
        if failing:
            assert cache.get_seq_length() == 0
            assert [kv.stats().rows_active for kv in cache.kv_caches] == [0, 0]
        else:
            assert all(map(torch.equal, contents(cache), before))
            assert [kv.stats().rows_active for kv in cache.kv_caches] == [2, 2]
        monkeypatch.undo()
        cache.reset()
        assert_same(generate(gemma, left_padded(9), cache), generate(gemma, left_padded(9), None))
