"""Attention over contiguous rows, and how new tokens get there; vLLM is not needed."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable

import pytest
import torch
from vllm_rows import (
    ROW_TOKENS,
    Batch,
    Shape,
    close,
    expected,
    make_batch,
    varlen_stand_in,
)

from vattn.integrations.vllm import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DECODES = [(1, 37), (1, 1), (1, ROW_TOKENS), (1, 64)]
BATCHES = {
    "decodes": DECODES,
    "prefills": [(5, 5), (1, 1), (ROW_TOKENS, ROW_TOKENS), (64, 64)],
    "chunks with tokens before them": [(3, 20), (2, 3), (300, 400), (256, 257), (257, 300)],
    "all at once": [(1, 100), (7, 7), (0, 0), (30, 99), (1, 2), (2, 2), (0, 0)],
    "as many queries as requests": [(2, 5), (0, 0)],
    "nobody": [(0, 0)],
}
SHAPES = {
    "MHA": Shape(heads=3, kv_heads=3, head_size=64, head_size_v=64),
    "GQA": Shape(heads=8, kv_heads=2, head_size=80, head_size_v=80),
    "MQA": Shape(heads=4, kv_heads=1, head_size=128, head_size_v=128),
    "one head": Shape(heads=1, kv_heads=1),
}

Attend = Callable[[Batch, torch.Tensor], None]


def on_the_cpu(batch: Batch, out: torch.Tensor) -> None:
    kernels.attend_rows(
        batch.query,
        batch.flat,
        batch.query_starts,
        batch.seq_lens,
        batch.row_starts,
        scale=batch.shape.scale,
        head_size=batch.shape.head_size,
        out=out,
    )


def by_varlen(
    batch: Batch, out: torch.Tensor, kernel: Callable[..., torch.Tensor] = varlen_stand_in
) -> None:
    kernels.attend_rows_varlen(
        batch.query,
        batch.flat,
        batch.query_starts,
        batch.seq_lens,
        batch.row_starts,
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
        scale=batch.shape.scale,
        head_size=batch.shape.head_size,
        out=out,
        kernel=kernel,
    )


@pytest.fixture(params=[on_the_cpu, by_varlen])
def attend(request: pytest.FixtureRequest) -> Attend:
    kernel: Attend = request.param
    return kernel


@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_request_attends_to_its_row_and_to_nothing_else(
    attend: Attend, requests: list[tuple[int, int]], shape: Shape
) -> None:
    batch = make_batch(requests, shape)
    out = batch.empty_output()
    attend(batch, out)
    close(out, expected(batch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128])
def test_types_and_head_sizes(attend: Attend, dtype: torch.dtype, head_size: int) -> None:
    shape = Shape(heads=6, kv_heads=2, head_size=head_size, head_size_v=head_size, dtype=dtype)
    batch = make_batch([(1, 100), (9, 9), (30, 99)], shape)
    out = batch.empty_output()
    attend(batch, out)
    close(out, expected(batch))


def test_values_may_be_of_another_size_on_the_cpu() -> None:
    batch = make_batch(BATCHES["all at once"], Shape(head_size=64, head_size_v=32))
    out = batch.empty_output()
    on_the_cpu(batch, out)
    close(out, expected(batch))


@pytest.mark.parametrize(
    ("queries", "tokens", "first"),
    [(3, 2, 0), (1, 9, 4 * ROW_TOKENS - 8), (1, 9, -1), (1, 0, 0)],
    ids=["more queries than tokens", "past the end", "before the start", "no tokens"],
)
def test_rows_that_cannot_be_are_refused(queries: int, tokens: int, first: int) -> None:
    batch = make_batch([(1, 1), (queries, tokens)])
    batch.row_starts[1] = first
    with pytest.raises(ValueError, match=f"request 1 has {queries} queries and tokens .{first}, "):
        on_the_cpu(batch, batch.empty_output())


def test_the_end_of_the_buffer_may_be_used() -> None:
    batch = make_batch([(1, 9)])
    end = batch.flat.shape[0]
    batch.flat[end - 9 :] = torch.randn(9, *batch.flat.shape[1:])
    batch.row_starts[0] = end - 9
    out = batch.empty_output()
    on_the_cpu(batch, out)
    close(out, expected(batch))


def windows(requests: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What the kernel is told about causality, call by call."""
    seen = []

    def kernel(*tensors: object, **options: object) -> torch.Tensor:
        seen.append(options["window_size"])
        return varlen_stand_in(*tensors, **options)  # type: ignore[arg-type]

    batch = make_batch(requests)
    by_varlen(batch, batch.empty_output(), kernel)
    return seen  # type: ignore[return-value]


