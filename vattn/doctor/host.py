"""Facts about the host: kernel, memory, and what a CPU cache asks of them."""

from __future__ import annotations

import mmap
import os
import platform
import resource
from collections.abc import Callable
from pathlib import Path

# As csrc/driver/host_driver.cc has them. Python's mmap knows them in part, or from 3.13 on.
MADV_POPULATE_WRITE = 23
MAP_NORESERVE = 0x4000
MEMFD_BYTES = 2**60

LARGEST_RESERVATION = 2**44
SMALLEST_RESERVATION = 2**30

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def first_line(path: str | Path) -> str:
    """Return the first line of a file.

    Raises
    ------
    OSError
        No such file, or it is not readable.
    """
    with open(path) as file:
        return file.readline().strip()


def chosen(path: Path) -> str:
    """Return the word in brackets, as in "always [never]"."""
    line = first_line(path)
    return line.partition("[")[2].partition("]")[0] or line


def meminfo(key: str) -> int:
    """Return bytes of an entry of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise LookupError(f"/proc/meminfo has no {key}")


def cgroup_limit() -> int | None:
    """Return the smallest memory limit of the control groups that this process is in, in bytes.

    Returns
    -------
    int or None
        None if there is no limit.
    """
    files: list[Path] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        # In a container the path is often that of the host: then the root is the container's own.
        folders = [group, *group.parents]
        files += [folder / name for folder in folders if folder.is_relative_to(root)]
    words = [first_line(file) for file in files if file.is_file()]
    numbers = [int(word) for word in words if word.isdigit()]
    # Version 1 says "no limit" with a number just below 2**63.
    return min((number for number in numbers if number < 2**60), default=None)


def limit_of(which: int) -> int | None:
    """Return a soft limit of this process; None if there is none."""
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def reservable() -> int:
    """Return how many bytes of addresses can be reserved in one piece, by trying powers of two."""
    size = LARGEST_RESERVATION
    while size >= SMALLEST_RESERVATION and not _can_reserve(size):
        size //= 2
    return size if size >= SMALLEST_RESERVATION else 0


def _can_reserve(size: int) -> bool:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ).close()
    except OSError:
        return False
    return True


def memfd_error() -> str:
    """Make the file that a CPU cache lives in, and write a page. Empty if that worked."""
    try:
        file = os.memfd_create("vattn-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(file, MEMFD_BYTES)
            with mmap.mmap(file, mmap.PAGESIZE) as page:
                page[0] = 1
        finally:
            os.close(file)
    except OSError as error:
        return str(error)
    return ""


def populate_error() -> str:
    """Fault pages in ahead of their use. Empty if the kernel can."""
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            page.madvise(MADV_POPULATE_WRITE)
    except OSError as error:
        return str(error)
    return ""


def is_wsl() -> bool:
    """Whether this is the Windows Subsystem for Linux."""
    return "microsoft" in platform.release().lower()


def is_jetson() -> bool:
    """Whether this is an NVIDIA board whose GPU shares the host's memory."""
    model = Path("/proc/device-tree/model")
    return Path("/etc/nv_tegra_release").exists() or (
        model.is_file() and "jetson" in model.read_text(errors="replace").lower()
    )


HOST: dict[str, Callable[[], object]] = {
    "system": platform.system,
    "machine": platform.machine,
    "kernel": platform.release,
    "wsl": is_wsl,
    "jetson": is_jetson,
    "memory_total": lambda: meminfo("MemTotal"),
    "memory_available": lambda: meminfo("MemAvailable"),
    "cgroup_limit": cgroup_limit,
    "max_map_count": lambda: int(first_line("/proc/sys/vm/max_map_count")),
    "overcommit_memory": lambda: int(first_line("/proc/sys/vm/overcommit_memory")),
    "shmem_huge_pages": lambda: chosen(HUGE_PAGES / "shmem_enabled"),
    "shmem_huge_pages_2mib": lambda: chosen(HUGE_PAGES / "hugepages-2048kB" / "shmem_enabled"),
    "address_limit": lambda: limit_of(resource.RLIMIT_AS),
    "file_size_limit": lambda: limit_of(resource.RLIMIT_FSIZE),
    "reservable": reservable,
    "memfd_error": memfd_error,
    "populate_error": populate_error,
}
