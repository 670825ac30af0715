"""How many tokens requests hold: as given, or from a trace. Pure arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Lengths of a lognormal distribution beyond this many sigmas: one in 10**9.
_TAIL_SIGMAS = 6.0
SPECIFICATIONS = "fixed:N, uniform:A:B or lognormal:MEAN:SIGMA"


@dataclass(frozen=True)
class Run:
    """The lengths ``first`` to ``last``, each with the same weight."""

    first: int
    last: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens that a request holds at a random moment of its life.

    Attributes
    ----------
    name : str
        For people.
    runs : tuple of Run
        The distribution; the weights of all lengths are divided by their sum.
    left_out : str
        What does not fit in ``max_seq_len`` and is not in ``runs``; empty if all fits.
    """

    name: str
    runs: tuple[Run, ...]
    left_out: str = ""

    @property
    def mean_tokens(self) -> float:
        """Mean length."""
        return self.mean_units(1, 1)

    def mean_units(self, token_size: int, unit: int) -> float:
        """Mean of ``ceil(length * token_size / unit)``: pages for a region, exactly.

        Examples
        --------
        >>> fixed(5).mean_units(token_size=10, unit=16)  # 50 bytes need 4 pages of 16
        4.0
        """
        sums = weights = 0.0
        for run in self.runs:
            count = run.last - run.first + 1
            weights += run.weight * count
            if count == 1:
                sums += run.weight * -(-run.first * token_size // unit)
            else:
                start = run.first * token_size + unit - 1
                sums += run.weight * _floor_sum(count, unit, token_size, start)
        return sums / weights

    def mean_at_most(self, limit: int) -> float:
        """Mean of ``min(length, limit)``: the tokens that a window of ``limit`` sees."""
        sums = weights = 0.0
        for run in self.runs:
            count = run.last - run.first + 1
            weights += run.weight * count
            whole = max(0, min(run.last, limit) - run.first + 1)
            below = whole * (run.first + run.first + whole - 1) // 2
            sums += run.weight * (below + (count - whole) * limit)
        return sums / weights


@dataclass(frozen=True, kw_only=True)
class MeanOnly:
    """Lengths of which only the mean is known: each region wastes half a unit."""

    name: str
    mean_tokens: float
    max_seq_len: int
    left_out: str = ""

    def mean_units(self, token_size: int, unit: int) -> float:
        """Like that of :class:`Lengths`, by the rule of thumb of half a unit."""
        if unit >= self.max_seq_len * token_size:
            return 1.0  # no request needs a second
        if token_size % unit == 0:
            return self.mean_tokens * token_size / unit
        return max(1.0, self.mean_tokens * token_size / unit + 0.5)

    def mean_at_most(self, limit: int) -> float:
        """Upper bound of that of :class:`Lengths`."""
        return min(self.mean_tokens, limit)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum of ``(a * i + b) // m`` for i in 0 to n - 1, in logarithmic time."""
    total = 0
    while True:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b = divmod(top, m)
        m, a = a, m


def fixed(tokens: int) -> Lengths:
    """All requests hold the same."""
    return Lengths(name=f"{tokens:,} tokens each", runs=(Run(tokens, tokens, 1.0),))


def parse_lengths(text: str, max_seq_len: int) -> Lengths:
    """Read ``fixed:N``, ``uniform:A:B`` or ``lognormal:MEAN:SIGMA``.

    Parameters
    ----------
    text : str
        A and B inclusive; MEAN in tokens, SIGMA that of the logarithm.
    max_seq_len : int
        Lengths beyond are left out, which the result says.

    Raises
    ------
    ValueError
        Not one of these, or nothing of it fits.

    Examples
    --------
    >>> parse_lengths("uniform:1:9", max_seq_len=100).mean_tokens
    5.0
    """
    kind, *words = text.split(":")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    integers = all(number.is_integer() for number in numbers)
    if not all(0 < number < math.inf for number in numbers):
        numbers = []
    if kind == "fixed" and len(numbers) == 1 and integers:
        return _within(text, [Run(int(numbers[0]), int(numbers[0]), 1.0)], max_seq_len)
    if kind == "uniform" and len(numbers) == 2 and integers and numbers[0] <= numbers[1]:
        return _within(text, [Run(int(numbers[0]), int(numbers[1]), 1.0)], max_seq_len)
    if kind == "lognormal" and len(numbers) == 2:
        return _within(text, _lognormal(numbers[0], numbers[1], max_seq_len), max_seq_len)
    raise ValueError(
        f"length distribution is {text!r}, expected {SPECIFICATIONS} with numbers above 0"
    )


def _lognormal(mean: float, sigma: float, max_seq_len: int) -> Iterator[Run]:
    """One run per length, and one beyond ``max_seq_len`` for what does not fit."""
    mu = math.log(mean) - sigma * sigma / 2

    def below(tokens: float) -> float:
        return 0.5 * math.erfc((mu - math.log(tokens)) / (sigma * math.sqrt(2)))

    last = min(max_seq_len, math.ceil(math.exp(min(mu + _TAIL_SIGMAS * sigma, 60.0))))
    seen = 0.0
    for tokens in range(1, last + 1):
        now = below(tokens + 0.5)
        if now > seen:
            yield Run(tokens, tokens, now - seen)
        seen = now
    if last == max_seq_len and seen < 1:
        yield Run(last + 1, last + 1, 1 - seen)


def _within(name: str, runs: Iterable[Run], max_seq_len: int) -> Lengths:
    kept: list[Run] = []
    total = lost = 0.0
    for run in runs:
        total += run.weight * (run.last - run.first + 1)
        lost += run.weight * max(0, run.last - max(run.first, max_seq_len + 1) + 1)
        if run.first <= max_seq_len:
            kept.append(Run(run.first, min(run.last, max_seq_len), run.weight))
    if not kept:
        raise ValueError(
            f"all lengths of {name} are beyond max_seq_len = {max_seq_len}; raise --max-seq-len"
        )
    share = lost / total
    left_out = (
        f"{share:.2%} of the lengths are beyond max_seq_len = {max_seq_len:,}: left out"
        if share >= 5e-5
        else ""
    )
    return Lengths(name=name, runs=tuple(kept), left_out=left_out)


def lengths_of_requests(
    name: str, requests: Iterable[tuple[int, int]], max_seq_len: int
) -> Lengths:
    """Every length that requests pass through, from the first generated token to the last.

    Parameters
    ----------
    name : str
        For people.
    requests : iterable of (prompt_tokens, generated_tokens)
        A request that generates g tokens is resident for g iterations and holds one token more in
        each, so that long answers weigh more, as they do in a running engine.
    max_seq_len : int
        Requests that would grow beyond are left out, which the result says.

    Examples
    --------
    >>> lengths_of_requests("two", [(10, 1), (20, 2)], max_seq_len=100).mean_tokens
    18.0
    """
    changes: dict[int, int] = {}
    n = too_long = 0
    for prompt, generated in requests:
        n += 1
        if prompt + generated > max_seq_len:
            too_long += 1
        elif generated > 0:
            changes[prompt + 1] = changes.get(prompt + 1, 0) + 1
            changes[prompt + generated + 1] = changes.get(prompt + generated + 1, 0) - 1
    runs: list[Run] = []
    weight = 0
    points = sorted(changes)
    for first, after in itertools.pairwise(points):
        weight += changes[first]
        if weight:
            runs.append(Run(first, after - 1, float(weight)))
    if not runs:
        raise ValueError(
            f"{name} has no request that generates and fits in max_seq_len = {max_seq_len:,} "
            f"({n:,} requests, {too_long:,} too long); raise --max-seq-len"
        )
    left_out = (
        f"{too_long:,} of {n:,} requests are beyond max_seq_len = {max_seq_len:,}: left out"
        if too_long
        else ""
    )
    return Lengths(name=name, runs=tuple(runs), left_out=left_out)


def read_lengths(path: Path, max_seq_len: int) -> Lengths:
    """Lengths of the requests of a trace, in any format that ``vattn replay`` reads."""
    # Here, because it needs numpy.
    from vattn.replay.trace import read_trace

    trace = read_trace(path)
    requests = zip(trace.prompt_tokens.tolist(), trace.generated_tokens.tolist(), strict=True)
    return lengths_of_requests(path.name, requests, max_seq_len)
