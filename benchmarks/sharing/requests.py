"""Requests that share prefixes: read from a Mooncake trace, or made up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 512  # of one hash id, in the published traces


@dataclass(frozen=True)
class Request:
    """A prompt, told by its blocks, and how many tokens follow it.

    ``blocks`` has one id for each started block of the prompt. An id stands for the block and all
    before it, so that requests share exactly the blocks that have equal ids.
    """

    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length at the end."""
        return self.prompt_tokens + self.output_tokens

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """Blocks that the prompt fills: what a cache of whole blocks can share."""
        return self.blocks[: self.prompt_tokens // BLOCK_TOKENS]

    def token_ids(self) -> NDArray[np.int64]:
        """Token ids of the prompt that are equal exactly where the blocks are.

        >>> Request(514, 1, (7, 9)).token_ids()[510:].tolist()
        [4094, 4095, 4608, 4609]
        """
        starts = np.array(self.blocks, dtype=np.int64)[:, None] * BLOCK_TOKENS
        ids: NDArray[np.int64] = (starts + np.arange(BLOCK_TOKENS)).ravel()[: self.prompt_tokens]
        return ids


def read_requests(path: Path, limit: int | None = None) -> list[Request]:
    """Read a Mooncake JSONL with ``input_length``, ``output_length`` and ``hash_ids``.

    Raises
    ------
    ValueError
        A line is not of that form; the message names it. Or there is none.
    OSError
        The file cannot be read.
    """
    requests: list[Request] = []
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if len(requests) == limit:
                break
            try:
                requests.append(_request(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: {error!r}; expected input_length, output_length and "
                    f"hash_ids, one id for each {BLOCK_TOKENS} tokens of the input"
                ) from error
    if not requests:
        raise ValueError(f"{path} has no requests, expected one on each line")
    return requests


def _request(record: dict[str, Any]) -> Request:
    prompt, output = int(record["input_length"]), int(record["output_length"])
    blocks = tuple(int(block) for block in record["hash_ids"])
    wanted = -(-prompt // BLOCK_TOKENS)
    if prompt < 1 or output < 0 or len(blocks) != wanted:
        raise ValueError(
            f"{prompt} input and {output} output tokens with {len(blocks)} hash_ids, "
            f"expected {wanted} of them"
        )
    return Request(prompt, output, blocks)


def made_up(n: int, seed: int = 0) -> list[Request]:
    """Make conversations of several turns that start with one of two system prompts."""
    rng = random.Random(seed)
    next_block = 2  # 0 and 1 are the system prompts
    conversations = [[system] for system in (0, 1) for _ in range(max(1, n // 8))]
    requests = []
    for _ in range(n):
        history = rng.choice(conversations)
        grown = rng.randint(1, 3)
        history += range(next_block, next_block + grown)
        next_block += grown
        prompt = (len(history) - 1) * BLOCK_TOKENS + rng.randint(1, BLOCK_TOKENS)
        requests.append(Request(prompt, rng.randint(1, BLOCK_TOKENS), tuple(history)))
        history[-1] = next_block  # the block that was not full goes on otherwise
        next_block += 1
    return requests


class EndlessCache:
    """Remembers every prompt: the most that any cache can find again, to the token."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def hit_tokens(self, request: Request) -> int:
        """Tokens of the longest prefix seen before, but for the last: its logits are wanted."""
        n = next((i for i, b in enumerate(request.blocks) if b not in self._seen), None)
        tokens = request.prompt_tokens if n is None else n * BLOCK_TOKENS
        return min(tokens, request.prompt_tokens - 1)

    def insert(self, request: Request) -> None:
        """Remember."""
        self._seen.update(request.blocks)


def facts(requests: Sequence[Request]) -> dict[str, int]:
    """Sums for the record."""
    return {
        "requests": len(requests),
        "prompt_tokens": sum(request.prompt_tokens for request in requests),
        "output_tokens": sum(request.output_tokens for request in requests),
        "longest_tokens": longest(requests),
    }


def longest(requests: Iterable[Request]) -> int:
    """Tokens of the longest request at its end."""
    return max(request.tokens for request in requests)
