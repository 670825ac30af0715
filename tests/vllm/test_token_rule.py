"""The rule by which two runs count as the same lets a tie pass, and nothing else."""

from __future__ import annotations

import pytest
import torch
from token_rule import MAX_TIES, TIE, assert_same, first_difference, is_tie

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2], [3], [4, 5], [6]]
STOCK = [[7, 8, 9], [7, 7, 7], [9, 8, 7], [8, 8, 8]]


def logits_with(best: dict[int, float]) -> torch.Tensor:
    found = torch.zeros(10, dtype=torch.float64)
    for token, value in best.items():
        found[token] = value
    return found


def near(tokens: list[int]) -> torch.Tensor:
    """8 and 9 are the best ones, and a tie."""
    return logits_with({8: 5.0, 9: 5.0 + TIE / 2, 7: 1.0})


def far(tokens: list[int]) -> torch.Tensor:
    """8 and 9 are the best ones, and no tie."""
    return logits_with({8: 5.0, 9: 5.0 + TIE * 2, 7: 1.0})


def changed(request: int, tokens: list[int]) -> list[list[int]]:
    return [tokens if i == request else list(found) for i, found in enumerate(STOCK)]


def test_equal_tokens_are_the_same() -> None:
    assert assert_same(PROMPTS, STOCK, [list(tokens) for tokens in STOCK], far) == 0


def test_another_token_is_a_difference() -> None:
    with pytest.raises(AssertionError, match=r"1 of 4 requests differ: request 0: token 1 of 3"):
        assert_same(PROMPTS, STOCK, changed(0, [7, 9, 9]), far)


def test_a_tie_passes_and_what_follows_is_not_compared() -> None:
    assert assert_same(PROMPTS, STOCK, changed(0, [7, 9, 1]), near) == 1


def test_a_tie_of_other_tokens_is_a_difference() -> None:
    with pytest.raises(AssertionError, match="request 0"):
        assert_same(PROMPTS, STOCK, changed(0, [7, 7, 9]), near)


def test_tokens_that_are_missing_are_a_difference() -> None:
    for tokens in ([], [7, 8], [7, 8, 9, 9]):
        with pytest.raises(AssertionError, match="request 0"):
            assert_same(PROMPTS, STOCK, changed(0, tokens), near)


def test_a_request_that_is_missing_is_a_difference() -> None:
    with pytest.raises(AssertionError):
        assert_same(PROMPTS, STOCK, STOCK[:-1], near)


def test_many_ties_are_not_believed() -> None:
    swap = {8: 9, 9: 8}
    ours = [[swap.get(token, token) for token in tokens] for tokens in STOCK]
    assert len([1 for a, b in zip(STOCK, ours, strict=True) if a != b]) == MAX_TIES + 1
    with pytest.raises(AssertionError, match="3 ties, at most 2"):
        assert_same(PROMPTS, STOCK, ours, near)


def test_the_logits_are_those_after_what_both_have_said() -> None:
    asked: list[list[int]] = []

    def logits(tokens: list[int]) -> torch.Tensor:
        asked.append(tokens)
        return near(tokens)

    assert_same(PROMPTS, STOCK, changed(2, [9, 9, 1]), logits)
    assert asked == [[4, 5, 9]]


def test_a_tie_is_closer_than_its_limit() -> None:
    assert is_tie(near, [1], 8, 9)
    assert is_tie(near, [1], 9, 8)
    assert not is_tie(far, [1], 8, 9)
    assert not is_tie(near, [1], 7, 9)
    assert not is_tie(near, [1], 9, 9)


def test_the_first_difference_is_found() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == 1
    assert first_difference([], [1]) == 0
