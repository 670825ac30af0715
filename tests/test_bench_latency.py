"""What `vattn bench latency` writes, and that each figure has its calls behind it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_vmm_double import RawVmmDouble

import vattn
from vattn.bench.common import Distribution, Measurement, NothingMeasured
from vattn.bench.latency import (
    command,
    computing,
    floors,
    loop,
    measure,
    picture,
    published,
    reuse,
    together,
)
from vattn.bench.latency.calls import (
    MANY_HANDLES,
    MIB,
    ONE_HANDLE,
    POPULATED,
    RawCycle,
    kind_of,
    repeat,
)
from vattn.bench.latency.raw import HostVmm

GIB = 2**30
PAGE = 2 * MIB


@pytest.fixture
def raw() -> RawVmmDouble:
    return RawVmmDouble()


class Kernels:
    """Compute in the background that lasts until it is waited for, or not even as long."""

    in_flight_ns = 1e6

    def __init__(self, *, too_short: bool = False) -> None:
        self.too_short = too_short
        self.running = False

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def start(self) -> None:
        self.running = not self.too_short

    def still_running(self) -> bool:
        return self.running

    def wait(self) -> None:
        self.running = False


# What is written.


def run(out: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run it as the command line does; the record, and its measurements by name."""
    assert command.main(["--quick", "--out", str(out), *words]) == 0
    (path,) = out.glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    by_name = {m["name"]: m for m in record["measurements"]}
    assert len(by_name) == len(record["measurements"]), "two measurements have one name"
    for m in by_name.values():
        ns = m["ns"]
        assert ns["n"] >= 1
        assert 0 <= ns["min"] <= ns["median"] <= ns["p99"] <= ns["max"], m
        assert m["limit"] is None or m["limit"] in by_name, m
    return record, by_name


def test_all_parts_are_measured_and_drawn(tmp_path: Path) -> None:
    record, by_name = run(tmp_path)
    assert (record["benchmark"], record["quick"], record["not_measured"]) == (
        *("vmm_latency", True),
        {},
    )
    for backend in ("raw", "vattn"):
        for manner in ("one handle", "64 KiB handles"):
            for call in ("reserve", "create", "map", "unmap", "release", "free"):
                assert by_name[f"{backend}/{manner}/{PAGE}/{call}"]["calls"][call] >= 1
    assert by_name[f"raw/64 KiB handles/{PAGE}/create"]["calls"] == {"create": 32}
    populate = by_name[f"raw/one handle, populated/{PAGE}/populate"]
    assert populate["limit"] == f"floor/fill/{PAGE}"
    for name in ("floor/call", "floor/foreign_call", "floor/page_fault"):
        assert by_name[name]["ns"]["median"] > 0
    for what in (f"raw/{POPULATED.name}/{PAGE}", f"vattn/{ONE_HANDLE.name}/{PAGE}"):
        one, two = (by_name[f"threads/{what}/{state}/map"] for state in together.STATES)
        assert two["limit"] == one["name"]
    assert by_name[f"compute/raw/{POPULATED.name}/{PAGE}/computing/unmap"]["calls"] == {"unmap": 1}
    assert by_name[f"reuse/raw/{PAGE}/touch_fresh"]["calls"]["page faults"] >= 1
    assert by_name[f"reuse/raw/{PAGE}/touch_again"]["calls"]["page faults"] == 0
    mappings = command.QUICK_REQUESTS * 64
    assert (record["vattention_mappings"], record["vattention_scaled_down"]) == (mappings, True)
    for backend, calls in (("raw", mappings), ("vattn per_layer", mappings)):
        for call in ("create", "map+set_access"):
            total = by_name[f"vattention/{backend}/{call}/total"]
            assert total["calls"] == {call: calls}
            assert by_name[f"vattention/{backend}/{call}/call"]["calls"] == {call: 1}
    super_pages = by_name["vattention/vattn interleaved/map+set_access/total"]
    assert super_pages["calls"] == {"map+set_access": command.QUICK_REQUESTS}
    assert record["published_ns"]["set_access"] == 38_000
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"}


def test_only_the_parts_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, by_name = run(tmp_path, "--parts", "reuse,vattention")
    assert "Scaled down to 2 of 100 requests" in capsys.readouterr().out
    assert {name.split("/")[0] for name in by_name} == {"floor", "reuse", "vattention"}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"], "nothing to draw"


def test_a_part_that_measured_nothing_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HostVmm, "touch", lambda self, address, size: None)
    words = ["--quick", "--parts", "reuse,vattention", "--out", str(tmp_path)]
    assert command.main(words) == 1
    (path,) = tmp_path.iterdir()
    assert "took no page fault" in path.read_text()
    assert "vattention/raw/create/total" in path.read_text()
    assert "reuse: nothing was measured" in capsys.readouterr().out


