"""Generation settings mean in a continuous batch what they mean in generate(), or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCAB, make_model
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from vattn.integrations.transformers.batching import ContinuousBatch, generate_batch, stream_batch

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama", max_position_embeddings=128)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {chr(ord("!") + i): i for i in range(VOCAB)}
    characters = Tokenizer(models.BPE(vocab, merges=[]))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters)


def alone(model: Any, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    tokens = model.generate(torch.tensor([prompt]), **({"pad_token_id": 0} | options))
    return tokens[0, len(prompt) :].tolist()


def together(
    model: Any, inputs: Any = (PROMPT, [1, 2, 3]), config: Any = None, **options: Any
) -> list[list[int]]:
    settings = {"memory": "64MiB", "progress_bar": False} | options
    outputs = generate_batch(model, inputs, config, **settings).values()
    assert all(output.error is None for output in outputs)
    return [output.generated_tokens for output in outputs]


# What ends a request.


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_the_defaults_are_those_of_generate(llama: Any) -> None:
    outputs = together(llama)
    assert outputs == [alone(llama), alone(llama, [1, 2, 3])]
    assert [len(tokens) for tokens in outputs] == [20, 20]


@pytest.mark.parametrize("settings", [{"max_length": 12}, {"max_length": 12, "max_new_tokens": 3}])
def test_lengths(llama: Any, settings: dict[str, Any]) -> None:
    assert together(llama, **settings)[0] == alone(llama, **settings)


@pytest.mark.parametrize("as_list", [False, True])
def test_eos_tokens_end_a_request_and_belong_to_it(llama: Any, as_list: bool) -> None:
    tokens = alone(llama, max_new_tokens=20)
    at = next(i for i in range(5, 20) if tokens[i] not in tokens[:i])
    eos = [96 if 96 not in tokens else 95, tokens[at]] if as_list else tokens[at]
    assert together(llama, max_new_tokens=20, eos_token_id=eos)[0] == tokens[: at + 1]
    assert alone(llama, max_new_tokens=20, eos_token_id=eos) == tokens[: at + 1]


def test_eos_of_the_models_own_configuration(llama: Any, monkeypatch: Any) -> None:
    tokens = alone(llama, max_new_tokens=20)
    monkeypatch.setattr(llama.generation_config, "eos_token_id", tokens[6])
    assert together(llama, max_new_tokens=20)[0] == tokens[: tokens.index(tokens[6]) + 1]


def test_stop_strings(llama: Any, tokenizer: Any) -> None:
    tokens = alone(llama, max_new_tokens=20)
    stop = {"stop_strings": ["no such", tokenizer.decode(tokens[7:9])]}
    expected = alone(llama, max_new_tokens=20, tokenizer=tokenizer, **stop)
    assert len(expected) < 20
    got = together(llama, max_new_tokens=20, tokenizer=tokenizer, **stop)
    assert got[0] == expected
    assert got[1] == alone(llama, [1, 2, 3], max_new_tokens=20, tokenizer=tokenizer, **stop)
    with ContinuousBatch(llama, memory="64MiB", tokenizer=tokenizer) as batch:
        batch.add_request(PROMPT, max_new_tokens=20, **stop)
        while batch.has_work:
            (output,) = batch.step()
    assert output.generated_tokens == expected


def test_max_time(llama: Any) -> None:
    assert [len(tokens) for tokens in together(llama, max_time=0.0)] == [1, 1]


def test_a_request_ends_at_the_models_limit(llama: Any, caplog: Any) -> None:
    inputs = [[7] * 120, [8] * 127, [9] * 20]
    outputs = together(llama, inputs, max_new_tokens=50)
    assert [len(tokens) for tokens in outputs] == [8, 1, 50]
    assert outputs[0] == alone(llama, inputs[0], max_new_tokens=8)
    (record,) = caplog.records
    assert "req_0 may have 170 tokens" in record.message and "takes 128" in record.message


# Which tokens.


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(90))},
        {"begin_suppress_tokens": list(range(50)), "suppress_tokens": list(range(50, 90))},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "temperature": 1e-4, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_processors_see_what_they_see_in_generate(llama: Any, settings: dict[str, Any]) -> None:
    inputs = [PROMPT, [1, 2, 3], [11] * 40]
    expected = [alone(llama, prompt, max_new_tokens=15, **settings) for prompt in inputs]
    sizes = {"max_batch_size": 2, "max_batch_tokens": 16}
    assert together(llama, inputs, max_new_tokens=15, **settings, **sizes) == expected


def test_each_request_has_its_own_configuration(llama: Any) -> None:
    greedy = GenerationConfig(max_new_tokens=15, do_sample=False)
    wild = GenerationConfig(max_new_tokens=15, do_sample=True, temperature=3.0, top_k=0)
    top_1 = GenerationConfig(max_new_tokens=15, do_sample=True, temperature=3.0, top_k=1)
    inputs = [PROMPT, [1, 2, 3]] * 3
    torch.manual_seed(1)
    outputs = together(llama, inputs, [greedy, wild, wild, greedy, top_1, top_1])
    expected = [alone(llama, prompt, max_new_tokens=15) for prompt in inputs[:2]]
    assert [outputs[0], outputs[3]] == expected == outputs[4:]
    assert outputs[1] != expected[1] and outputs[2] != expected[0]


def test_settings_take_precedence_and_leave_the_configuration_alone(llama: Any) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=False)
    before = config.to_dict()
    assert [len(tokens) for tokens in together(llama, config=config, max_new_tokens=3)] == [3, 3]
    assert [len(tokens) for tokens in together(llama, config=config)] == [9, 9]
    assert config.to_dict() == before


def test_samples_follow_the_distribution(llama: Any) -> None:
    settings = {"max_new_tokens": 1, "do_sample": True, "temperature": 2.0, "top_k": 4}
    torch.manual_seed(2)
    samples = together(llama, [PROMPT], num_return_sequences=1000, **settings)
    counts = torch.bincount(torch.tensor(samples)[:, 0], minlength=VOCAB)
    with torch.no_grad():
        best = llama(torch.tensor([PROMPT])).logits[0, -1].topk(4)
    expected = torch.softmax(best.values / 2.0, dim=-1)
    torch.testing.assert_close(counts[best.indices] / 1000, expected, atol=0.05, rtol=0.0)


def test_a_seed_makes_samples_repeatable(llama: Any) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return together(llama, do_sample=True, temperature=3.0)

    assert sample(3) == sample(3) != sample(4)


def test_several_sequences_of_a_prompt(llama: Any) -> None:
    options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    outputs = generate_batch(
        llama, [PROMPT, [1, 2]], memory="64MiB", progress_bar=False, max_new_tokens=9, **options
    )
    names = [f"req_{i}{child}" for i in (0, 1) for child in ("", "__child#0", "__child#1")]
    assert list(outputs) == names
    assert outputs["req_1__child#1"].prompt_ids == [1, 2]
    assert len({tuple(output.generated_tokens) for output in outputs.values()}) == 6
    with ContinuousBatch(llama, GenerationConfig(**options), memory="64MiB") as batch:
        assert batch.add_request(PROMPT, max_new_tokens=1) == "req_0"
        assert [output.request_id for output in batch.step()] == names[:3]


# What is refused.


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"num_beams": 2}, NotImplementedError, "ask for beam_search"),
        ({"prompt_lookup_num_tokens": 2}, NotImplementedError, "ask for assisted_generation"),
        ({"guidance_scale": 1.5}, NotImplementedError, "guidance_scale is 1.5"),
        ({"output_logits": True}, NotImplementedError, "output_logits is True"),
        ({"max_new_token": 3}, ValueError, "max_new_token: no such setting"),
        ({"attention_mask": None}, ValueError, "attention_mask: no such setting"),
        ({"stop_strings": "x"}, ValueError, "stop_strings is 'x'.* pass tokenizer"),
        ({"max_length": 5}, ValueError, "req_0 has 5 tokens and max_length is 5"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size is 0"),
        ({"max_batch_tokens": 8}, ValueError, "max_batch_tokens is 8, fewer than .* = 32"),
        ({"memory": "much"}, ValueError, "memory is 'much'"),
        ({"generation_config": [GenerationConfig()]}, ValueError, "there are 1 .* for 2 inputs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_not_served(
    llama: Any, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        stream_batch(llama, [PROMPT, [1, 2, 3]], **settings)
    assert llama.config._attn_implementation == "sdpa", "the model was not touched"


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        ([], ValueError, "the prompt of req_1 is empty"),
        ([1] * 128, ValueError, r"has 128 tokens, the model takes 128 \(max_position_embeddings\)"),
        ([1, 97], ValueError, "has the token 97, the model knows 0 to 96"),
        ([1, -1], ValueError, "has the token -1"),
        ("text", TypeError, "req_1 is text"),
        ([1.5], TypeError, "float"),
    ],
    ids=["empty", "long", "unknown", "negative", "text", "float"],
)
def test_prompts_that_make_no_sense(
    llama: Any, prompt: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        generate_batch(llama, [PROMPT, prompt])
    assert llama.config._attn_implementation == "sdpa"


def test_prompts_may_be_tensors(llama: Any) -> None:
    assert together(llama, torch.tensor([PROMPT]))[0] == together(llama)[0]
