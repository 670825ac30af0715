"""Which layout should be the default on a device, from the figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vattn.config import CacheConfig

# interleaved grows by single pages, per_layer by one for each of its many regions: for that it may
# take this much longer.
ALLOWED = {"cuda": 1.01, "cpu": 1.02}


@dataclass(frozen=True)
class LayoutRatio:
    """Time over ``interleaved`` divided by that over ``per_layer``, in one decode case."""

    case: str
    order: str
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the figures say about the default layout; None where there are none."""

    device: str
    default: str
    recommended: str | None
    allowed: float
    median: dict[str, float]
    worst: dict[str, float]
    sentence: str


def default_config(kind: str) -> CacheConfig:
    """Make a configuration that leaves layout and order open."""
    return CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=1, max_batch_size=1, max_seq_len=1, device=kind
    )


def decide(device: str, ratios: Sequence[LayoutRatio]) -> Verdict:
    """Compare the layouts in the order that a configuration has by itself.

    Parameters
    ----------
    device : str
        "cpu" or "cuda:N".
    ratios : sequence of LayoutRatio
        Of decode cases: prefill is bound by arithmetic.

    Examples
    --------
    >>> decide("cpu", [LayoutRatio("a", "NHD", 1.3), LayoutRatio("b", "NHD", 1.1)]).sentence
    'on cpu, decoding over interleaved takes 1.20x the time of per_layer (NHD: median of 2 cases, \
worst 1.30x in a), more than 1.02x: per_layer should be the default, and is'
    """
    kind = device.partition(":")[0]
    config, allowed = default_config(kind), ALLOWED[kind]
    default = config.layout_name
    by_order: dict[str, list[LayoutRatio]] = {}
    for ratio in ratios:
        by_order.setdefault(ratio.order, []).append(ratio)
    median = {o: statistics.median(r.ratio for r in some) for o, some in by_order.items()}
    worst = {order: max(some, key=lambda r: r.ratio) for order, some in by_order.items()}
    recommended, sentence = None, f"none, as no figures of decoding on {device} have both layouts"
    if config.order in median:
        order = config.order
        within = median[order] <= allowed
        recommended = "interleaved" if within else "per_layer"
        others = "".join(f"; {o} {median[o]:.2f}x" for o in sorted(median) if o != order)
        sentence = (
            f"on {device}, decoding over interleaved takes {median[order]:.2f}x the time of "
            f"per_layer ({order}: median of {len(by_order[order])} cases, worst "
            f"{worst[order].ratio:.2f}x in {worst[order].case}{others}), "
            f"{'within' if within else 'more than'} {allowed}x: {recommended} should be the "
            f"default, {'and is' if recommended == default else f'but {default} is'}"
        )
    return Verdict(
        device=device,
        default=default,
        recommended=recommended,
        allowed=allowed,
        median=median,
        worst={order: r.ratio for order, r in worst.items()},
        sentence=sentence,
    )
