"""What is compared: each way to hold keys and values, with each kernel that can read it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vattn.bench.attention import kernels, paged
from vattn.bench.attention.cases import RESERVED, Case, NotMeasured
from vattn.bench.attention.kernels import Call, Kernel
from vattn.bench.attention.paged import PagedKernel
from vattn.bench.attention.stores import (
    KV,
    PLAIN,
    RESERVED_ROWS,
    Blocks,
    PlainRows,
    Rows,
    Store,
    contiguous_stores,
)

_REFERENCE_QUERIES = 256  # of a prefill: a score for each pair is a lot of memory

# Others' kernels refuse shapes, machines and versions in their own ways.
REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    ImportError,
    OSError,
)


@dataclass
class Subject:
    """A store and a kernel over it. ``calls`` has one call for each timed layer."""

    store: str
    kernel: str
    baseline: str | None  # name of the subject over torch.empty, in the same order
    calls: Sequence[Call]
    token_stride_bytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.store}/{self.kernel}"


@dataclass
class Setup:
    """The subjects of a case, and what their outputs must be."""

    case: Case
    subjects: list[Subject]
    missing: list[NotMeasured]
    kernels: dict[str, str]  # what each is, in words
    # For each layer, what the first query head of the first row must get: [last queries, dim].
    expected: list[torch.Tensor]
    limit: Sequence[Call]  # what the machine would need for the same work without attention


@contextlib.contextmanager
def set_up(case: Case, device: str) -> Iterator[Setup]:
    """Make and fill every store of a case, bind every kernel to it; give all back at the end."""
    generator = torch.Generator(device=device).manual_seed(case.tokens + case.batch)

    def random(heads: int, tokens: int) -> torch.Tensor:
        size = (case.batch, heads, tokens, case.head_dim)
        return torch.randn(size, generator=generator, device=device).to(case.torch_dtype)

    found, missing = kernels.contiguous_kernels(device, case.dtype)
    by_block, not_installed = paged.available(device, found)
    with contextlib.ExitStack() as stack:
        stores: list[Store] = []

        def held(store: Store) -> None:
            stack.callback(store.close)
            stores.append(store)

        rows = contiguous_stores(case, device, held)
        reserved = PlainRows(case, "HND", device, name=RESERVED_ROWS, reserved=RESERVED)
        held(reserved)
        tables = {size: Blocks(case, size, device) for size, some in by_block.items() if some}
        for blocks in tables.values():
            held(blocks)
        queries = [random(case.shape.num_query_heads, case.queries)] * case.layers_timed
        expected = []
        for layer in range(case.layers_timed):
            kv = random(case.kv_heads, case.tokens), random(case.kv_heads, case.tokens)
            for store in stores:
                store.write(layer, kv)
            expected.append(reference(queries[layer], kv))
        setup = Setup(case, [], missing + not_installed, {}, expected, [])
        for kernel in found:
            setup.kernels[kernel.name] = kernel.what
            for store in (*rows, reserved):
                setup.subjects.append(_over_rows(case, store, kernel, queries))
        setup.kernels["masked"] = "as sdpa, with a mask of which keys are live"
        _add_masked(setup, reserved, queries)
        for size, some in by_block.items():
            for paged_kernel in some:
                _add_paged(setup, tables[size], paged_kernel, queries)
        setup.limit = limit_calls(case, rows[1], queries)
        yield setup


def reference(query: torch.Tensor, kv: KV) -> torch.Tensor:
    """Attention of the first row's first query head, step by step in float32; its last queries."""
    q, k, v = (tensor[0, 0].float() for tensor in (query, *kv))
    q = q[-_REFERENCE_QUERIES:]
    future = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    scores = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(future, float("-inf"))
    return scores.softmax(dim=-1) @ v


def limit_calls(case: Case, plain: Rows, queries: Sequence[torch.Tensor]) -> list[Call]:
    """Work of the same size that cannot be done faster, for each timed layer.

    Decoding has to move K and V: a copy of K reads and writes as many bytes together. A prefill has
    to multiply: one matrix product with as many multiplications as a causal prefill has.
    """
    if case.phase == "decode":
        target = torch.empty_like(plain.kv(0)[0])

        def copy(source: torch.Tensor) -> Call:
            return lambda: target.copy_(source)

        return [copy(plain.kv(layer)[0]) for layer in range(case.layers_timed)]

    def multiply(query: torch.Tensor) -> Call:
        left = query.transpose(1, 2).flatten(2)  # [batch, tokens, heads * dim]
        if left.device.type == "cpu":
            left = left.float()  # half types take seconds on a CPU without instructions for them
        right = left.transpose(1, 2).contiguous()
        return lambda: left @ right

    return [multiply(query) for query in queries[:1]]


def _over_rows(case: Case, store: Rows, kernel: Kernel, queries: Sequence[torch.Tensor]) -> Subject:
    calls = [kernel.bind(case, query, store.kv(layer)) for layer, query in enumerate(queries)]
    name, baseline = store.name, f"{PLAIN} {store.order}/{kernel.name}"
    if name.startswith(RESERVED_ROWS):
        name = f"{name}, live part"
    is_plain = name.startswith(PLAIN)
    return Subject(
        name, kernel.name, None if is_plain else baseline, calls, store.token_stride_bytes
    )


def _add_masked(setup: Setup, store: PlainRows, queries: Sequence[torch.Tensor]) -> None:
    """A StaticCache: attention goes over the whole row, and a mask hides what is not live."""
    name, case = f"{store.name}, masked", setup.case
    if case.phase == "prefill":
        setup.missing.append(NotMeasured(name, "with a mask, prefill takes another kernel"))
        return
    live = torch.arange(RESERVED * case.tokens, device=queries[0].device) < case.tokens
    mask = live[None, None, None, :]

    def bind(query: torch.Tensor, kv: KV) -> Call:
        return lambda: kernels.attend(query, kv, mask)

    calls = [bind(query, store.reserved(layer)) for layer, query in enumerate(queries)]
    baseline = f"{PLAIN} {store.order}/sdpa"
    setup.subjects.append(Subject(name, "sdpa", baseline, calls, store.token_stride_bytes))


def _add_paged(
    setup: Setup, blocks: Blocks, kernel: PagedKernel, queries: Sequence[torch.Tensor]
) -> None:
    setup.kernels[kernel.name] = kernel.what
    subject = Subject(blocks.name, kernel.name, f"{PLAIN} NHD/{kernel.baseline}", [])
    try:
        subject.calls = kernel.bind(setup.case, queries, blocks)
    except REFUSALS as error:
        setup.missing.append(NotMeasured(subject.name, why(error)))
        return
    setup.subjects.append(subject)


def why(error: BaseException) -> str:
    """One line about an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