def test_decodes_let_the_flash_kernel_fold_groups() -> None:
    assert windows(DECODES) == [(-1, -1)]
    assert windows([*DECODES, (2, 2)]) == [(-1, 0)]
    # It would take the queries of a request from where another one's are.
    assert windows([*DECODES, (0, 0)]) == [(-1, 0)]


def test_the_flash_kernel_gets_the_buffer_itself() -> None:
    batch = make_batch(DECODES)

    def kernel(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        key, value = tensors[1:3]
        assert key.data_ptr() == batch.flat.data_ptr()
        assert value.data_ptr() == batch.flat[..., batch.shape.head_size :].data_ptr()
        return varlen_stand_in(*tensors, **options)  # type: ignore[arg-type]

    by_varlen(batch, batch.empty_output(), kernel)


def test_torch_takes_what_the_stand_in_takes() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    try:
        real = kernels.varlen_attn()
    except ImportError as error:
        pytest.skip(str(error))
    ours = inspect.signature(varlen_stand_in).parameters
    theirs = inspect.signature(real).parameters
    assert list(theirs)[:7] == list(ours)[:7]
    assert set(ours) <= set(theirs)


@pytest.mark.parametrize("found", ["no varlen_attn", "a varlen_attn without seqused_k"])
def test_a_torch_too_old_is_told(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("varlen")
    if found != "no varlen_attn":
        module.varlen_attn = lambda query, key, value: query  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    with pytest.raises(ImportError, match=f"has {found}, .* use 2.13"):
        kernels.varlen_attn()


def new_tokens(count: int, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of 3 and 2 elements."""
    size = (count, flat.shape[1])
    return torch.randn(*size, 3).to(flat.dtype), torch.randn(*size, 2).to(flat.dtype)


def filled(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(12, 2, 5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "slots",
    [[3], [4, 5, 6], [11, 0, 7], [2, -1, 9, -1], [-1, -1], [-1, 8], []],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 3])
def test_tokens_go_to_their_slots_and_nowhere_else(
    dtype: torch.dtype, slots: list[int], padding: int
) -> None:
    flat = filled(dtype)
    right = flat.clone()
    key, value = new_tokens(len(slots) + padding, flat)
    for token, slot in enumerate(slots):
        if slot >= 0:
            right[slot] = torch.cat([key[token], value[token]], dim=-1)
    kernels.write_tokens(flat, key, value, torch.tensor(slots, dtype=torch.int64))
    assert torch.equal(flat, right)


def test_a_slot_outside_of_the_buffer_is_refused() -> None:
    flat = filled()
    with pytest.raises((IndexError, RuntimeError), match="12"):
        kernels.write_tokens(flat, *new_tokens(1, flat), torch.tensor([12]))


def test_a_token_for_every_slot() -> None:
    flat = filled()
    before = flat.clone()
    key, value = new_tokens(2, flat)
    with pytest.raises(ValueError, match="2 keys and 1 values for 2 slots"):
        kernels.write_tokens(flat, key, value[:1], torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="1 keys and 2 values for 2 slots"):
        kernels.write_tokens(flat, key[:1], value, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"values torch.float16, the KV buffer is torch.float32"):
        kernels.write_tokens(flat, key, value.half(), torch.tensor([3, 4]))
    assert torch.equal(flat, before)
