"""What is found out by using it: torch, the CUDA driver, and a tiny cache on every device.

Runs in a process of its own, because a sick driver may end it or never answer. The process writes a
JSON object per line: ``{"doing": what}`` before each part, and its result after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import vattn
from vattn import _C

LIMIT_S = 300.0
TOKENS = 100

# With -m the child could import another vattn, out of the folder it was started in.
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from vattn.doctor.trial import tell_all; tell_all()"
)


def run(report: Callable[[str], None], limit_s: float = LIMIT_S, code: str = _CODE) -> Any:
    """Try everything in a child process.

    Parameters
    ----------
    report : callable
        Told what is being tried.
    limit_s : float
        Seconds after which the child is ended.
    code : str
        What the child runs.

    Returns
    -------
    dict
        ``torch``, ``cuda``, ``caches``, as far as it came; ``problem``: how the child ended if not
        by itself, "" otherwise; ``doing``: what it was at.
    """
    found: dict[str, Any] = {"caches": {}, "doing": "start", "problem": ""}
    command = [sys.executable, "-c", code, json.dumps(sys.path)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        too_late = threading.Event()

        def end() -> None:
            too_late.set()
            child.kill()

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                _take(line, found, report)
            status = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            timer.cancel()
        if too_late.is_set():
            found["problem"] = f"no answer within {limit_s:g} s"
        elif status != 0:
            errors.seek(0)
            last_words = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            found["problem"] = ": ".join([_how_it_ended(status), *last_words])
    return found


def _take(line: str, found: dict[str, Any], report: Callable[[str], None]) -> None:
    try:
        told = json.loads(line)
    except ValueError:
        return  # other libraries may print what they like
    if not isinstance(told, dict):
        return
    found["caches"] |= told.pop("caches", {})
    found.update(told)
    if told.get("doing"):
        report(told["doing"])


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-status).name}"
    return f"ended by signal {-status}"


# In the child.


def tell_all() -> None:
    """Try everything, and write what comes of it. The riskier, the later."""
    _tell(doing="torch")
    _tell(torch=torch_facts())
    _tell(doing="a cache on the CPU")
    _tell(caches={"cpu": try_cache("cpu")})
    _tell(doing="the CUDA driver")
    cuda = cuda_facts()
    _tell(cuda=cuda)
    for index, device in enumerate(cuda["devices"]):
        if not device["problem"]:
            name = f"cuda:{index}"
            _tell(doing=f"a cache on {name}")
            _tell(caches={name: try_cache(name)})
    _tell(doing="")


def _tell(**told: object) -> None:
    print(json.dumps(told), flush=True)


def torch_facts() -> dict[str, Any]:
    """Return the version of torch, the CUDA it was built for, and whether it finds a device."""
    try:
        import torch

        return {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cuda_available": torch.cuda.is_available(),
            "problem": "",
        }
    except Exception as error:  # a broken installation raises whatever it likes
        return {"problem": f"{type(error).__name__}: {error}"}


def cuda_facts() -> dict[str, Any]:
    """Return the version of the CUDA driver and what its devices offer.

    Returns
    -------
    dict
        ``driver_version``, such as 13000, None without a driver; ``failed_call`` and ``problem``,
        why there are no devices; ``devices``, as csrc/driver/cuda_probe.h has them.
    """
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        # Asked here, because a driver that is too old for the rest still has this function.
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return {"driver_version": version.value or None} | _C.probe_cuda()


def try_cache(device: str) -> dict[str, Any]:
    """Open a tiny cache, give a row memory, write it, read it, close it.

    Returns
    -------
    dict
        ``works``; ``stage``, where it ended; ``error``, why, "" if it works.

    Examples
    --------
    >>> try_cache("cpu")
    {'works': True, 'stage': 'close', 'error': ''}
    """
    stage = "open"
    try:
        config = vattn.CacheConfig(
            num_layers=2,
            num_kv_heads=2,
            head_dim=64,
            dtype="float32",
            max_batch_size=2,
            max_seq_len=1024,
            device=device,
            memory="16MiB",
        )
        with vattn.init(config) as cache:
            stage = "step"
            row = cache.alloc(TOKENS)
            cache.step({row: TOKENS})
            stage = "tensors"
            # K and V of both layers. Any: for mypy, V may be None and == a bool.
            views: list[Any] = [
                view for layer in (0, 1) for view in cache.kv(layer, rows=row, max_len=TOKENS)
            ]
            stage = "write"
            for value, view in enumerate(views, start=1):
                view.fill_(value)
            stage = "read"
            if not all(bool((view == i).all()) for i, view in enumerate(views, start=1)):
                raise RuntimeError("what was written was not there when it was read")
            stage = "free"
            cache.free(row)
            stage = "close"
    except Exception as error:
        return {"works": False, "stage": stage, "error": f"{type(error).__name__}: {error}"}
    return {"works": True, "stage": stage, "error": ""}
