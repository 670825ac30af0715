"""One range of addresses of which any page may have memory."""

from __future__ import annotations

import gc
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from backends import BACKENDS

import vattn
from vattn.testing import page_range_with_faults

everywhere = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
on_host = pytest.mark.parametrize("backend", ["host"], indirect=True)
on_double = pytest.mark.parametrize("backend", ["double"], indirect=True)

MIB = 2**20


@pytest.fixture
def make(backend):
    """Makes ranges of the backend's default pages; checks and closes them at the end."""
    made = []

    def make_range(pages=16, **options):
        made.append(vattn.PageRange(pages * backend.page_bytes, device=backend.device, **options))
        return made[-1]

    yield make_range
    for pages in made:
        pages.check()
        pages.close()


def elements(pages, first, count=1):
    """What a tensor of bytes has of some pages."""
    return slice(first * pages.page_bytes, (first + count) * pages.page_bytes)


def resident_kib(address):
    """What of the mapping that holds an address is in memory; None if it is not one of ours."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) .*", line):
            inside = int(match[1], 16) <= address < int(match[2], 16) and "memfd:vattn" in line
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    return None


def memfd_mappings():
    return Path("/proc/self/maps").read_text().count("memfd:vattn")


@everywhere
def test_a_size_is_rounded_up_to_pages(backend):
    size = 3 * backend.page_bytes + 1
    with vattn.PageRange(size, device=backend.device) as pages:
        assert pages.page_bytes == backend.page_bytes  # the default
        assert (pages.n_pages, pages.size) == (4, 4 * backend.page_bytes)
        assert pages.tensor().shape == (4 * backend.page_bytes,)
        pages.map([(3, 1)])
        pages.tensor()[-1] = 1


@everywhere
def test_pages_can_be_larger_than_the_driver_needs(backend):
    page_bytes = 4 * backend.page_bytes
    with vattn.PageRange("64MiB", device=backend.device, page_bytes=page_bytes) as pages:
        assert (pages.page_bytes, pages.size) == (page_bytes, 64 * MIB)
        pages.map([(1, 1)])
        buffer = pages.tensor()
        buffer[elements(pages, 1)] = 5
        assert bool((buffer[elements(pages, 1)] == 5).all())
        pages.check()


@everywhere
def test_mapped_pages_keep_what_is_written_to_them(make):
    pages = make()
    buffer = pages.tensor("uint8")
    pages.map([(8, 2), (1, 3)])
    assert pages.mapped_runs() == [(1, 3), (8, 2)]
    for page in (1, 2, 3, 8, 9):
        assert pages.is_mapped(page)
        buffer[elements(pages, page)] = page
    assert pages.unmap([(2, 1), (9, 1)]) == 2
    pages.map([(9, 2)])
    assert pages.mapped_runs() == [(1, 1), (3, 1), (8, 3)]
    assert pages.mapped_pages == 5
    for page in (1, 3, 8):
        assert bool((buffer[elements(pages, page)] == page).all())


@everywhere
def test_runs_may_be_any_sequence_of_pairs(make):
    pages = make()
    pages.map(((0, 2), [4, 1]))
    assert pages.mapped_runs() == [(0, 2), (4, 1)]
    with pytest.raises(TypeError):
        pages.map([3, 1])


@everywhere
@pytest.mark.parametrize(
    ("dtype", "item_bytes"),
    [("int8", 1), (torch.bfloat16, 2), ("float32", 4), (torch.float8_e4m3fn, 1)],
)
def test_the_tensor_has_the_dtype_that_was_asked_for(make, dtype, item_bytes):
    pages = make()
    tensor = pages.tensor(dtype)
    assert str(tensor.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert tensor.shape == (pages.size // item_bytes,)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() == pages.tensor().data_ptr()


@everywhere
def test_an_alias_is_one_page_of_memory(make):
    pages = make()
    buffer = pages.tensor()
    pages.map([(3, 1)])
    pages.alias(4, 12)
    assert pages.mapped_runs() == [(3, 13)]
    assert pages.mapped_pages == 2
    buffer[elements(pages, 3)] = 1
    buffer[elements(pages, 5)] = 77
    for page in range(4, 16):
        assert bool((buffer[elements(pages, page)] == 77).all())
    assert bool((buffer[elements(pages, 3)] == 1).all())
    assert pages.unmap([(4, 11)]) == 11
    assert int(buffer[elements(pages, 15)][0]) == 77
    assert pages.mapped_pages == 2
    assert pages.unmap([(15, 1)]) == 1
    assert pages.mapped_pages == 1


@everywhere
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pages: pages.map([(0, 2), (16, 1)]), r"run \(16, 1\) is not in the range of 16"),
        (lambda pages: pages.map([(-1, 1)]), r"run \(-1, 1\) is not in the range"),
        (lambda pages: pages.map([(0, 0)]), "a count of at least 1"),
        (lambda pages: pages.map([(8, 4), (9, 1)]), r"run \(9, 1\) overlaps run \(8, 4\)"),
        (lambda pages: pages.map([(2, 3)]), "page 4 is mapped already; unmap it first"),
        (lambda pages: pages.alias(4, 2), "page 4 is mapped already"),
        (lambda pages: pages.unmap([(4, 1), (6, 1)]), "page 6 is not mapped; mapped_runs"),
        (lambda pages: pages.is_mapped(16), r"page 16 is not in 0\.\.15"),
        (lambda pages: pages.tensor("int3"), "dtype is 'int3'"),
    ],
)
def test_a_wrong_call_changes_nothing(make, call, message):
    pages = make()
    pages.map([(4, 2)])
    with pytest.raises(ValueError, match=message):
        call(pages)
    assert pages.mapped_runs() == [(4, 2)]


@everywhere
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": "much"}, "size is 'much'"),
        ({"size": MIB, "device": "tpu"}, "device is 'tpu', expected 'cpu', 'cuda' or 'cuda:N'"),
        ({"size": MIB, "device": "cpu", "page_bytes": 3 * 4096}, "page_bytes is 12288"),
    ],
)
def test_what_cannot_be_is_refused(backend, options, message):
    with pytest.raises(ValueError, match=message):
        vattn.PageRange(**options)


@everywhere
def test_a_misspelt_environment_variable_is_an_error(make, monkeypatch):
    monkeypatch.setenv("VATTN_LOG_LEVL", "debug")
    with pytest.raises(ValueError, match="unknown environment variable VATTN_LOG_LEVL"):
        make()


@on_double
def test_a_range_may_be_larger_than_the_memory(make, libcuda_double):
    libcuda_double.vattn_double_set_total_memory(4 * 2 * MIB)
    pages = make(pages=16)
    pages.map([(0, 1), (12, 2)])
    with pytest.raises(vattn.OutOfPagesError, match="need 2 pages, 1 free; unmap") as info:
        pages.map([(5, 2)])
    assert (info.value.needed, info.value.free) == (2, 1)
    assert pages.mapped_runs() == [(0, 1), (12, 2)]
    pages.map([(5, 1)])


@everywhere
def test_whichever_driver_call_fails_nothing_has_changed(backend):
    pages, faults = page_range_with_faults(16 * backend.page_bytes, device=backend.device)
    pages.map([(8, 1)])
    for nth in range(1, 6):  # three creations, two runs
        faults.fail_nth(nth)
        with pytest.raises(vattn.DriverError):
            pages.map([(0, 2), (4, 1)])
        assert faults.injected == 1
        assert pages.mapped_runs() == [(8, 1)]
        pages.check()
    pages.map([(0, 2), (4, 1)])
    faults.fail_nth(3)  # record, wait, unmap
    assert pages.unmap([(0, 2), (8, 1)]) == 1
    assert pages.mapped_runs() == [(0, 2), (4, 1)]
    assert pages.unmap([(0, 2)]) == 2
    pages.check()
    pages.close()


@everywhere
def test_faulting_in_can_be_left_to_another_call(make):
    pages = make()

    def populated():
        calls = pages.pool.driver_calls()["other"]
        return calls["populate"]["count"] if "populate" in calls else 0

    pages.map([(0, 2)], populate=False)
    assert populated() == 0
    pages.populate([(0, 2)])
    assert populated() == 1
    pages.populate([(5, 1)])  # has no memory: left alone
    assert pages.mapped_runs() == [(0, 2)]
    with pytest.raises(ValueError, match="16"):
        pages.populate([(15, 2)])


@on_host
def test_mapped_memory_is_there_and_unmapped_memory_is_not(make):
    pages = make(pages=512)
    address = pages.tensor().data_ptr()
    assert resident_kib(address) is None
    pages.map([(0, 512)])
    assert resident_kib(address) == 512 * 64
    assert pages.unmap([(0, 511)]) == 511
    assert resident_kib(address) is None
    assert resident_kib(address + 511 * pages.page_bytes) == 64
    pages.alias(100, 3)
    assert resident_kib(address + 100 * pages.page_bytes) == 64


@on_host
def test_memory_that_comes_back_is_zero(make):
    pages = make()
    buffer = pages.tensor()
    pages.map([(0, 4)])
    buffer[elements(pages, 0, 4)] = 1
    pages.unmap([(0, 4)])
    assert int(buffer.abs().max()) == 0  # reading what has no memory
    pages.map([(0, 4)])
    assert int(buffer[elements(pages, 0, 4)].abs().max()) == 0


@on_host
def test_runs_that_grow_in_turns_are_few_mappings(make):
    gc.collect()
    before = memfd_mappings()
    pages = make(pages=256)
    for page in range(64):
        pages.map([(page, 1), (100 + page, 1)])
    assert memfd_mappings() - before <= 4  # a first page may have the other run behind it


@on_host
def test_a_tensor_outlives_the_range_and_close_takes_its_memory(make):
    pages = vattn.PageRange("1MiB")
    pages.map([(0, 2)])
    buffer = pages.tensor()
    buffer[: 2 * pages.page_bytes] = 7
    del pages
    gc.collect()
    others = [make() for _ in range(4)]  # would take the addresses if they were free
    assert int(buffer[: 2 * 65536].min()) == 7
    assert all(other.tensor().data_ptr() != buffer.data_ptr() for other in others)

    closed = make()
    closed.map([(0, 2)])
    buffer = closed.tensor()
    buffer[0] = 7
    closed.close()
    assert int(buffer[0]) == 0


@everywhere
def test_a_closed_range_says_so(make):
    pages = make()
    pages.map([(0, 2)])
    with pages as same:
        assert same is pages
        assert "16 pages of" in repr(pages)
        assert "2 mapped" in repr(pages)
    assert pages.closed
    assert "closed" in repr(pages)
    pages.close()
    assert (pages.mapped_pages, pages.mapped_runs()) == (0, [])
    for call in (
        lambda: pages.map([(0, 1)]),
        lambda: pages.alias(0, 1),
        lambda: pages.unmap([(0, 1)]),
        pages.tensor,
    ):
        with pytest.raises(ValueError, match="the range is closed"):
            call()


@on_double
def test_unmapping_waits_for_the_stream_and_lets_others_run(make, libcuda_double):
    stream = 0x40
    pages = make()
    pages.map([(0, 4)])
    libcuda_double.vattn_double_set_stream_busy(stream, 1)
    unmapped = []
    thread = threading.Thread(target=lambda: unmapped.append(pages.unmap([(1, 2)], stream=stream)))
    thread.start()
    thread.join(timeout=0.2)
    still_mapped = pages.mapped_runs()
    pages.map([(8, 1)])
    libcuda_double.vattn_double_set_stream_busy(stream, 0)
    thread.join(timeout=20)
    assert still_mapped == [(0, 4)]
    assert unmapped == [2]
    assert pages.mapped_runs() == [(0, 1), (3, 1), (8, 1)]


@on_host
def test_mapping_lets_other_python_threads_run(make):
    pages = make(pages=1024)  # 64 MiB to fault in: tens of milliseconds
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1)  # so that only a released GIL lets the other thread run
    thread = threading.Thread(target=count)
    try:
        thread.start()
        before = counted[0]
        pages.map([(0, 1024)])
        during = counted[0] - before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert during > 0


@everywhere
def test_threads_may_share_a_range(make):
    pages = make()
    buffer = pages.tensor()
    errors = []

    def serve(first):
        try:
            for _ in range(20):
                pages.map([(first, 3)])
                buffer[elements(pages, first, 3)] = first
                assert int(buffer[elements(pages, first, 3)].min()) == first
                assert pages.unmap([(first, 3)]) == 3
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(first,)) for first in (0, 4, 8, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert pages.mapped_pages == 0
