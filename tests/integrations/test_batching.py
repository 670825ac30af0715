"""Requests in a continuous batch get the tokens that generate() gives each of them alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from families import VOCAB, make_model
from transformers import GenerationConfig
from transformers.generation.continuous_batching import RequestStatus

import vattn
from vattn.integrations.transformers.batching import ContinuousBatch, generate_batch, stream_batch

SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral-window": {},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3": {},
    "gpt2": {},
    "mixtral": {},
    "deepseek-v3": {},
    "gpt-oss": {},
}
# What a llama takes for 64 tokens: a page for K and V of each of two heads in three layers.
PAGE_TOKENS, PAGES = 64, 12 * 64 * 1024


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama", "eager")


def prompts(*lengths: int) -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


def alone(model: Any, prompt: list[int], **options: Any) -> list[int]:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    tokens = model.generate(torch.tensor([prompt]), **settings)
    return tokens[0, len(prompt) :].tolist()


def together(model: Any, inputs: list[list[int]], config: Any = None, **options: Any) -> list[Any]:
    settings = {"memory": "64MiB", "progress_bar": False} | options
    return list(generate_batch(model, inputs, config, **settings).values())


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    assert all(output.status == RequestStatus.FINISHED for output in outputs), outputs
    return [output.generated_tokens for output in outputs]


def drain(batch: ContinuousBatch) -> dict[str, Any]:
    last = {}
    while batch.has_work:
        last |= {output.request_id: output for output in batch.step()}
    return last


# The tokens.


@pytest.mark.parametrize("in_chunks", [False, True], ids=["whole prompts", "chunks"])
@pytest.mark.parametrize("name", SERVED)
def test_each_gets_the_tokens_it_gets_alone(name: str, in_chunks: bool) -> None:
    model = make_model(name, **SERVED[name])
    inputs = prompts(5, 37, 1, 21, 60, 8)
    sizes = {"max_batch_size": 3, "max_batch_tokens": 7} if in_chunks else {}
    expected = [alone(model, prompt, max_new_tokens=20) for prompt in inputs]
    assert tokens_of(together(model, inputs, max_new_tokens=20, **sizes)) == expected
    assert len({token for tokens in expected for token in tokens}) > 9, "too few to compare"


def test_many_requests_of_all_lengths(llama: Any) -> None:
    inputs = prompts(*random.Random(2).sample(range(1, 120), 30))
    configs = [GenerationConfig(max_new_tokens=3 + i % 11, do_sample=False) for i in range(30)]
    expected = [
        alone(llama, prompt, max_new_tokens=config.max_new_tokens)
        for prompt, config in zip(inputs, configs, strict=True)
    ]
    sizes = {"max_batch_size": 9, "max_batch_tokens": 50}
    assert tokens_of(together(llama, inputs, configs, **sizes)) == expected


def test_no_request_waits_while_a_long_prompt_comes(llama: Any) -> None:
    with ContinuousBatch(llama, memory="64MiB", max_batch_size=2, max_batch_tokens=10) as batch:
        batch.add_request([1, 2, 3], max_new_tokens=20)
        batch.step()
        batch.add_request(prompts(60)[0], max_new_tokens=1)
        steps = [[output.request_id for output in batch.step()] for _ in range(7)]
    assert steps == [["req_0"]] * 6 + [["req_0", "req_1"]], "9 tokens of the prompt at a time"


def test_the_models_own_attention_makes_no_difference(llama: Any) -> None:
    inputs = prompts(5, 37)
    expected = [alone(llama, prompt, max_new_tokens=20) for prompt in inputs]
    llama.set_attn_implementation("sdpa")
    assert tokens_of(together(llama, inputs, max_new_tokens=20)) == expected
    assert llama.config._attn_implementation == "sdpa"
    llama.set_attn_implementation("eager")


# Memory.


def test_two_at_a_time_when_there_is_room_for_two(llama: Any) -> None:
    inputs = prompts(40, 50, 45, 55, 60)
    # Four prompts fit, but what they generate takes another page each.
    new = PAGE_TOKENS
    with ContinuousBatch(llama, memory=4 * PAGES) as batch:
        for prompt in inputs:
            batch.add_request(prompt, max_new_tokens=new)
        outputs = drain(batch)
        assert 0 < batch.preemptions <= 2 * len(inputs), "once or twice for each that ended"
        assert batch.kv_cache.stats().rows_active == 0
        batch.kv_cache.check()
    expected = [alone(llama, prompt, max_new_tokens=new) for prompt in inputs]
    assert tokens_of([outputs[f"req_{i}"] for i in range(5)]) == expected


def test_a_request_that_never_fits_fails_alone(llama: Any) -> None:
    inputs = prompts(20, 3 * PAGE_TOKENS, 2 * PAGE_TOKENS - 5, 30)
    outputs = together(llama, inputs, memory=2 * PAGES, max_new_tokens=10)
    assert [output.status.name for output in outputs] == [
        "FINISHED",
        "FAILED",
        "FAILED",
        "FINISHED",
    ]
    for output, n_tokens in ((outputs[1], 3 * PAGE_TOKENS), (outputs[2], 2 * PAGE_TOKENS + 1)):
        assert f"{output.request_id} has {n_tokens} tokens and needs" in output.error
        assert "more pages of 65536 bytes" in output.error
        assert f"budget of {2 * PAGES} bytes" in output.error and "raise memory" in output.error
    assert len(outputs[2].generated_tokens) == 6, "what it got before is not lost"
    for index in (0, 3):
        assert outputs[index].generated_tokens == alone(llama, inputs[index], max_new_tokens=10)


def test_memory_of_one_that_ended_is_there_for_the_next(llama: Any) -> None:
    outputs = together(llama, prompts(*[50] * 6), memory=PAGES, max_new_tokens=3)
    assert all(output.error is None for output in outputs)


def test_nothing_is_left_behind(llama: Any) -> None:
    batch = ContinuousBatch(llama, memory="64MiB")
    batch.add_request([1, 2, 3], max_new_tokens=2)
    batch.add_request([4, 5], max_new_tokens=30)
    cache = batch.kv_cache
    batch.step()
    batch.step()
    assert cache.stats().rows_active == 1, "the row of the first is free at once"
    batch.close()
    batch.close()
    assert cache.stats().held_bytes == 0
    with pytest.raises(ValueError, match="make a new ContinuousBatch"):
        batch.step()
    with pytest.raises(ValueError, match="make a new ContinuousBatch"):
        batch.add_request([1])
    with pytest.raises(ValueError, match="make a new ContinuousBatch"):
        batch.cancel_request("req_1")


def test_autograd_takes_no_notice(llama: Any) -> None:
    assert torch.is_grad_enabled() and next(llama.parameters()).requires_grad
    with ContinuousBatch(llama, memory="64MiB") as batch:
        batch.add_request([1, 2, 3], max_new_tokens=2)
        drain(batch)
        assert not batch.kv_cache.kv(0)[0].requires_grad


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("nth", [1, 2, 4], ids=["opening", "prefill", "decode"])
def test_an_exception_in_a_forward_leaves_all_as_it_was(
    llama: Any, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    forward, calls = llama.model.layers[1].forward, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise Interrupted
        return forward(*args, **kwargs)

    def run(caches: list[vattn.KVCache]) -> None:
        with ContinuousBatch(llama, memory="64MiB") as batch:
            caches.append(batch.kv_cache)
            batch.add_request([1, 2, 3], max_new_tokens=9)
            drain(batch)

    caches: list[vattn.KVCache] = []
    with monkeypatch.context() as patch:
        patch.setattr(llama.model.layers[1], "forward", fails)
        with pytest.raises(Interrupted):
            run(caches)
    assert [cache.stats().held_bytes for cache in caches] == ([] if nth == 1 else [0])
    assert llama.config._attn_implementation == "eager"
    expected = alone(llama, [1, 2, 3], max_new_tokens=5)
    assert tokens_of(together(llama, [[1, 2, 3]], max_new_tokens=5)) == [expected]


def test_a_step_that_raised_can_be_called_again(llama: Any, monkeypatch: Any) -> None:
    with ContinuousBatch(llama, memory="64MiB") as batch:
        batch.add_request([1, 2, 3], max_new_tokens=5)
        batch.step()
        with monkeypatch.context() as patch:
            patch.setattr(llama.lm_head, "forward", None)
            with pytest.raises(TypeError):
                batch.step()
        outputs = drain(batch)
    assert outputs["req_0"].generated_tokens == alone(llama, [1, 2, 3], max_new_tokens=5)


# Coming and going.


def test_requests_come_and_go_between_steps(llama: Any) -> None:
    inputs = prompts(5, 37, 21, 9)
    expected = [alone(llama, prompt, max_new_tokens=12) for prompt in inputs]
    with ContinuousBatch(llama, memory="64MiB", max_batch_size=2, max_batch_tokens=8) as batch:
        names = [batch.add_request(prompt, max_new_tokens=12) for prompt in inputs[:3]]
        outputs = {name: output for _ in range(4) for name, output in step(batch).items()}
        assert batch.cancel_request(names[2]), "while it waits"
        assert batch.cancel_request(names[1]), "while it runs"
        assert batch.kv_cache.stats().rows_active == 1
        assert not batch.cancel_request(names[1]) and not batch.cancel_request("nobody")
        batch.add_request(inputs[3], request_id="late", max_new_tokens=12)
        with pytest.raises(ValueError, match="a request 'late' already"):
            batch.add_request(inputs[3], request_id="late")
        outputs |= drain(batch)
        assert batch.kv_cache.stats().rows_active == 0
    assert {name for name, output in outputs.items() if output.is_finished()} == {"req_0", "late"}
    assert [outputs[name].generated_tokens for name in ("req_0", "late")] == [
        expected[0],
        expected[3],
    ]


def step(batch: ContinuousBatch) -> dict[str, Any]:
    return {output.request_id: output for output in batch.step()}


def test_a_stream_gives_each_token_once_and_says_what_ended(llama: Any) -> None:
    inputs = prompts(5, 37, 21)
    sizes = {"max_batch_size": 2, "max_batch_tokens": 16}
    stream = stream_batch(llama, inputs, memory="64MiB", max_new_tokens=8, **sizes)
    seen: dict[str, list[Any]] = {}
    for output in stream:
        assert llama.config._attn_implementation == "vattn_ragged"
        seen.setdefault(output.request_id, []).append(output)
    for i, prompt in enumerate(inputs):
        snapshots = seen[f"req_{i}"]
        assert [len(output.generated_tokens) for output in snapshots] == list(range(1, 9))
        assert [output.is_finished() for output in snapshots] == [False] * 7 + [True]
        expected = alone(llama, prompt, max_new_tokens=8)
        assert [output.generated_tokens[-1] for output in snapshots] == expected
        assert snapshots[-1].prompt_ids == prompt


def test_a_stream_that_is_left_early_gives_the_model_back(llama: Any) -> None:
    stream = stream_batch(llama, prompts(5), memory="64MiB", max_new_tokens=8)
    assert llama.config._attn_implementation == "eager", "nothing has been asked for yet"
    next(stream)
    assert llama.config._attn_implementation == "vattn_ragged"
    stream.close()
    assert llama.config._attn_implementation == "eager"


def test_times_are_recorded(llama: Any) -> None:
    first, second = together(llama, prompts(5, 9), max_new_tokens=4, record_timestamps=True)
    assert len(first.timestamps) == 4 and first.timestamps == sorted(first.timestamps)
    assert first.created_time <= first.lifespan[0] <= first.timestamps[0]
    assert second.lifespan[1] == second.timestamps[-1]
    assert together(llama, prompts(5), max_new_tokens=1)[0].timestamps is None


@pytest.mark.parametrize(
    ("shown", "is_terminal", "text"),
    [(True, True, "Solving 2 requests: 100%"), (True, False, ""), (False, True, "")],
)
def test_progress_is_shown_on_a_terminal(
    llama: Any, capsys: Any, monkeypatch: Any, shown: bool, is_terminal: bool, text: str
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    together(llama, prompts(5, 9), max_new_tokens=2, progress_bar=shown)
    err = capsys.readouterr().err
    assert text in err and (text or not err)


def test_no_prompts_no_outputs(llama: Any) -> None:
    # Less than one page: to open anything would fail.
    assert generate_batch(llama, [], memory="1KiB") == {}
    assert list(stream_batch(llama, [], memory="1KiB")) == []
