"""The requests that all engines serve, and how they serve them."""

from __future__ import annotations

import random

from tiny_models import VOCABULARY

MIB = 2**20
N_REQUESTS = 26
# So little that running requests have to be preempted, and enough for the longest one.
TIGHT = 2 * MIB
# More than all requests need together.
AMPLE = 64 * MIB


def requests(n: int = N_REQUESTS) -> tuple[list[list[int]], list[int]]:
    """Make prompts, one in three with a beginning that others have as well, and their lengths."""
    rng = random.Random(1)

    def some(count: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

    shared = [some(160), some(97)]
    prompts, max_tokens = [], []
    for i in range(n):
        own = some(rng.choice([1, 5, 31, 64, 100, 250, 300]))
        prompts.append(own if i % 3 else shared[i // 3 % 2] + own[:40])
        max_tokens.append(rng.randrange(16, 90))
    return prompts, max_tokens
