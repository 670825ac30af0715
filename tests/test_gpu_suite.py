"""The GPU suite survives its parts; how fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_suite import bootstrap, command, processes
from benchmarks.gpu_suite.parts import DEADLINE_S, Part, find_sdist, limit_of, parts
from benchmarks.gpu_suite.processes import run_all, run_part

ROOT = Path(__file__).resolve().parent.parent


def part(name: str, code: str, limit_s: float = 20, **options: object) -> Part:
    """A part of a little Python."""
    defaults: dict[str, object] = {"needs_gpu": False}
    return Part(name, 1, limit_s, ("-c", code), **(defaults | options))  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the GPU tests from within a test")
def test_without_a_gpu_every_part_says_that_it_is_skipped(tmp_path: Path) -> None:
    own = ("machine", "build", "doctor", "vmm_latency_host")  # need no GPU, or replace the build
    skips = [word for name in own for word in ("--skip", name)]
    arguments = ["--quick", "--out", str(tmp_path), "--commit", "abc", *skips]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert (record["benchmark"], record["quick"]) == ("gpu_suite", True)
    names = [p.name for p in parts(work=tmp_path) if p.name not in own]
    assert [p["name"] for p in record["parts"]] == names
    assert all(p["status"].startswith("skipped: ") for p in record["parts"]), record["parts"]
    reasons = {p["name"]: p["status"] for p in record["parts"]}
    assert reasons["tests"] == reasons["attention_gpu"] == "skipped: no CUDA device"
    assert reasons["flash_attn_build"] == "skipped: no --flash-attn and no --carry was given"
    assert path.name.endswith("-abc.json")


def test_a_part_runs_as_a_user_would_run_it(tmp_path: Path) -> None:
    arguments = ("--quick", "--out", str(tmp_path), "--only", "machine")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    (machine,) = json.loads(path.read_text())["parts"]
    assert (machine["name"], machine["status"]) == ("machine", "ok")
    assert torch.__version__ in machine["output_tail"]
    assert "machine: ok" in (tmp_path / "gpu_suite.log").read_text()


def test_a_tree_that_is_not_built_is_built_first_and_a_failure_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vattn").mkdir()
    extension = tmp_path / f"vattn/_C{EXTENSION_SUFFIXES[0]}"
    fails = (sys.executable, "-c", "print('no compiler'); raise SystemExit(1)")
    arguments = ["--quick", "--out", str(tmp_path / "out")]
    assert not bootstrap.ensure_built(arguments, tmp_path, fails)
    record = json.loads((tmp_path / "out/gpu_suite-not-built.json").read_text())
    assert record["parts"] == [
        {"name": "build", "status": "failed", "output_tail": "no compiler\n"}
    ]
    builds = (sys.executable, "-c", f"open({str(extension)!r}, 'w')")
    assert bootstrap.ensure_built(arguments, tmp_path, builds)
    capsys.readouterr()
    assert bootstrap.ensure_built(arguments, tmp_path, builds)
    assert capsys.readouterr().out == "", "it was there"


def test_what_runs_before_the_build_needs_no_extension() -> None:
    code = "import sys; sys.modules['vattn'] = None; import benchmarks.gpu_suite.bootstrap"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_all_budgets_fit_into_one_call(tmp_path: Path) -> None:
    listed = parts(work=tmp_path)
    assert sum(p.budget_s for p in listed) < DEADLINE_S < 9 * 60
    assert all(0 < p.budget_s <= p.most_s for p in listed)
    assert len({p.name for p in listed}) == len(listed)
    order = [p.name for p in listed]
    assert order.index("tests") < min(i for i, p in enumerate(listed) if p.measures)
    assert [p.name for p in listed if p.beside] == ["flash_attn_build"]


def test_every_module_that_a_part_runs_is_there(tmp_path: Path) -> None:
    for p in parts(work=tmp_path):
        if p.arguments[0] == "-m" and p.arguments[1].startswith("benchmarks."):
            path = ROOT / p.arguments[1].replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), p.name
        for argument in p.arguments:
            if argument.startswith("tests/"):
                assert (ROOT / argument.partition("::")[0]).exists(), argument


def test_no_part_takes_the_time_of_those_after_it() -> None:
    first, beside, then, last = (
        part("first", "", 100),
        part("beside", "", 100, beside=True),
        part("then", "", 100),
        part("last", "", 100, measures=True),
    )
    assert limit_of([first, beside, then, last], 50) == 47
    assert limit_of([first, beside, then, last], 500) == 100
    assert limit_of([beside, then, last], 50) == 49, "what runs beside it needs no time of its own"
    assert limit_of([last], 7) == 7


def test_the_suite_survives_parts_that_fail_or_hang(tmp_path: Path) -> None:
    log = tmp_path / "log"
    chosen = [
        part("fails", "print('why'); raise SystemExit(3)"),
        part("hangs", "import time; time.sleep(60)", 1),
        part("missing", "", program="/no/such/program"),
        part("works", "print('fine')"),
    ]
    seen: list[int] = []
    outcomes = run_all(
        chosen, time.monotonic() + 40, log, None, after_each=lambda o: seen.append(len(o))
    )
    assert [o.status for o in outcomes] == ["failed", "timed out", "failed", "ok"]
    assert (outcomes[0].output_tail, outcomes[0].summary) == ("why\n", "why")
    assert "No such file" in outcomes[2].summary
    assert [o.failed for o in outcomes] == [True, True, True, False]
    assert seen == [1, 2, 3, 4], "the results are saved after each part"
    late = run_all(chosen, time.monotonic(), log, None)
    assert [o.status for o in late] == ["not started"] * 4
    assert late[0].summary == "0 s were left, it needs 1"


def test_what_hangs_and_does_not_listen_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    alive = tmp_path / "alive"
    child = f"import time\\nwhile True: open({str(alive)!r}, 'w').close(); time.sleep(0.05)"
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    code = f"{deaf}; import subprocess, sys; subprocess.run([sys.executable, '-c', '''{child}'''])"
    outcome = run_part(part("deaf", code), 2, tmp_path / "log")
    assert outcome.status == "timed out"
    assert alive.exists(), "the child never ran"
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_what_a_part_had_written_when_it_was_ended_is_kept(tmp_path: Path) -> None:
    code = "open('{scratch}/a.json', 'w').write('{\"summary\": \"half\"}'); "
    outcome = run_part(part("p", f"{code}import time; time.sleep(60)"), 1, tmp_path / "log")
    assert (outcome.status, outcome.summary) == ("timed out", "half")
    assert outcome.result == {"summary": "half"}
    torn = run_part(part("p", "open('{scratch}/a.json', 'w').write('{')"), 20, tmp_path / "log")
    assert torn.status == "ok"
    assert torn.summary.startswith("a.json cannot be read")
    printed = run_part(part("p", "print('wait\\n{\"gpu\": 1}\\nbye')"), 20, tmp_path / "log")
    assert printed.result == {"gpu": 1}


def test_a_test_run_that_was_ended_tells_how_far_it_came(tmp_path: Path) -> None:
    code = (
        "print('t.py::test_a[x y] PASSED  [ 10%]\\nt.py::test_b FAILED [ 20%]\\nt.py::test_c ',"
        " flush=True); import time; time.sleep(60)"
    )
    listed = Part("tests", 1, 1, ("-c", code, "{scratch}/junit.xml"), needs_gpu=False)
    outcome = run_part(listed, 1, tmp_path / "log")
    assert outcome.status == "timed out"
    assert outcome.summary == "1 passed, 1 failed before it ended"
    assert outcome.failures == ["t.py::test_b"]


def test_a_test_run_in_which_nothing_ran_is_a_failure(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    case = '<testcase classname="m" name="t"><failure/></testcase>'
    counts = 'tests="3" failures="1" errors="0" skipped="1"'
    junit.write_text(f"<testsuites><testsuite {counts}>{case}</testsuite></testsuites>")
    assert processes.read_junit(junit) == ("1 passed, 1 failed, 1 skipped", ["m::t"], 2)
    write = "open('{scratch}/junit.xml', 'w').write('<testsuite tests=\"2\" skipped=\"2\"/>')"
    outcome = run_part(part("tests", write), 20, tmp_path / "log")
    assert (outcome.status, outcome.summary) == ("failed", "no test ran")


def test_what_the_sanitizer_found_is_in_the_summary(tmp_path: Path) -> None:
    code = "print('========= ERROR SUMMARY: 2 errors\\nbye'); raise SystemExit(9)"
    outcome = run_part(part("sanitizer", code), 20, tmp_path / "log")
    assert outcome.status == "failed"
    assert outcome.summary.endswith("ERROR SUMMARY: 2 errors")


def test_what_measures_waits_for_what_runs_beside(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    mark = f"open({str(marks)!r}, 'a').write"
    chosen = [
        part("slow", f"import time; time.sleep(1.5); {mark}('slow ')", beside=True),
        part("beside", f"{mark}('beside ')"),
        part("measures", f"{mark}('measures ')", measures=True),
    ]
    outcomes = run_all(chosen, time.monotonic() + 60, tmp_path / "log", None)
    assert [o.status for o in outcomes] == ["ok"] * 3
    assert marks.read_text() == "beside slow measures "


def test_a_part_whose_module_or_file_is_missing_is_skipped(tmp_path: Path) -> None:
    chosen = [
        part("module", "", needs_module="no_such_module"),
        part("file", "", needs_file=tmp_path / "made"),
    ]
    outcomes = run_all(chosen, time.monotonic() + 20, tmp_path / "log", None)
    assert [o.status for o in outcomes] == [
        "skipped: no no_such_module",
        "skipped: there is no made, which an earlier part makes",
    ]
    assert not any(o.failed for o in outcomes)


def test_the_source_distribution_is_the_one_given_or_the_newest_carried(tmp_path: Path) -> None:
    assert find_sdist(None, None)[1] == "no --flash-attn and no --carry was given"
    assert find_sdist(None, tmp_path)[1] == f"no flash_attn-*.tar.gz in {tmp_path}"
    for version in ("2.8.2", "2.8.3"):
        (tmp_path / f"flash_attn-{version}.tar.gz").touch()
    carried = tmp_path / "flash_attn-2.8.3.tar.gz"
    assert find_sdist(None, tmp_path) == (carried, None)
    assert find_sdist(carried, None) == (carried, None)
    with pytest.raises(SystemExit):
        command.main(["--flash-attn", str(tmp_path / "other.tar.gz")])
