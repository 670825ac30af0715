"""Requests that share tokens: what is found, that it is theirs byte for byte, and what it costs."""

from __future__ import annotations

import pytest
from backends import BACKENDS
from prefix_engine import Engine, calls, tokens

import vattn
from vattn import prefix_index

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def make_engine(make_cache, backend):
    """Makes engines over caches of single pages, where a hit is exact to the token."""

    def make(*, block_tokens=None, **options) -> Engine:
        options = {"max_extent_bytes": backend.page_bytes} | options
        return Engine(make_cache(**options), block_tokens=block_tokens)

    return make


def test_a_request_that_continues_an_idle_row_takes_it_over_without_a_driver_call(
    make_engine, backend
):
    engine = make_engine()
    turn = tokens(3 * backend.page_tokens + 5)
    row, n_cached = engine.serve(turn)
    assert n_cached == 0
    before = calls(engine.cache)
    again, n_cached = engine.prefixes.match([*turn, 1, 2, 3])
    assert calls(engine.cache) == before
    assert (again, n_cached) == (row, len(turn))
    assert engine.cache.stats().aliased_bytes == 0
    engine.extend(row, [*turn, 1, 2, 3])
    engine.end(row, [*turn, 1, 2, 3])
    assert engine.serve([*turn, 1, 2, 3, 4])[1] == len(turn) + 3
    stats = engine.prefixes.stats()
    assert (stats.lookups, stats.hits, stats.adopted, stats.forked) == (3, 2, 2, 0)


def test_a_shorter_prefix_is_shared_and_stays_where_it_was(make_engine, backend):
    engine = make_engine()
    first = tokens(5 * backend.page_tokens)
    row, _ = engine.serve(first)
    common = 3 * backend.page_tokens + 7
    second = first[:common] + tokens(backend.page_tokens, seed=2)
    other, n_cached = engine.start(second)
    assert other != row
    assert n_cached == common
    assert engine.cache.stats().aliased_bytes == 3 * backend.page_bytes
    engine.cache.check()
    engine.end(other, second)
    assert engine.serve([*first, 1])[:2] == (row, len(first))  # all of it is still there
    assert engine.serve([*second, 1])[:2] == (other, len(second))
    assert engine.prefixes.stats().forked == 1


def test_requests_share_while_they_run_and_write_only_what_is_theirs(make_engine, backend):
    engine = make_engine()
    prompt = tokens(2 * backend.page_tokens + 9)
    texts = [prompt + tokens(40, seed=n) for n in range(1, 5)]
    rows = []
    for n, text in enumerate(texts):
        row, n_cached = engine.start(text)
        rows.append(row)
        assert n_cached == (len(prompt) if n else 0)
    for grown in (50, 60 + backend.page_tokens):
        for n, row in enumerate(rows):
            texts[n] = prompt + tokens(grown, seed=n + 1)
            engine.extend(row, texts[n])
    for row, text in zip(rows, texts, strict=True):
        engine.end(row, text)
    for row, text in zip(rows, texts, strict=True):
        assert engine.start([*text, 1])[:2] == (row, len(text))


def test_a_running_request_is_not_preferred_to_one_with_more_tokens(make_engine):
    engine = make_engine()
    text = tokens(100)
    longer, _ = engine.start([*text, 7, 7, 7])
    shorter, n_cached = engine.start(text[:80])
    assert n_cached == 79
    row, n_cached = engine.start([*text, 8, 8])  # continues all of the shorter one, which runs
    assert row not in (longer, shorter)
    assert n_cached == 100


def test_the_last_token_of_a_known_prompt_is_still_computed(make_engine, backend):
    engine = make_engine()
    prompt = tokens(2 * backend.page_tokens)
    engine.serve(prompt)
    assert engine.serve(prompt)[1] == len(prompt) - 1
    assert engine.serve(prompt[:-5])[1] == len(prompt) - 6


@pytest.mark.parametrize("shape", ["per_layer NHD", "per_layer HND", "interleaved HND"])
@pytest.mark.parametrize("extent_pages", [1, 4])
def test_a_hit_has_every_byte_in_every_layout(make_engine, backend, shape, extent_pages):
    layout, order = shape.split()
    engine = make_engine(
        layout=layout,
        order=order,
        pages=256,
        max_extent_bytes=extent_pages * backend.page_bytes,
    )
    page_tokens = backend.page_tokens * engine.cache.regions_per_row
    first = tokens(3 * page_tokens + 5)
    engine.serve(first)
    assert engine.start([*first, 1, 2])[1] == len(first)
    second = first[: 2 * page_tokens + 9] + tokens(30, seed=2)
    row, n_cached = engine.start(second)
    assert 0 < n_cached <= 2 * page_tokens + 9
    engine.end(row, second)


