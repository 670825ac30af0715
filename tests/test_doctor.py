"""`vattn doctor`: sentences from facts, and facts from machines that miss something."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from doctor_facts import facts, without_gpu

from vattn.cli import main
from vattn.doctor import command, trial
from vattn.doctor import facts as gatherers
from vattn.doctor.finding import Finding
from vattn.doctor.findings import MIN_TORCH, MIN_TRANSFORMERS, findings, summary, works

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "trial.cuda.devices.0"


def finding(name: str, changed: dict[str, Any]) -> Finding:
    found = {f.name: f for f in findings(changed)}
    assert name in found, f"no finding {name!r} among {sorted(found)}"
    return found[name]


def test_a_healthy_machine_needs_nothing() -> None:
    healthy = facts()
    assert [f for f in findings(healthy) if f.verdict != "fine" or f.remedy] == []
    assert works(healthy) == {"cpu": True, "cuda:0": True}
    assert summary(healthy) == [
        "CPU cache: yes, it was opened, written, read and closed.",
        "CUDA cache: yes, on cuda:0.",
    ]


# What is changed, and the finding that must come of it: name, verdict, in its text, in its remedy.
OLD_DRIVER = {
    "driver_version": 11020,
    "failed_call": "dlsym",
    "problem": "dlsym failed (0): libcuda.so.1 has no cuGetProcAddress; install an NVIDIA driver",
    "devices": [],
}
NO_START = {
    "driver_version": 13000,
    "failed_call": "cuInit",
    "problem": "cuInit failed (803): unknown CUDA error",
    "devices": [],
}
NO_DEVICE = {"driver_version": 13000, "failed_call": "", "problem": "", "devices": []}
CASES: list[tuple[dict[str, Any], str, str, str, str]] = [
    ({"trial.cuda": OLD_DRIVER}, "driver", "missing", "for CUDA 11.2", "CUDA 11.3 or newer"),
    ({"trial.cuda": NO_START}, "driver", "missing", "cuInit failed (803)", "restart the machine"),
    ({"trial.cuda": NO_DEVICE}, "driver", "missing", "shows no device", "--gpus all"),
    (
        {"trial.cuda": NO_DEVICE, "settings.variables": {"CUDA_VISIBLE_DEVICES": ""}},
        "driver",
        "missing",
        "CUDA_VISIBLE_DEVICES is ''",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    ({"trial.cuda": None}, "driver", "missing", "could not be asked", "nvidia-smi"),
    (
        {f"{DEVICE}.attributes.virtual_memory": 0, f"{DEVICE}.problem": "attribute is 0"},
        "cuda:0 virtual memory",
        "missing",
        "NVIDIA H200 offers no virtual memory management",
        "device='cpu'",
    ),
    (
        {f"{DEVICE}.problem": "cuDevicePrimaryCtxRetain failed (2)"},
        "cuda:0 virtual memory",
        "missing",
        "cuDevicePrimaryCtxRetain failed (2)",
        "nvidia-smi",
    ),
    (
        {f"{DEVICE}.pages.plain": "cuMemCreate failed (2): out of memory"},
        "cuda:0 virtual memory",
        "missing",
        "cuMemCreate failed (2)",
        "who holds its memory",
    ),
    ({f"{DEVICE}.bytes.free": 2**30}, "cuda:0 memory", "limited", "1 GiB of 140", "empty_cache"),
    ({f"{DEVICE}.bytes.reservable": 2**34}, "cuda:0 addresses", "limited", "16 GiB", "max_seq_len"),
    (
        {f"{DEVICE}.pages.posix_fd": "cuMemCreate failed (801)"},
        "cuda:0 posix fd pages",
        "limited",
        "refused: cuMemCreate failed (801)",
        "",
    ),
    ({f"{DEVICE}.attributes.gpudirect_rdma": 0}, "cuda:0 gpudirect rdma pages", "missing", "N", ""),
    # Offered, refused without IMEX, and not used by vattn.
    (
        {f"{DEVICE}.pages.fabric": "cuMemCreate failed (800)"},
        "cuda:0 fabric pages",
        "fine",
        "refused: cuMemCreate failed (800)",
        "",
    ),
    ({f"{DEVICE}.name": "NVIDIA H200 MIG 1g.18gb"}, "cuda:0 MIG", "limited", "slice", ""),
    ({f"{DEVICE}.attributes.integrated": 1}, "cuda:0 integrated", "limited", "the host's", ""),
    ({"nvidia.mps": True}, "MPS", "limited", "a fault of one client", ""),
    ({"host.wsl": True}, "WSL", "limited", "WSL", "driver in Windows"),
    ({"host.jetson": True}, "Jetson", "limited", "share one memory", "max_batch_size"),
    ({"host.system": "Darwin"}, "system", "limited", "vattn runs on Linux", ""),
    ({"host.max_map_count": 65530}, "mappings", "limited", "65,530: enough", "sysctl -w vm.max_"),
    ({"host.max_map_count": None}, "mappings", "limited", "not be found out: not asked", ""),
    ({"host.shmem_huge_pages": "never"}, "huge pages", "limited", "never", "echo advise"),
    ({"host.shmem_huge_pages_2mib": "never"}, "huge pages", "limited", "never", "echo advise"),
    (
        {"host.populate_error": "[Errno 22] Invalid argument", "host.kernel": "5.10.0"},
        "populate ahead",
        "limited",
        "The kernel is 5.10.0",
        "5.14",
    ),
    ({"host.memory_available": 2**28}, "memory", "limited", "256 MiB available", "memory="),
    ({"host.cgroup_limit": 2**31}, "memory", "limited", "may use 2 GiB", "container"),
    ({"host.overcommit_memory": 2}, "overcommit", "limited", "commit limit", "sysctl"),
    (
        {"host.reservable": 2**33, "host.address_limit": 2**34},
        "addresses",
        "limited",
        "The limit of this process is 16 GiB",
        "ulimit -v",
    ),
    ({"host.reservable": 0}, "addresses", "missing", "0 bytes", "max_batch_size"),
    (
        {"host.memfd_error": "[Errno 27] File too large", "host.file_size_limit": 2**20},
        "memory file",
        "missing",
        "limited to 1 MiB",
        "ulimit -f",
    ),
    ({"host.memfd_error": "[Errno 1] No"}, "memory file", "missing", "[Errno 1] No", "seccomp"),
    ({"packages.torch": None}, "torch", "missing", "Not installed", "pip install torch"),
    ({"packages.torch": "2.3.1"}, "torch", "limited", "needs 2.4", "pip install -U torch"),
    ({"trial.torch": {"problem": "OSError: libx"}}, "torch", "missing", "OSError: libx", "pip"),
    ({"trial.torch.cuda": None}, "torch", "limited", "Built without CUDA", "built for a CUDA"),
    ({"trial.torch.cuda_available": False}, "torch", "limited", "finds no", "built for a CUDA"),
    ({"packages.transformers": None}, "transformers", "missing", "Not installed", "pip install"),
    ({"packages.transformers": "5.8.3"}, "transformers", "limited", "needs 5.9", "pip install -U"),
    ({"packages.transformers": "5.10.0"}, "transformers", "fine", "5.10.0", ""),
    ({"packages.vLLM": None}, "vLLM", "missing", "Not installed", ""),
    ({"packages.flash-attn": None}, "flash-attn", "missing", "Not installed", ""),
    (
        {"settings.vattn_error": "unknown environment variable VATTN_X"},
        "VATTN_*",
        "missing",
        "VATTN_X",
        "Unset",
    ),
    (
        {"settings.variables": {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}},
        "PYTORCH_CUDA_ALLOC_CONF",
        "limited",
        "driver's pool",
        "empty_cache",
    ),
    (
        {"settings.variables": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}},
        "PYTORCH_ALLOC_CONF",
        "fine",
        "side by side",
        "",
    ),
    (
        {"settings.variables": {"CUDA_LAUNCH_BLOCKING": "1"}},
        "CUDA_LAUNCH_BLOCKING",
        "limited",
        "nothing overlaps",
        "unset",
    ),
    (
        {"trial.problem": "ended by SIGSEGV", "trial.doing": "the CUDA driver"},
        "trial",
        "missing",
        "the CUDA driver: ended by SIGSEGV",
        "bug report",
    ),
]


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "text", "remedy"), CASES, ids=lambda value: str(value)[:40]
)
def test_a_finding_says_what_is_wrong_and_what_to_do(
    changes: dict[str, Any], name: str, verdict: str, text: str, remedy: str
) -> None:
    found = finding(name, facts(changes))
    assert (found.verdict, text in found.text, remedy in found.remedy) == (verdict, True, True), (
        found
    )
    assert bool(found.remedy) == bool(remedy) or name == "MPS", found


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "Install an NVIDIA driver for CUDA 11.3 or newer, or use device='cpu'."),
        ({"nvidia.device_files": ["/dev/nvidia0"]}, "NVIDIA_DRIVER_CAPABILITIES"),
        ({"nvidia.wsl_library": True}, "LD_LIBRARY_PATH=/usr/lib/wsl/lib"),
    ],
)
def test_without_libcuda_the_remedy_depends_on_the_machine(
    changes: dict[str, Any], remedy: str
) -> None:
    bare = without_gpu(changes)
    assert remedy in finding("driver", bare).remedy
    assert finding("torch", without_gpu({"trial.torch.cuda": None})).verdict == "fine"
    assert works(bare) == {"cpu": True}
    assert summary(bare)[1] == (
        "CUDA cache: no. There is no NVIDIA driver: libcuda.so.1 was not found."
        + (" But its kernel module is loaded." if "nvidia.device_files" in changes else "")
    )


def test_the_summary_says_why_a_cache_does_not_work() -> None:
    no_torch = {
        "works": False,
        "stage": "tensors",
        "error": "ModuleNotFoundError: No module named 'torch'",
    }
    cpu_torch = {
        "works": False,
        "stage": "tensors",
        "error": "AssertionError: Torch not compiled with CUDA enabled",
    }
    refused = {"works": False, "stage": "step", "error": "DriverError: mmap failed (12)"}
    good = {"works": True, "stage": "close", "error": ""}

    assert summary(facts({"trial.caches": {"cpu": no_torch, "cuda:0": cpu_torch}})) == [
        "CPU cache: no. It gets memory, but shows it as tensors of torch, which is not installed.",
        "CUDA cache: no. On cuda:0: It gets memory, but this torch is built without CUDA and "
        "cannot show it.",
    ]
    mixed = facts({"trial.caches": {"cpu": refused, "cuda:0": good, "cuda:1": refused}})
    assert works(mixed) == {"cpu": False, "cuda:0": True, "cuda:1": False}
    assert summary(mixed) == [
        "CPU cache: no. It failed to give a row memory: DriverError: mmap failed (12).",
        "CUDA cache: yes, on cuda:0. On cuda:1: It failed to give a row memory: DriverError: mmap "
        "failed (12).",
    ]
    died = facts({"trial.caches": {}, "trial.problem": "ended by SIGSEGV", "trial.doing": "torch"})
    assert summary(died)[0] == (
        "CPU cache: no. It was not tried: ended by SIGSEGV, while trying torch."
    )


def test_the_versions_it_asks_for_are_those_the_package_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    needed = dict(re.findall(r'"(torch|transformers)>=([\d.]+)"', project))
    assert needed["torch"] == ".".join(map(str, MIN_TORCH))
    assert needed["transformers"] == ".".join(map(str, MIN_TRANSFORMERS))


# Gathering.


def test_nothing_is_raised_when_nothing_can_be_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Any:
        raise PermissionError("not for you")

    for questions in gatherers.SECTIONS.values():
        for name in questions:
            monkeypatch.setitem(questions, name, fail)
    monkeypatch.setattr(trial, "run", fail)
    assert command.main(["--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["facts"]["host"]["memory_total"] is None
    assert document["facts"]["host"]["problems"]["wsl"] == "PermissionError: not for you"
    texts = {f["name"]: f["text"] for f in document["findings"]}
    assert texts["mappings"] == "Could not be found out: PermissionError: not for you."
    assert texts["vLLM"] == "Not readable: PermissionError: not for you."
    assert document["works"] == {}
    assert "PermissionError: not for you" in document["summary"][0]


@pytest.mark.parametrize("section", ["host", "nvidia", "python", "packages", "settings"])
def test_no_single_unknown_is_too_much(section: str) -> None:
    for name in facts()[section]:
        if name != "problems":
            findings(facts({f"{section}.{name}": None}))


def test_the_command_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"schema", "vattn", "works", "summary", "findings", "facts"}
    healthy = facts()
    for section, expected in healthy.items():
        assert set(document["facts"][section]) == set(expected), section
    assert document["works"]["cpu"] is True
    assert {tuple(f) for f in document["findings"]} == {
        ("area", "name", "verdict", "text", "remedy")
    }


# Output.


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("rich", [True, False])
def test_the_report_has_everything_with_and_without_rich(
    *, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "rich", None)
    bare = without_gpu(
        {"nvidia.device_files": ["/dev/nvidia0"], "packages.torch": "[bold]2.3[/bold]"}
    )
    monkeypatch.setattr(command, "gather", lambda report: bare)
    assert command.main([]) == 0
    output = capsys.readouterr().out
    if not rich:  # a command can be copied, as it is on one line
        assert all(f.remedy in output for f in findings(bare))
    printed = " ".join(words(output))
    for f in findings(bare):
        assert f"{f.verdict} {f.name} " in printed
        for part in words(f.text) + words(f.remedy):
            assert part in printed
    for sentence in summary(bare):
        assert sentence in printed
