"""Models compiled over a VAttnCache: without graph breaks, in few graphs, with the same tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import assert_varied, filled, generate, left_padded, make_model, vattn_cache
from torch._dynamo.utils import counters
from transformers import CompileConfig

import vattn


@pytest.fixture
def dynamo(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """Counters of what was compiled, from nothing."""
    # A failure would be followed by thousands of lines.
    caplog.set_level(logging.CRITICAL, logger="torch.__trace")
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.fixture
def llama() -> Any:
    return make_model("llama", num_hidden_layers=2)


def early(model: Any, cache: Any, batch_size: int) -> Any:
    config = model.config
    cache.early_initialization(
        batch_size, config.num_key_value_heads, config.head_dim, model.dtype, model.device
    )
    return cache


# inductor is what users get; eager shows the same breaks in a tenth of the time.
@pytest.mark.parametrize(
    ("name", "n_layers", "backend"),
    [
        ("llama", 3, "eager"),
        ("gemma3", 4, "eager"),
        pytest.param("mistral-window", 1, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_forward_has_no_breaks(
    name: str, n_layers: int, backend: str, dynamo: Any
) -> None:
    model = make_model(name, num_hidden_layers=n_layers)
    inputs = left_padded(5, 37, 21)
    stock = generate(model, inputs, None)
    assert_varied(stock)
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    with early(model, vattn_cache(model), 3) as cache:
        ours = generate(model, inputs, cache)
        assert cache.get_seq_length() == 37 + 39
    assert ours.sequences.equal(stock.sequences)
    for mine, theirs in zip(ours.logits, stock.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)  # inductor sums otherwise
    assert not dynamo["graph_break"]
    assert dynamo["stats"]["unique_graphs"] <= 4, "prefill, decode, decode of any length"


def test_another_cache_needs_no_new_graphs(llama: Any, dynamo: Any) -> None:
    llama.forward = torch.compile(llama.forward, backend="eager", fullgraph=True)
    graphs = []
    for length in (9, 12, 14, 17):
        with early(llama, vattn_cache(llama), 1) as cache:
            generate(llama, left_padded(length), cache)
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[-2]


def test_a_backend_that_copies_its_inputs_is_refused(llama: Any, dynamo: Any) -> None:
    inputs = left_padded(9)
    with early(llama, vattn_cache(llama), 1) as cache:
        compiled = torch.compile(llama, backend="aot_eager")
        with pytest.raises(RuntimeError, match="compile with the backend 'inductor'"):
            filled(compiled, cache, inputs)


def test_errors_come_out_of_a_graph(llama: Any, dynamo: Any) -> None:
    compiled = torch.compile(llama, backend="eager")
    with early(llama, vattn_cache(llama, max_cache_len=12), 2) as cache:
        ids = left_padded(9, 5)["input_ids"]
        filled(compiled, cache, {"input_ids": ids})
        with pytest.raises(ValueError, match="would have 18 tokens, the cache takes 12"):
            filled(compiled, cache, {"input_ids": ids})
    with early(llama, vattn_cache(llama, memory=8 * 64 * 1024), 1) as cache:
        filled(compiled, cache, left_padded(60))
        with pytest.raises(vattn.OutOfPagesError, match="raise memory of VAttnCache"):
            filled(compiled, cache, left_padded(9))
        cache.kv_caches[0].check()


# bucket_len: what generate() compiles by itself.

EVERYWHERE = CompileConfig(fullgraph=True, backend="eager", mode=None)
EVERYWHERE._compile_all_devices = True  # by default on accelerators only


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window"])
def test_generate_compiles_buckets(name: str, dynamo: Any) -> None:
    model = make_model(name)
    inputs = left_padded(5, 37, 21)
    stock = generate(model, inputs, None)
    with vattn_cache(model, bucket_len=16) as cache:
        assert cache.is_compileable
        ours = generate(model, inputs, cache, compile_config=EVERYWHERE)
        assert cache.get_seq_length() == 37 + 39
        assert ours.sequences.equal(stock.sequences)
        assert not dynamo["graph_break"]
        # 37 to 76 tokens are buckets that end at 48, 64 and 80: one length, then any.
        assert 1 <= dynamo["stats"]["unique_graphs"] <= 3
        kept = cache.layers[0].keys
        assert kept is not None and kept.shape[2] == min(76, kept.shape[2])


def test_assisted_decoding_compiles_buckets_and_cuts_them(llama: Any, dynamo: Any) -> None:
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3]])}
    # Assisted decoding is compiled from transformers 5.24 on.
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 30, "eos_token_id": 96}
    stock = generate(llama, inputs, None, **options)
    with vattn_cache(llama, bucket_len=8) as cache:
        ours = generate(llama, inputs, cache, compile_config=EVERYWHERE, **options)
        assert cache.get_seq_length() == ours.sequences.shape[1] - 1
    assert ours.sequences.equal(stock.sequences)
    assert not dynamo["graph_break"]


@pytest.mark.slow
def test_inductor_compiles_buckets(dynamo: Any) -> None:
    llama = make_model("llama", num_hidden_layers=1)
    everywhere = CompileConfig(fullgraph=True, mode=None)
    everywhere._compile_all_devices = True
    inputs = left_padded(5, 37, 21)
    stock = generate(llama, inputs, None)
    with vattn_cache(llama, bucket_len=16) as cache:
        ours = generate(llama, inputs, cache, compile_config=everywhere)
    assert ours.sequences.equal(stock.sequences)
    assert dynamo["stats"]["unique_graphs"] <= 3
    assert not dynamo["graph_break"]


def test_buckets_do_all_that_rows_do_without_compiling(llama: Any) -> None:
    inputs = left_padded(5, 9)
    for options in (
        {},
        {"num_beams": 3, "max_new_tokens": 12},
        {"prefill_chunk_size": 4},
    ):
        stock = generate(llama, inputs, None, **options)
        with vattn_cache(llama, bucket_len=16) as cache:
            assert generate(llama, inputs, cache, **options).sequences.equal(stock.sequences)
            cache.reset()
            assert generate(llama, inputs, cache, **options).sequences.equal(stock.sequences)
    one = {"input_ids": torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3]])}
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12, "eos_token_id": 96}
    stock = generate(llama, one, None, **options)
    with vattn_cache(llama, bucket_len=4) as cache:
        assert generate(llama, one, cache, **options).sequences.equal(stock.sequences)


def test_what_was_in_a_page_before_is_never_seen(llama: Any) -> None:
    inputs = left_padded(5, 9)
    stock = generate(llama, inputs, None)
    with vattn_cache(llama, bucket_len=64, max_batch_size=3) as cache:
        poison = torch.full((3, 2, 64, 256), torch.nan)
        for layer in cache.layers:
            layer.update(poison, poison)
        cache.reset()
        assert generate(llama, inputs, cache).sequences.equal(stock.sequences)
        cache.reset()
        filled(llama, cache, inputs)
        cache.batch_repeat_interleave(1)
        cache.batch_select_indices(torch.tensor([0, 1, 1]))
        for layer in cache.layers:
            keys, values = cache._storages[0].windows[layer._index]
            assert keys.shape[0] == 3
            assert keys.isfinite().all() and values.isfinite().all()


def test_the_last_bucket_ends_with_the_cache(llama: Any) -> None:
    with vattn_cache(llama, bucket_len=16, max_cache_len=20) as cache:
        filled(llama, cache, left_padded(18))
        assert cache.get_mask_sizes(1, 0) == (20, 0)
        with pytest.raises(ValueError, match="would have 27 tokens, the cache takes 20"):
            filled(llama, cache, left_padded(9))


def test_keys_of_buckets_cannot_be_assigned(llama: Any) -> None:
    with vattn_cache(llama, bucket_len=16) as cache:
        filled(llama, cache, left_padded(9))
        layer = cache.layers[0]
        assert layer.keys.shape[2] == layer.values.shape[2] == 9
        with pytest.raises(NotImplementedError, match="bucket_len"):
            layer.keys = layer.keys
        with pytest.raises(NotImplementedError, match="bucket_len"):
            layer.values = layer.values