def test_parts_that_lack_something_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "open_raw", lambda device: (None, "cuda-python is missing"))
    monkeypatch.setattr(command, "free_bytes", lambda device: 0)
    record, by_name = run(tmp_path, "--parts", "threads,compute,reuse,vattention")
    assert list(record["skipped"]) == ["compute", "reuse", "vattention"]
    assert {name.split("/")[1] for name in by_name if name.startswith("threads")} == {"vattn"}
    assert "reuse: skipped: cuda-python is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--parts", "sizes,speed"], "names speed, expected some of sizes"), (["-n", "0"], "-n is 0")],
)
def test_bad_options_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(words)


def test_the_picture_adds_access_to_mapping(tmp_path: Path) -> None:
    calls = {"create": 5.0, "map": 2.0, "set_access": 38.0, "unmap": 4.0, "release": 3.0}
    found = [
        Measurement(
            name=f"{backend}/{manner}/{size}/{call}", what="", ns=Distribution(1, ns, ns, ns, ns)
        )
        for backend in ("raw", "vattn")
        for manner in ("one handle", "2 MiB handles, access per run")
        for size in (PAGE, 4 * PAGE)
        for call, ns in calls.items()
    ]
    assert picture._lines("map", found)["raw", "one handle"] == [(PAGE, 40.0), (4 * PAGE, 40.0)]
    png, svg = picture.draw("cuda:0", found, [1.0], tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    for text in ("map + set access", "2 MiB handles, access per run, vattn", "floor of a call"):
        assert f">{text}</text>" in svg.read_text()


def test_the_published_loop_is_derived_from_single_calls() -> None:
    derived = published.loop_ns(6400)
    assert derived["map+set_access"] == 6400 * 40_000
    assert derived["create"] == 6400 * 29_000


# Calls, in balance.

MANNERS = [*measure.manners("cuda"), POPULATED]


@pytest.mark.parametrize("manner", MANNERS, ids=[manner.name for manner in MANNERS])
def test_a_cycle_gives_back_what_it_takes(raw: RawVmmDouble, manner: Any) -> None:
    cycle = RawCycle(raw, 4 * PAGE, manner)
    cycle.once()
    cycle.once()
    raw.check_nothing_left()
    pieces = 4 if manner.piece else 1
    runs = 1 if manner.access_per_run else pieces
    expected = {"reserve": 1, "create": pieces, "map": pieces, "set_access": runs}
    expected |= {"unmap": runs, "release": pieces, "free": 1}
    expected |= {"populate": 1} if manner.populate else {}
    assert raw.counts == {call: 2 * count for call, count in expected.items()}
    assert {call: count for call, count in cycle.counts.items() if count} == expected
    assert all(len(ns) == 2 for ns in cycle.samples.values())
    first = list(dict.fromkeys(raw.calls))
    assert first[:4] == ["reserve", "create", "map", "set_access"]
    assert first[-3:] == ["unmap", "release", "free"]


PARTS: dict[str, Callable[[RawVmmDouble], list[Measurement]]] = {
    "floors": lambda raw: floors.measure("cuda", raw, [PAGE, 2 * PAGE], 2),
    "reuse": lambda raw: reuse.measure("cuda:0", raw, 2, sizes=[PAGE]),
    "compute": lambda raw: computing.measure("cuda:0", raw, 2, work=Kernels(), sizes=[PAGE]),
    "loop": lambda raw: loop._raw_measurements(raw, requests=1, rounds=2),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_gives_back_what_it_takes(raw: RawVmmDouble, part: str) -> None:
    found = PARTS[part](raw)
    raw.check_nothing_left()
    assert raw.counts["map"] == raw.counts["set_access"]
    assert len({m.name for m in found}) == len(found)


def test_the_loop_makes_a_reservation_for_each_page(raw: RawVmmDouble) -> None:
    found = {m.name: m for m in loop._raw_measurements(raw, requests=2, rounds=3)}
    counts = Counter(raw.calls)
    for call in ("reserve", "create", "map", "set_access", "unmap", "release", "free"):
        assert counts[call] == 3 * 128
        assert found[f"vattention/raw/{call}/call"].ns.n == 3 * 128
        assert found[f"vattention/raw/{call}/total"].ns.n == 3
    both = found["vattention/raw/map+set_access/total"].ns.min
    assert both >= found["vattention/raw/map/total"].ns.min


def test_vattns_cache_makes_the_calls_of_the_loop_on_cuda(libcuda_double: Any) -> None:
    found = {m.name: m for m in loop._own_measurements("cuda:0", requests=2, rounds=1)}
    for manner, calls in (("per_layer", 128), ("interleaved", 2)):
        for call in ("create", "map+set_access"):
            total = found[f"vattention/vattn {manner}/{call}/total"]
            assert total.calls == {call: calls}


def test_what_does_not_fit_is_left_out() -> None:
    assert loop.requests_that_fit(15 * GIB) == 100
    assert loop.requests_that_fit(5 * GIB) == 24
    assert loop.requests_that_fit(1 * GIB) == 0
    largest = max(size for size, _ in measure.cases("cuda", measure.SIZES["cuda"], GIB))
    assert largest == 256 * MIB
    populated = [s for s, m in measure.cases("cpu", measure.SIZES["cpu"], 2**50) if m.populate]
    assert max(populated) == 256 * MIB
    assert (GIB, ONE_HANDLE) in measure.cases("cpu", measure.SIZES["cpu"], 0)


def test_repetitions_end_when_the_time_is_spent() -> None:
    assert repeat(lambda: None, 50, 60) == 50
    assert repeat(lambda: time.sleep(0.02), 50, 0.01) == 3


def test_without_cuda_python_no_limit_is_named_that_was_not_measured() -> None:
    found = measure.measure("cpu", None, [PAGE], 1)
    assert {m.limit for m in found} == {None}
    assert kind_of("cuda:1") == "cuda"


# Two threads.


def test_both_threads_are_attached_and_balanced(raw: RawVmmDouble) -> None:
    cycles = [RawCycle(raw, PAGE, ONE_HANDLE), RawCycle(raw, PAGE, ONE_HANDLE)]
    done = together.sample_at_once(cycles, 5, 10, raw.attach)
    raw.check_nothing_left()
    assert done >= 5
    assert all(len(cycle.samples["map"]) >= done for cycle in cycles)
    assert len(raw.attached) == 2
    assert raw.attached >= raw.callers, "a thread made calls without being attached"


def test_an_error_in_one_thread_ends_the_other() -> None:
    def fail() -> None:
        raise RuntimeError("from the driver")

    with pytest.raises(RuntimeError, match="from the driver"):
        together.run_at_once([fail, lambda: time.sleep(0.001)], 10**9, 60, 0)


def test_threads_that_take_turns_are_not_two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "LEAST_S", (0.01,))
    lock = threading.Lock()

    def in_turns(actions: list[Callable[[], object]], *rest: Any) -> tuple[int, float]:
        with lock:
            results = [original([action], *rest) for action in actions]
        return min(done for done, _ in results), 0.0

    original = together.run_at_once
    monkeypatch.setattr(together, "run_at_once", in_turns)
    with pytest.raises(NothingMeasured, match="ran at once for 0%"):
        together.measure("cpu", HostVmm(), 1, sizes=[PAGE])


# No figure without its work.


def test_compute_that_ends_before_the_calls_is_not_measured(raw: RawVmmDouble) -> None:
    work = Kernels(too_short=True)
    work.in_flight_ns = 1e15
    with pytest.raises(NothingMeasured, match="ended before the calls did"):
        computing.measure("cuda:0", raw, 1, work=work, sizes=[PAGE])


def test_a_call_that_waits_for_the_device_is_counted(
    raw: RawVmmDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Kernels()
    work.in_flight_ns = 20e6

    def unmap(address: int, size: int) -> None:
        if work.running:
            time.sleep(0.02)
            work.wait()
        original(address, size)

    original = raw.unmap
    monkeypatch.setattr(raw, "unmap", unmap)
    found = {m.name: m for m in computing.measure("cuda:0", raw, 3, work=work, sizes=[PAGE])}
    path = f"compute/raw/one handle/{PAGE}/computing"
    assert found[f"{path}/unmap"].calls == {"unmap": 1, "waited for the device": 3}
    assert found[f"{path}/map"].calls == {"map": 1}


def test_a_thread_that_computes_nothing_is_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "PATIENCE_S", 0.1)
    monkeypatch.setattr(computing.HostWork, "_multiply", lambda self: self._stop.wait())
    with pytest.raises(NothingMeasured, match="nothing was computed"):
        computing.measure("cpu", HostVmm(), 1, work=computing.HostWork(), sizes=[PAGE])
    assert "compute" not in {thread.name for thread in threading.enumerate()}


def test_torch_has_its_threads_back_after_the_compute() -> None:
    before = torch.get_num_threads()
    with computing.HostWork() as work:
        work.start()
        assert work.still_running()
        work.wait()
    assert torch.get_num_threads() == before


NOTHING: dict[str, tuple[Callable[[], object], str]] = {
    "sizes": (lambda: measure.measure("cpu", None, [PAGE], 1), "vattn: map: 0 calls"),
    "threads": (lambda: together.measure("cpu", None, 1, sizes=[PAGE]), "vattn: map: 0 calls"),
    "loop": (lambda: loop._own_measurements("cpu", 1, 1), "bytes mapped: 0 calls"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_step_that_does_nothing_cannot_be_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vattn.KVCache, "step", lambda self, seq_lens: None)
    call, message = NOTHING[name]
    with pytest.raises(NothingMeasured, match=message):
        call()


def test_a_map_that_does_nothing_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostVmm, "map", lambda self, address, size, handle: None)
    with pytest.raises(NothingMeasured, match="separate mappings: 0 calls were made, expected 64"):
        loop._raw_measurements(HostVmm(), requests=1, rounds=1)


def test_handles_of_the_host_are_separate_mappings() -> None:
    raw = HostVmm()
    pieces = 4
    base = raw.reserve(pieces * raw.page_bytes)
    before = loop._own_mappings()
    for i in range(pieces):
        raw.map(base + i * raw.page_bytes, raw.page_bytes, raw.create(raw.page_bytes))
    assert loop._own_mappings() - before == pieces
    raw.free(base, pieces * raw.page_bytes)
    assert MANY_HANDLES["cpu"].piece == raw.page_bytes
