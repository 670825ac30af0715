"""What the engines are asked to do: the same requests for all of them, others in every round."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.vllm.model import VOCABULARY
from vattn.replay.synthetic import poisson_arrivals
from vattn.replay.trace import read_trace

PROMPT_MEDIAN, PROMPT_SIGMA = 160, 0.8
GENERATED_MEDIAN, GENERATED_SIGMA = 24, 0.7


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Longest prompt and longest answer; what is longer is cut."""

    prompt: int = 1024
    generated: int = 96


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt of random tokens, which no other request shares, and how many to generate."""

    prompt: list[int]
    generate: int
    at_s: float


def lengths(
    n: int, trace: Path | None, limits: Limits
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of ``n`` prompts and answers, those of a trace, or lognormal with a fixed seed.

    Raises
    ------
    ValueError
        The trace has fewer requests.
    """
    prompts: NDArray[Any]
    generated: NDArray[Any]
    if trace is None:
        random = np.random.default_rng(0)
        prompts = random.lognormal(np.log(PROMPT_MEDIAN), PROMPT_SIGMA, n)
        generated = random.lognormal(np.log(GENERATED_MEDIAN), GENERATED_SIGMA, n)
    else:
        found = read_trace(trace)
        if len(found) < n:
            raise ValueError(
                f"{trace.name} has {len(found)} requests; give --requests of at most that"
            )
        prompts, generated = found.head(n).prompt_tokens, found.head(n).generated_tokens
    return _clipped(prompts, limits.prompt), _clipped(generated, limits.generated)


def _clipped(tokens: NDArray[Any], most: int) -> NDArray[np.int64]:
    clipped: NDArray[np.int64] = np.clip(np.rint(tokens), 1, most).astype(np.int64)
    return clipped


def make_load(
    prompts: NDArray[np.int64],
    generated: NDArray[np.int64],
    *,
    rate: float | None,
    seed: int,
) -> list[Request]:
    """Make the requests of one round.

    Parameters
    ----------
    prompts, generated : array of int
        Tokens of each request.
    rate : float or None
        Requests a second, at exponential intervals; None: all at once.
    seed : int
        Decides the tokens and the arrivals.
    """
    random = np.random.default_rng(seed)
    n = len(prompts)
    arrivals = np.zeros(n) if rate is None else poisson_arrivals(n, rate, random)
    return [
        Request(
            prompt=random.integers(3, VOCABULARY, int(length)).tolist(),
            generate=int(answer),
            at_s=float(at),
        )
        for length, answer, at in zip(prompts, generated, arrivals - arrivals[0], strict=True)
    ]


def as_json(load: list[Request]) -> list[dict[str, Any]]:
    """Write a load for the process of an engine."""
    return [asdict(request) for request in load]
