"""Made-up traces: lognormal lengths, Poisson arrivals, the same for the same seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vattn.replay.trace import Trace, make_trace

# The means of azure_conv_2023, and about its spread.
PROMPT_MEDIAN, PROMPT_SIGMA = 800, 0.85
GENERATED_MEDIAN, GENERATED_SIGMA = 140, 0.9
MAX_PROMPT, MAX_GENERATED = 16_384, 2_048


def make_synthetic(requests: int, *, seed: int = 0, qps: float | None = None) -> Trace:
    """Make a trace of ``requests`` requests.

    Parameters
    ----------
    requests : int
        At least 1.
    seed : int
        Decides the lengths and the arrivals.
    qps : float, optional
        Mean arrivals per second, at exponential intervals. None: all arrive at once.

    Raises
    ------
    ValueError
        A count or a rate that is not positive.

    Examples
    --------
    >>> trace = make_synthetic(3, seed=1, qps=2)
    >>> len(trace), float(trace.arrival_s[0])
    (3, 0.0)
    """
    if requests < 1:
        raise ValueError(f"the synthetic trace has {requests} requests, expected at least 1")
    random = np.random.default_rng(seed)
    prompts = _lengths(random, requests, PROMPT_MEDIAN, PROMPT_SIGMA, MAX_PROMPT)
    generated = _lengths(random, requests, GENERATED_MEDIAN, GENERATED_SIGMA, MAX_GENERATED)
    arrivals = None if qps is None else poisson_arrivals(requests, qps, random)
    return make_trace(
        f"synthetic-{requests}", f"synthetic, seed {seed}", prompts, generated, arrivals
    )


def _lengths(
    random: np.random.Generator, n: int, median: int, sigma: float, largest: int
) -> NDArray[np.int64]:
    drawn = random.lognormal(np.log(median), sigma, n)
    return np.clip(np.rint(drawn), 1, largest).astype(np.int64)


def poisson_arrivals(n: int, qps: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Draw ``n`` arrival times in seconds, ``qps`` of them per second on average."""
    if not 0 < qps < np.inf:
        raise ValueError(f"qps is {qps:g}, expected a positive number of requests per second")
    return np.cumsum(random.exponential(1 / qps, n))
