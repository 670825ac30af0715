"""kv_connector_extra_config: what is accepted, what is refused, and what an engine is called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vattn.integrations.vllm.settings import (
    NAME,
    Settings,
    active_settings,
    engine_name,
    start_id,
)

KIB, MIB = 2**10, 2**20


def _config(
    extra: dict[str, Any] | None, engine_id: str = "0123456789ab-cd", instance_id: str = "1"
) -> Any:
    transfer = None
    if extra is not None:
        transfer = SimpleNamespace(
            kv_connector="VattnConnector", kv_connector_extra_config=extra, engine_id=engine_id
        )
    return SimpleNamespace(kv_transfer_config=transfer, instance_id=instance_id)


def test_everything_has_a_default() -> None:
    settings = Settings.parse({})
    assert (settings.mode, settings.budget_bytes, settings.floor_bytes) == ("elastic", None, 0)
    assert settings.idle_seconds == 10.0


def test_sizes_may_have_units() -> None:
    settings = Settings.parse({"budget": "8MiB", "floor": 65536})
    assert (settings.budget_bytes, settings.floor_bytes) == (8 * MIB, 64 * KIB)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"bugdet": 1}, "'bugdet'.*did you mean 'budget'"),
        ({"mode": "paged"}, "mode is 'paged', expected one of elastic, contiguous"),
        ({"budget": "8 apples"}, "budget is '8 apples'"),
        ({"budget": "1MiB", "floor": "2MiB"}, "floor is 2MiB, more than budget = 1MiB"),
        ({"idle_seconds": -1}, "idle_seconds is -1"),
        ({"idle_seconds": "soon"}, "idle_seconds is 'soon'"),
        ({"idle_seconds": True}, "idle_seconds is True"),
        ({"idle_seconds": float("nan")}, "idle_seconds is nan"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": "x" * 41}, "at most 40"),
        ({"name": 123}, "name is 123, expected text"),
        ({"page_bytes": 0}, "page_bytes is 0"),
    ],
)
def test_what_cannot_be_is_named(extra: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Settings.parse(extra)


@pytest.mark.parametrize(
    ("device", "block_bytes", "page_bytes"),
    [
        ("cuda", 64 * KIB, 2 * MIB),
        ("cpu", 16 * KIB, 64 * KIB),
        ("cpu", 100 * KIB, 128 * KIB),
        ("cpu", 128 * KIB, 128 * KIB),
        ("cpu", 9 * MIB, 2 * MIB),
    ],
)
def test_a_page_is_about_a_block(device: str, block_bytes: int, page_bytes: int) -> None:
    assert Settings().page_bytes_for(device, block_bytes) == page_bytes
    assert Settings(page_bytes="4MiB").page_bytes_for(device, block_bytes) == 4 * MIB


def test_only_an_engine_that_names_the_connector_uses_it() -> None:
    assert active_settings(None) is None
    assert active_settings(_config(None)) is None
    other = _config({})
    other.kv_transfer_config.kv_connector = "NixlConnector"
    assert active_settings(other) is None
    assert active_settings(_config({"mode": "contiguous"})) == Settings(mode="contiguous")


def test_the_name_is_the_users_or_made_from_the_engine_id() -> None:
    assert engine_name(_config({}), Settings()) == "vllm-0123456789ab-cd"
    assert engine_name(_config({}), Settings(name="chat")) == "chat"


@pytest.mark.parametrize(
    "ids",
    [
        ["production-a", "production-b"],
        ["production-" + "x" * 40 + end for end in "ab"],
        ["0b1d7a3c-6f0e-4e55-9d1c-3a1f9f1e2d00", "0b1d7a3c-6f0e-4e55-9d1c-3a1f9f1e2d01"],
        ["chat/a", "chat/b", "chat a", "chät", ""],
    ],
)
def test_engines_whose_ids_are_alike_have_different_names(ids: list[str]) -> None:
    names = {engine_name(_config({}, engine_id=id_), Settings()) for id_ in ids}
    assert len(names) == len(ids)
    assert all(NAME.fullmatch(name) for name in names), names


def test_engines_of_a_data_parallel_group_have_names_of_their_own() -> None:
    of_rank = _config({}, engine_id="0123456789ab-cd_dp3")
    assert engine_name(of_rank, Settings(name="chat")) == "chat-dp3"
    assert engine_name(of_rank, Settings()) == "vllm-0123456789ab-cd-dp3"
    # The front end has the id without a rank, and says which one it means.
    assert engine_name(_config({}), Settings(name="chat"), rank=3) == "chat-dp3"


@pytest.mark.parametrize("engine_id", ["a", "a_dp1", "x" * 36, "0b1d7a3c-6f0e-4e55-9d1c-3a1f9f1e2"])
def test_the_front_end_gives_an_engine_the_name_that_it_gives_itself(engine_id: str) -> None:
    of_rank = _config({}, engine_id=f"{engine_id}_dp3")
    front_end = _config({}, engine_id=engine_id)
    assert engine_name(front_end, Settings(), rank=3) == engine_name(of_rank, Settings())


def test_a_start_of_an_engine_is_told_from_all_others() -> None:
    starts = [
        _config({}),
        _config({}, instance_id="2"),  # restarted, with an engine id that the user has set
        _config({}, engine_id="0123456789ab-cd_dp0"),
        _config({}, engine_id="0123456789ab-cd_dp1"),  # of the same configuration
    ]
    assert len({start_id(config) for config in starts}) == len(starts)
    assert start_id(_config({})) == start_id(starts[0])
