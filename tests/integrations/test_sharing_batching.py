"""Requests of one prompt in a continuous batch: the first computes it, the others take it over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import left_padded, make_model
from transformers import GenerationConfig

import vattn
from vattn.integrations.transformers import ContinuousBatch
from vattn.integrations.transformers.batching.scheduler import Scheduler, Task

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 3.0}


@pytest.fixture(scope="module")
def llama() -> Any:
    # A page of 64 KiB is 64 tokens of one head.
    return make_model("llama")


def prompt(tokens: int) -> list[int]:
    return left_padded(tokens)["input_ids"][0].tolist()


def tokens_in_forwards(model: Any) -> tuple[list[int], Any]:
    counts: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, given: counts.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    return counts, hook


def run(batch: ContinuousBatch) -> dict[str, list[int]]:
    done = {}
    while batch.has_work:
        for output in batch.step():
            assert output.error is None
            if output.is_finished():
                done[output.request_id] = output.generated_tokens
    batch.kv_cache.check()
    return done


def test_a_prompt_is_computed_once_and_has_one_place(llama: Any) -> None:
    greedy = {"do_sample": True, "top_k": 1, "max_new_tokens": 20}
    with ContinuousBatch(llama, memory="64MiB") as batch:
        batch.add_request(prompt(200), GenerationConfig(**greedy))
        (alone,) = run(batch).values()
    counts, hook = tokens_in_forwards(llama)
    with hook, ContinuousBatch(llama, memory="64MiB") as batch:
        batch.add_request(prompt(200), GenerationConfig(**greedy, num_return_sequences=8))
        batch.step()
        batch.step()
        stats = batch.kv_cache.stats()
        # Three whole pages of seven rows.
        assert stats.aliased_bytes == 7 * 3 * batch.kv_cache.regions_per_row * stats.page_bytes
        assert list(run(batch).values()) == [alone] * 8
    # After the one that shows the shapes: the prompt, then its second token with the others' first.
    assert counts == [1, 200, *[8] * 19, 7]


def test_samples_of_a_shared_prompt_follow_the_distribution(llama: Any) -> None:
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 4, "max_new_tokens": 2}
    torch.manual_seed(2)
    config = GenerationConfig(**settings, num_return_sequences=600)
    with ContinuousBatch(llama, config, memory="64MiB", max_batch_size=64) as batch:
        batch.add_request(prompt(70))
        samples = torch.tensor(list(run(batch).values()))
    with torch.no_grad():
        best = llama(torch.tensor([prompt(70)])).logits[0, -1].topk(4)
    expected = torch.softmax(best.values / 2.0, dim=-1)
    counts = torch.bincount(samples[:, 0], minlength=97)
    torch.testing.assert_close(counts[best.indices] / 600, expected, atol=0.07, rtol=0.0)


def test_whoever_is_left_of_a_family_is_enough(llama: Any) -> None:
    config = GenerationConfig(**SAMPLED, max_new_tokens=30, num_return_sequences=5)
    counts, hook = tokens_in_forwards(llama)
    with hook, ContinuousBatch(llama, config, memory="64MiB", max_batch_size=2) as batch:
        first = batch.add_request(prompt(200))
        batch.step()
        batch.step()
        assert batch.cancel_request(first)
        assert len(run(batch)) == 4
    assert [count for count in counts if count > 2] == [200]


def test_when_memory_is_short_they_say_the_same(llama: Any) -> None:
    config = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=100, num_return_sequences=4)
    regions, page = 12, 64 * 1024
    with ContinuousBatch(llama, memory="64MiB") as batch:
        batch.add_request(prompt(200), config)
        expected = run(batch)
    # Three whole pages once and a last one each, but not the next one for all of them.
    with ContinuousBatch(llama, memory=(3 + 4 + 3) * regions * page) as batch:
        batch.add_request(prompt(200), config)
        assert run(batch) == expected
        assert batch.preemptions > 0


class Pages:
    """Memory that only counts; forks are told apart."""

    def __init__(self) -> None:
        self.forks: list[tuple[int, int, int]] = []
        self.rows = 0

    def admit(self, num_tokens: int) -> int:
        self.rows += 1
        return self.rows

    def fork(self, row: int, shared: int, num_tokens: int) -> int:
        if num_tokens > 50:
            raise vattn.OutOfPagesError("too many", 1, 0)
        self.forks.append((row, shared, num_tokens))
        return self.admit(num_tokens)

    def grow(self, lengths: Any) -> None:
        pass

    def free(self, row: int) -> None:
        pass


def family(prompt: int, size: int, new: int) -> list[Task]:
    tasks: list[Task] = []
    for _ in range(size):
        tasks.append(
            Task(tokens=[0] * prompt, max_length=prompt + new, family=tasks, shared=prompt - 1)
        )
    return tasks


def test_relatives_wait_until_the_prompt_is_computed() -> None:
    memory = Pages()
    s: Scheduler[Task] = Scheduler(memory, max_batch_size=9, max_batch_tokens=16)
    tasks = family(20, size=3, new=5)
    for task in tasks:
        s.add(task)
    for count in (16, 4):
        ((running, n),) = s.plan().chunks
        assert running is tasks[0] and n == count
        running.computed += n
    tasks[0].tokens.append(0)
    assert [n for _, n in s.plan().chunks] == [1, 1, 1]
    assert memory.forks == [(1, 19, 21), (1, 19, 21)]
    assert [task.computed for task in tasks] == [20, 19, 19]


def test_a_relative_without_memory_waits() -> None:
    s: Scheduler[Task] = Scheduler(Pages(), max_batch_size=9, max_batch_tokens=99)
    tasks = family(60, size=2, new=5)
    for task in tasks:
        s.add(task)
    ((running, n),) = s.plan().chunks
    running.computed += n
    running.tokens.append(0)
    assert len(s.plan().chunks) == 1
    assert tasks[1].row is None and tasks[1].computed == 0 and list(s.waiting) == [tasks[1]]
    s.end(tasks[0])
    assert s.plan().chunks == [(tasks[1], 60)]
