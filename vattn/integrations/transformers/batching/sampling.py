"""The next token of a request, from the scores of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Those that look at the scores only, not at the tokens so far.
_BLIND = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@dataclass(frozen=True, eq=False)
class Sampler:
    """How a request, or many of them, choose their tokens.

    Parameters
    ----------
    processors : LogitsProcessorList
        Of transformers, in their order.
    do_sample : bool
        Draw a token instead of taking the best.
    """

    processors: Any
    do_sample: bool

    @property
    def is_shareable(self) -> bool:
        """Whether requests with tokens of different lengths can be served in one call."""
        return all(type(processor) in _BLIND for processor in self.processors)

    def choose(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Choose a token for each row of ``logits``, as ``model.generate`` does.

        Parameters
        ----------
        tokens : torch.Tensor
            [requests, length], prompt included. Not looked at when this is shareable.
        logits : torch.Tensor
            [requests, vocabulary], float32. May be written to.

        Returns
        -------
        torch.Tensor
            [requests]
        """
        scores = self.processors(tokens, logits)
        if self.do_sample:
            return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[:, 0]
        return torch.argmax(scores, dim=-1)


GREEDY = Sampler(LogitsProcessorList(), do_sample=False)


def choose_tokens(
    samplers: Sequence[Sampler], tokens: Sequence[list[int]], logits: torch.Tensor
) -> list[int]:
    """Choose a token for each request, with one call for those that share a sampler.

    Parameters
    ----------
    samplers : sequence of Sampler
        One for each request.
    tokens : sequence of list of int
        Their tokens so far.
    logits : torch.Tensor
        [requests, vocabulary]

    Returns
    -------
    list of int
        One for each request.
    """
    members: dict[Sampler, list[int]] = {}
    for index, sampler in enumerate(samplers):
        members.setdefault(sampler, []).append(index)
    chosen = torch.empty(len(samplers), dtype=torch.long, device=logits.device)
    if GREEDY in members:
        # By far the most common, so without the copy below.
        chosen = torch.argmax(logits, dim=-1)
    for sampler, indices in members.items():
        if sampler is GREEDY:
            continue
        # Indexing copies, so that no processor can write into what another one reads.
        scores = logits[indices].to(torch.float32)
        seen = [] if sampler.is_shareable else [tokens[index] for index in indices]
        chosen[indices] = sampler.choose(torch.tensor(seen, device=logits.device), scores)
    return chosen.tolist()
