"""From facts to sentences. Pure: nothing here looks at the machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vattn.doctor.cuda_findings import cuda_findings, platform_findings
from vattn.doctor.finding import Facts, Finding, Verdict, release, unknown
from vattn.doctor.host_findings import host_findings

MIN_TORCH = (2, 4)
MIN_TRANSFORMERS = (5, 9)
# Packages that nothing in vattn insists on: what each is for.
OPTIONAL = {
    "numpy": "for the benchmarks, and for seq_lens as an array",
    "vLLM": "for its paged attention in the benchmarks",
    "flash-attn": "for attention that takes cache_batch_idx, and in the benchmarks",
    "FlashInfer": "for its paged attention in the benchmarks",
    "cuda-python": "for a second opinion in vattn bench latency",
    "rich": "for tables and progress in colour",
    "matplotlib": "for the pictures of vattn bench and vattn replay",
}


def findings(facts: Facts) -> list[Finding]:
    """Turn facts into sentences.

    Parameters
    ----------
    facts : dict
        As :func:`vattn.doctor.facts.gather` returns them; any of them may be None.
    """
    return [
        *platform_findings(facts),
        *cuda_findings(facts),
        *host_findings(facts),
        *_package_findings(facts),
        *_setting_findings(facts),
        *_cache_findings(facts),
    ]


def works(facts: Facts) -> dict[str, bool]:
    """By device ("cpu", "cuda:0"): whether a cache on it was used with success."""
    return {device: cache["works"] for device, cache in facts["trial"].get("caches", {}).items()}


def summary(facts: Facts) -> list[str]:
    """Say in two sentences, or a few more where it does not, what works on this machine."""
    worked = works(facts)
    on_cuda = [device for device in worked if device != "cpu"]
    if worked.get("cpu"):
        cpu = "yes, it was opened, written, read and closed."
    else:
        cpu = f"no. {_reason(facts, 'cpu')}"
    if on_cuda:
        good = [device for device in on_cuda if worked[device]]
        answer = [f"yes, on {', '.join(good)}." if good else "no."]
        answer += [f"On {d}: {_reason(facts, d)}" for d in on_cuda if not worked[d]]
    else:
        answer = ["no.", *(f.text for f in cuda_findings(facts) if f.verdict == "missing")]
        if facts["trial"].get("problem") or len(answer) == 1:
            answer.append(_reason(facts, "cuda"))
    return [f"CPU cache: {cpu}", f"CUDA cache: {' '.join(answer)}"]


def _reason(facts: Facts, device: str) -> str:
    trial = facts["trial"]
    cache = trial.get("caches", {}).get(device)
    if cache is not None:
        return f"It {_failure(cache)}."
    problem, doing = trial.get("problem") or "no answer", trial.get("doing")
    return f"It was not tried: {problem}" + (f", while trying {doing}." if doing else ".")


def _failure(cache: dict[str, Any]) -> str:
    stage, error = cache["stage"], cache["error"]
    if stage == "tensors" and "No module named 'torch'" in error:
        return "gets memory, but shows it as tensors of torch, which is not installed"
    if stage == "tensors" and "not compiled with CUDA" in error:
        return "gets memory, but this torch is built without CUDA and cannot show it"
    return f"failed to {_STAGES[stage]}: {error}".rstrip(".")


_STAGES = {
    "open": "open",
    "step": "give a row memory",
    "tensors": "show its memory to torch",
    "write": "be written",
    "read": "be read back",
    "free": "free a row",
    "close": "close",
}


# Python.


def _package_findings(facts: Facts) -> Iterator[Finding]:
    python, packages = facts["python"], facts["packages"]
    yield Finding(
        area="Python",
        name="vattn",
        verdict="fine",
        text=f"vattn {python.get('vattn')}, Python {python.get('version')}, "
        f"extension {python.get('extension')}.",
    )
    yield _torch(packages.get("torch"), facts["trial"])
    yield _transformers(packages.get("transformers"))
    for name, purpose in OPTIONAL.items():
        version = packages.get(name)
        if version is None:
            reason = packages.get("problems", {}).get(name)
            text = f"Not readable: {reason}." if reason else f"Not installed; {purpose}."
            yield Finding(area="Python", name=name, verdict="missing", text=text)
        else:
            yield Finding(area="Python", name=name, verdict="fine", text=f"{version}.")


def _torch(version: str | None, trial: Facts) -> Finding:
    if version is None:
        return Finding(
            area="Python",
            name="torch",
            verdict="missing",
            text="Not installed; a cache shows its memory as torch's tensors.",
            remedy="pip install torch",
        )
    imported = trial.get("torch") or {}
    verdict: Verdict = "fine"
    text, remedy = f"{version}.", ""
    if release(version) < MIN_TORCH:
        verdict, remedy = "limited", "pip install -U torch"
        text += f" vattn needs {'.'.join(map(str, MIN_TORCH))}."
    if imported.get("problem"):
        verdict, remedy = "missing", "pip install --force-reinstall torch"
        text += f" It cannot be imported: {imported['problem']}."
    elif "cuda" in imported:
        built = f"for CUDA {imported['cuda']}" if imported["cuda"] else "without CUDA"
        found = "a" if imported["cuda_available"] else "no"
        text += f" Built {built}, finds {found} CUDA device."
        if (trial.get("cuda") or {}).get("devices") and not (
            imported["cuda"] and imported["cuda_available"]
        ):
            verdict = "limited"
            remedy = (
                "Install a torch built for a CUDA that the driver supports: pytorch.org says how."
            )
    return Finding(area="Python", name="torch", verdict=verdict, text=text, remedy=remedy)


def _transformers(version: str | None) -> Finding:
    floor = ".".join(map(str, MIN_TRANSFORMERS))
    if version is None:
        return Finding(
            area="Python",
            name="transformers",
            verdict="missing",
            text="Not installed; for VAttnCache and vattn.integrations.transformers.",
            remedy="pip install 'vattn[transformers]'",
        )
    if release(version) < MIN_TRANSFORMERS:
        return Finding(
            area="Python",
            name="transformers",
            verdict="limited",
            text=f"{version}; vattn.integrations.transformers needs {floor} or newer.",
            remedy="pip install -U transformers",
        )
    return Finding(
        area="Python", name="transformers", verdict="fine", text=f"{version} (needs {floor})."
    )


# Settings.


def _setting_findings(facts: Facts) -> Iterator[Finding]:
    settings = facts["settings"]
    variables = settings.get("variables")
    if variables is None:
        yield unknown("settings", "variables", settings, "variables")
        return
    if settings.get("vattn_error"):
        yield Finding(
            area="settings",
            name="VATTN_*",
            verdict="missing",
            text=f"vattn.init refuses the environment: {settings['vattn_error']}.",
            remedy="Unset or correct it.",
        )
    for name, value in variables.items():
        if name.startswith("VATTN_") and settings.get("vattn_error"):
            continue
        yield _variable(name, value)


def _variable(name: str, value: str) -> Finding:
    text, remedy = f"{value!r}.", ""
    if name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "cudaMallocAsync" in value:
            text += (
                " Memory that torch freed stays in the driver's pool, where vattn cannot get it."
            )
            remedy = "torch.cuda.empty_cache() before vattn.init, or the native backend"
        elif "expandable_segments" in value:
            text += " Expandable segments and vattn live side by side."
    elif name == "CUDA_LAUNCH_BLOCKING" and value not in ("", "0"):
        text += " Every kernel is waited for: nothing overlaps, and no time means anything."
        remedy = f"unset {name}"
    elif name == "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT":
        text += " Memory beyond it is refused, whatever the device has free."
        remedy = "Keep memory= below it."
    return Finding(
        area="settings",
        name=name,
        verdict="limited" if remedy else "fine",
        text=text,
        remedy=remedy,
    )


# Caches.


def _cache_findings(facts: Facts) -> Iterator[Finding]:
    trial = facts["trial"]
    for device, cache in trial.get("caches", {}).items():
        text = "Opened, given memory, written, read, freed, closed."
        if not cache["works"]:
            text = f"It {_failure(cache)}."
        yield Finding(
            area="tried",
            name=f"cache on {device}",
            verdict="fine" if cache["works"] else "missing",
            text=text,
        )
    if trial.get("problem"):
        doing = f" while it tried {trial['doing']}" if trial.get("doing") else ""
        yield Finding(
            area="tried",
            name="trial",
            verdict="missing",
            text=f"The process that tries things{doing}: {trial['problem']}.",
            remedy="See what dmesg and nvidia-smi say; put both into a bug report.",
        )
