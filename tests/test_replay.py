"""The replay's scheduler, policies and figures against cases that were worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, Backend

from vattn import CacheConfig, KVCache, LayerGroup, OutOfPagesError
from vattn.bench.common import NothingMeasured
from vattn.pool import open_pool
from vattn.replay import command
from vattn.replay.engine import Engine, Replay
from vattn.replay.outcome import Outcome, summarise
from vattn.replay.policies import (
    IntArray,
    LengthPolicy,
    VattnPolicy,
    full_reservation,
    paged_blocks,
    per_layer_pages,
    region_bytes,
)
from vattn.replay.trace import Trace, make_trace

MIB = 2**20


def bytes_are_tokens(
    budget: int, rows: int = 2, kind: type[LengthPolicy] = LengthPolicy
) -> LengthPolicy:
    """Grant one byte per token: the budget is in tokens."""
    return kind(
        "tokens",
        n_rows=rows,
        token_bytes=1,
        budget_bytes=budget,
        growth_bytes=1,
        formula=lambda lengths: lengths,
    )


def run(trace: Trace, policy: LengthPolicy, *, ahead: bool = False, rows: int = 2) -> Outcome:
    """Replay with iterations of 1 s and 10 prompt tokens per second."""
    engine = Engine(
        max_batch_size=rows,
        max_seq_len=1000,
        decode_s=1,
        prefill_tokens_per_s=10,
        admit_ahead=ahead,
    )
    return Replay(trace, policy, engine, lambda _: None).run()


def columns(outcome: Outcome, *names: str) -> list[list[float]]:
    return [outcome.column(name).tolist() for name in names]


# The scheduler.


def test_who_waits_starts_as_soon_as_a_row_is_free() -> None:
    trace = make_trace("t", "", [10, 20, 10], [2, 1, 1])
    outcome = run(trace, bytes_are_tokens(100))
    assert columns(outcome, "start_s", "duration_s") == [[0, 4], [4, 2]]
    assert columns(outcome, "running", "waiting") == [[2, 2], [1, 0]]
    assert columns(outcome, "used_bytes", "prefill_tokens") == [[30, 21], [30, 10]]
    assert outcome.queueing_s.tolist() == [0, 0, 4]
    assert (outcome.completed, outcome.refused, outcome.preemptions) == (3, 0, 0)


def test_admitted_ahead_a_request_starts_one_iteration_later() -> None:
    trace = make_trace("t", "", [10, 20, 10], [2, 1, 1])
    outcome = run(trace, bytes_are_tokens(100), ahead=True)
    # The first two start at once, as nothing runs; the third gets its row while the first decodes.
    assert columns(outcome, "start_s", "duration_s") == [[0, 4, 5], [4, 1, 2]]
    assert columns(outcome, "running", "waiting") == [[2, 1, 1], [1, 0, 0]]
    assert outcome.queueing_s.tolist() == [0, 0, 5]


def test_nobody_overtakes_who_has_waited_longest() -> None:
    trace = make_trace("t", "", [6, 6, 1], [3, 1, 1])
    outcome = run(trace, bytes_are_tokens(10, rows=3), rows=3)
    # The third would fit beside the first, but comes after the second.
    assert columns(outcome, "running", "used_bytes") == [[1, 1, 1, 2], [6, 7, 8, 7]]


def test_a_prompt_is_admitted_only_with_headroom() -> None:
    trace = make_trace("t", "", [5, 5], [1, 1])
    assert columns(run(trace, bytes_are_tokens(10)), "running") == [[1, 1]]
    assert columns(run(trace, bytes_are_tokens(11)), "running") == [[2]]


@pytest.mark.parametrize("ahead", [False, True])
def test_memory_promised_to_one_is_not_promised_to_the_next(ahead: bool) -> None:
    trace = make_trace("t", "", [1, 4, 4], [3, 1, 1], [0, 0.5, 0.5])
    outcome = run(trace, bytes_are_tokens(9, rows=3), ahead=ahead, rows=3)
    assert outcome.preemptions == 0
    assert max(outcome.column("running")) == 2


def test_memory_promised_to_who_has_not_started_is_not_promised_again() -> None:
    # The second has its row when the first ends; the third arrives before the second starts.
    trace = make_trace("t", "", [1, 6, 6], [2, 1, 1], [0, 0.5, 1.5])
    outcome = run(trace, bytes_are_tokens(10, rows=3), ahead=True, rows=3)
    assert columns(outcome, "running", "waiting") == [[1, 1, 1, 1], [0, 0, 1, 0]]
    assert outcome.preemptions == 0


def test_the_youngest_is_preempted_and_computed_again() -> None:
    trace = make_trace("t", "", [6, 4], [5, 5])
    outcome = run(trace, bytes_are_tokens(13))
    # At 8 + 6 tokens the second loses the 5 it had, and starts with a prompt of 6 when there is
    # room for it again: 3 of its 5 tokens are still to come.
    assert columns(outcome, "used_bytes") == [[10, 12, 8, 9, 10, 6, 7, 8]]
    assert columns(outcome, "prefill_tokens") == [[10, 0, 0, 0, 0, 6, 0, 0]]
    assert outcome.column("start_s")[-1] + 1 == pytest.approx(9.6)
    assert (outcome.preemptions, outcome.recomputed_tokens, outcome.completed) == (1, 5, 2)
    assert outcome.queueing_s.tolist() == [0, 0], "the wait is for the first start"


def test_the_preempted_comes_before_who_arrived_later() -> None:
    trace = make_trace("t", "", [5, 5, 2], [5, 5, 1], [0, 0, 2.5])
    outcome = run(trace, bytes_are_tokens(13))
    assert outcome.preemptions == 1
    # The third arrives before the preemption, fits after it, and yet starts with the second.
    assert columns(outcome, "running")[0][:6] == [2, 2, 1, 1, 1, 2]


def test_time_without_requests_is_skipped() -> None:
    outcome = run(make_trace("t", "", [10, 10], [1, 1], [0, 100]), bytes_are_tokens(50))
    assert columns(outcome, "start_s", "duration_s") == [[0, 100], [2, 2]]


def test_a_request_that_generates_nothing_is_one_iteration() -> None:
    outcome = run(make_trace("t", "", [10], [0]), bytes_are_tokens(10))
    assert columns(outcome, "used_bytes") == [[10]]


def test_what_would_not_fit_alone_is_refused() -> None:
    # 8 + 4 - 1 = 11 tokens at most: the last one is never written.
    trace = make_trace("t", "", [8, 8, 990], [4, 5, 20])
    outcome = run(trace, bytes_are_tokens(11))
    assert (outcome.completed, outcome.refused) == (1, 2)
    assert outcome.column("used_bytes").max() == 11
    nobody = run(trace, bytes_are_tokens(5))
    assert (nobody.completed, nobody.refused) == (0, 3)
    assert summarise(nobody) is None


class Refusing(LengthPolicy):
    def grow(self, lengths: IntArray) -> None:
        raise OutOfPagesError("none", 1, 0)


class Idle(LengthPolicy):
    def grow(self, lengths: IntArray) -> None:
        pass


class Forgetful(LengthPolicy):
    def grow(self, lengths: IntArray) -> None:
        super().grow(lengths)
        self._used -= 1


def test_a_policy_that_refuses_who_is_alone_is_an_error() -> None:
    with pytest.raises(OutOfPagesError):
        run(make_trace("t", "", [5, 5], [2, 2]), bytes_are_tokens(100, kind=Refusing))


@pytest.mark.parametrize(("kind", "known"), [(Idle, 0), (Forgetful, 4)])
def test_a_policy_that_does_not_do_it_is_not_measured(kind: type[LengthPolicy], known: int) -> None:
    message = rf"tokens at 0\.000 s: 5 bytes of tokens, of which it knows {known}"
    with pytest.raises(NothingMeasured, match=message):
        run(make_trace("t", "", [5], [2]), bytes_are_tokens(100, kind=kind))


# The policies.


def config(**options: Any) -> CacheConfig:
    """Two layers of 8 heads x 128: 8 KiB per token, 2 KiB in each of K and V of each layer."""
    defaults: dict[str, Any] = {
        "num_layers": 2,
        "num_kv_heads": 8,
        "head_dim": 128,
        "max_batch_size": 4,
        "max_seq_len": 2048,
        "device": "cpu",
        "memory": "1GiB",
        "layout": "interleaved",
        "page_bytes": "2MiB",
    }
    return CacheConfig(**(defaults | options))


def test_the_other_policies_grant_what_was_computed_by_hand() -> None:
    lengths = [1, 16, 17, 1024, 1025]
    block, reserved = 16 * 8192, 2048 * 8192
    for make, expected in (
        (paged_blocks, [block, block, 2 * block, 64 * block, 65 * block]),
        (per_layer_pages, [8 * MIB] * 4 + [16 * MIB]),  # 1024 tokens to a page, 4 regions
        (full_reservation, [reserved] * 5),
    ):
        policy = make(config())
        assert [policy.bytes_for(n) for n in lengths] == expected, policy.name
        policy.grow(np.array([1, 0, 17, 0]))
        memory = policy.memory(np.array([1, 0, 17, 0]))
        granted = expected[0] + expected[2]
        assert memory[:4] == (18 * 8192, granted, granted, granted)
        assert policy.available_bytes() == 2**30 - granted
        policy.free(2)
        assert policy.available_bytes() == 2**30 - expected[0]


def test_a_policy_refuses_more_than_its_budget_and_changes_nothing() -> None:
    policy = full_reservation(config(memory="40MiB"))  # 16 MiB for a request
    policy.grow(np.array([1, 1, 0, 0]))
    with pytest.raises(OutOfPagesError) as raised:
        policy.grow(np.array([1, 1, 1, 0]))
    assert (raised.value.needed, raised.value.free) == (16 * MIB, 8 * MIB)
    assert policy.available_bytes() == 8 * MIB


MIXED = (
    LayerGroup(layers=[0, 2], num_kv_heads=8, head_dim=128),
    LayerGroup(layers=[1], num_kv_heads=1, head_dim=576, v_head_dim=0),
)


@pytest.mark.parametrize("layout", ["interleaved", "per_layer"])
def test_regions_are_those_of_the_cache(layout: str) -> None:
    shape = {"num_layers": 3, "num_kv_heads": None, "head_dim": None, "layer_groups": MIXED}
    mixed = config(layout=layout, **shape)
    regions = region_bytes(mixed, layout)
    with KVCache(mixed, open_pool(mixed, rehearsal=True)) as cache:
        assert regions.total() == cache.regions_per_row
        assert sum(size * n for size, n in regions.items()) == cache.token_bytes
        row = cache.alloc()
        cache.step({row: 1500})
        policy = VattnPolicy(cache)
        lengths = np.array(cache.seq_lens)
        assert policy.bytes_for(1500) == policy.memory(lengths).needed_bytes
        assert policy.bytes_for(1500) == cache.stats().mapped_bytes


# The real cache.


def maps(outcome: Outcome) -> int:
    """Runs of pages that were mapped, by whom is a race where a request starts at once."""
    return sum(calls.get("map", 0) for calls in outcome.driver_calls.values())


def replay_real(trace: Trace, **options: Any) -> Outcome:
    # 256 tokens to a page.
    cache = config(**{"memory": "64MiB", "lookahead": 256, **options})
    engine = Engine(max_batch_size=4, max_seq_len=2048, decode_s=1, prefill_tokens_per_s=1000)
    return command.replay_vattn(trace, cache, engine)


def test_the_real_cache_maps_ahead_of_need() -> None:
    outcome = replay_real(make_trace("t", "", [255, 255], [4, 2], [0, 0.5]))
    # The first starts at once. The second gets its row in the iteration after its arrival, and
    # finds its page mapped in the one after that; so does the first when it needs a second page.
    assert columns(outcome, "running") == [[1, 1, 2, 2]]
    assert outcome.column("used_bytes").tolist() == [8192 * n for n in (255, 256, 512, 514)]
    assert outcome.column("granted_bytes").tolist() == [2 * MIB * n for n in (1, 1, 3, 3)]
    assert outcome.column("needed_bytes").tolist() == outcome.column("granted_bytes").tolist()
    # Whether the first step maps its page or alloc() had it mapped is a race.
    calls = outcome.column("calls_in_step")
    assert (calls == calls[0]).all()
    assert outcome.column("calls_in_background")[-1] > 0
    summary = summarise(outcome)
    assert summary is not None
    assert summary.steps_without_call == (1 if calls[0] == 0 else 0.75)
    assert summary.decode_steps_without_call == 1


def test_short_memory_preempts_and_everything_is_completed() -> None:
    trace = make_trace("t", "", [500, 600, 700, 500, 300], [300, 400, 500, 600, 100])
    outcome = replay_real(trace, memory="16MiB")  # 2048 tokens
    assert outcome.completed == 5
    assert outcome.preemptions > 0
    assert outcome.column("granted_bytes").max() <= 16 * MIB


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_every_driver_is_replayed_over(backend: Backend) -> None:
    tokens = backend.page_tokens
    trace = make_trace("t", "", [tokens, 2 * tokens, 5, tokens], [2, 9, 3, 4])
    engine = Engine(max_batch_size=4, max_seq_len=4 * tokens, decode_s=1, prefill_tokens_per_s=1000)
    config = backend.config(pages=6, max_seq_len=4 * tokens, lookahead=4)
    outcome = command.replay_vattn(trace, config, engine)
    assert outcome.completed == 4
    assert maps(outcome) > 0


def test_a_cache_whose_step_does_nothing_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "step", lambda self, lengths: None)
    with pytest.raises(NothingMeasured, match=r"vattn at 0\.000 s"):
        replay_real(make_trace("t", "", [10], [2]))


def test_steps_are_counted_by_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    step = KVCache.step

    def step_twice(self: KVCache, lengths: IntArray) -> None:
        step(self, lengths)
        step(self, lengths)

    monkeypatch.setattr(KVCache, "step", step_twice)
    with pytest.raises(NothingMeasured, match="4 calls were made, expected 2"):
        replay_real(make_trace("t", "", [10], [2]))


def test_requests_that_are_left_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "free", lambda self, row: None)
    with pytest.raises(NothingMeasured, match="1 rows with 90112 bytes are left"):
        replay_real(make_trace("t", "", [10], [2]))
