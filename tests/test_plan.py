"""What `vattn plan` says is what the library does, on the CPU and in numbers."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

import vattn
from vattn.config import LayerGroup
from vattn.models import MODELS, ModelShape
from vattn.plan import report
from vattn.plan.estimate import (
    MAX_RESERVED_BYTES,
    PATCHED_ONLY,
    Fit,
    Question,
    cache_config,
    compare,
    fit,
    full_reservation,
    paged_blocks,
    recommend,
    vattn_policy,
)
from vattn.plan.lengths import (
    Lengths,
    MeanOnly,
    Run,
    fixed,
    lengths_of_requests,
    parse_lengths,
)

KIB, MIB, GIB = 2**10, 2**20, 2**30
LLAMA = MODELS["llama-3-8b"]


def shape_of(*groups: LayerGroup, max_seq_len: int = 3000) -> ModelShape:
    return ModelShape(
        name="tiny",
        num_layers=sum(len(group.layers) for group in groups),
        num_query_heads=6,
        layer_groups=groups,
        max_seq_len=max_seq_len,
    )


TINY = {
    "GQA": shape_of(LayerGroup(layers=range(4), num_kv_heads=3, head_dim=40)),
    "MLA": shape_of(LayerGroup(layers=range(3), num_kv_heads=1, head_dim=576, v_head_dim=0)),
    "groups": shape_of(
        LayerGroup(layers=(0, 2), num_kv_heads=2, head_dim=64, v_head_dim=32),
        LayerGroup(layers=(1, 3, 4), num_kv_heads=1, head_dim=96),
    ),
}


def question(**more: Any) -> Question:
    known: dict[str, Any] = {
        "shape": LLAMA,
        "dtype": "bfloat16",
        "item_bytes": 2,
        "memory_bytes": 8 * GIB,
        "max_seq_len": 8192,
    }
    return Question(**(known | more))


# Against the library itself.


@pytest.mark.parametrize("page_bytes", [4 * KIB, 64 * KIB])
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("layout", ["interleaved", "per_layer"])
@pytest.mark.parametrize("shape", TINY.values(), ids=TINY.keys())
def test_a_policy_is_what_the_cache_does(
    shape: ModelShape, layout: str, order: str, page_bytes: int
) -> None:
    policy = vattn_policy(shape, item_bytes=2, layout=layout, page_bytes=page_bytes, order=order)
    config = vattn.CacheConfig(
        num_layers=shape.num_layers,
        layer_groups=shape.layer_groups,
        dtype="bfloat16",
        max_batch_size=2,
        max_seq_len=shape.max_seq_len,
        device="cpu",
        memory="64MiB",
        layout=layout,
        order=order,
        page_bytes=page_bytes,
        lookahead=0,
    )
    with vattn.init(config) as cache:
        assert cache.token_bytes == policy.token_bytes == shape.token_bytes(item_bytes=2)
        assert cache.regions_per_row == policy.n_regions
        assert cache.stats().reserved_bytes == 2 * policy.row_stride_bytes(shape.max_seq_len)
        row = cache.alloc()
        for tokens in (1, 2, 7, 100, 101, 1023, 1024, 3000):
            cache.step({row: tokens})
            assert cache.stats().mapped_bytes == policy.mapped_bytes(tokens), tokens


def test_the_longest_row_is_the_longest_that_the_cache_takes() -> None:
    shape = TINY["GQA"]
    policy = vattn_policy(shape, item_bytes=2, layout="per_layer", page_bytes=4 * KIB)
    pages = 100
    longest = policy.longest(pages)
    assert policy.pages(longest) <= pages < policy.pages(longest + 1)
    config = vattn.CacheConfig(
        num_layers=4, num_kv_heads=3, head_dim=40, max_batch_size=1, max_seq_len=3000,
        device="cpu", memory=pages * 4 * KIB, layout="per_layer", page_bytes=4 * KIB, lookahead=0,
    )  # fmt: skip
    with vattn.init(config) as cache:
        row = cache.alloc()
        with pytest.raises(vattn.OutOfPagesError):
            cache.step({row: longest + 1})
        cache.step({row: longest})


def test_the_limit_of_addresses_is_that_of_the_library() -> None:
    """The core says "64 TiB" itself; a plan that fits must not be refused."""
    shape = TINY["GQA"]
    policy = vattn_policy(shape, item_bytes=2, layout="interleaved", page_bytes=4 * KIB)
    most = MAX_RESERVED_BYTES // policy.row_stride_bytes(2**30)
    options: dict[str, Any] = {
        "num_layers": 4, "num_kv_heads": 3, "head_dim": 40, "max_seq_len": 2**30,
        "device": "cpu", "memory": "1MiB", "layout": "interleaved", "page_bytes": 4 * KIB,
    }  # fmt: skip
    with pytest.raises(ValueError, match="64 TiB"):
        vattn.init(vattn.CacheConfig(max_batch_size=most + 1, **options))
    over = question(shape=shape, max_seq_len=2**30, max_batch_size=most + 1, memory_bytes=MIB)
    assert any("64 TiB" in obstacle for obstacle in fit(policy, over).obstacles)
    under = question(shape=shape, max_seq_len=2**30, max_batch_size=most, memory_bytes=MIB)
    assert not any("64 TiB" in obstacle for obstacle in fit(policy, under).obstacles)


# Arithmetic.


def test_llama_on_two_layouts() -> None:
    interleaved = vattn_policy(LLAMA, item_bytes=2, layout="interleaved", page_bytes=2 * MIB)
    per_layer = vattn_policy(LLAMA, item_bytes=2, layout="per_layer", page_bytes=2 * MIB)
    assert interleaved.regions == ((128 * KIB, 1),)
    assert per_layer.regions == ((2 * KIB, 64),)
    assert (interleaved.growth_bytes, per_layer.growth_bytes) == (2 * MIB, 128 * MIB)
    assert interleaved.mapped_bytes(17) == 4 * MIB
    assert paged_blocks(128 * KIB).mapped_bytes(17) == 4 * MIB
    assert full_reservation(128 * KIB, 8192).mapped_bytes(17) == GIB


def test_the_mean_over_runs_is_that_over_every_length() -> None:
    rng = random.Random(4)
    for _ in range(200):
        first, token, unit = rng.randint(1, 50), rng.randint(1, 40), rng.randint(1, 64)
        last, limit = first + rng.randint(0, 60), rng.randint(1, 120)
        lengths = Lengths(name="", runs=(Run(first, last, 0.3), Run(5, 5, 2.0)))
        every = [(n, 0.3) for n in range(first, last + 1)] + [(5, 2.0)]
        weight = sum(w for _, w in every)
        pages = sum(w * math.ceil(n * token / unit) for n, w in every) / weight
        seen = sum(w * min(n, limit) for n, w in every) / weight
        assert lengths.mean_units(token, unit) == pytest.approx(pages)
        assert lengths.mean_at_most(limit) == pytest.approx(seen)


def test_requests_count_once_for_every_token_they_generate() -> None:
    requests = [(10, 3), (100, 1), (7, 0), (95, 10), (10, 1)]
    lengths = lengths_of_requests("five", requests, max_seq_len=101)
    held = [11, 12, 13, 101, 11]
    assert lengths.mean_tokens == pytest.approx(sum(held) / 5)
    assert lengths.mean_units(1, 10) == pytest.approx((2 + 2 + 2 + 11 + 2) / 5)
    assert lengths.left_out == "1 of 5 requests are beyond max_seq_len = 101: left out"
    with pytest.raises(ValueError, match="no request that generates and fits"):
        lengths_of_requests("one", [(7, 0)], max_seq_len=100)


def test_distributions_have_the_mean_they_are_asked_for() -> None:
    assert parse_lengths("fixed:300", 1000).mean_tokens == 300
    assert parse_lengths("uniform:100:300", 1000).mean_tokens == 200
    lognormal = parse_lengths("lognormal:300:0.5", 100_000)
    assert lognormal.mean_tokens == pytest.approx(300, rel=1e-3)
    assert not lognormal.left_out
    cut = parse_lengths("uniform:101:300", 200)
    assert cut.mean_tokens == 150.5
    assert cut.left_out.startswith("50.00%")
    assert "%" in parse_lengths("lognormal:300:1", 500).left_out


@pytest.mark.parametrize(
    "text",
    ["fixed", "fixed:0", "fixed:1.5", "uniform:5", "uniform:9:5", "lognormal:5:x", "zipf:1",
     "fixed:inf", "lognormal:nan:1"],
)  # fmt: skip
def test_a_bad_distribution_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"length distribution is '{text}', expected fixed:N"):
        parse_lengths(text, 1000)


def test_a_distribution_beyond_the_longest_request_is_refused() -> None:
    with pytest.raises(ValueError, match="all lengths of fixed:2000 are beyond max_seq_len = 1000"):
        parse_lengths("fixed:2000", 1000)


def test_where_only_the_mean_is_known_half_a_page_is_lost_in_every_region() -> None:
    mean = MeanOnly(name="", mean_tokens=1000, max_seq_len=8192)
    one = fit(
        vattn_policy(LLAMA, item_bytes=2, layout="per_layer", page_bytes=2 * MIB),
        question(lengths=mean),
    )
    assert one.mean_waste_bytes == 64 * MIB
    whole = vattn_policy(LLAMA, item_bytes=2, layout="interleaved", page_bytes=64 * KIB)
    assert fit(whole, question(lengths=mean)).mean_waste_bytes == 0
    assert fit(whole, question()).mean_waste_bytes == 0
    full = fit(full_reservation(128 * KIB, 8192), question(lengths=mean))
    assert full.mean_mapped_bytes == GIB


def test_what_fits_is_the_budget_over_the_pages_of_a_request() -> None:
    policy = vattn_policy(LLAMA, item_bytes=2, layout="per_layer", page_bytes=2 * MIB)
    one = fit(policy, question(lengths=fixed(1025)))
    assert one.rows_at_longest == 8
    assert one.mean_mapped_bytes == 256 * MIB
    assert one.mean_waste_bytes == 256 * MIB - 1025 * 128 * KIB
    assert one.concurrency == 32
    assert one.max_batch_size == 40
    assert one.longest_row == 65_536


def by(fits: list[Fit], layout: str, page_bytes: int) -> Fit:
    return next(f for f in fits if f.policy.layout == layout and f.policy.page_bytes == page_bytes)


def test_small_pages_need_a_patched_driver_on_cuda_only() -> None:
    cuda = compare(question(lengths=fixed(1000)))
    assert PATCHED_ONLY in by(cuda, "interleaved", 64 * KIB).obstacles
    assert not by(cuda, "interleaved", 2 * MIB).obstacles
    chosen = recommend(cuda, "cuda")
    assert chosen is by(cuda, "interleaved", 2 * MIB)
    cpu = compare(question(lengths=fixed(1000), device="cpu", max_map_count=10**9))
    assert not any(f.obstacles for f in cpu)


def test_too_many_mappings_are_an_obstacle_on_the_host() -> None:
    fits = compare(question(lengths=fixed(1000), device="cpu", max_map_count=65_530))
    assert "mappings" in by(fits, "per_layer", 64 * KIB).obstacles[0]
    assert not by(fits, "per_layer", 2 * MIB).obstacles


def test_large_pages_win_where_they_cost_nothing() -> None:
    fits = compare(question(lengths=fixed(8192), device="cpu", max_map_count=10**9))
    chosen = recommend(fits, "cpu")
    assert chosen is by(fits, "per_layer", 2 * MIB)
    assert recommend(fits, "cuda") is by(fits, "interleaved", 2 * MIB)


def test_nothing_is_recommended_where_nothing_fits() -> None:
    fits = compare(question(memory_bytes=MIB))
    assert recommend(fits, "cuda") is None


# Several devices.


def test_heads_are_divided_or_copied() -> None:
    assert LLAMA.split(4).layer_groups[0].num_kv_heads == 2
    assert LLAMA.split(4).num_query_heads == 8
    assert LLAMA.split(32).layer_groups[0].num_kv_heads == 1
    assert LLAMA.split(1) == LLAMA
    latent = TINY["MLA"].split(2)
    assert latent.layer_groups == TINY["MLA"].layer_groups
    with pytest.raises(ValueError, match="32 query heads, which 3 devices"):
        LLAMA.split(3)
    with pytest.raises(ValueError, match="3 KV heads cannot be divided over 2 devices"):
        TINY["GQA"].split(2)


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY.keys())
def test_the_snippet_is_the_configuration(shape: ModelShape) -> None:
    asked = question(shape=shape, memory_bytes=64 * MIB, max_seq_len=3000, device="cpu")
    chosen = recommend(compare(asked), "cpu")
    assert chosen is not None
    config = cache_config(chosen, asked)
    again = eval(report.snippet(config), {"vattn": vattn})
    assert [g.shape() for g in again.groups] == [g.shape() for g in config.groups]
    for name in ("max_batch_size", "max_seq_len", "memory_bytes", "layout", "order", "dtype"):
        assert getattr(again, name) == getattr(config, name)
    with vattn.init(again):
        pass
