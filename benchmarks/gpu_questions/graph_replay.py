"""Does a CUDA graph replay rightly after its memory was mapped again?"""

from __future__ import annotations

from collections.abc import Callable

import torch

import vattn
from benchmarks.gpu_questions.answers import Evidence
from benchmarks.gpu_questions.work import DEVICE, DIM, HEADS, make_cache

TOKENS = 1000


def _capture(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    body()  # warms up: nothing may be loaded while capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


class Replayed:
    """A graph over the first TOKENS of a row."""

    def __init__(self, cache: vattn.KVCache, row: int) -> None:
        self.k, v = cache.kv(1, rows=row, max_len=TOKENS)
        assert v is not None
        self.v = v
        self.out = torch.empty(1, TOKENS, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        self.k.fill_(1)
        self.v.fill_(1)
        self.graph = _capture(lambda: torch.add(self.k, self.v, out=self.out))

    def right(self, value: int) -> bool:
        """Write new contents, replay, compare."""
        self.k.fill_(value)
        self.v.fill_(1)
        self.out.zero_()
        self.graph.replay()
        return bool((self.out == value + 1).all())


def _step_in_capture(cache: vattn.KVCache, row: int) -> str:
    """Map memory while a capture is under way, as a server's other thread might."""
    try:
        x = torch.zeros(16, device=DEVICE)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
            before = cache.stats().mapped_bytes
            cache.step({row: 30000})
            mapped = cache.stats().mapped_bytes - before
            x.add_(1)
        graph.replay()
        return f"mapped {mapped} bytes; the graph counts {x.tolist()[0]:.0f}"
    except RuntimeError as error:  # DriverError is one
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _calls(cache: vattn.KVCache) -> dict[str, int]:
    by_origin = cache.stats().driver_calls.values()
    names = ("create", "map", "unmap", "release")
    # A call that was never made is not listed.
    return {n: sum(calls[n].count for calls in by_origin if n in calls) for n in names}


def ask(evidence: Evidence) -> tuple[bool | None, str]:
    """Replay after growth, after the row was unmapped, and with other pages under it."""
    cache = make_cache(memory="512MiB", max_batch_size=1)
    row = cache.alloc()
    cache.step({row: TOKENS})
    replayed = Replayed(cache, row)
    right = {"as captured": replayed.right(3)}
    evidence.note(right=right, address=replayed.k.data_ptr())

    cache.step({row: 20_000})
    right["after growth"] = replayed.right(5)
    evidence.note(right=right)

    for i in range(3):
        before = _calls(cache)
        cache.free(row)
        torch.cuda.synchronize()  # or the row is still in use when it is to be unmapped
        cache.trim()
        unmapped = cache.stats().mapped_bytes == 0
        row = cache.alloc()
        cache.step({row: TOKENS + i * 5000})  # extents of other sizes
        same = cache.kv(1, rows=row)[0].data_ptr() == replayed.k.data_ptr()
        calls = {name: n - before[name] for name, n in _calls(cache).items()}
        right[f"mapped again {i + 1}"] = replayed.right(7 + i)
        evidence.note(right=right, **{f"remap {i + 1}": calls | {"all": unmapped, "same": same}})
        if not (unmapped and same and calls["unmap"] and calls["map"] and calls["create"]):
            return None, "the row was not unmapped and mapped again at its address"
    if not all(right.values()):
        return False, f"wrong: {', '.join(name for name, ok in right.items() if not ok)}"
    evidence.note(step_while_capturing=_step_in_capture(cache, row))
    cache.close()
    return True, f"{len(right)} replays right; {evidence.found('step_while_capturing')}"
