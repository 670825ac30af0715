"""The prefix cache under several threads: every row holds what its request says, byte for byte."""

from __future__ import annotations

import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from backends import BACKENDS
from prefix_engine import Engine, tokens

import vattn

N_THREADS = 4
ROUNDS = 25

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def conversation(engine, page, seed, counts):
    """Requests that begin like those of the other threads, go on, are cut, and end."""
    dice = random.Random(seed)
    for turn in range(ROUNDS):
        salt = dice.choice([None, "tenant"])
        text = tokens(dice.randint(1, 2 * page), seed=dice.randint(1, 2))
        text = text + tokens(dice.randint(1, page), seed=dice.randint(3, 5))
        try:
            row, n_cached = engine.start(text, salt, insert=dice.random() < 0.7)
        except vattn.OutOfRowsError:
            counts["no row"] += 1
            continue
        except vattn.OutOfPagesError:
            raise AssertionError("match must not need pages that are not there") from None
        counts["hits"] += n_cached > 0
        if dice.random() < 0.3:
            text = text[: dice.randint(1, len(text))]
            engine.cache.truncate(row, len(text))
        text = text + tokens(dice.randint(1, page // 2), seed=100 * seed + turn)
        engine.extend(row, text, salt)
        if dice.random() < 0.8:
            engine.end(row, text, salt)
        else:
            engine.verify(row, text, salt)
            engine.cache.free(row)


@pytest.mark.parametrize("extent_pages", [1, 4])
@pytest.mark.parametrize("scrub", ["never", "on_reuse"])
def test_threads_share_and_nobody_reads_what_is_not_theirs(
    make_cache, backend, extent_pages, scrub
):
    page = backend.page_tokens
    cache = make_cache(
        pages=48,
        max_batch_size=8,
        max_extent_bytes=extent_pages * backend.page_bytes,
        lookahead=page,
        scrub=scrub,
    )
    engine = Engine(cache, block_tokens=16)
    counts = {"no row": 0, "hits": 0}
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            cache.trim()
            cache.check()
            stats = engine.prefixes.stats()
            assert stats.entries <= 8
            assert stats.adopted + stats.forked == stats.hits <= stats.lookups
            time.sleep(0.002)

    with ThreadPoolExecutor(N_THREADS + 1) as executor:
        disturber = executor.submit(disturb)
        threads = [
            executor.submit(conversation, engine, page, seed, counts) for seed in range(N_THREADS)
        ]
        try:
            for thread in threads:
                thread.result()
        finally:
            stop.set()
        disturber.result()
    cache.check()
    assert cache.stats().rows_active == 0
    assert counts["hits"] > 0
    assert counts["no row"] == 0


@pytest.fixture
def hasty_threads():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_no_thread_sees_the_index_half_changed(make_cache, hasty_threads):
    cache = make_cache(max_batch_size=16, max_seq_len=64)
    prefixes = vattn.PrefixCache(cache, block_tokens=1)
    text, n_rounds = tokens(32), 1500
    rows = [cache.alloc() for _ in range(2)]
    cache.step({row: len(text) for row in rows})

    def insert(row):
        dice = random.Random(row)
        for _ in range(n_rounds):
            prefixes.insert(row, text[: dice.randint(1, len(text))])

    def match(_):
        for _ in range(n_rounds):
            row, n_cached = prefixes.match(text)
            assert n_cached < len(text)
            cache.free(row)

    with ThreadPoolExecutor(4) as executor:
        for done in [executor.submit(job, i) for job in (insert, match) for i in rows]:
            done.result()
    stats = prefixes.stats()
    assert (stats.lookups, stats.lookup_tokens) == (2 * n_rounds, 2 * n_rounds * len(text))
    assert stats.entries == 2
    assert stats.indexed_blocks == max(n for _, n in cache._core.kept_prefixes())
