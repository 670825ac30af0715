"""What fork, truncate, reorder and compact refuse: it is said, and nothing has changed."""

from __future__ import annotations

import pytest
from backends import BACKENDS
from test_sharing import grown, read, same, write

import vattn

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

BAD_CALLS = [
    (lambda c: c.fork(1), ValueError, r"row 1 is free, not active: it was freed before, or never"),
    (lambda c: c.fork(9), ValueError, r"row 9 is not in 0\.\.3; raise max_batch_size"),
    (lambda c: c.fork(0, 41), ValueError, r"seq_len is 41, but row 0 has 40 tokens; pass 0 to as"),
    (lambda c: c.fork(0, -1), ValueError, r"seq_len is -1, but row 0 has 40 tokens"),
    (lambda c: c.fork(0, n=-1), TypeError, "fork"),
    (lambda c: c.fork(0, 3.0), TypeError, "fork"),
    (lambda c: c.fork(0, n=4), vattn.OutOfRowsError, r"4 rows wanted, but only 3 of 4 are not in"),
    (lambda c: c.truncate(1, 0), ValueError, "row 1 is free, not active"),
    (lambda c: c.truncate(0, 41), ValueError, "seq_len is 41, but row 0 has 40 tokens"),
    (lambda c: c.truncate(0, -1), ValueError, "seq_len is -1, but row 0 has 40 tokens"),
    (lambda c: c.reorder([0], [1]), ValueError, "row 1 is free, not active"),
    (lambda c: c.reorder([1], [0]), ValueError, "row 1 is free, not active"),
    (lambda c: c.reorder([0], []), ValueError, "rows has 1 entries and parents 0; give each row"),
    (lambda c: c.reorder([0, 0], [0, 0]), ValueError, "row 0 is in rows twice; name it once"),
    (lambda c: c.compact(1, []), ValueError, "row 1 is free, not active"),
    (lambda c: c.compact(0, [40]), ValueError, r"indices\[0\] is 40, expected .* from 0 to 39"),
    (lambda c: c.compact(0, [3, 3]), ValueError, r"indices\[1\] is 3, expected ascending"),
    (lambda c: c.compact(0, [3, 2]), ValueError, r"indices\[1\] is 2, expected ascending"),
    (lambda c: c.compact(0, [-1]), ValueError, r"indices\[0\] is -1, expected"),
    (lambda c: c.compact(0, [3], start=4), ValueError, r"is 3, expected .* from 4 to 39"),
    (lambda c: c.compact(0, [], start=41), ValueError, "start is 41, expected 0 to 40"),
    (lambda c: c.compact(0, [], start=-1), ValueError, "start is -1, expected 0 to 40"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_a_bad_call_says_what_is_wrong_and_changes_nothing(make_cache, call, error, message):
    cache = make_cache()
    row, tokens = grown(cache, 40)
    before = cache.stats()
    with pytest.raises(error, match=message):
        call(cache)
    assert cache.stats() == before
    assert cache.seq_lens == [40, 0, 0, 0]
    assert same(read(cache, row, 40), tokens)


def test_a_closed_cache_refuses_all_of_it(make_cache):
    cache = make_cache()
    row = cache.alloc()
    cache.close()
    for call in (
        lambda: cache.fork(row),
        lambda: cache.truncate(row, 0),
        lambda: cache.reorder([row], [row]),
        lambda: cache.compact(row, []),
    ):
        with pytest.raises(ValueError, match="the cache is closed"):
            call()


def test_out_of_pages_names_the_shortage_and_changes_nothing(make_cache, backend):
    cache = make_cache(pages=6, max_extent_bytes=backend.page_bytes)
    n = 3 * backend.page_tokens
    (row, tokens), (other, others) = grown(cache, n - 1), grown(cache, n)
    message = r"need \d+ pages, 0 free; free a request or raise memory"
    for call in (
        lambda: cache.fork(row),  # the last page is full of another row's
        lambda: cache.reorder([other], [row]),
    ):
        with pytest.raises(vattn.OutOfPagesError, match=message) as info:
            call()
        assert info.value.needed - info.value.free == 1
        assert cache.seq_lens[:2] == [n - 1, n]
    (child,) = cache.fork(row, 2 * backend.page_tokens)  # needs no page
    cache.truncate(child, 1)
    for call in (
        lambda: cache.step({child: 2}),
        lambda: cache.compact(row, [1, 2], start=0),
    ):
        with pytest.raises(vattn.OutOfPagesError, match=message):
            call()
    assert cache.seq_lens[:3] == [n - 1, n, 1]
    assert same(read(cache, row, n - 1), tokens)
    assert same(read(cache, other, n), others)
    cache.free(other)
    cache.step({child: 2})
    write(cache, child, 1, 2)
    assert same(read(cache, row, n - 1), tokens)
