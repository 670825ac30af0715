"""Is reading unmapped addresses an error, and can the cache still be closed then?"""

from __future__ import annotations

import torch

from benchmarks.gpu_questions.answers import Evidence
from benchmarks.gpu_questions.work import LENS, fill_rows, make_cache


def ask(evidence: Evidence) -> tuple[bool | None, str]:
    """Read far beyond what is mapped; afterwards this process can use the GPU no more."""
    cache = make_cache()
    fill_rows(cache, 0)
    k, _ = cache.kv(0)
    torch.cuda.synchronize()
    mapped = cache.mapped_tokens(0)
    evidence.note(tokens=LENS[0], mapped_tokens=mapped)
    error = ""
    try:
        total = float(k[0, mapped + 10_000 :].float().sum())
        torch.cuda.synchronize()
    except RuntimeError as caught:  # torch.AcceleratorError is one
        error = str(caught).splitlines()[0]
        total = None
    evidence.note(error=error, read=total)
    try:
        cache.close()
        evidence.note(close="returned")
    except RuntimeError as caught:
        evidence.note(close=str(caught))
    return bool(error), error or f"no error; the sum of what was read is {total}"