def test_of_an_extent_that_is_shared_in_part_at_most_a_page_is_copied(make_engine, backend):
    engine = make_engine(max_extent_bytes=4 * backend.page_bytes)
    first = tokens(8 * backend.page_tokens)
    engine.serve(first)
    second = first[: 7 * backend.page_tokens] + tokens(5, seed=2)
    _, n_cached = engine.start(second)
    assert n_cached == 5 * backend.page_tokens
    assert engine.cache.stats().aliased_bytes == 4 * backend.page_bytes


def test_a_salt_separates(make_engine, backend):
    engine = make_engine()
    prompt = tokens(2 * backend.page_tokens)
    for salt in (None, "a", b"a", 7):
        assert engine.serve(prompt, salt)[1] == 0
    for salt in (None, "a", b"a", 7):
        assert engine.serve([*prompt, 1], salt)[1] == len(prompt)
    assert engine.serve([*prompt, 1], "b")[1] == 0


def test_a_collision_of_hashes_shows_nobody_the_kv_of_another(make_engine, backend, monkeypatch):
    monkeypatch.setattr(prefix_index, "digest", lambda *_: b"the same")
    engine = make_engine()
    engine.serve(tokens(3 * backend.page_tokens, seed=1), "a")
    assert engine.serve(tokens(3 * backend.page_tokens, seed=2), "a")[1] == 0
    assert engine.serve(tokens(3 * backend.page_tokens, seed=1), "b")[1] == 0
    near = tokens(backend.page_tokens, seed=1) + tokens(2 * backend.page_tokens, seed=3)
    assert engine.serve(near, "a")[1] == backend.page_tokens


def test_what_was_freed_first_loses_its_memory_first_and_from_the_end(make_engine, backend):
    page = backend.page_tokens
    engine = make_engine(pages=12)
    texts = [tokens(4 * page, seed=n) for n in range(3)]
    for text in texts:
        engine.serve(text)
    row, _ = engine.start(tokens(2 * page, seed=9))
    engine.cache.free(row)
    assert engine.prefixes.match([*texts[2], 1]).n_cached == 4 * page
    assert engine.prefixes.match([*texts[1], 1]).n_cached == 4 * page
    assert engine.prefixes.match([*texts[0], 1]).n_cached == 2 * page


def test_memory_that_nobody_can_find_goes_first(make_engine, backend):
    page = backend.page_tokens
    engine = make_engine(pages=12)
    growing, _ = engine.start(tokens(page, seed=7))
    engine.serve(tokens(4 * page))
    row, _ = engine.start(tokens(4 * page, seed=2), insert=False)
    engine.cache.free(row)
    engine.extend(growing, tokens(8 * page, seed=7))
    assert engine.prefixes.match([*tokens(4 * page), 1]).n_cached == 4 * page


def test_a_hit_makes_what_it_shares_the_youngest(make_engine, backend):
    page = backend.page_tokens
    engine = make_engine(pages=14, max_batch_size=8)
    prompt = tokens(3 * page)
    engine.serve(prompt + tokens(page, seed=1))
    engine.serve(tokens(4 * page, seed=5))
    engine.serve(prompt + tokens(page, seed=2))  # shares the prompt of the first
    engine.start(tokens(8 * page, seed=9), insert=False)
    assert engine.prefixes.match([*tokens(4 * page, seed=5), 1]).n_cached < 4 * page
    assert engine.prefixes.match([*prompt, *tokens(page, seed=2), 1]).n_cached == 4 * page


def test_new_requests_take_the_rows_that_nobody_can_continue(make_engine, backend):
    engine = make_engine(max_batch_size=4)
    kept = [engine.serve(tokens(80, seed=n))[0] for n in range(2)]
    spare = [engine.start(tokens(80, seed=n), insert=False)[0] for n in (5, 6)]
    for row in spare:
        engine.cache.free(row)
    new = [engine.start(tokens(80, seed=n))[0] for n in (7, 8)]
    assert sorted(new) == sorted(spare)
    assert engine.start(tokens(80, seed=9))[0] == kept[0]  # the one freed first
    assert engine.start([*tokens(80, seed=1), 1]) == (kept[1], 80)


