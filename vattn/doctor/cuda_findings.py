"""From facts to sentences: the CUDA driver, its devices, and the kind of machine."""

from __future__ import annotations

from collections.abc import Iterator

from vattn.doctor.finding import Facts, Finding, Verdict
from vattn.units import format_bytes

NEEDED = "Install an NVIDIA driver for CUDA 11.3 or newer, or use device='cpu'."
ENOUGH_ADDRESSES = 2**40


def platform_findings(facts: Facts) -> Iterator[Finding]:
    """Say what kind of machine this is, where that is known to limit CUDA's virtual memory."""
    host, nvidia = facts["host"], facts["nvidia"]
    if host.get("system") not in (None, "Linux"):
        yield _machine("system", f"This is {host['system']}; vattn runs on Linux.")
    if host.get("wsl"):
        yield _machine(
            "WSL",
            "Under WSL some drivers offer no virtual memory management, and large reservations of "
            "addresses fail.",
            "Update the driver in Windows; lower max_batch_size or max_seq_len.",
        )
    if host.get("jetson"):
        yield _machine(
            "Jetson",
            "GPU and host share one memory. Large reservations of addresses are known to fail.",
            "Lower max_batch_size or max_seq_len; device='cpu' uses the same memory.",
        )
    if nvidia.get("mps"):
        yield _machine(
            "MPS",
            "CUDA programs share the GPU by MPS: a fault of one client ends all of them.",
            "Take a process of its own for experiments.",
        )


def _machine(name: str, text: str, remedy: str = "") -> Finding:
    return Finding(area="machine", name=name, verdict="limited", text=text, remedy=remedy)


def _driver(verdict: Verdict, text: str, remedy: str = "") -> Finding:
    return Finding(area="CUDA", name="driver", verdict=verdict, text=text, remedy=remedy)


def cuda_findings(facts: Facts) -> Iterator[Finding]:
    """Say whether there is a driver, and what each of its devices can do."""
    trial = facts["trial"]
    cuda = trial.get("cuda")
    if cuda is None:
        reason = trial.get("problem") or "no answer"
        yield _driver(
            "missing", f"The CUDA driver could not be asked: {reason}.", "Run nvidia-smi."
        )
    elif cuda["failed_call"]:
        yield _no_driver(facts, cuda)
    elif not cuda["devices"]:
        yield _no_devices(facts, cuda)
    else:
        number = len(cuda["devices"])
        devices = "1 device" if number == 1 else f"{number} devices"
        yield _driver("fine", f"For CUDA {_version(cuda)}, {devices}.{_kernel_module(facts)}")
        for index, device in enumerate(cuda["devices"]):
            yield from _device_findings(f"cuda:{index}", device)


def _version(cuda: Facts) -> str:
    number = cuda.get("driver_version")
    return "?" if number is None else f"{number // 1000}.{number % 1000 // 10}"


def _kernel_module(facts: Facts) -> str:
    line = facts["nvidia"].get("kernel_module")
    return f" {line.removeprefix('NVRM version: ').strip()}." if line else ""


def _no_driver(facts: Facts, cuda: Facts) -> Finding:
    call, nvidia = cuda["failed_call"], facts["nvidia"]
    if call == "dlopen":
        text = "There is no NVIDIA driver: libcuda.so.1 was not found."
        if nvidia.get("wsl_library"):
            return _driver("missing", text, "export LD_LIBRARY_PATH=/usr/lib/wsl/lib")
        if nvidia.get("device_files") or nvidia.get("kernel_module"):
            return _driver(
                "missing",
                f"{text} But its kernel module is loaded.",
                "Start the container with --gpus all and NVIDIA_DRIVER_CAPABILITIES="
                "compute,utility, or install the driver's libraries.",
            )
        return _driver("missing", text, NEEDED)
    if call in ("dlsym", "cuGetProcAddress"):
        problem = cuda["problem"].partition("; install")[0]
        return _driver(
            "missing", f"The driver is too old, it is for CUDA {_version(cuda)}: {problem}.", NEEDED
        )
    return _driver(
        "missing",
        f"The driver for CUDA {_version(cuda)} does not start: {cuda['problem']}.",
        "After an update of the driver, restart the machine. With NVSwitch, start "
        "nvidia-fabricmanager.",
    )


