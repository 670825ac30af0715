"""What `vattn doctor` would find on a healthy machine with one GPU, and variations of it."""

from __future__ import annotations

import copy
from typing import Any

GIB = 2**30

HEALTHY: dict[str, Any] = {
    "host": {
        "system": "Linux",
        "machine": "x86_64",
        "kernel": "6.8.0",
        "wsl": False,
        "jetson": False,
        "memory_total": 256 * GIB,
        "memory_available": 200 * GIB,
        "cgroup_limit": None,
        "max_map_count": 1048576,
        "overcommit_memory": 0,
        "shmem_huge_pages": "advise",
        "shmem_huge_pages_2mib": "inherit",
        "address_limit": None,
        "file_size_limit": None,
        "reservable": 2**44,
        "memfd_error": "",
        "populate_error": "",
        "problems": {},
    },
    "nvidia": {
        "kernel_module": "NVRM version: NVIDIA UNIX Open Kernel Module 580.95",
        "device_files": ["/dev/nvidia0", "/dev/nvidiactl"],
        "wsl_library": False,
        "mps": False,
        "problems": {},
    },
    "python": {"version": "3.12.3", "vattn": "0.1.0", "extension": "_C.so", "problems": {}},
    "packages": {
        "torch": "2.11.0+cu130",
        "numpy": "2.4.6",
        "transformers": "5.9.0",
        "vLLM": "0.20.0",
        "flash-attn": "2.9.0",
        "FlashInfer": "0.9.0",
        "cuda-python": "13.0.0",
        "rich": "15.0.0",
        "matplotlib": "3.11.2",
        "problems": {},
    },
    "settings": {"variables": {}, "vattn_error": "", "problems": {}},
    "trial": {
        "caches": {
            "cpu": {"works": True, "stage": "close", "error": ""},
            "cuda:0": {"works": True, "stage": "close", "error": ""},
        },
        "doing": "",
        "problem": "",
        "torch": {
            "version": "2.11.0+cu130",
            "cuda": "13.0",
            "hip": None,
            "cuda_available": True,
            "problem": "",
        },
        "cuda": {
            "driver_version": 13000,
            "failed_call": "",
            "problem": "",
            "devices": [
                {
                    "name": "NVIDIA H200",
                    "attributes": {
                        "virtual_memory": 1,
                        "posix_fd": 1,
                        "gpudirect_rdma": 1,
                        "fabric": 1,
                        "integrated": 0,
                    },
                    "bytes": {
                        "free": 138 * GIB,
                        "total": 140 * GIB,
                        "granularity": 2 * 2**20,
                        "recommended_granularity": 2 * 2**20,
                        "reservable": 2**44,
                    },
                    "pages": {"plain": "", "posix_fd": "", "gpudirect_rdma": "", "fabric": ""},
                    "problem": "",
                }
            ],
        },
    },
}

NO_LIBCUDA = {
    "driver_version": None,
    "failed_call": "dlopen",
    "problem": "dlopen failed (0): libcuda.so.1: cannot open shared object file",
    "devices": [],
}


def facts(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The healthy machine with some facts replaced, by their path: {"host.wsl": True}."""
    changed = copy.deepcopy(HEALTHY)
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        section: Any = changed
        for parent in parents:
            section = section[int(parent)] if parent.isdigit() else section[parent]
        assert last in section, f"{path} is no fact"
        section[last] = value
    return changed


def without_gpu(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A machine that has no NVIDIA driver."""
    gone = {
        "trial.cuda": NO_LIBCUDA,
        "trial.caches": {"cpu": {"works": True, "stage": "close", "error": ""}},
        "nvidia.kernel_module": None,
        "nvidia.device_files": [],
    }
    return facts(gone | (changes or {}))