def test_tokens_that_were_rejected_are_not_found(make_engine, backend):
    engine = make_engine()
    page = backend.page_tokens
    drafted = tokens(4 * page)
    row, _ = engine.start(drafted)
    engine.cache.truncate(row, 2 * page)
    accepted = drafted[: 2 * page] + tokens(2 * page, seed=2)
    engine.extend(row, accepted)
    other, n_cached = engine.start([*drafted, 1], insert=False)
    assert n_cached == 2 * page
    engine.verify(row, accepted)
    engine.cache.free(other)
    engine.cache.step({row: page + 3})  # the same without saying so
    engine.extend(row, drafted[: page + 3] + tokens(2 * page, seed=3))
    engine.cache.free(row)
    assert engine.start([*accepted, 1])[1] == page + 3


def test_a_row_holds_what_was_inserted_last(make_engine, backend):
    engine = make_engine()
    text = tokens(3 * backend.page_tokens)
    row, _ = engine.start(text, "a")
    engine.prefixes.insert(row, text[: backend.page_tokens], salt="a")
    assert engine.prefixes.match(text, salt="a").n_cached == backend.page_tokens
    engine.prefixes.insert(row, text, salt="b")
    assert engine.prefixes.match(text, salt="a").n_cached == 0
    assert engine.prefixes.match(text, salt="b").n_cached == len(text) - 1
    assert engine.prefixes.stats().entries == 1


def test_clear_forgets_all(make_engine, backend):
    engine = make_engine()
    text = tokens(3 * backend.page_tokens)
    row, _ = engine.serve(text)
    running, _ = engine.start(tokens(80, seed=2))
    engine.prefixes.clear()
    engine.prefixes.clear()
    stats = engine.prefixes.stats()
    assert (stats.entries, stats.indexed_blocks, stats.lookups) == (0, 0, 2)
    assert engine.start([*text, 1]) == (row, 0)  # what is kept is taken after all others
    engine.end(running, tokens(80, seed=2))
    assert engine.start([*tokens(80, seed=2), 1]) == (running, 80)


def test_stats_count_tokens_and_hits(make_engine):
    engine = make_engine(block_tokens=16)
    assert engine.prefixes.stats() == vattn.PrefixStats()
    assert engine.prefixes.stats().hit_rate == 0
    engine.serve(tokens(60))
    engine.serve(tokens(50))
    engine.serve(tokens(50, seed=2))
    stats = engine.prefixes.stats()
    assert stats == vattn.PrefixStats(
        lookups=3,
        hits=1,
        adopted=0,
        forked=1,
        lookup_tokens=160,
        hit_tokens=49,
        entries=3,
        indexed_blocks=6,
    )
    assert stats.hit_rate == 49 / 160


def test_when_every_row_is_active_it_says_so(make_engine):
    engine = make_engine(max_batch_size=2)
    text = tokens(100)
    engine.start(text)
    engine.start(text)
    for prompt in (text, tokens(100, seed=2)):
        with pytest.raises(vattn.OutOfRowsError, match="all 2 rows are active"):
            engine.prefixes.match(prompt)
    assert engine.prefixes.stats().lookups == 2


def test_the_last_row_is_taken_over_for_what_it_has(make_engine, backend):
    engine = make_engine(max_batch_size=1)
    page = backend.page_tokens
    first = tokens(3 * page + 5)
    engine.serve(first)
    second = first[: 2 * page + 3] + tokens(page, seed=2)
    before = calls(engine.cache)
    assert engine.prefixes.match(second) == (0, 2 * page + 3)
    assert calls(engine.cache) == before
    engine.extend(0, second)
    engine.end(0, second)
    assert engine.serve([*first, 1])[1] == 2 * page + 3  # its end was overwritten
    assert engine.prefixes.stats().adopted == 2


def test_a_cache_that_scrubs_keeps_what_is_inserted(make_engine, backend):
    engine = make_engine(scrub="on_reuse")
    text = tokens(3 * backend.page_tokens + 5)
    engine.serve(text)
    assert engine.serve([*text, 1])[1] == len(text)
    assert engine.serve([*text[:-20], *tokens(9, seed=2)])[1] == len(text) - 20
