"""What outlives what: tensors, caches, forks, threads, the interpreter."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from backends import Backend

import vattn


@pytest.fixture
def config():
    return Backend("host").config(lookahead=16)


def cache_threads():
    """Threads of this process, by the kernel's count."""
    return len(os.listdir("/proc/self/task"))


def run_python(code, **environment):
    """Runs code in an interpreter of its own; returns what it did."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


MAKE = """
    import os, torch, vattn
    config = vattn.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32",
                               max_batch_size=2, max_seq_len=4096, device="cpu", memory="4MiB")
    cache = vattn.init(config)
    row = cache.alloc(5)
    cache.step({row: 5})
    k, v = cache.kv(0)
    k[row, :5] = 3.0
"""


def test_a_tensor_outlives_the_cache_with_its_data(config):
    cache = vattn.init(config)
    row = cache.alloc()
    cache.step({row: 40})
    k, v = cache.kv(1)
    k[row, :40], v[row, :40] = 1.5, 2.5
    part = k[row, 10:20]
    del cache, k
    gc.collect()
    others = [vattn.init(config) for _ in range(4)]  # would take the addresses if they were free
    assert bool((part == 1.5).all())
    assert bool((v[row, :40] == 2.5).all())
    v[row, :40] = 9.0
    assert all(other.kv(1)[1].data_ptr() != v.data_ptr() for other in others)


def test_after_close_a_tensor_reads_zeros_on_the_host(config):
    with vattn.init(config) as cache:
        row = cache.alloc()
        cache.step({row: 40})
        k, _ = cache.kv(0)
        k[row, :40] = 1.5
    assert bool((k[row, :40] == 0).all())


def test_reading_a_token_without_memory_gives_zeros_on_the_host(config):
    cache = vattn.init(config)
    k, v = cache.kv(0)
    assert float(k[3].abs().sum()) == 0 == float(v[0, -1].sum())
    cache.close()


def test_dropping_the_cache_and_its_tensors_gives_everything_back(config):
    before = cache_threads(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        cache = vattn.init(config)
        row = cache.alloc()
        cache.step({row: 40})
        k = cache.kv(0)[0]
        assert cache_threads() == before[0] + 1
        del cache
        gc.collect()
        assert cache_threads() == before[0]  # a tensor needs no thread
        del k
        gc.collect()
    assert (cache_threads(), len(os.listdir("/proc/self/fd"))) == before


def test_a_forked_child_gets_a_clear_error_and_does_the_parent_no_harm():
    result = run_python(
        MAKE
        + """
    pid = os.fork()
    if pid == 0:
        for call in (cache.alloc, lambda: cache.step([1, 0]), lambda: cache.free(row), cache.trim,
                     cache.stats, cache.check, lambda: cache.seq_lens):
            try:
                call()
            except vattn.DriverError as error:
                assert "forked" in str(error) and "spawn" in str(error), error
            else:
                os._exit(1)
        cache.close()
        del cache, k, v
        raise SystemExit(0)  # through every destructor and exit handler
    assert os.waitpid(pid, 0)[1] == 0
    assert bool((k[row, :5] == 3).all())
    cache.step({row: 4000})
    cache.check()
    print("fine")
    """
    )
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "del cache",
        "del k, v",
        "cache.close()",
        "cycle = [cache]; cycle.append(cycle)",
    ],
)
def test_the_interpreter_ends_cleanly_with_live_caches_and_tensors(ending):
    result = run_python(MAKE + f"    {ending}\n    print('end')\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


def test_the_interpreter_ends_cleanly_while_the_thread_is_mapping():
    result = run_python(
        """
        import vattn
        config = vattn.CacheConfig(num_layers=8, num_kv_heads=4, head_dim=64, dtype="float32",
                                   max_batch_size=8, max_seq_len=65536, device="cpu", order="HND",
                                   memory="1GiB", lookahead=4096)
        cache = vattn.init(config)
        for _ in range(8):
            cache.step({cache.alloc(20000): 1})
        """
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_threads_may_share_a_cache(config):
    cache = vattn.init(config)
    errors = []

    def serve():
        try:
            for n in range(1, 100):
                row = cache.alloc(n)
                cache.step({row: n})
                tokens = cache.kv(0, rows=row, max_len=n)[0]
                tokens.fill_(row)
                assert bool((tokens == row).all())
                cache.free(row)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    cache.check()
    cache.close()


@pytest.mark.parametrize("form", [dict, list, np.array])
def test_step_lets_other_python_threads_run(form):
    """While one thread maps for long, another one counts."""
    cache = vattn.init(  # 4,096 regions in a row, each mapped by a call: tens of milliseconds
        Backend("host").config(
            num_layers=128,
            num_kv_heads=16,
            head_dim=8,
            page_bytes=4096,
            memory="64MiB",
            max_seq_len=1024,
            max_batch_size=2,
            layout="per_layer",
            order="HND",
        )
    )
    row = cache.alloc()
    assert row == 0
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    sys_interval = sys.getswitchinterval()
    sys.setswitchinterval(1)  # so that only a released GIL lets the other thread run
    thread = threading.Thread(target=count)
    try:
        thread.start()
        before = counted[0]
        cache.step({row: 1} if form is dict else form([1, 0]))
        during = counted[0] - before
    finally:
        done.set()
        sys.setswitchinterval(sys_interval)
        thread.join()
    assert during > 0
    cache.close()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VATTN_LOG_LEVL", "debug", "unknown environment variable VATTN_LOG_LEVL"),
        ("VATTN_LOG_LEVEL", "loud", "VATTN_LOG_LEVEL is 'loud', expected one of error"),
    ],
)
def test_a_misspelt_environment_variable_is_an_error(config, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        vattn.init(config)


def test_views_are_not_copies(config):
    cache = vattn.init(config)
    first, again = cache.kv(0)[0], cache.kv(0)[0]
    assert first.data_ptr() == again.data_ptr()
    assert not first.is_contiguous()
    assert torch.equal(first[0, :0], again[0, :0])
    cache.close()
