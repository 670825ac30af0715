"""Options, sizes and what is said about bad ones."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

import vattn
from vattn.units import parse_bytes

GOOD = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "head_dim": 64,
    "max_batch_size": 2,
    "max_seq_len": 1024,
    "device": "cpu",
    "memory": "8MiB",
}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60GiB", 60 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("2mib", 2**21),
        ("7", 7),
        (9, 9),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


BY_GROUPS = {
    "num_kv_heads": None,
    "head_dim": None,
    "layer_groups": [vattn.LayerGroup(layers=[0, 1], num_kv_heads=1, head_dim=8)],
}

BAD_OPTIONS = [
    ({"num_layers": 0}, ValueError, "num_layers is 0, expected at least 1"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0, expected at least 1"),
    ({"head_dim": -1}, ValueError, "head_dim is -1, expected at least 1"),
    ({"v_head_dim": -1}, ValueError, "v_head_dim is -1, expected at least 0"),
    ({"max_batch_size": 0}, ValueError, "max_batch_size is 0, expected at least 1"),
    ({"max_seq_len": 0}, ValueError, "max_seq_len is 0, expected at least 1"),
    ({"max_seq_len": 1.5}, TypeError, "max_seq_len is 1.5, expected an int"),
    ({"num_layers": True}, TypeError, "num_layers is True, expected an int"),
    ({"lookahead": -1}, ValueError, "lookahead is -1, expected at least 0"),
    ({"dtype": "float64"}, ValueError, "dtype is 'float64', expected one of float32"),
    ({"dtype": torch.complex64}, ValueError, "expected one of float32"),
    ({"layout": "paged"}, ValueError, "layout is 'paged', expected one of interleaved, per_layer"),
    ({"scrub": "always"}, ValueError, "scrub is 'always', expected one of never, on_reuse"),
    ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ({"window": 1.5}, TypeError, "window is 1.5, expected an int"),
    ({"window": 8, "sink": -1}, ValueError, "sink is -1, expected at least 0"),
    ({"window": 8, "sink": True}, TypeError, "sink is True, expected an int"),
    ({"sink": 4}, ValueError, "sink is 4, but there is no window .* set window"),
    ({"order": "DHN"}, ValueError, "order is 'DHN', expected one of NHD, HND"),
    ({"device": "tpu"}, ValueError, "device is 'tpu', expected 'cpu', 'cuda' or 'cuda:N'"),
    ({"memory": "lots"}, ValueError, "memory is 'lots', expected a number and one of"),
    ({"memory": 0}, ValueError, "memory is 0, expected at least one byte"),
    ({"memory": 1.5}, TypeError, "memory is 1.5, expected bytes as an int or a string"),
    ({"page_bytes": "x"}, ValueError, "page_bytes is 'x'"),
    ({"num_kv_heads": None}, ValueError, "num_kv_heads is missing; pass it, or layer_groups"),
    ({"max_batchsize": 4}, TypeError, "no option 'max_batchsize'; did you mean 'max_batch_size'"),
    (
        {"layer_groups": [vattn.LayerGroup(layers=[0, 1], num_kv_heads=1, head_dim=8)]},
        ValueError,
        "num_kv_heads and layer_groups are both given",
    ),
    (
        BY_GROUPS | {"window": 8},
        ValueError,
        "window and layer_groups are both given; leave window out",
    ),
    (
        BY_GROUPS | {"sink": 4},
        ValueError,
        "sink and layer_groups are both given; leave sink out",
    ),
    (
        {
            "num_kv_heads": None,
            "head_dim": None,
            "layer_groups": [vattn.LayerGroup(layers=[0, 0], num_kv_heads=1, head_dim=8)],
        },
        ValueError,
        r"layer_groups name the layers \[0, 0\], expected each of 0 to 1 exactly once",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_a_bad_option_is_named_with_its_limit(options, error, message):
    with pytest.raises(error, match=message):
        vattn.CacheConfig(**(GOOD | options))


BAD_INITS = [
    ({"memory": None}, ValueError, "memory is missing; say how much physical memory"),
    (
        {"memory": "900TiB"},
        ValueError,
        "memory is 900 TiB, .* only .* GiB in all",
    ),
    (
        {"memory": "128KiB"},
        ValueError,
        "memory is 128 KiB, but one row needs at least one page of 64 KiB in each of 4 regions",
    ),
    ({"page_bytes": 5000}, ValueError, "page_bytes is 5000, expected a power of two"),
    ({"page_bytes": 1024}, ValueError, "page_bytes is 1024, expected a power of two of at least"),
    ({"max_extent_bytes": 5000}, ValueError, "max_extent_bytes is 5000, expected a power of two"),
    ({"max_seq_len": 2**60}, ValueError, "lower max_batch_size or max_seq_len"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_INITS)
def test_what_this_machine_cannot_give_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        vattn.init(vattn.CacheConfig(**(GOOD | options)))


def test_windows_are_those_of_the_groups_or_of_all_layers():
    all_layers = vattn.CacheConfig(**(GOOD | {"window": 8, "sink": 2}))
    assert [(g.window, g.sink) for g in all_layers.groups] == [(8, 2)]
    shape = {"num_kv_heads": 1, "head_dim": 8}
    some = [vattn.LayerGroup(layers=[0], **shape), vattn.LayerGroup(layers=[1], window=8, **shape)]
    assert vattn.CacheConfig(**(GOOD | BY_GROUPS | {"layer_groups": some})).has_window
    assert all_layers.has_window
    assert not vattn.CacheConfig(**(GOOD | BY_GROUPS)).has_window
    assert some[1].shape() == ([1], 1, 8, 8, 8, 0)
    assert some[0].shape() == ([0], 1, 8, 8, 0, 0)


def test_a_device_that_is_not_there_is_refused(libcuda_double):
    with pytest.raises(ValueError, match="7"):
        vattn.init(vattn.CacheConfig(**(GOOD | {"device": "cuda:7", "memory": "64MiB"})))


def test_a_budget_larger_than_the_device_is_refused(libcuda_double):
    libcuda_double.vattn_double_set_total_memory(2**30)
    with pytest.raises(ValueError, match="memory is 2 GiB, but there are only 1 GiB"):
        vattn.init(vattn.CacheConfig(**(GOOD | {"device": "cuda", "memory": "2GiB"})))


def test_configurations_can_be_copied_compared_and_sent():
    config = vattn.CacheConfig(**GOOD)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
    assert dataclasses.replace(config, max_seq_len=2048).max_seq_len == 2048
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3


@pytest.mark.parametrize(
    ("options", "page_bytes"),
    [
        ({}, 64 * 1024),
        ({"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "layout": "interleaved"}, 2**21),
        ({"num_kv_heads": 8, "head_dim": 128}, 2**17),
        ({"num_kv_heads": 8, "head_dim": 128, "order": "HND"}, 2**16),
        ({"num_kv_heads": 16, "head_dim": 128, "window": 1024}, 2**18),
        ({"num_kv_heads": 16, "head_dim": 128, "window": 10}, 2**16),
    ],
)
def test_the_default_page_on_the_host_follows_the_token_size(options, page_bytes):
    config = vattn.CacheConfig(**(GOOD | {"memory": "64MiB"} | options))
    with vattn.init(config) as cache:
        assert cache.page_bytes == page_bytes


def test_errors_can_be_sent_between_processes():
    for error in (vattn.OutOfPagesError("m", 4, 2), vattn.DriverError("m", "cuMemMap", 2)):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), "m", vars(error))
