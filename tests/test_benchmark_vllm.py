"""benchmarks.vllm: its arithmetic, and what it reads from the kernel. No vLLM is started."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vattn
from benchmarks.vllm import memory, model, picture, report
from benchmarks.vllm.__main__ import _parse
from benchmarks.vllm.engines import Played
from benchmarks.vllm.figures import Spread, Times, percentile, pooled, ratios
from benchmarks.vllm.load import Limits, lengths, make_load
from benchmarks.vllm.memory import Mapped
from vattn.bench.common import NothingMeasured

SMAPS = """\
7f0000000000-7f0040000000 rw-p 00000000 00:00 0
Size:            1048576 kB
Rss:              524288 kB
Pss:                  12 kB
7f0050000000-7f0050020000 rw-s 00010000 00:01 2061 /memfd:vattn (deleted)
Size:                128 kB
Rss:                  64 kB
7f0060000000-7f0060010000 rw-s 00030000 00:01 2061 /memfd:vattn (deleted)
Rss:                  32 kB
7f0070000000-7f00b0001000 r-xp 00000000 fe:00 77 /usr/lib/lib with a space.so
Rss:                   8 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Rss:                  16 kB
VmFlags: rd wr mr
"""

# What is read from the kernel.


def test_smaps_are_read() -> None:
    assert memory.parse_smaps("1000-3000 rw-p 00000000 00:00 0 \nRss: 4 kB\n") == [
        Mapped(8192, "", 4096)  # the kernel writes a blank where a path would be
    ]
    assert memory.parse_smaps(SMAPS) == [
        Mapped(2**30, "", 2**29),
        Mapped(0x20000, "/memfd:vattn (deleted)", 65536),
        Mapped(0x10000, "/memfd:vattn (deleted)", 32768),
        Mapped(0x40001000, "/usr/lib/lib with a space.so", 8192),
        Mapped(0x21000, "[stack]", 16384),
    ]


def test_vattns_memory_is_all_that_its_files_are_mapped_at() -> None:
    assert memory.of_vattn(memory.parse_smaps(SMAPS)) == 98304


def test_stock_memory_is_that_of_the_largest_anonymous_mapping() -> None:
    mappings = memory.parse_smaps(SMAPS)
    assert memory.of_buffer(mappings, 2**30) == 2**29
    # Weights may be more of what is resident than a buffer that is still empty.
    assert memory.of_buffer([Mapped(2**20, "", 2**20), Mapped(2**30, "", 4096)], 2**30) == 4096
    # A neighbour that the kernel joined with the buffer is not the buffer's.
    assert memory.of_buffer([Mapped(2**30, "", 2**30)], 2**20) == 2**20
    with pytest.raises(ValueError, match="has 1073741824 bytes, the buffer has 1073741825"):
        memory.of_buffer(mappings, 2**30 + 1)
    with pytest.raises(ValueError, match="has 0 bytes"):
        memory.of_buffer([], 1)


def test_of_this_process_only_touched_memory_is_resident() -> None:
    size = 64 * 2**20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE) as buffer:
        buffer.madvise(mmap.MADV_NOHUGEPAGE)
        assert max(m.size for m in memory.smaps(os.getpid()) if not m.path) >= size
        before = sum(m.rss for m in memory.smaps(os.getpid()) if not m.path)
        buffer[: 8 * 2**20] = bytes(8 * 2**20)
        grown = sum(m.rss for m in memory.smaps(os.getpid()) if not m.path) - before
        # Python's own memory comes and goes with the 8 MiB of zeros.
        assert 7.5 * 2**20 < grown < 20 * 2**20


def test_three_accounts_of_vattns_memory_agree() -> None:
    def accounts() -> tuple[int, int]:
        files = memory.files_of_vattn(os.getpid())
        return memory.of_vattn(memory.smaps(os.getpid())), memory.file_bytes(files)

    nothing = accounts()
    with vattn.PageRange("8MiB", page_bytes="64KiB") as pages:
        pages.map([(0, 3), (100, 2)])
        resident, in_file = (now - then for now, then in zip(accounts(), nothing, strict=True))
        assert resident == in_file == pages.mapped_pages * 65536 == 5 * 65536
        pages.unmap([(0, 2)])
        resident, in_file = (now - then for now, then in zip(accounts(), nothing, strict=True))
        assert resident == in_file == 3 * 65536


def test_descendants_are_found_with_their_own() -> None:
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", inner], stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 30
        while len(memory.descendants(child.pid)) < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        grandchildren = memory.descendants(child.pid)
        assert len(grandchildren) == 1
        mine = memory.descendants(os.getpid())
        assert mine.index(child.pid) < mine.index(grandchildren[0])
        assert child.stdin is not None
        child.stdin.close()


# Arithmetic.

LOAD = [{"at_s": 1.0, "generate": 3}, {"at_s": 2.0, "generate": 2}]
ANSWERS = [{"token_s": [1.5, 1.75, 2.25]}, {"token_s": [2.25, 5.0]}]


def test_times_of_a_load() -> None:
    times = Times.of(LOAD, ANSWERS)
    assert times.seconds == 4.0
    assert times.requests_per_s == 0.5
    assert times.first_ns == [0.5e9, 0.25e9]
    assert times.between_ns == [0.25e9, 0.5e9, 2.75e9]


def test_a_request_that_got_too_few_tokens_is_no_measurement() -> None:
    with pytest.raises(NothingMeasured, match="got 2 tokens, asked for 3"):
        Times.of(LOAD, [{"token_s": [1.0, 2.0]}, ANSWERS[1]])
    with pytest.raises(ValueError, match="shorter"):
        Times.of(LOAD, ANSWERS[:1])


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 50), (99, 99), (100, 100), (1, 1), (95, 95)]
)
def test_percentiles_of_a_hundred(percent: int, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == expected


def test_percentiles_of_few() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert percentile([7.0], 1) == 7.0
    with pytest.raises(NothingMeasured):
        percentile([], 50)


def test_spread_over_rounds() -> None:
    spread = Spread.of([3.0, 1.0, 2.0, 10.0])
    assert (spread.n, spread.median, spread.min, spread.max) == (4, 2.5, 1.0, 10.0)
    assert spread.rounds == [3.0, 1.0, 2.0, 10.0]
    assert Spread.of([3.0, 1.0, 2.0]).median == 2.0
    with pytest.raises(NothingMeasured):
        Spread.of([])


def test_ratios_compare_round_with_round() -> None:
    # The ratio of the medians would be 1.
    assert ratios([2.0, 4.0, 8.0], [4.0, 16.0, 2.0]).rounds == [0.5, 0.25, 4.0]
    assert ratios([2.0, 4.0, 8.0], [4.0, 16.0, 2.0]).median == 0.5
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_samples_of_all_rounds_are_summarized_together() -> None:
    found = pooled([[1.0, 2.0], [9.0]])
    assert (found.n, found.median, found.max) == (3, 2.0, 9.0)


# Loads.


def test_loads_are_the_same_for_the_same_seed_and_share_no_prefix() -> None:
    prompts, generated = lengths(20, None, Limits())
    load = make_load(prompts, generated, rate=None, seed=1)
    assert load == make_load(prompts, generated, rate=None, seed=1)
    assert [len(request.prompt) for request in load] == prompts.tolist()
    assert [request.generate for request in load] == generated.tolist()
    assert {request.at_s for request in load} == {0.0}
    other = make_load(prompts, generated, rate=None, seed=2)
    assert all(a.prompt != b.prompt for a, b in zip(load, other, strict=True))
    assert max(max(request.prompt) for request in load) < model.VOCABULARY


def test_poisson_arrivals_begin_at_once_and_have_the_rate() -> None:
    prompts, generated = lengths(2000, None, Limits())
    at = [r.at_s for r in make_load(prompts[:2000], generated, rate=10.0, seed=0)]
    assert at[0] == 0.0
    assert at == sorted(at)
    assert 180 < at[-1] < 220


def test_lengths_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    prompts, generated = lengths(500, None, Limits(prompt=300, generated=20))
    assert (prompts.max(), generated.max()) == (300, 20)
    assert min(prompts.min(), generated.min()) >= 1
    trace = tmp_path / "azure.csv"
    lines = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,5000,0"]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    prompts, generated = lengths(2, trace, Limits(prompt=1024, generated=96))
    assert (prompts.tolist(), generated.tolist()) == ([374, 1024], [44, 1])
    with pytest.raises(ValueError, match=r"azure\.csv has 2 requests; give --requests"):
        lengths(3, trace, Limits())


# Engines.


def test_a_block_has_keys_and_values_of_all_layers() -> None:
    # 4 layers, 2 heads, keys and values of 64, float32, 32 tokens.
    assert model.block_bytes(model.Shape()) == 4 * 2 * 2 * 64 * 4 * 32 == 131072


def test_engines_differ_only_in_what_is_compared(tmp_path: Path) -> None:
    arguments = {
        kind: model.engine_arguments(kind, tmp_path, model.Shape(), "n") for kind in model.KINDS
    }
    transfers = {kind: a.pop("kv_transfer_config", None) for kind, a in arguments.items()}
    assert all(a == arguments["stock"] for a in arguments.values())
    assert transfers["stock"] is None
    extra = {k: t["kv_connector_extra_config"] for k, t in transfers.items() if t}
    assert {k: e["mode"] for k, e in extra.items()} == {
        "elastic": "elastic",
        "elastic-budget": "elastic",
        "contiguous": "contiguous",
    }
    assert {k for k, e in extra.items() if "budget" in e} == {"elastic-budget"}
    model.write_model(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 4


def test_requests_longer_than_the_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse(["--max-prompt", "2000"])
    assert "2096 tokens together, the model has 2048" in capsys.readouterr().err


# Reports.


def played(scale: float, peak: int, idle: int) -> Played:
    answers = [{"token_s": [t * scale for t in a["token_s"]]} for a in ANSWERS]
    load = [{"at_s": 0.0, "generate": 3}, {"at_s": 0.0, "generate": 2}]
    return Played(
        times=Times.of(load, answers),
        samples=[(0.5, peak), (6.0, idle)],
        loaded_bytes=peak - 1,
        idle_bytes=idle,
    )


@pytest.fixture
def rows() -> list[report.Row]:
    stock = [played(1.0, 1000, 1000), played(2.0, 1000, 1000), played(4.0, 1000, 1000)]
    ours = [played(2.0, 500, 10), played(2.0, 700, 12), played(5.0, 600, 11)]
    return [
        report.row_of(kind, "at-once", rounds, stock)
        for kind, rounds in (("stock", stock), ("elastic", ours))
    ]


def test_a_row_compares_with_stock_in_the_same_round(rows: list[report.Row]) -> None:
    stock, ours = rows
    assert stock["requests_per_s_over_stock"]["rounds"] == [1.0, 1.0, 1.0]
    assert stock["requests_per_s"]["rounds"] == [0.4, 0.2, 0.1]
    assert (ours["requests"], ours["tokens"]) == (2, 5)
    assert ours["requests_per_s_over_stock"]["rounds"] == pytest.approx([0.5, 1.0, 0.8])
    assert ours["requests_per_s_over_stock"]["median"] == pytest.approx(0.8)
    assert ours["p50_ttft_ns_over_stock"]["rounds"] == pytest.approx([2.0, 1.0, 1.25])
    assert ours["peak_bytes"]["median"] == 600
    assert ours["idle_bytes"] == [10, 12, 11]


def test_targets_take_the_median_ratio_and_the_worst_idle_round(rows: list[report.Row]) -> None:
    speed, idle = report.targets_of(rows, {"elastic": 11})
    assert speed.measured == pytest.approx(0.8)
    assert not speed.met
    assert (idle.measured * 2**20, idle.met) == (12, False)
    _, idle = report.targets_of(rows, {"elastic": 12})
    assert idle.met
    another = rows[1] | {"arrivals": "poisson", "idle_bytes": [13, 1, 1]}
    _, idle = report.targets_of([*rows, another], {"elastic": 12})
    assert not idle.met


def test_the_peak_is_the_most_that_was_seen() -> None:
    one = played(1.0, 500, 10)
    assert one.peak_bytes == 500
    one.loaded_bytes = 501
    assert one.peak_bytes == 501


def test_tables_and_picture_show_every_engine(
    rows: list[report.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = [played(1.0, 2**20, 2**10)]
    report.print_rows(rows, report.measurements_of("elastic", "at-once", rounds))
    shown = capsys.readouterr().out
    assert "3 rounds" in shown
    assert "0.800 (0.500-1.000)" in shown
    assert "idle 0.00 MiB" in report.one_line("elastic", "at-once", rounds[0])
    series = {kind: [(0.0, 2**20), (1.0, 2**21)] for kind in model.KINDS}
    paths = picture.draw(series, tmp_path / "memory")
    assert [path.name for path in paths] == ["memory.png", "memory.svg"]
    drawn = paths[1].read_text()
    assert all(label in drawn for label in ("stock vLLM", "elastic, with a budget", "contiguous"))
