"""What fits in a budget. Pure arithmetic, in bytes: numbers in, numbers out."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from vattn.config import LAYOUTS, CacheConfig
from vattn.models import ModelShape
from vattn.plan.lengths import Lengths, MeanOnly

KIB, MIB, TIB = 2**10, 2**20, 2**40
PAGE_SIZES = (64 * KIB, 128 * KIB, 256 * KIB, 2 * MIB)
STOCK_CUDA_PAGE_BYTES = 2 * MIB
PATCHED_ONLY = "patched driver only"
# What vattn reserves at most: half of the 47 bits of addresses that a process has.
MAX_RESERVED_BYTES = 64 * TIB
PAGED_BLOCK_TOKENS = 16
# Mappings that a process has anyway, and that the library keeps back for itself.
OTHER_MAPPINGS = 2048
# Rows of a batch where nothing is known about lengths.
DEFAULT_ROWS = 256
# Policies whose requests need this much more than the best are still as good.
AS_GOOD = 1.01


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How the memory of a request grows.

    Attributes
    ----------
    name : str
        For people.
    layout : str or None
        Of vattn; None for what vattn is compared with.
    page_bytes : int
        Unit of growth of every region.
    regions : tuple of (int, int)
        Bytes of one token in a region, and how many regions are like that.
    """

    name: str
    layout: str | None
    page_bytes: int
    regions: tuple[tuple[int, int], ...]

    @property
    def n_regions(self) -> int:
        """Regions of a row."""
        return sum(count for _, count in self.regions)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all regions."""
        return sum(token * count for token, count in self.regions)

    @property
    def growth_bytes(self) -> int:
        """Bytes that a row grows by when every region needs a page."""
        return self.n_regions * self.page_bytes

    @property
    def typical_waste_bytes(self) -> float:
        """Half a page in every region, save where tokens are whole pages."""
        partly_filled = sum(n for token, n in self.regions if token % self.page_bytes)
        return partly_filled * self.page_bytes / 2

    def pages(self, tokens: int) -> int:
        """Pages under a row of ``tokens``, rounded up in every region."""
        return sum(count * -(-tokens * token // self.page_bytes) for token, count in self.regions)

    def mapped_bytes(self, tokens: int) -> int:
        """Bytes under a row of ``tokens``."""
        return self.pages(tokens) * self.page_bytes

    def mean_mapped_bytes(self, lengths: Lengths | MeanOnly) -> float:
        """Mean of :meth:`mapped_bytes` over a distribution of lengths."""
        return self.page_bytes * sum(
            count * lengths.mean_units(token, self.page_bytes) for token, count in self.regions
        )

    def longest(self, n_pages: int) -> int:
        """Tokens of the longest row that ``n_pages`` can hold."""
        low, high = 0, n_pages * self.page_bytes // self.token_bytes
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.pages(middle) <= n_pages else (low, middle - 1)
        return low

    def row_stride_bytes(self, max_seq_len: int) -> int:
        """Addresses of one row: in every region whole tokens and whole pages."""
        return sum(
            count * _round_up(max_seq_len * token, math.lcm(token, self.page_bytes))
            for token, count in self.regions
        )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def vattn_policy(
    shape: ModelShape, *, item_bytes: int, layout: str, page_bytes: int, order: str = "NHD"
) -> Policy:
    """Make the policy of a layout of vattn: its regions are those of ``csrc/core/layout.h``.

    Examples
    --------
    >>> from vattn.models import MODELS
    >>> policy = vattn_policy(MODELS["llama-3-8b"], item_bytes=2, layout="per_layer",
    ...                       page_bytes=2 * MIB)
    >>> policy.regions, policy.growth_bytes // MIB
    (((2048, 64),), 128)
    """
    regions: Counter[int] = Counter()
    whole_token = 0
    for group in shape.layer_groups:
        layers, heads, k_dim, v_dim, *_ = group.shape()
        # In order HND every head is a region of its own.
        parts, heads_here = (heads, 1) if order == "HND" else (1, heads)
        tensors = [heads_here * dim * item_bytes for dim in (k_dim, v_dim) if dim]
        if layout == "per_layer":
            for token_bytes in tensors:
                regions[token_bytes] += parts * len(layers)
        elif order == "HND":
            regions[sum(tensors) * len(layers)] += parts
        else:
            whole_token += sum(tensors) * len(layers)
    if whole_token:
        regions[whole_token] = 1
    return Policy(
        name=layout, layout=layout, page_bytes=page_bytes, regions=tuple(sorted(regions.items()))
    )


def paged_blocks(token_bytes: int, block_tokens: int = PAGED_BLOCK_TOKENS) -> Policy:
    """Make the policy of engines with a block table: whole blocks, each of all layers."""
    return Policy(
        name=f"paged, {block_tokens}-token blocks",
        layout=None,
        page_bytes=block_tokens * token_bytes,
        regions=((token_bytes, 1),),
    )


def full_reservation(token_bytes: int, max_seq_len: int) -> Policy:
    """Make the policy of a static cache: every request has memory for the longest."""
    return Policy(
        name="full reservation",
        layout=None,
        page_bytes=max_seq_len * token_bytes,
        regions=((token_bytes, 1),),
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a policy makes of a budget.

    Attributes
    ----------
    policy : Policy
        Whose figures these are.
    rows_at_longest : int
        Rows that fit if all are ``max_seq_len`` long.
    longest_row : int
        Tokens that one row alone could hold; may be beyond ``max_seq_len``.
    mean_mapped_bytes, mean_waste_bytes : float or None
        Per request, over the distribution of lengths. Without one the waste is half a page in every
        region, the bytes are None.
    concurrency : float or None
        Requests that fit on average.
    max_batch_size : int
        Rows that a cache should have.
    reserved_bytes : int
        Addresses of that many rows.
    most_mappings : int
        Mappings of the process, on the host, if no two pages are neighbours.
    obstacles : tuple of str
        Why this cannot be used; empty if it can.
    """

    policy: Policy
    rows_at_longest: int
    longest_row: int
    mean_mapped_bytes: float | None
    mean_waste_bytes: float
    concurrency: float | None
    max_batch_size: int
    reserved_bytes: int
    most_mappings: int
    obstacles: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Everything that a plan depends on.

    Attributes
    ----------
    shape : ModelShape
        On one device.
    dtype : str
        Of the cache; ``item_bytes`` are those of one element.
    memory_bytes : int
        Budget for keys and values.
    max_seq_len : int
        Longest row.
    device : str
        "cuda" or "cpu".
    order : str
        "NHD" or "HND".
    max_batch_size : int or None
        Rows; None: as many as make sense.
    lengths : Lengths, MeanOnly or None
        Tokens that requests hold.
    max_map_count : int
        Mappings that the kernel lets a process have.
    """

    shape: ModelShape
    dtype: str
    item_bytes: int
    memory_bytes: int
    max_seq_len: int
    device: str = "cuda"
    order: str = "NHD"
    max_batch_size: int | None = None
    lengths: Lengths | MeanOnly | None = None
    max_map_count: int = 65_530


def fit(policy: Policy, question: Question) -> Fit:
    """Return what ``policy`` makes of the budget of ``question``."""
    q = question
    pages = q.memory_bytes // policy.page_bytes
    mean = None if q.lengths is None else policy.mean_mapped_bytes(q.lengths)
    concurrency = None if mean is None else pages * policy.page_bytes / mean
    if q.lengths is None or mean is None:
        waste = policy.typical_waste_bytes
    else:
        # Not below zero, which rounding of the means could make of nothing.
        waste = max(0.0, mean - q.lengths.mean_tokens * policy.token_bytes)
    stride = policy.row_stride_bytes(q.max_seq_len)
    rows = q.max_batch_size or _rows(policy, pages, concurrency, stride)
    at_once = min(rows, pages // policy.n_regions)
    # A row is a mapping for what it has and one for what it has not, in every region.
    most_mappings = pages + at_once * policy.n_regions + OTHER_MAPPINGS
    result = Fit(
        policy=policy,
        rows_at_longest=pages // policy.pages(q.max_seq_len),
        longest_row=policy.longest(pages),
        mean_mapped_bytes=mean,
        mean_waste_bytes=waste,
        concurrency=concurrency,
        max_batch_size=rows,
        reserved_bytes=rows * stride,
        most_mappings=most_mappings,
        obstacles=(),
    )
    return _with_obstacles(result, q, pages)


def _rows(policy: Policy, pages: int, concurrency: float | None, stride: int) -> int:
    """Return a quarter more rows than expected requests: rows cost addresses only."""
    wanted = DEFAULT_ROWS if concurrency is None else _round_up(math.ceil(concurrency * 1.25), 8)
    return max(1, min(wanted, pages // policy.n_regions, MAX_RESERVED_BYTES // stride))


def _with_obstacles(result: Fit, q: Question, pages: int) -> Fit:
    policy = result.policy
    if policy.layout is None:
        return result
    found = []
    if q.device == "cuda" and policy.page_bytes % STOCK_CUDA_PAGE_BYTES:
        found.append(PATCHED_ONLY)
    if pages < policy.n_regions:
        found.append(f"the budget has {pages:,} pages, a row needs {policy.n_regions:,}")
    if result.reserved_bytes > MAX_RESERVED_BYTES:
        found.append(f"{result.max_batch_size:,} rows need more than 64 TiB of addresses")
    if q.device == "cpu" and result.most_mappings > q.max_map_count:
        found.append(f"may need {result.most_mappings:,} mappings")
    return replace(result, obstacles=tuple(found))


def compare(question: Question, page_sizes: tuple[int, ...] = PAGE_SIZES) -> list[Fit]:
    """Both layouts with every page size, paged blocks and full reservation."""
    q = question
    policies = [
        vattn_policy(
            q.shape, item_bytes=q.item_bytes, layout=layout, page_bytes=size, order=q.order
        )
        for layout in LAYOUTS
        for size in page_sizes
    ]
    token_bytes = policies[0].token_bytes
    others = [paged_blocks(token_bytes), full_reservation(token_bytes, q.max_seq_len)]
    return [fit(policy, q) for policy in [*policies, *others]]


def recommend(fits: list[Fit], device: str) -> Fit | None:
    """Choose among what can be used: least memory, within 1% the largest page; None if nothing can.

    Large pages come next because cost follows the number of pages mapped; then the layout that
    the library takes by default on the device.
    """
    usable = [f for f in fits if f.policy.layout is not None and not f.obstacles]
    if not usable:
        return None
    default = "interleaved" if device == "cuda" else "per_layer"

    def need(one: Fit) -> float:
        return one.mean_waste_bytes if one.mean_mapped_bytes is None else one.mean_mapped_bytes

    least = min(map(need, usable))
    as_good = [f for f in usable if need(f) <= AS_GOOD * least]
    return max(as_good, key=lambda f: (f.policy.page_bytes, f.policy.layout == default))


def cache_config(chosen: Fit, question: Question) -> CacheConfig:
    """Make the configuration of a cache as ``chosen``, with the whole budget."""
    q, page_bytes = question, chosen.policy.page_bytes
    unit = max(page_bytes, MIB)
    uniform = len(q.shape.layer_groups) == 1
    group = q.shape.layer_groups[0]
    return CacheConfig(
        num_layers=q.shape.num_layers,
        num_kv_heads=group.num_kv_heads if uniform else None,
        head_dim=group.head_dim if uniform else None,
        v_head_dim=group.v_head_dim if uniform else None,
        layer_groups=None if uniform else q.shape.layer_groups,
        dtype=q.dtype,
        max_batch_size=chosen.max_batch_size,
        max_seq_len=q.max_seq_len,
        device=q.device,
        memory=q.memory_bytes // unit * unit or q.memory_bytes,
        layout=chosen.policy.layout,
        order=q.order,
        page_bytes=page_bytes,
    )
