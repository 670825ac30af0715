"""generate() with a VAttnCache gives what it gives with DynamicCache, or says why it cannot."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers
from families import assert_same, filled, generate, given, left_padded, make_model, vattn_cache
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import vattn
from vattn.integrations.transformers import VAttnCache


@pytest.fixture(scope="module")
def llama() -> Any:
    # Sixteen dims: a page is then 1,024 tokens, and most tests need not think of it.
    return make_model("llama", head_dim=16)


def test_what_attention_gets_is_the_cache_itself(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        generate(llama, left_padded(5, 9), cache, max_new_tokens=3)
        assert cache.kv_caches
        pool_k, _ = cache.kv_caches[0].kv(1)
        k, v = cache.layers[1].update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16))
        assert k.shape == v.shape == (2, 2, 12, 16)
        assert k.data_ptr() == pool_k.data_ptr()
        assert pool_k[:2, :, 11].eq(1).all()


def test_one_step_per_forward_and_not_per_layer(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        generate(llama, left_padded(5, 9), cache, max_new_tokens=7)
        assert cache.kv_caches
        assert cache.kv_caches[0].stats().steps == 7


class RowsWritten(TorchDispatchMode):
    """Counts the rows that index_copy_ writes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.index_copy_.default:
            self.counts.append(args[2].numel())
        return func(*args, **(kwargs or {}))


