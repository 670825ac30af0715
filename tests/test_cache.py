"""The allocator's behaviour, the same over every driver."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from backends import BACKENDS, TOKEN_BYTES, fill, holds, wait_until

import vattn

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        lambda lens: np.array(lens, dtype=np.int64),
        lambda lens: np.array(lens, dtype=np.int32),
        lambda lens: np.repeat(np.array(lens), 2)[::2],
        lambda lens: torch.tensor(lens),
        lambda lens: torch.tensor(lens, dtype=torch.int32),
        lambda lens: [np.int64(n) for n in lens],
        lambda lens: dict(enumerate(lens)),
    ],
)
def test_step_takes_lengths_in_every_usual_form(make_cache, form):
    cache = make_cache()
    for _ in range(4):
        cache.alloc()
    cache.step(form([5, 0, 40, 1]))
    assert cache.seq_lens == [5, 0, 40, 1]
    cache.check()


def test_a_dict_leaves_the_other_rows_alone(make_cache):
    cache = make_cache()
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 5})
    cache.step({b: 9})
    assert [cache.seq_lens[row] for row in (a, b)] == [5, 9]


BAD_STEPS = [
    ([1, 2], ValueError, r"seq_lens has 2 entries, expected max_batch_size = 4"),
    ([0, 0, 0, -1], ValueError, r"seq_lens\[3\] is -1, expected 0 to max_seq_len"),
    ([10**9, 0, 0, 0], ValueError, r"seq_lens\[0\] is 1000000000, expected 0 to max_seq_len"),
    ([0, 1, 0, 0], ValueError, r"seq_lens\[1\] is 1, but the row is free; alloc\(\) it first"),
    ([2**70, 0, 0, 0], OverflowError, "int too big"),
    ([1.0, 0, 0, 0], TypeError, "float"),
    (np.zeros(4), ValueError, "elements of type 'd', expected int32 or int64"),
    (np.zeros((2, 2), dtype=np.int64), ValueError, "2 dimensions"),
    (np.zeros(4, dtype=np.uint64), ValueError, "expected int32 or int64"),
    (torch.zeros(4), ValueError, "expected int32 or int64"),
    ({9: 1}, ValueError, r"row 9 is not in 0\.\.3; raise max_batch_size"),
    ({0: "5"}, TypeError, "str"),
    ("5000", TypeError, "seq_lens is a str, expected a list"),
    (None, TypeError, "seq_lens is a NoneType"),
]


@pytest.mark.parametrize(("lens", "error", "message"), BAD_STEPS)
def test_a_bad_step_says_what_is_wrong_and_changes_nothing(make_cache, lens, error, message):
    cache = make_cache()
    cache.alloc()
    cache.step([40, 0, 0, 0])
    before = cache.stats()
    with pytest.raises(error, match=message):
        cache.step(lens)
    assert cache.seq_lens == [40, 0, 0, 0]
    assert cache.stats() == before
    cache.step([41, 0, 0, 0])


def test_rows_run_out_with_a_typed_error(make_cache):
    cache = make_cache()
    assert sorted(cache.alloc() for _ in range(4)) == [0, 1, 2, 3]
    with pytest.raises(vattn.OutOfRowsError, match="all 4 rows are active"):
        cache.alloc()
    assert issubclass(vattn.OutOfRowsError, MemoryError)
    cache.free(2)
    assert cache.alloc() == 2


@pytest.mark.parametrize("bad", [-1, 10**9])
def test_alloc_refuses_a_length_that_no_row_can_have(make_cache, bad):
    cache = make_cache()
    with pytest.raises(ValueError, match=f"seq_len is {bad}, expected 0 to"):
        cache.alloc(bad)
    assert cache.stats().rows_active == 0


@pytest.mark.parametrize("row", [-1, 4, 1])
def test_freeing_what_is_not_allocated_is_an_error(make_cache, row):
    cache = make_cache()
    assert cache.alloc() == 0
    with pytest.raises(ValueError, match=f"row {row} is"):
        cache.free(row)
    cache.free(0)
    with pytest.raises(ValueError, match=r"row 0 is .*freed before, or never allocated"):
        cache.free(0)


def test_out_of_pages_names_the_shortage_and_changes_no_active_row(make_cache, backend):
    cache = make_cache(pages=8)
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 5 * backend.page_tokens, b: 1})
    fill(cache, a, 5 * backend.page_tokens, 7.0)
    with pytest.raises(vattn.OutOfPagesError, match="need 4 pages, 2 free; free a request") as info:
        cache.step({b: 4 * backend.page_tokens + 1})
    assert (info.value.needed, info.value.free) == (4, 2)
    assert isinstance(info.value, MemoryError)
    assert (cache.seq_lens[a], cache.seq_lens[b]) == (5 * backend.page_tokens, 1)
    cache.check()
    cache.free(a)  # preempt
    cache.step({b: 4 * backend.page_tokens + 1})
    cache.check()


def test_a_freed_row_is_adopted_without_mapping_anything(make_cache, backend):
    cache = make_cache()
    row = cache.alloc()
    cache.step({row: 3 * backend.page_tokens})
    cache.free(row)
    assert cache.row_state(row) == "idle"
    before = cache.stats().driver_calls["step"]
    again = cache.alloc(3 * backend.page_tokens)
    cache.step({again: 3 * backend.page_tokens})
    assert again == row
    assert cache.stats().driver_calls["step"] == before


def test_alloc_adopts_the_idle_row_that_fits_best(make_cache, backend):
    cache = make_cache()
    rows = [cache.alloc() for _ in range(4)]
    cache.step({row: n * backend.page_tokens for row, n in zip(rows, (9, 5, 1, 7), strict=True)})
    for row in rows:
        cache.free(row)
    assert cache.alloc(5 * backend.page_tokens) == rows[1]  # exact, though row 0 is enough
    assert cache.alloc(6 * backend.page_tokens) == rows[3]  # the smallest that is enough
    assert cache.alloc(60 * backend.page_tokens) == rows[0]  # none is: the largest


def test_idle_rows_give_way_when_memory_is_short(make_cache, backend):
    cache = make_cache(pages=8)
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 6 * backend.page_tokens, b: 1})
    cache.free(a)
    cache.step({b: 7 * backend.page_tokens})
    assert cache.row_state(a) == "free"
    cache.check()


def test_shrinking_unmaps_nothing(make_cache, backend):
    cache = make_cache()
    row = cache.alloc()
    cache.step({row: 4 * backend.page_tokens})
    fill(cache, row, 4 * backend.page_tokens, 5.0)
    mapped = cache.stats().mapped_bytes
    cache.step({row: 1})
    assert cache.stats().mapped_bytes == mapped
    assert holds(cache, row, 4 * backend.page_tokens, 5.0)


def test_a_step_with_everything_mapped_makes_no_driver_call(make_cache, backend):
    cache = make_cache()
    row = cache.alloc()
    cache.step({row: backend.page_tokens})
    calls = cache.stats().driver_calls
    for n in range(1, backend.page_tokens + 1):
        cache.step({row: n})
    assert cache.stats().driver_calls == calls
    cache.step({row: backend.page_tokens + 1})
    assert cache.stats().driver_calls != calls


def test_a_row_wastes_less_than_a_page_per_region(make_cache, backend):
    for layout in ("interleaved", "per_layer"):
        cache = make_cache(layout=layout, pages=64)
        row = cache.alloc()
        for tokens in (1, 7, backend.page_tokens + 1, 9 * backend.page_tokens + 3):
            cache.step({row: tokens})
            waste = cache.stats().mapped_bytes - tokens * TOKEN_BYTES
            assert 0 <= waste < cache.regions_per_row * cache.page_bytes


def test_growth_by_many_pages_takes_few_large_extents(make_cache, backend):
    cache = make_cache(max_extent_bytes=16 * backend.page_bytes)
    row = cache.alloc()
    cache.step({row: 63 * backend.page_tokens})  # 16 + 16 + 16 + 8 + 4 + 2 + 1 pages
    calls = cache.stats().driver_calls["step"]
    assert (calls["create"].count, calls["map"].count) == (7, 1)


def test_the_background_thread_maps_ahead_of_need(make_cache, backend):
    cache = make_cache(lookahead=2 * backend.page_tokens)
    row = cache.alloc(backend.page_tokens)
    wait_until(lambda: cache.mapped_tokens(row) >= 2 * backend.page_tokens)
    cache.step({row: backend.page_tokens})
    assert cache.stats().calls("step") == 0
    assert cache.stats().calls("background") > 0
    assert cache.stats().prefetched_runs > 0


def test_memory_mapped_ahead_never_makes_a_step_fail(make_cache, backend):
    cache = make_cache(pages=8, lookahead=3 * backend.page_tokens)
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 1, b: 1})
    for tokens in range(1, 7 * backend.page_tokens, 5):
        cache.step({b: tokens})
    cache.step({b: 7 * backend.page_tokens})
    cache.check()


def test_a_step_does_not_take_from_one_of_its_rows_to_give_to_another(make_cache, backend):
    cache = make_cache(pages=8, lookahead=3 * backend.page_tokens)
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 1, b: 1})
    wait_until(lambda: cache.stats().mapped_bytes == 8 * backend.page_bytes)
    cache.step({a: 3 * backend.page_tokens, b: 5 * backend.page_tokens})
    cache.check()
    fill(cache, a, 3 * backend.page_tokens, 1.0)
    fill(cache, b, 5 * backend.page_tokens, 2.0)
    assert holds(cache, a, 3 * backend.page_tokens, 1.0)


def test_trim_gives_idle_and_free_memory_back(make_cache, backend):
    cache = make_cache()
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: 4 * backend.page_tokens, b: 1})
    fill(cache, b, 1, 2.0)
    cache.free(a)
    assert cache.trim() == 4 * backend.page_bytes
    stats = cache.stats()
    assert (stats.held_bytes, stats.free_bytes) == (backend.page_bytes, 0)
    assert cache.row_state(a) == "free"
    assert holds(cache, b, 1, 2.0)


def test_after_close_everything_raises_and_closing_again_is_fine(make_cache):
    cache = make_cache()
    row = cache.alloc()
    cache.step({row: 5})
    cache.close()
    cache.close()
    for call in (
        lambda: cache.alloc(),
        lambda: cache.step([0, 0, 0, 0]),
        lambda: cache.free(row),
        lambda: cache.trim(),
        lambda: cache.kv(0),
        lambda: cache.seq_lens,
        lambda: cache.row_state(0),
    ):
        with pytest.raises(ValueError, match="the cache is closed; make a new one"):
            call()
    assert cache.closed
    assert cache.stats().held_bytes == 0


def test_leaving_the_with_block_closes(backend):
    with vattn.init(backend.config()) as cache:
        cache.step([0, 0, 0, 0])
    assert cache.closed


def test_two_caches_share_one_budget(make_cache, backend):
    target = make_cache(pages=8)
    options = {"memory": None, "page_bytes": None}
    draft = vattn.init(backend.config(**options), share_pool_with=target)
    a, b = target.alloc(), draft.alloc()
    target.step({a: 5 * backend.page_tokens})
    with pytest.raises(vattn.OutOfPagesError, match="need 4 pages, 3 free"):
        draft.step({b: 4 * backend.page_tokens})
    draft.step({b: 3 * backend.page_tokens})
    target.check()
    draft.check()
    target.close()
    draft.step({b: 8 * backend.page_tokens})
    draft.close()
    with pytest.raises(ValueError, match="memory and share_pool_with are both given"):
        vattn.init(backend.config(), share_pool_with=target)


def test_every_failing_driver_call_leaves_the_cache_as_it_was(backend):
    from vattn.testing import init_with_faults

    for nth in range(1, 100):
        cache, faults = init_with_faults(backend.config(pages=16, layout="per_layer"))
        a, b = cache.alloc(), cache.alloc()
        cache.step({a: 3, b: 1})
        fill(cache, a, 3, 4.0)
        faults.fail_nth(nth)
        length = 3
        with contextlib.suppress(vattn.DriverError):
            cache.free(b)
            cache.step({a: 2 * backend.page_tokens})
            length = 2 * backend.page_tokens
            cache.trim()
        assert cache.seq_lens[a] == length
        done = faults.injected == 0
        faults.disarm()
        cache.check()
        assert holds(cache, a, 3, 4.0)
        cache.step({a: 2 * backend.page_tokens})
        cache.close()
        assert cache.stats().held_bytes == 0
        if done:
            assert nth > 5  # it did try several
            return
    pytest.fail("the sweep did not come to an end")


def test_stats_add_up(make_cache, backend):
    cache = make_cache(pages=16)
    row = cache.alloc()
    cache.step({row: backend.page_tokens + 1})
    s = cache.stats()
    assert s.page_bytes == cache.page_bytes == backend.page_bytes
    assert s.mapped_bytes == 2 * backend.page_bytes == s.held_bytes - s.free_bytes
    assert s.peak_mapped_bytes == s.mapped_bytes
    assert s.used_bytes == (backend.page_tokens + 1) * TOKEN_BYTES
    assert s.reserved_bytes == 4 * 64 * backend.page_bytes
    assert (s.rows_active, s.rows_free, s.steps, s.steps_with_growth) == (1, 3, 1, 1)
    for calls in s.driver_calls.values():
        for call in calls.values():
            assert sum(call.histogram) == call.count
            assert call.total_ns > 0
    assert any("call=map by=step" in line for line in cache.recent_calls())


def test_repr_says_what_it_is(make_cache):
    cache = make_cache()
    assert "2 layers, 4 rows" in repr(cache)
    cache.close()
    assert "closed" in repr(cache)
