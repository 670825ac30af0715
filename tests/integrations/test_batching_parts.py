"""The parts of continuous batching: who runs, which tokens see which, where kernels are called."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import make_model
from transformers import LogitsProcessor, LogitsProcessorList

import vattn
from vattn.integrations.transformers.batching import flash, ragged
from vattn.integrations.transformers.batching.attention import (
    AttentionOptions,
)
from vattn.integrations.transformers.batching.batch import ContinuousBatch
from vattn.integrations.transformers.batching.flash import FlashCalls
from vattn.integrations.transformers.batching.ragged import RaggedBatch, Segment
from vattn.integrations.transformers.batching.rows import TokenPool
from vattn.integrations.transformers.batching.sampling import GREEDY, Sampler, choose_tokens
from vattn.integrations.transformers.batching.scheduler import Scheduler, Task

# Who runs.


class FakeMemory:
    """Pages of ten tokens."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.rows: dict[int, int] = {}
        self.most_rows = 0

    def _back(self, lengths: Mapping[int, int]) -> None:
        wanted = self.rows | dict(lengths)
        needed = sum(-(-length // 10) for length in wanted.values())
        if needed > self.pages:
            raise vattn.OutOfPagesError("too many", needed, self.pages)
        self.rows = wanted
        self.most_rows = max(self.most_rows, len(wanted))

    def admit(self, num_tokens: int) -> int:
        row = next(row for row in range(99) if row not in self.rows)
        self._back({row: num_tokens})
        return row

    def grow(self, lengths: Mapping[int, int]) -> None:
        assert lengths.keys() == self.rows.keys(), "rows in use, and no others"
        assert all(length >= self.rows[row] for row, length in lengths.items()), "never less"
        self._back(lengths)

    def free(self, row: int) -> None:
        del self.rows[row]


def task(prompt: int, new: int) -> Task:
    return Task(tokens=[0] * prompt, max_length=prompt + new)


def scheduler(pages: int = 99, rows: int = 4, tokens: int = 16) -> Scheduler[Task]:
    return Scheduler(FakeMemory(pages), max_batch_size=rows, max_batch_tokens=tokens)


def iterate(scheduler: Scheduler[Task]) -> list[int]:
    """Run one iteration, in which each task that can gets a token; how many each computed."""
    plan = scheduler.plan()
    assert not plan.failed
    for running, count in plan.chunks:
        assert running.row is not None and running.computed + count <= running.backed
        running.computed += count
        if running.missing == 0:
            running.tokens.append(0)
            if len(running.tokens) == running.max_length:
                scheduler.end(running)
    return [count for _, count in plan.chunks]


def test_those_that_generate_come_first_and_prompts_share_the_rest() -> None:
    s = scheduler(tokens=10)
    for prompt in (5, 12, 30):
        s.add(task(prompt, new=9))
    assert iterate(s) == [5, 5]
    assert len(s.running) == 2, "a prompt that has no token yet needs no memory yet"
    assert iterate(s) == [1, 7, 2]
    assert iterate(s) == [1, 1, 8]
    assert [t.computed for t in s.running] == [7, 13, 10]


def test_no_more_run_than_there_are_rows() -> None:
    s = scheduler(rows=2)
    for _ in range(3):
        s.add(task(prompt=1, new=3))
    assert iterate(s) == [1, 1]
    s.end(s.running[0])
    assert iterate(s) == [1, 1], "the row is there for the next one at once"
    assert not s.waiting


def test_a_prompt_is_admitted_as_a_whole_with_room_for_the_next_token() -> None:
    s = scheduler(pages=2)
    s.add(task(prompt=9, new=5))
    s.add(task(prompt=10, new=5))
    assert iterate(s) == [9]
    assert [t.backed for t in s.running] == [10]
    exact = scheduler(pages=1)
    exact.add(task(prompt=10, new=1))
    assert iterate(exact) == [10], "the last token never needs memory"


def test_the_last_one_admitted_goes_to_the_front_of_the_queue() -> None:
    s = scheduler(pages=4, rows=3)
    old, young, third, small = task(8, 10), task(8, 10), task(8, 10), task(2, 2)
    for t in (old, young, third, small):
        s.add(t)
    while not s.preemptions:
        iterate(s)
    assert s.running == [old, young] and list(s.waiting) == [third, small]
    assert third.row is None and third.computed == 0 and len(third.tokens) > 8


def test_nobody_is_admitted_after_that_before_one_has_ended() -> None:
    memory = FakeMemory(pages=3)
    s: Scheduler[Task] = Scheduler(memory, max_batch_size=4, max_batch_tokens=16)
    old, young = task(8, 10), task(8, 10)
    for t in (old, young, task(8, 10)):
        s.add(t)
    while not s.preemptions:
        iterate(s)
    memory.pages = 99
    while len(old.tokens) < old.max_length:
        assert iterate(s) == [1], "whatever there is room for"
    iterate(s)
    assert len(s.running) == 2


def test_all_end_however_little_memory_there_is() -> None:
    for pages in range(5, 30):
        s = scheduler(pages=pages, rows=8, tokens=8)
        tasks = [task(prompt=1 + 7 * i % 20, new=1 + 5 * i % 30) for i in range(20)]
        for t in tasks:
            s.add(t)
        for _ in range(2000):
            if not (s.waiting or s.running):
                break
            iterate(s)
        assert all(len(t.tokens) == t.max_length for t in tasks)
        assert s.preemptions <= 8 * len(tasks)
        assert s._memory.rows == {}  # type: ignore[attr-defined]


def test_one_that_does_not_fit_alone_fails_and_the_next_one_runs() -> None:
    s = scheduler(pages=2)
    huge, growing, small, other = task(30, 1), task(15, 20), task(3, 1), task(2, 1)
    for t in (huge, growing, small, other):
        s.add(t)
    plan = s.plan()
    assert [t for t, _ in plan.failed] == [huge] and plan.failed[0][1].needed == 3
    assert [t for t, _ in plan.chunks] == [growing]
    growing.tokens, growing.computed = [0] * 21, 20
    plan = s.plan()
    assert [t for t, _ in plan.failed] == [growing] and plan.failed[0][1].needed == 3
    assert plan.chunks == [(small, 3), (other, 2)], "one has ended, so that all can come"


def test_what_is_cancelled_leaves_room() -> None:
    s = scheduler(pages=4)
    first, second, third = task(8, new=30), task(8, new=30), task(8, new=30)
    for t in (first, second, third):
        s.add(t)
    while not s.preemptions:
        iterate(s)
    s.end(third)
    assert not s.waiting
    s.add(third)
    s.end(first)
    tokens = len(third.tokens)
    assert iterate(s) == [1, tokens]


# Which tokens see which.

SEGMENTS = [Segment(3, 1, 1), Segment(0, 9, 1), Segment(4, 6, 6), Segment(1, 12, 5)]


def pool_of(heads: int, dim: int, order: str) -> TokenPool:
    generator = torch.Generator().manual_seed(heads + dim)
    if order == "HND":
        return TokenPool(torch.randn(5, heads, 16, dim, generator=generator))
    return TokenPool(torch.randn(5, 16, heads, dim, generator=generator).transpose(1, 2))


def reference(query: Any, keys: Any, values: Any, options: AttentionOptions) -> torch.Tensor:
    """Token by token, head by head."""
    heads, groups = query.shape[1], query.shape[1] // keys.shape[1]
    rows = []
    start = 0
    for segment in SEGMENTS:
        for i in range(segment.count):
            end = segment.length - segment.count + i + 1
            first = 0 if options.window is None else max(0, end - options.window)
            for head in range(heads):
                k = keys[segment.row, head // groups, first:end]
                v = values[segment.row, head // groups, first:end]
                scores = k @ query[0, head, start + i] * (options.scaling or 8**-0.5)
                if options.softcap is not None:
                    scores = torch.tanh(scores / options.softcap) * options.softcap
                if options.sinks is not None:
                    scores = torch.cat([scores, options.sinks[head, None]])
                rows.append(torch.softmax(scores, dim=0)[: len(v)] @ v)
        start += segment.count
    return torch.stack(rows).view(1, -1, heads, values.shape[3])


@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(),
        AttentionOptions(scaling=0.7, window=4),
        AttentionOptions(window=6),
        AttentionOptions(softcap=0.5, window=3),
        AttentionOptions(sinks=torch.randn(6)),
    ],
    ids=["plain", "window 4", "window 6", "softcap", "sinks"],
)
def test_a_token_sees_its_own_row_up_to_itself(options: AttentionOptions, order: str) -> None:
    keys, values = pool_of(2, 8, order), pool_of(2, 5, order)
    query = torch.randn(1, 13, 6, 8).transpose(1, 2)
    batch = RaggedBatch(SEGMENTS, torch.device("cpu"))
    got = batch.attend(torch.nn.Module(), query, keys.rows, values.rows, options)
    torch.testing.assert_close(got, reference(query, keys.rows, values.rows, options))
    assert batch.positions.tolist() == [0, 8, *range(6), *range(7, 12)]


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_keys_are_written_to_their_place_and_nowhere_else(order: str) -> None:
    pool = pool_of(2, 8, order)
    before = pool.rows.clone()
    states = torch.randn(1, 13, 2, 8).transpose(1, 2)
    RaggedBatch(SEGMENTS, torch.device("cpu")).write(pool, states)
    start = 0
    for s in SEGMENTS:
        place = s.row, slice(None), slice(s.length - s.count, s.length)
        assert pool.rows[place].equal(states[0, :, start : start + s.count])
        before[place] = pool.rows[place]
        start += s.count
    assert pool.rows.equal(before)


# FlashAttention, which a stand-in for the kernel replaces.

CALLS: list[dict[str, Any]] = []


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """What the package documents: the last query is aligned with the last key."""
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32 and causal
    assert q.dim() == 4 and len(cache_seqlens) == len(cache_batch_idx) == q.shape[0]
    CALLS.append({"shape": tuple(q.shape), "rows": cache_batch_idx.tolist()})
    outputs = []
    for one, n, row in zip(q, cache_seqlens.tolist(), cache_batch_idx.tolist(), strict=True):
        k, v = (
            tensor[row, :n].transpose(0, 1).repeat_interleave(q.shape[2] // tensor.shape[2], dim=0)
            for tensor in (k_cache, v_cache)
        )
        scores = one.transpose(0, 1) @ k.transpose(1, 2) * (softmax_scale or q.shape[3] ** -0.5)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(n - len(one), n)[:, None] - torch.arange(n)
        sees = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        weights = torch.softmax(scores.masked_fill(~sees, float("-inf")), dim=-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "options",
    [AttentionOptions(), AttentionOptions(scaling=0.7, window=4), AttentionOptions(softcap=0.5)],
    ids=["plain", "window", "softcap"],
)
def test_flash_is_called_once_for_all_that_generate_and_once_for_each_prompt(
    options: AttentionOptions,
) -> None:
    CALLS.clear()
    keys, values = pool_of(2, 8, "NHD"), pool_of(2, 8, "NHD")
    query = torch.randn(1, 13, 6, 8).transpose(1, 2)
    calls = FlashCalls([(s.row, s.length, s.count) for s in SEGMENTS], torch.device("cpu"))
    got = calls.attend(flash_attn_with_kvcache, query, keys.rows, values.rows, options)
    torch.testing.assert_close(got, reference(query, keys.rows, values.rows, options))
    assert CALLS == [
        {"shape": (2, 1, 6, 8), "rows": [3, 0]},
        {"shape": (1, 6, 6, 8), "rows": [4]},
        {"shape": (1, 5, 6, 8), "rows": [1]},
    ]


def test_a_model_generates_the_same_with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "find_flash_kernel", lambda *_: flash_attn_with_kvcache)
    CALLS.clear()
    model = make_model("mistral-window")
    prompts = [[3, 4, 5], list(range(1, 30))]
    with ContinuousBatch(model, memory="64MiB", max_batch_size=2, max_batch_tokens=9) as batch:
        for prompt in prompts:
            batch.add_request(prompt, max_new_tokens=12)
        last: dict[str, Any] = {}
        while batch.has_work:
            last |= {output.request_id: output for output in batch.step()}
    for index, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, pad_token_id=0)
        assert last[f"req_{index}"].generated_tokens == alone[0, len(prompt) :].tolist()
    assert CALLS


def test_flash_is_left_out_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "has_flash", lambda device, dtype: device.type == "cuda")
    monkeypatch.setattr(flash, "flash_attn_with_kvcache", lambda: flash_attn_with_kvcache)

    def find(query_dim: int, value_dim: int, device: str = "cuda", sinks: Any = None) -> Any:
        query, value = (
            SimpleNamespace(shape=(1, 2, 3, dim), device=torch.device(device), dtype=torch.half)
            for dim in (query_dim, value_dim)
        )
        return flash.find_flash_kernel(query, value, AttentionOptions(sinks=sinks))  # type: ignore[arg-type]

    assert find(64, 64) is flash_attn_with_kvcache
    assert find(192, 128) is None
    assert find(512, 512) is None
    assert find(64, 64, device="cpu") is None
    assert find(64, 64, sinks=torch.zeros(2)) is None


# Choosing tokens.


def test_processors_of_one_request_do_not_reach_the_others() -> None:
    class ForbidBest(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> torch.Tensor:
            seen.append(input_ids.tolist())
            return scores.index_fill_(1, scores.argmax(dim=-1), float("-inf"))

    seen: list[Any] = []
    odd = Sampler(LogitsProcessorList([ForbidBest()]), do_sample=False)
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [9.0, 2.0, 3.0]])
    assert choose_tokens([GREEDY, odd, GREEDY], [[1], [1, 2], [3]], logits) == [1, 1, 0]
    assert seen == [[[1, 2]]]
