"""With scrub="on_reuse" no byte that a freed request wrote is readable in another row.

Requests fill every byte of their pages, also those where no token lies, and every byte of the next
request's pages is read, beneath the tensors.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from backends import BACKENDS, TOKEN_BYTES

import vattn
from vattn.testing import settle

LEFT = 0xA5  # what earlier requests leave

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
LAYOUTS = pytest.mark.parametrize(
    ("layout", "order"), [("interleaved", "NHD"), ("interleaved", "HND"), ("per_layer", "NHD")]
)


class Rows:
    """The mapped pages of a cache's rows, as bytes."""

    def __init__(self, cache, backend):
        self.cache = cache
        # A GPU's memory can be read through tensors only, so not between the last token and the
        # end of its page.
        self.raw = backend.name != "gpu"

    def parts(self, row):
        """Flat tensors of bytes, of all that is mapped in the row."""
        cache = self.cache
        n = min(cache.mapped_tokens(row), cache.config.max_seq_len)
        if not self.raw:
            for layer in range(cache.config.num_layers):
                for tensor in cache.kv(layer, rows=row, max_len=n):
                    yield tensor.view(torch.uint8)
            return
        if n == 0:
            return
        for start, token_bytes in self.regions(row):
            size = -(-n * token_bytes // cache.page_bytes) * cache.page_bytes
            memory = (ctypes.c_uint8 * size).from_address(start)
            yield torch.frombuffer(memory, dtype=torch.uint8)

    def regions(self, row):
        """Address and bytes per token of each region."""
        config, n = self.cache.config, self.cache.regions_per_row
        tensors = [t for layer in range(config.num_layers) for t in self.cache.kv(layer, rows=row)]
        stripes = [t[0, h] if config.order == "HND" else t for t in tensors for h in range(2)]
        starts = list(dict.fromkeys(stripe.data_ptr() for stripe in stripes))
        return [(start, TOKEN_BYTES // n) for start in starts[:n]]

    def soil(self, row):
        for part in self.parts(row):
            part.fill_(LEFT)

    def assert_clean(self, row, *, but=0):
        """Every byte is zero, but for `but` bytes that the request has written itself."""
        left = sum(int(part.count_nonzero()) for part in self.parts(row))
        assert left == but


@pytest.fixture
def make_rows(make_cache, backend):
    def make(**options):
        options = {"scrub": "on_reuse", "max_extent_bytes": backend.page_bytes} | options
        return Rows(make_cache(**options), backend)

    return make


def used(rows, n):
    """A request of n tokens that has soiled all its pages, and is over."""
    row = rows.cache.alloc()
    rows.cache.step({row: n})
    rows.soil(row)
    rows.cache.free(row)
    return row


@LAYOUTS
@pytest.mark.parametrize("extent_pages", [1, 8])
def test_an_adopted_row_is_zero(make_rows, backend, layout, order, extent_pages):
    rows = make_rows(layout=layout, order=order, max_extent_bytes=extent_pages * backend.page_bytes)
    n = 5 * backend.page_tokens // 2
    row = used(rows, n)
    assert rows.cache.alloc(n) == row
    rows.assert_clean(row)
    rows.cache.step({row: n + 3 * backend.page_tokens})
    rows.assert_clean(row)


@LAYOUTS
def test_memory_that_another_row_gave_up_is_zero(make_rows, backend, layout, order):
    rows = make_rows(layout=layout, order=order, pages=16)
    cache = rows.cache
    n = 3 * backend.page_tokens
    first = cache.alloc()
    old = used(rows, 13 * backend.page_tokens)
    cache.step({first: n})
    assert cache.row_state(first) == "active"
    rows.assert_clean(first)
    cache.step({first: 14 * backend.page_tokens})  # not without the idle row's pages
    assert old != first
    rows.assert_clean(first)


def test_memory_mapped_ahead_of_need_is_zero(make_rows, backend):
    rows = make_rows(pages=16, lookahead=2 * backend.page_tokens)
    row = rows.cache.alloc()
    used(rows, 14 * backend.page_tokens)
    rows.cache.step({row: 1})
    settle(rows.cache)
    assert rows.cache.mapped_tokens(row) > 2 * backend.page_tokens
    rows.assert_clean(row)


def test_a_fork_shows_the_tokens_that_it_was_given_and_nothing_else(make_rows, backend):
    rows = make_rows()
    cache = rows.cache
    n = 5 * backend.page_tokens // 2
    parent = cache.alloc()
    cache.step({parent: 4 * backend.page_tokens})
    for _ in range(2):
        used(rows, 4 * backend.page_tokens)
    rows.soil(parent)
    (child,) = cache.fork(parent, n)
    rows.assert_clean(child, but=n * TOKEN_BYTES)
    cache.truncate(child, backend.page_tokens + 1)
    cache.step({child: backend.page_tokens + 2})
    rows.assert_clean(child, but=(backend.page_tokens + 1) * TOKEN_BYTES)


def test_a_reordered_row_shows_the_tokens_of_its_parent_and_nothing_else(make_rows, backend):
    rows = make_rows()
    cache = rows.cache
    n = 3 * backend.page_tokens // 2
    for _ in range(3):
        used(rows, 4 * backend.page_tokens)
    a, b = cache.alloc(), cache.alloc()
    cache.step({a: n, b: 4 * backend.page_tokens})
    rows.soil(a)
    rows.soil(b)
    cache.truncate(a, n - 5)
    cache.reorder([b], [a])
    rows.assert_clean(b, but=(n - 5) * TOKEN_BYTES)


def test_a_request_that_shares_a_prefix_sees_the_prefix_and_nothing_else(make_rows, backend):
    rows = make_rows(max_batch_size=2)
    cache = rows.cache
    prefixes = vattn.PrefixCache(cache, block_tokens=1)
    n = 2 * backend.page_tokens
    prompt = list(range(n))

    def serve(ids):
        row, n_cached = prefixes.match(ids)
        rows.assert_clean(row, but=n_cached * TOKEN_BYTES)
        cache.step({row: len(ids)})
        rows.soil(row)
        return row, n_cached

    row, _ = serve(prompt)
    prefixes.insert(row, prompt[: n - 7])
    cache.free(row)
    adopted, n_cached = serve([*prompt[: n - 7], n, n])
    assert (adopted, n_cached) == (row, n - 7)
    prefixes.insert(adopted, [*prompt[: n - 7], n, n])
    shared, n_cached = serve([*prompt[:9], n])
    assert (n_cached, shared != adopted) == (9, True)
    # The only row that is not active is the one with the prefix.
    cache.free(adopted)
    only, n_cached = serve([*prompt[:11], n])
    assert (only, n_cached) == (adopted, 11)


def test_without_it_a_row_may_show_what_was_there(make_rows, backend):
    rows = make_rows(scrub="never")
    row = used(rows, backend.page_tokens)
    assert rows.cache.alloc(backend.page_tokens) == row
    rows.assert_clean(row, but=backend.page_tokens * TOKEN_BYTES)