def _no_devices(facts: Facts, cuda: Facts) -> Finding:
    text = f"The driver for CUDA {_version(cuda)} shows no device."
    visible = (facts["settings"].get("variables") or {}).get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        text += f" CUDA_VISIBLE_DEVICES is {visible!r}."
        return _driver("missing", text, "unset CUDA_VISIBLE_DEVICES")
    return _driver(
        "missing", text, "See what nvidia-smi lists; start the container with --gpus all."
    )


def _device_findings(device_name: str, device: Facts) -> Iterator[Finding]:
    attributes, numbers, title = device["attributes"], device["bytes"], device["name"]
    refused = device["pages"].get("plain")
    obstacle = remedy = ""
    if attributes.get("virtual_memory") == 0:
        obstacle = "offers no virtual memory management, so no CUDA cache is possible on it"
        remedy = "Update the driver, or use device='cpu'."
    elif device["problem"]:
        obstacle = f"cannot be used: {device['problem']}"
        remedy = "See what nvidia-smi says about it."
    elif refused:
        obstacle = f"gives no memory, although it says that it can: {refused}"
        remedy = "See with nvidia-smi who holds its memory."
    if obstacle:
        yield _device(
            device_name, "virtual memory", "missing", f"{title} {obstacle}.", remedy=remedy
        )
        return
    pages = f"pages of {format_bytes(numbers['granularity'])}"
    recommended = format_bytes(numbers["recommended_granularity"])
    text = f"{title}: {pages} (recommended: {recommended}), one was made and released."
    yield _device(device_name, "virtual memory", "fine", text)
    yield _device_memory(device_name, numbers)
    yield _device_addresses(device_name, numbers)
    for kind, purpose in _PURPOSES.items():
        yield _device_pages(device_name, kind, purpose, device)
    if " MIG " in title:
        text = "A slice of a GPU; nobody has tried vattn on one."
        yield _device(device_name, "MIG", "limited", text)
    if attributes.get("integrated"):
        text = "Its memory is the host's: caches on both share it."
        yield _device(device_name, "integrated", "limited", text)


def _device(
    device_name: str, what: str, verdict: Verdict, text: str, *, remedy: str = ""
) -> Finding:
    return Finding(
        area="CUDA", name=f"{device_name} {what}", verdict=verdict, text=text, remedy=remedy
    )


def _device_memory(device_name: str, numbers: Facts) -> Finding:
    free, total = numbers["free"], numbers["total"]
    text = f"{format_bytes(free)} of {format_bytes(total)} free."
    if free >= total // 2:
        return _device(device_name, "memory", "fine", text)
    text += " Others hold the rest, or torch in another process has it cached."
    remedy = "See nvidia-smi. torch.cuda.empty_cache() gives back what torch caches."
    return _device(device_name, "memory", "limited", text, remedy=remedy)


def _device_addresses(device_name: str, numbers: Facts) -> Finding:
    got = numbers["reservable"]
    text = f"{format_bytes(got)} of addresses can be reserved in one piece (tried)."
    if got >= ENOUGH_ADDRESSES:
        return _device(device_name, "addresses", "fine", text)
    remedy = "Lower max_batch_size or max_seq_len."
    return _device(device_name, "addresses", "limited", text, remedy=remedy)


_PURPOSES = {
    "posix_fd": "for sharing memory with other processes",
    "gpudirect_rdma": "for network cards that read it directly",
    "fabric": "for sharing memory over NVLink between machines, which vattn does not",
}


def _device_pages(device_name: str, kind: str, purpose: str, device: Facts) -> Finding:
    what = f"{kind.replace('_', ' ')} pages"
    unused = kind == "fabric"
    refused = device["pages"].get(kind)
    if not device["attributes"].get(kind):
        verdict: Verdict = "fine" if unused else "missing"
        return _device(device_name, what, verdict, f"Not offered; {purpose}.")
    if refused:
        text = f"Offered ({purpose}), but refused: {refused}. vattn does without."
        return _device(device_name, what, "fine" if unused else "limited", text)
    return _device(device_name, what, "fine", f"One was made; {purpose}.")