def test_beams_that_keep_their_parent_are_not_moved(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        filled(llama, cache, left_padded(5, 9, 7, 8))
        before = [layer.keys.clone() for layer in cache.layers]
        with RowsWritten() as written:
            cache.reorder_cache(torch.tensor([0, 0, 2, 1]))
        assert written.counts == [2] * 6, "rows 1 and 3, of K and V in three layers"
        for layer, old in zip(cache.layers, before, strict=True):
            assert layer.keys.equal(old[[0, 0, 2, 1]])
        with RowsWritten() as written:
            cache.reorder_cache(torch.arange(4))
        assert not written.counts


@pytest.mark.parametrize("count", [-4, torch.tensor(-4), 5])
def test_crop_counts_from_the_end_or_keeps_so_many(llama: Any, count: Any) -> None:
    ids = left_padded(9)["input_ids"]
    with vattn_cache(llama) as cache, torch.no_grad():
        llama(ids, **given(cache))
        cache.crop(count)
        assert cache.get_seq_length() == 5
        assert cache.kv_caches[0].seq_lens == [5]
        after = llama(ids[:, 5:], **given(cache)).logits
        torch.testing.assert_close(after, llama(ids).logits[:, 5:], atol=1e-5, rtol=1e-5)


def test_crop_of_more_than_there_is_takes_all(llama: Any) -> None:
    with vattn_cache(llama) as cache, torch.no_grad():
        llama(left_padded(9)["input_ids"], **given(cache))
        cache.crop(20)
        assert cache.get_seq_length() == 9
        cache.crop(-20)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("select", [[2, 0], [1, 1, 0, 2, 2], [True, False, True]])
def test_rows_are_selected_as_in_a_dynamic_cache(llama: Any, select: list[Any]) -> None:
    inputs = left_padded(5, 9, 7)
    ours = filled(llama, vattn_cache(llama, max_batch_size=6), inputs)
    stock = filled(llama, DynamicCache(config=llama.config), inputs)
    for cache in (ours, stock):
        cache.batch_select_indices(torch.tensor(select))
        cache.batch_repeat_interleave(1)
    for mine, theirs in zip(ours.layers, stock.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-5, rtol=1e-5)
    ours.kv_caches[0].check()


def test_one_prompt_is_continued_in_several_ways(llama: Any) -> None:
    ids = left_padded(9)["input_ids"]
    tails = torch.tensor([[3, 4], [5, 6], [7, 8]])
    with vattn_cache(llama, max_batch_size=3) as cache, torch.no_grad():
        llama(ids, **given(cache))
        cache.batch_repeat_interleave(3)
        after = llama(tails, **given(cache)).logits
        whole = llama(torch.cat([ids.repeat(3, 1), tails], dim=1)).logits
        torch.testing.assert_close(after, whole[:, 9:], atol=1e-5, rtol=1e-5)


def test_reset_makes_room_for_another_batch(llama: Any) -> None:
    with vattn_cache(llama, max_batch_size=3) as cache:
        for lengths in ((5, 9, 7), (30,), (11, 4)):
            stock = generate(llama, left_padded(*lengths), None)
            assert_same(generate(llama, left_padded(*lengths), cache), stock)
            cache.reset()
            assert cache.get_seq_length() == 0
            assert cache.kv_caches
            assert cache.kv_caches[0].stats().rows_active == 0, "no other row can have their memory"


# A page of 64 KiB is 1,024 tokens of one head of K or V in a layer, and a row has twelve of these.
ROW_PAGE_BYTES = 2 * 2 * 3 * 64 * 1024


def test_memory_of_rows_no_longer_used_is_there_for_the_others(llama: Any) -> None:
    options = {"max_batch_size": 3, "memory": 3 * ROW_PAGE_BYTES, "max_cache_len": 4096}
    with vattn_cache(llama, **options) as cache:
        three = torch.zeros(3, 2, 1000, 16)
        cache.layers[0].update(three, three)
        cache.reset()
        one = torch.zeros(1, 2, 3000, 16)
        cache.layers[0].update(one, one)
        assert cache.kv_caches
        cache.kv_caches[0].check()


def test_out_of_pages_leaves_a_cache_that_reset_makes_usable(llama: Any) -> None:
    with vattn_cache(llama, memory=2 * ROW_PAGE_BYTES, max_cache_len=2048) as cache:
        with pytest.raises(vattn.OutOfPagesError, match="raise memory of VAttnCache") as raised:
            generate(llama, left_padded(1015, 900), cache)
        assert raised.value.needed > raised.value.free
        assert {layer.get_seq_length() for layer in cache.layers} == {1024}
        assert cache.kv_caches
        cache.kv_caches[0].check()
        cache.reset()
        shorter = left_padded(5, 9)
        assert_same(generate(llama, shorter, cache), generate(llama, shorter, None))


def test_out_of_pages_in_one_kind_of_layer_leaves_the_others_as_they_are() -> None:
    gemma = make_model("gemma3")  # two layers with a window, two without, of 2 heads
    a_page_more = 2 * 2 * 2 * 64 * 1024
    with vattn_cache(gemma, memory=3 * a_page_more) as cache:
        filled(gemma, cache, left_padded(60))
        with pytest.raises(vattn.OutOfPagesError):
            filled(gemma, cache, left_padded(9))
        assert [layer.length for layer in cache.layers] == [60] * 4
        assert [kv_cache.seq_lens for kv_cache in cache.kv_caches] == [[60], [60]]
        for kv_cache in cache.kv_caches:
            kv_cache.check()
        cache.crop(-20)
        filled(gemma, cache, left_padded(9))
        assert cache.get_seq_length() == 49


def test_rows_that_cannot_be_backed_are_not_taken(llama: Any) -> None:
    options = {"max_batch_size": 3, "memory": 2 * ROW_PAGE_BYTES}
    with vattn_cache(llama, **options) as cache:
        filled(llama, cache, left_padded(5, 9))
        keys = cache.layers[2].keys.clone()
        with pytest.raises(vattn.OutOfPagesError):
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
        assert cache.layers[2].keys.equal(keys)


def test_it_serves_inference_mode_and_no_grad_in_turn(llama: Any) -> None:
    ids = left_padded(9)["input_ids"]
    with vattn_cache(llama) as cache:
        with torch.inference_mode():
            llama(ids, **given(cache))
        with torch.no_grad():
            llama(ids[:, :1], **given(cache))
        assert cache.get_seq_length() == 10


def test_early_initialization_makes_the_memory(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        assert not cache.is_initialized
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
        assert cache.is_initialized
        assert_same(
            generate(llama, left_padded(5, 9), cache), generate(llama, left_padded(5, 9), None)
        )


def test_a_closed_cache_starts_afresh(llama: Any) -> None:
    cache = vattn_cache(llama)
    generate(llama, left_padded(5, 9), cache, max_new_tokens=2)
    cache.close()
    assert not cache.kv_caches and cache.get_seq_length() == 0
    assert_same(generate(llama, left_padded(7), cache), generate(llama, left_padded(7), None))


def test_the_budget_has_a_default(llama: Any) -> None:
    with VAttnCache(llama.config) as cache:
        generate(llama, left_padded(5), cache, max_new_tokens=2)
        assert cache.kv_caches
        assert cache.kv_caches[0].stats().budget_bytes > 64 * 2**20


# What it refuses.


def test_too_many_tokens_name_the_setting(llama: Any) -> None:
    with (
        vattn_cache(llama, max_cache_len=12) as cache,
        pytest.raises(ValueError, match="would have 13 tokens, the cache takes 12"),
    ):
        generate(llama, left_padded(9), cache)


def test_too_many_rows_name_the_setting(llama: Any) -> None:
    with vattn_cache(llama, max_batch_size=2) as cache:
        filled(llama, cache, left_padded(5, 9))
        with pytest.raises(ValueError, match="max_batch_size=4"):
            cache.batch_repeat_interleave(2)
        assert cache.get_seq_length() == 9


def test_another_batch_on_a_full_cache_is_refused(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        filled(llama, cache, left_padded(5, 9))
        with pytest.raises(ValueError, match=r"the batch has 1 rows.*reset\(\)"):
            filled(llama, cache, left_padded(5))
        with pytest.raises(ValueError, match="beam_idx has 3 entries"):
            cache.reorder_cache(torch.tensor([0, 1, 1]))


def test_training_is_refused(llama: Any) -> None:
    with (
        vattn_cache(llama) as cache,
        pytest.raises(NotImplementedError, match=r"torch\.no_grad"),
    ):
        llama(left_padded(5)["input_ids"], **given(cache))


def test_offloading_is_not_there_yet(llama: Any) -> None:
    with pytest.raises(NotImplementedError, match="cannot offload"):
        vattn_cache(llama, offloading=True)
    with vattn_cache(llama) as cache:
        filled(llama, cache, left_padded(5))
        for call in (cache.layers[0].offload, cache.layers[0].prefetch):
            with pytest.raises(NotImplementedError, match="cannot offload"):
                call()


def test_only_a_configuration_makes_a_cache(llama: Any) -> None:
    keys = torch.zeros(1, 2, 5, 16)
    for not_a_config in (((keys, keys),), DynamicCache(), llama):
        with pytest.raises(TypeError, match=r"config=model\.config"):
            VAttnCache(not_a_config)


def test_keys_of_another_type_or_shape_are_refused(llama: Any) -> None:
    with vattn_cache(llama, dtype=torch.bfloat16) as cache:
        k = torch.zeros(1, 2, 1, 16)
        with pytest.raises(ValueError, match=r"torch\.float32, the cache holds torch\.bfloat16"):
            cache.layers[0].update(k, k)
        cache.layers[0].update(k.bfloat16(), k.bfloat16())
        other = torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16)
        with pytest.raises(NotImplementedError, match="layers differ"):
            cache.layers[1].update(other, other)


def test_models_it_cannot_serve_are_refused() -> None:
    mamba = transformers.Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    with pytest.raises(ValueError, match="no layer of Qwen3NextConfig"):
        VAttnCache(mamba)


def test_bad_settings_are_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="max_cache_len is 0"):
        VAttnCache(llama.config, max_cache_len=0)
    with pytest.raises(ValueError, match="memory is 'much'"):
        VAttnCache(llama.config, memory="much")


def test_a_transformers_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import vattn.integrations.transformers as integration

    # By name: transformers may have put another module object in the place of the one above.
    monkeypatch.setattr("transformers.__version__", "5.8.1")
    with pytest.raises(ImportError, match=r"5\.8\.1, .* needs 5\.9 or later: pip install"):
        importlib.reload(integration)
