"""Which models a continuous batch refuses, and how it leaves those that it serves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from families import cache_in, make_model

from vattn.integrations.transformers.batching import ContinuousBatch, generate_batch, support
from vattn.integrations.transformers.batching.attention import no_mask, ragged_attention

PROMPT = [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("bloom", {}, "does not use the attention interface"),
        ("bart", {}, "is an encoder-decoder model"),
        (
            "llama",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "layer 1 of .* keeps its state in a LinearAttentionLayer",
        ),
        ("llama", {"attention_chunk_size": 8}, r"chunked attention \(8\)"),
    ],
)
def test_models_that_are_not_served(name: str, changes: dict[str, Any], text: str) -> None:
    model = make_model(name, **changes)
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=f"{text}.*use model.generate"):
        generate_batch(model, [PROMPT])
    with pytest.raises(NotImplementedError, match=text):
        ContinuousBatch(model)
    assert model.config._attn_implementation == before


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="LlamaModel has no language model head"):
        ContinuousBatch(make_model("llama").model)


def test_a_model_without_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    monkeypatch.setattr(model, "forward", lambda input_ids: None)
    with pytest.raises(NotImplementedError, match="takes no position_ids"):
        ContinuousBatch(model)


def test_a_model_that_keeps_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(NotImplementedError, match="does not let its attention be replaced"):
        ContinuousBatch(model)


def test_a_model_whose_layers_keep_other_types_is_refused() -> None:
    def halve(_module: Any, _args: Any, kwargs: Any, _output: Any) -> None:
        layer = cache_in(kwargs).layers[2]
        layer.keys = layer.keys.half()

    model = make_model("llama")
    model.model.layers[2].register_forward_hook(halve, with_kwargs=True)
    with pytest.raises(NotImplementedError, match=r"float16.*one type on one device"):
        ContinuousBatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_hands_over_another_window_is_refused() -> None:
    model = make_model("mistral-window")
    model.model.layers[1].self_attn.config = SimpleNamespace(
        sliding_window=None, _attn_implementation="vattn_ragged"
    )
    with pytest.raises(NotImplementedError, match=r"layer 1 .* 8 tokens in its cache and of None"):
        ContinuousBatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_attention_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(NotImplementedError, match="2 of the 3 layers of LlamaForCausalLM use"):
        ContinuousBatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_a_limit_is_refused() -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    with pytest.raises(ValueError, match="SimpleNamespace has no max_position_embeddings"):
        support.max_seq_len(SimpleNamespace(config=config))


def test_masks_and_biases_of_a_models_own_are_refused() -> None:
    qkv = [torch.zeros(1, 1, 1, 8)] * 3
    with pytest.raises(NotImplementedError, match="Module adds a mask or a bias of its own"):
        ragged_attention(torch.nn.Module(), *qkv, torch.zeros(1, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="Module adds a mask or a bias of its own"):
        ragged_attention(torch.nn.Module(), *qkv, None, position_bias=torch.zeros(1))
    with pytest.raises(NotImplementedError, match="not just causal"):
        no_mask(allow_is_causal_skip=False)


def test_a_model_serves_one_batch_at_a_time() -> None:
    model = make_model("llama")
    with ContinuousBatch(model, memory="64MiB") as batch:
        with pytest.raises(ValueError, match="part of another ContinuousBatch"):
            ContinuousBatch(model, memory="64MiB")
        with pytest.raises(RuntimeError, match="close the batch first"):
            model.generate(torch.tensor([PROMPT]), max_new_tokens=2)
        batch.add_request(PROMPT, max_new_tokens=1)
        (output,) = batch.step()
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=1)[0, len(PROMPT) :]
    assert output.generated_tokens == expected.tolist()


def test_each_part_of_a_model_gets_its_own_attention_back() -> None:
    text = make_model("gemma3", max_position_embeddings=128).config
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    config._attn_implementation = {"": "sdpa", "text_config": "eager", "vision_config": "eager"}
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.model.vision_tower = torch.nn.Identity()  # so that no module has this configuration
    before = [part._attn_implementation for part in (config, config.text_config, vision)]
    with ContinuousBatch(model, memory="64MiB") as batch:
        batch.add_request(PROMPT, max_new_tokens=9, do_sample=False)
        assert config.text_config._attn_implementation == "vattn_ragged"
        while batch.has_work:
            (output,) = batch.step()
    assert [part._attn_implementation for part in (config, config.text_config, vision)] == before
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=9, do_sample=False)
    assert output.generated_tokens == expected[0, len(PROMPT) :].tolist()
