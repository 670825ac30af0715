"""When two runs of a model count as the same.

Kernels add in different orders, so logits differ in their last bits. Where the two best tokens are
as near to each other as that, either is right, and what follows cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

TIE = 1e-4
MAX_TIES = 2

# Logits of the token after a sequence, [vocabulary], float64.
Logits = Callable[[list[int]], torch.Tensor]


def reference(model: Path) -> Logits:
    """Make the logits of a model on disk, by transformers in fp64. Loaded when first asked."""
    loaded: list[torch.nn.Module] = []

    def logits(tokens: list[int]) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        if not loaded:
            loaded.append(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval())
        with torch.no_grad():
            found: torch.Tensor = loaded[0](torch.tensor([tokens])).logits[0, -1]
        return found

    return logits


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs; the shorter length if one is the other's beginning."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))


def is_tie(logits: Logits, before: list[int], one: int, other: int) -> bool:
    """Whether two tokens are the two best ones, and hardly apart."""
    best, tokens = logits(before).topk(2)
    return {one, other} == set(tokens.tolist()) and float(best[0] - best[1]) < TIE


def assert_same(
    prompts: list[list[int]], stock: list[list[int]], ours: list[list[int]], logits: Logits
) -> int:
    """Check that every request has the tokens of stock; returns how many ended in a tie."""
    assert len(prompts) == len(stock) == len(ours)
    ties, wrong = 0, []
    for i, (prompt, expected, found) in enumerate(zip(prompts, stock, ours, strict=True)):
        at = first_difference(expected, found)
        if at is None:
            continue
        both_go_on = at < min(len(expected), len(found))
        if both_go_on and is_tie(logits, prompt + expected[:at], expected[at], found[at]):
            ties += 1
        else:
            pair = expected[at : at + 3], found[at : at + 3]
            wrong.append(f"request {i}: token {at} of {len(expected)}: {pair[0]} -> {pair[1]}")
    assert not wrong, f"{len(wrong)} of {len(prompts)} requests differ: " + "; ".join(wrong)
    assert ties <= MAX_TIES, f"{ties} ties, at most {MAX_TIES} are believable"
    return ties


def assert_same_again(
    prompts: list[list[int]],
    stock: list[list[int]],
    ours: Iterable[tuple[int, list[int]]],
    logits: Logits,
) -> int:
    """Check requests of which each may have come several times: its number, and its tokens.

    A tie that falls out in the same way each time counts once.
    """
    found = sorted({(i, tuple(tokens)) for i, tokens in ours})
    return assert_same(
        [prompts[i] for i, _ in found],
        [stock[i] for i, _ in found],
        [list(tokens) for _, tokens in found],
        logits,
    )
