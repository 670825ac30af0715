"""What the kernel does for the host driver: huge pages, holes, limits."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from backends import Backend, wait_until

import vattn
from vattn.pool import open_pool
from vattn.testing import settle

MIB = 2**20


def host_cache(**options):
    return vattn.init(Backend("host").config(**options))


def smaps_kib(name, address):
    """A counter of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith(name + ":"):
            return int(line.split()[1])
    return 0


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def test_only_touched_tokens_take_memory_and_closing_gives_it_back():
    cache = host_cache(pages=2048, max_seq_len=65536)  # 128 MiB
    row = cache.alloc()
    before = resident_mib()
    cache.step({row: 65536})
    assert resident_mib() - before < 32
    for layer in range(2):
        for tensor in cache.kv(layer, rows=row):
            tensor.fill_(1.0)
    assert resident_mib() - before > 120
    cache.free(row)
    cache.trim()
    assert resident_mib() - before < 32
    cache.close()


def test_the_background_thread_faults_pages_in_ahead_of_use():
    cache = host_cache(pages=1024, max_seq_len=32768, lookahead=16)  # 64 MiB
    before = resident_mib()
    row = cache.alloc(seq_len=32768)
    wait_until(lambda: resident_mib() - before > 60)
    assert cache.seq_lens[row] == 0
    cache.close()


def test_a_rehearsal_maps_but_touches_nothing_and_may_exceed_the_machine():
    config = Backend("host").config(memory="64TiB", max_seq_len=32768, lookahead=16)
    cache = vattn.KVCache(config, open_pool(config, rehearsal=True))
    before = resident_mib()
    row = cache.alloc(seq_len=32768)
    settle(cache)
    assert cache.mapped_tokens(row) >= 32768
    assert cache.stats().mapped_bytes >= 64 * MIB
    assert resident_mib() - before < 16
    cache.close()


def test_neighbouring_extents_are_one_mapping():
    cache = host_cache(pages=1024, max_extent_bytes=64 * 1024, max_seq_len=32768)
    row = cache.alloc()
    cache.step({row: 32768})
    address = cache.kv(0)[0][row].data_ptr()
    assert smaps_kib("Size", address) == 64 * 1024
    cache.close()


def memfd_mappings():
    return Path("/proc/self/maps").read_text().count("memfd:vattn")


def test_rows_that_grow_in_turns_are_few_mappings():
    gc.collect()
    before = memfd_mappings()  # of caches that earlier tests still hold
    cache = host_cache(pages=1024, layout="per_layer", order="HND", max_seq_len=32768)
    rows = [cache.alloc() for _ in range(4)]
    regions = len(rows) * cache.regions_per_row
    for tokens in range(256, 32768 // 4, 256):  # a page of 64 KiB in each region
        cache.step({row: tokens for row in rows})
    mappings = memfd_mappings() - before
    assert cache.stats().mapped_bytes // cache.page_bytes == 31 * regions
    assert mappings <= 2 * regions
    cache.close()


def test_large_extents_ask_for_huge_pages():
    enabled = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    if "[advise]" not in enabled and "[always]" not in enabled:
        pytest.skip(f"this kernel gives no huge pages to shared memory: {enabled.strip()}")
    cache = host_cache(pages=32, page_bytes=2 * MIB, memory=64 * MIB, max_seq_len=32768)
    row = cache.alloc()
    cache.step({row: 32768})
    cache.kv(0)[0][row].fill_(1.0)
    assert smaps_kib("ShmemPmdMapped", cache.kv(0)[0][row].data_ptr()) > 0
    cache.close()


def test_too_many_mappings_is_an_error_that_names_the_way_out():
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 200_000:
        pytest.skip(f"vm.max_map_count is {limit}: too many for a test")
    cache = host_cache(  # 4,096 regions in a row, each a mapping and a gap
        num_layers=128, num_kv_heads=16, head_dim=8, layout="per_layer", order="HND",
        page_bytes=4096, memory="1GiB", max_seq_len=1024, max_batch_size=limit // 4096,
    )  # fmt: skip

    def use_every_row():
        while True:
            cache.step({cache.alloc(): 1})

    with pytest.raises(vattn.DriverError, match=rf"vm.max_map_count is {limit}, raise it") as info:
        use_every_row()
    assert info.value.code == 12  # ENOMEM
    assert "larger page_bytes" in str(info.value)
    used = cache.stats().rows_active - 1
    assert cache.seq_lens == [1] * used + [0] * (cache.config.max_batch_size - used)
    cache.check()
    cache.free(0)
    cache.trim()
    cache.step({used: 1})
    cache.kv(127)[1][used, 15, 0].fill_(1.0)
    cache.close()


def test_a_write_beyond_the_mapped_tokens_does_not_reach_another_row():
    """The process ends, as the documentation says, instead of corrupting a neighbour."""
    import subprocess
    import sys

    code = """
import vattn
cache = vattn.init(vattn.CacheConfig(
    num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", lookahead=0,
    max_batch_size=2, max_seq_len=65536, device="cpu", memory="1MiB"))
row = cache.alloc()
cache.step({row: 1})
cache.kv(0)[0][row, 60000] = 1.0
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert result.returncode == -11


def test_zeros_are_read_where_no_memory_is_even_by_attention():
    cache = host_cache(order="HND")
    rows = [cache.alloc() for _ in range(4)]
    cache.step({row: 5 for row in rows})
    for tensor in cache.kv(0, max_len=5):
        tensor.fill_(1.0)
    k, v = cache.kv(0)
    out = torch.nn.functional.scaled_dot_product_attention(torch.ones(4, 2, 1, 64), k, v)
    assert bool(out.isfinite().all())
    cache.close()
