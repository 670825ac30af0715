"""The prefix cache when others are faster, when calls are wrong or fail, and after a fork."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from backends import Backend
from prefix_engine import Engine, calls, tokens

import vattn
from vattn.testing import init_with_faults

PAGE = Backend("host").page_tokens


class Between:
    """The core of a cache, with something that happens just before a call of it."""

    def __init__(self, core):
        self._core = core
        self.before = {}

    def __getattr__(self, name):
        happens = self.before.pop(name, None)
        if happens is not None:
            happens()
        return getattr(self._core, name)


def config(**options):
    backend = Backend("host")
    return backend.config(**({"max_extent_bytes": backend.page_bytes} | options))


@pytest.fixture
def engine():
    with vattn.init(config()) as cache:
        yield Engine(cache, block_tokens=16)
        cache.check()


@pytest.fixture
def between(engine):
    """What happens before a call of the prefix cache to the core."""
    proxy = Between(engine.cache._core)
    engine.prefixes._core = proxy
    return proxy.before


def test_an_idle_row_that_is_taken_over_by_another_is_shared_with_it(engine, between):
    text = tokens(3 * PAGE)
    row, _ = engine.serve(text)
    rival = []
    between["adopt_prefix"] = lambda: rival.append(adopt(engine.cache, row))
    other, n_cached = engine.start([*text, 1])
    assert rival == [True]
    assert other != row
    assert n_cached == len(text)
    engine.verify(row, text)


def adopt(cache, row):
    life, intact = cache._core.kept_prefixes()[row]
    return cache._core.adopt_prefix(row, life, intact, 0)


def reuse(cache, row):
    """Another request gets the row, whatever it holds."""
    life, _ = cache._core.kept_prefixes()[row]
    cache._core.forget_prefix(row, life)
    rows = []
    while row not in rows:
        rows.append(cache.alloc())
    for other in rows:
        if other != row:
            cache.free(other)


def test_a_row_that_is_given_to_another_request_is_not_found(engine, between):
    text = tokens(3 * PAGE)
    longest, _ = engine.serve(text)
    shorter, _ = engine.serve(text[: 2 * PAGE] + tokens(9, seed=2))
    between["fork_prefix"] = lambda: reuse(engine.cache, longest)
    row, n_cached = engine.start(text[:-5] + tokens(5, seed=3))
    assert row not in (longest, shorter)
    assert n_cached == 2 * PAGE
    assert engine.prefixes.stats().forked == 2


def test_a_row_that_loses_its_end_meanwhile_is_not_tried_for_ever(engine, between):
    text = tokens(3 * PAGE)
    row, _ = engine.start(text)
    between["fork_prefix"] = lambda: engine.cache.truncate(row, PAGE)
    assert engine.start([*text, 1])[1] == 0
    assert engine.start([*text, 1, 2])[1] >= PAGE


def test_the_last_row_may_be_gone_when_it_is_to_be_taken_over(between, engine):
    text = tokens(3 * PAGE)
    row, _ = engine.serve(text)
    for _ in range(3):
        engine.cache.alloc()

    def nobody_has_a_row():
        assert adopt(engine.cache, row)

    between["fork_prefix"] = nobody_has_a_row
    with pytest.raises(vattn.OutOfRowsError):
        engine.prefixes.match(text[:PAGE])
    engine.verify(row, text)
    assert engine.prefixes.stats().lookups == 1


def test_a_failing_driver_leaves_no_row_behind():
    cache, faults = init_with_faults(config())
    engine = Engine(cache, block_tokens=16)
    text = tokens(3 * PAGE)
    engine.serve(text)
    prompt = text[: 2 * PAGE + 3] + tokens(9, seed=2)
    for nth in range(1, 20):
        faults.fail_nth(nth)
        try:
            row, n_cached = engine.prefixes.match(prompt)
        except vattn.DriverError:
            assert cache.stats().rows_active == 0
            cache.check()
        else:
            break
    assert nth > 1
    faults.disarm()
    assert n_cached == 2 * PAGE + 3
    engine.extend(row, prompt)
    engine.end(row, prompt)
    assert engine.start([*text, 1])[1] == len(text)
    cache.close()


@pytest.mark.parametrize("n_more", [1, -5], ids=["adopted", "forked"])
def test_a_hit_comes_after_the_work_that_was_using_the_row(libcuda_double, n_more):
    backend = Backend("double")
    with vattn.init(backend.config(max_extent_bytes=backend.page_bytes)) as cache:
        prefixes = vattn.PrefixCache(cache)
        text = tokens(2 * backend.page_tokens)
        wanted = [*text, 1] if n_more > 0 else text[:n_more]
        for stream, waits in [(1, 0), (1, 0), (2, 1)]:
            row, _ = prefixes.match(text, stream=1)
            cache.step({row: len(text)})
            prefixes.insert(row, text)
            cache.free(row, stream=1)
            before = calls(cache).get("stream_wait_fence", 0)
            row, n_cached = prefixes.match(wanted, stream=stream)
            assert n_cached > 0
            assert calls(cache).get("stream_wait_fence", 0) - before == waits
            cache.free(row, stream=stream)
            prefixes.clear()


BAD_MATCHES = [
    ({"token_ids": []}, ValueError, "token_ids has 0 entries, expected 1 to max_seq_len = 2048"),
    ({"token_ids": [1] * 2049}, ValueError, "has 2049 entries, expected 1 to max_seq_len = 2048"),
    ({"token_ids": [1.5]}, TypeError, r"token_ids\[0\] is 1.5"),
    ({"token_ids": [1], "salt": 1.5}, TypeError, "salt is a float"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_MATCHES)
def test_a_bad_match_takes_no_row(engine, options, error, message):
    with pytest.raises(error, match=message):
        engine.prefixes.match(**options)
    assert engine.cache.stats().rows_active == 0
    assert engine.prefixes.stats().lookups == 0


BAD_INSERTS = [
    ({"row": 0, "token_ids": tokens(81)}, ValueError, "81.* 80"),
    ({"row": 1, "token_ids": tokens(5)}, ValueError, "row 1 is "),
    ({"row": 0, "token_ids": []}, ValueError, "prefix of 0 tokens, .* 80; keep 1 to as many"),
    ({"row": 4, "token_ids": tokens(5)}, ValueError, r"row 4 is not in 0\.\.3"),
    ({"row": -1, "token_ids": tokens(5)}, ValueError, r"row -1 is not in 0\.\.3"),
    ({"row": 0.0, "token_ids": tokens(5)}, TypeError, "float"),
    ({"row": 0, "token_ids": [-1]}, ValueError, r"token_ids\[0\] is -1"),
    ({"row": 0, "token_ids": [1], "salt": []}, TypeError, "salt is a list"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_INSERTS)
def test_a_bad_insert_leaves_what_was_known(engine, options, error, message):
    row, _ = engine.start(tokens(80))
    assert row == 0
    with pytest.raises(error, match=message):
        engine.prefixes.insert(**options)
    assert engine.prefixes.stats().entries == 1
    engine.cache.free(0)
    assert engine.start([*tokens(80), 1]) == (0, 80)


def test_a_cache_with_a_window_is_refused():
    with (
        vattn.init(config(window=64)) as cache,
        pytest.raises(ValueError, match=r"sliding window, .*; use a cache without"),
    ):
        vattn.PrefixCache(cache)


@pytest.mark.parametrize(
    ("block_tokens", "error", "message"),
    [
        (0, ValueError, "block_tokens is 0, expected at least 1"),
        (1.5, TypeError, "block_tokens is 1.5, expected an int"),
    ],
)
def test_a_block_has_a_token(engine, block_tokens, error, message):
    with pytest.raises(error, match=message):
        vattn.PrefixCache(engine.cache, block_tokens=block_tokens)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ({}, 32),  # a page of 64 KiB has 32 tokens of 2 KiB
        ({"layout": "per_layer"}, 64),  # 128 of 512 bytes: too many
        ({"num_layers": 16}, 16),  # 4: too few
    ],
)
def test_a_block_is_about_a_page(shape, block):
    with vattn.init(config(**shape)) as cache:
        assert repr(vattn.PrefixCache(cache)).startswith(
            f"<vattn.PrefixCache blocks of {block} tokens of <vattn.KVCache "
        )


def test_a_closed_cache_finds_nothing(engine):
    engine.serve(tokens(80))
    engine.cache.close()
    with pytest.raises(ValueError, match="closed"):
        engine.prefixes.match([*tokens(80), 1])


def is_refused(call):
    with contextlib.suppress(vattn.DriverError):
        call()
        return False
    return True


def test_a_forked_child_gets_an_error_though_a_thread_held_the_lock(engine):
    row, _ = engine.start(tokens(80))
    prefixes = engine.prefixes
    refused = 0
    with prefixes._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # ends a child that waits for the lock
            try:
                for call in (prefixes.clear, prefixes.stats):
                    refused += is_refused(call)
                refused += is_refused(lambda: prefixes.match([1]))
                refused += is_refused(lambda: prefixes.insert(row, [1]))
            finally:
                os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    assert prefixes.match([*tokens(80), 1]).n_cached == 80
