"""Rows that have memory in common: what is written to one is not in another."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from families import assert_close, filled, given, left_padded, make_model, stock_cache, vattn_cache
from rows_in_common import aliased, contents, count_reorders, whole_bytes

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


def random_states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, rows, 2, tokens, 256, generator=generator)
    return k, v


def same_states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = random_states(1, tokens, seed)
    return k.repeat(rows, 1, 1, 1), v.repeat(rows, 1, 1, 1)


# Written to, one by one.


def rows_after_writes(model: Any, cache: Any, repeats: int) -> None:
    """Each row takes its own turn, again and again, as long as it takes to fill pages."""
    tails = torch.arange(2 * repeats)[:, None] % 7
    for turn in range(1, 5):
        with torch.no_grad():
            model((tails * turn + torch.arange(23)) % 97, **given(cache))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_repeated_rows_are_equal_until_each_is_written_to(name: str) -> None:
    model = make_model(name)
    prompts = left_padded(*LONG)
    with vattn_cache(model, memory="256MiB") as cache:
        filled(model, cache, prompts)
        before = contents(cache)
        cache.batch_repeat_interleave(4)
        for now, old in zip(contents(cache), before, strict=True):
            assert now.equal(old.repeat_interleave(4, dim=0))
        assert aliased(cache) == 2 * 3 * whole_bytes(cache)
        rows_after_writes(model, cache, 4)
        stock = filled(model, stock_cache(model), prompts)
        stock.batch_repeat_interleave(4)
        rows_after_writes(model, stock, 4)
        for now, old in zip(contents(cache), before, strict=True):
            assert now[:, :, : max(LONG)].equal(old.repeat_interleave(4, dim=0))
        for mine, theirs in zip(cache.layers, stock.layers, strict=True):
            assert_close(mine.keys, theirs.keys)
            assert_close(mine.values, theirs.values)


@pytest.mark.parametrize("copied_pages", [0, 3])
def test_rows_are_exchanged_repeated_and_dropped(
    llama: Any, copied_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_COPIED_PAGES", copied_pages)
    with vattn_cache(llama, max_batch_size=6) as cache:
        filled(llama, cache, left_padded(300, 290, 280, 270))
        expected = contents(cache)
        for select in ([1, 0, 3, 2], [3, 3, 0, 0], [0, 2, 1, 1, 3, 0], [5, 4, 1], [2, 1, 1, 0]):
            cache.batch_select_indices(torch.tensor(select))
            expected = [rows[select] for rows in expected]
            assert all(map(torch.equal, contents(cache), expected)), select
            more = random_states(len(select), 9, seed=len(select))
            for index, layer in enumerate(cache.layers):
                layer.update(*more)
                for i, new in enumerate(more):
                    at = 2 * index + i
                    expected[at] = torch.cat([expected[at], new], dim=2)
            assert all(map(torch.equal, contents(cache), expected)), select
            cache.kv_caches[0].check()


def grown(cache: Any, tokens: int, seed: int) -> list[torch.Tensor]:
    """Contents after each row got tokens of its own."""
    before = contents(cache)
    more = random_states(len(before[0]), tokens, seed)
    for layer in cache.layers:
        layer.update(*more)
    return [torch.cat([old, more[i % 2]], dim=2) for i, old in enumerate(before)]


def test_what_is_cropped_after_sharing_is_written_again_in_each_row(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        for layer in cache.layers:
            layer.update(*same_states(3, 300, seed=1))
        (kv_cache,) = cache.kv_caches
        assert aliased(cache) == 2 * whole_bytes(cache)
        cache.crop(-100)
        expected = grown(cache, 120, seed=2)
        assert all(map(torch.equal, contents(cache), expected))
        assert cache.kv_caches == (kv_cache,), "not moved"


def test_rows_of_a_family_copy_what_they_do_not_share(llama: Any, calls: Counter[str]) -> None:
    with vattn_cache(llama, max_batch_size=6) as cache:
        for layer in cache.layers:
            layer.update(*random_states(2, 300, seed=1))
        cache.batch_repeat_interleave(3)
        calls.clear()
        for seed, order in enumerate(([1, 0, 2, 3, 3, 4], [0, 0, 0, 5, 4, 3])):
            expected = [rows[order] for rows in grown(cache, 9, seed)]
            cache.reorder_cache(torch.tensor(order))
            assert all(map(torch.equal, contents(cache), expected))
        assert not calls
        expected = [rows[[3, 0, 1, 2, 4, 5]] for rows in contents(cache)]
        cache.reorder_cache(torch.tensor([3, 0, 1, 2, 4, 5]))
        assert all(map(torch.equal, contents(cache), expected))
        assert calls["reorder"] == 1, "rows 0 and 3 are of two families"


def test_what_is_left_of_shared_rows_is_not_written_over(llama: Any) -> None:
    with vattn_cache(llama, max_batch_size=4) as cache:
        for layer in cache.layers:
            layer.update(*random_states(2, 300, seed=1))
        cache.batch_repeat_interleave(2)
        cache.crop(-200)
        expected = [rows[[0, 2, 2, 3]] for rows in contents(cache)]
        cache.reorder_cache(torch.tensor([0, 2, 2, 3]))
        assert all(map(torch.equal, contents(cache), expected))


def test_a_layer_that_is_cropped_alone_is_written_in_each_row(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        for layer in cache.layers:
            layer.update(*same_states(3, 300, seed=1))
        expected = contents(cache)
        more = random_states(3, 30, seed=2)
        cache.layers[1].crop(-290)
        cache.layers[1].update(*more)
        for i, new in enumerate(more):
            expected[2 + i] = torch.cat([expected[2 + i][:, :, :10], new], dim=2)
        assert all(map(torch.equal, contents(cache), expected))


def test_assigned_keys_are_those_of_their_row(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        for layer in cache.layers:
            layer.update(*same_states(3, 300, seed=1))
        expected = contents(cache)
        k, v = random_states(3, 90, seed=2)
        cache.layers[1].keys = k
        cache.layers[1].values = v
        expected[2:4] = [k, v]
        assert all(map(torch.equal, contents(cache), expected))
        assert aliased(cache) == 0


# Rows that begin alike.


def test_equal_neighbours_share_from_the_first_token_on(llama: Any, calls: Counter[str]) -> None:
    with vattn_cache(llama) as cache:
        one, other = random_states(1, 300, seed=1), random_states(1, 300, seed=2)
        states = [torch.cat([a, a, b, a, b, b], dim=0) for a, b in zip(one, other, strict=True)]
        for layer in cache.layers:
            layer.update(*states)
        assert calls["reorder"] == 1
        assert aliased(cache) == 2 * whole_bytes(cache), "row 1 as row 0, and row 5 as row 4"
        for i, now in enumerate(contents(cache)):
            assert now.equal(states[i % 2])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_rows_that_differ_in_one_layer_share_nothing(llama: Any, at: int, which: int) -> None:
    with vattn_cache(llama) as cache:
        expected = []
        for index, layer in enumerate(cache.layers):
            states = same_states(3, 300, seed=index)
            if index == at:
                states[which][1, 0, 77, 5] += 1e-3
            layer.update(*states)
            expected += states
        assert all(map(torch.equal, contents(cache), expected))
        assert aliased(cache) == 0


def test_zeros_of_different_sign_are_not_equal(llama: Any) -> None:
    with vattn_cache(llama) as cache:
        k, v = same_states(2, 300, seed=1)
        k[:, 0, 0, 0] = torch.tensor([0.0, -0.0])
        for layer in cache.layers:
            layer.update(k, v)
        assert layer.keys.signbit().equal(k.signbit())
        assert aliased(cache) == 0


def test_rows_of_less_than_a_page_are_copied(llama: Any, calls: Counter[str]) -> None:
    with vattn_cache(llama) as cache:
        filled(llama, cache, left_padded(40))
        cache.batch_repeat_interleave(3)
        assert cache.kv_caches[0].stats().aliased_bytes == calls["reorder"] == 0


def test_rows_of_a_copy_have_their_own_memory(llama: Any, calls: Counter[str]) -> None:
    with vattn_cache(llama) as cache:
        for layer in cache.layers:
            layer.update(*same_states(3, 100, seed=1))
        with copy.deepcopy(cache) as twin:
            assert aliased(cache) > aliased(twin) == 0
            calls.clear()
            twin.reorder_cache(torch.tensor([0, 0, 1]))
            assert not calls, "less than three pages are copied"
            assert all(map(torch.equal, contents(twin), contents(cache)))


def test_rows_of_buckets_are_copied(calls: Counter[str]) -> None:
    model = make_model("llama")
    with vattn_cache(model, bucket_len=64) as cache:
        filled(model, cache, {key: rows.repeat(2, 1) for key, rows in left_padded(300).items()})
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0, 3, 3]))
        assert cache.kv_caches[0].stats().aliased_bytes == calls["reorder"] == 0


def test_first_tokens_without_memory_leave_the_cache_empty(llama: Any) -> None:
    states = same_states(3, 300, seed=1)
    # All pages of one row, and some for the others' last ones.
    with vattn_cache(llama, memory=(5 + 1) * 12 * 64 * 1024) as cache:
        with pytest.raises(vattn.OutOfPagesError, match="3 rows of 300 tokens"):
            cache.layers[0].update(*states)
        assert cache.kv_caches[0].seq_lens == [0, 0, 0]
        cache.layers[0].update(*(tensor[:, :, :60] for tensor in states))
        cache.kv_caches[0].check()
