"""From facts to sentences: the kernel's limits, and memory for a CPU cache."""

from __future__ import annotations

from collections.abc import Iterator

from vattn.doctor.finding import Facts, Finding, Verdict, unknown
from vattn.units import format_bytes

# What several distributions of Linux set today; the kernel's own default is 65,530.
ENOUGH_MAPPINGS = 262_144
SMALLEST_DEFAULT_PAGE = 64 * 2**10
LARGEST_DEFAULT_PAGE = 2 * 2**20
LITTLE_MEMORY = 2**30
# 256 rows of 128 Ki tokens at 128 KiB, which are those of Llama-3-8B, are 4 TiB.
ENOUGH_ADDRESSES = 4 * 2**40


def host_findings(facts: Facts) -> Iterator[Finding]:
    """Say what a CPU cache finds on this host."""
    host = facts["host"]
    for name, key, judge in (
        ("memory", "memory_available", _memory),
        ("mappings", "max_map_count", _mappings),
        ("huge pages", "shmem_huge_pages", _huge_pages),
        ("populate ahead", "populate_error", _populate),
        ("addresses", "reservable", _addresses),
        ("memory file", "memfd_error", _memory_file),
        ("overcommit", "overcommit_memory", _overcommit),
    ):
        if host.get(key) is None:
            yield unknown("CPU memory", name, host, key)
        else:
            verdict, text, remedy = judge(host)
            yield Finding(area="CPU memory", name=name, verdict=verdict, text=text, remedy=remedy)


_Judgement = tuple[Verdict, str, str]


def _memory(host: Facts) -> _Judgement:
    available, total = host["memory_available"], host.get("memory_total")
    limit = host.get("cgroup_limit")
    text = f"{format_bytes(available)} available" + (
        f" of {format_bytes(total)}." if total else "."
    )
    if limit is not None and limit < (total or limit + 1):
        text += f" The control group may use {format_bytes(limit)}, and pages of a CPU cache count."
        return "limited", text, "Keep memory= below that, or raise the container's memory limit."
    if available < LITTLE_MEMORY:
        return "limited", text, "Free some, or give the cache a small memory=."
    return "fine", text, ""


def _mappings(host: Facts) -> _Judgement:
    count = host["max_map_count"]
    text = (
        f"vm.max_map_count is {count:,}: enough for a CPU cache of about "
        f"{format_bytes(count * SMALLEST_DEFAULT_PAGE)} in pages of "
        f"{format_bytes(SMALLEST_DEFAULT_PAGE)}, "
        f"of {format_bytes(count * LARGEST_DEFAULT_PAGE)} in pages of "
        f"{format_bytes(LARGEST_DEFAULT_PAGE)}, "
        "even if no two are neighbours."
    )
    if count >= ENOUGH_MAPPINGS:
        return "fine", text, ""
    remedy = "For larger ones: sudo sysctl -w vm.max_map_count=1048576, or larger page_bytes."
    return "limited", text, remedy


def _huge_pages(host: Facts) -> _Judgement:
    setting = host["shmem_huge_pages"]
    of_2_mib = host.get("shmem_huge_pages_2mib")
    # Since Linux 6.10 each size has its own switch, which "inherit"s by default.
    if setting not in ("deny", "force") and of_2_mib not in (None, "inherit"):
        setting = of_2_mib
    text = f"Transparent huge pages of shared memory: {setting}."
    if setting in ("never", "deny"):
        return (
            "limited",
            f"{text} A CPU cache gets small pages: more page faults, more TLB misses.",
            "echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )
    return "fine", f"{text} A CPU cache with page_bytes of 2 MiB and more gets them.", ""


def _populate(host: Facts) -> _Judgement:
    if not host["populate_error"]:
        return "fine", "MADV_POPULATE_WRITE works: page faults are taken ahead of time.", ""
    return (
        "limited",
        f"MADV_POPULATE_WRITE is refused ({host['populate_error']}): the first write to every "
        f"page of a CPU cache waits for a page fault. The kernel is {host.get('kernel')}.",
        "Use Linux 5.14 or newer.",
    )


def _addresses(host: Facts) -> _Judgement:
    got, limit = host["reservable"], host.get("address_limit")
    text = f"{format_bytes(got)} of addresses can be reserved in one piece (tried)."
    if got >= ENOUGH_ADDRESSES:
        return "fine", text, ""
    if limit is not None:
        text += f" The limit of this process is {format_bytes(limit)}."
        return "missing" if got == 0 else "limited", text, "ulimit -v unlimited"
    remedy = "Keep max_batch_size * max_seq_len small, or find out what limits addresses here."
    return "missing" if got == 0 else "limited", text, remedy


def _memory_file(host: Facts) -> _Judgement:
    if not host["memfd_error"]:
        text = "memfd_create works; the size of /dev/shm does not matter, as it is not used."
        return "fine", text, ""
    text = f"The file that a CPU cache lives in cannot be made: {host['memfd_error']}."
    limit = host.get("file_size_limit")
    if limit is not None:
        return (
            "missing",
            f"{text} Files are limited to {format_bytes(limit)}.",
            "ulimit -f unlimited",
        )
    return "missing", text, "Allow memfd_create in the sandbox (seccomp) of this process."


def _overcommit(host: Facts) -> _Judgement:
    mode = host["overcommit_memory"]
    if mode != 2:
        return "fine", f"vm.overcommit_memory is {mode}: reserving addresses costs no memory.", ""
    return (
        "limited",
        "vm.overcommit_memory is 2: every page of a CPU cache counts towards the commit limit.",
        "Raise vm.overcommit_ratio, or sudo sysctl -w vm.overcommit_memory=0",
    )
