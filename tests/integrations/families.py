"""Tiny models of the families that transformers has, and what tests do with all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from vattn.integrations.transformers import VAttnCache
from vattn.integrations.transformers.naming import CACHE_ARGUMENT

VOCAB = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # A page on the CPU is 64 KiB at least: 64 tokens of one head, so that short texts cross pages.
    "head_dim": 256,
    "max_position_embeddings": 512,
    # Larger than usual, so that tokens differ and an error in one would show.
    "initializer_range": 0.3,
}
HYBRID = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    # Tied to random embeddings, the head says the last token again and again.
    "tie_word_embeddings": False,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 512,
    "n_embd": 256,
    "num_hidden_layers": 3,
    "n_head": 2,
    "initializer_range": 0.3,
}
BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "n_head": 2,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
QWEN3_NEXT = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
DEEPSEEK_V3 = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 512,
    "init_std": 0.05,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 256,
    "d_ff": 96,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """How to make a model, and which of the attention implementations it has."""

    model: str
    options: dict[str, Any]
    attention: tuple[str, ...] = ("sdpa", "eager")


EAGER = ("eager",)
FAMILIES = {
    "llama": Family("LlamaForCausalLM", SMALL),
    "qwen2": Family("Qwen2ForCausalLM", SMALL),
    "qwen3": Family("Qwen3ForCausalLM", SMALL),
    "mistral": Family("MistralForCausalLM", SMALL | {"sliding_window": None}),
    "mistral-window": Family("MistralForCausalLM", SMALL | {"sliding_window": 8}),
    "gemma2": Family("Gemma2ForCausalLM", SMALL | HYBRID, EAGER),
    "gemma3": Family("Gemma3ForCausalLM", SMALL | HYBRID),
    "phi3": Family("Phi3ForCausalLM", SMALL | {"pad_token_id": 0}),
    "gpt2": Family("GPT2LMHeadModel", GPT2),
    "bloom": Family("BloomForCausalLM", BLOOM, EAGER),
    "qwen3-next": Family("Qwen3NextForCausalLM", SMALL | QWEN3_NEXT),
    "gpt-oss": Family("GptOssForCausalLM", SMALL | HYBRID | EXPERTS, EAGER),
    "deepseek-v3": Family("DeepseekV3ForCausalLM", SMALL | DEEPSEEK_V3),
    "mixtral": Family("MixtralForCausalLM", SMALL | EXPERTS | {"sliding_window": None}),
    "bart": Family("BartForConditionalGeneration", BART),
    "t5": Family("T5ForConditionalGeneration", T5),
}
ENCODER_DECODER = ["bart", "t5"]
DECODERS = [name for name in FAMILIES if name not in ENCODER_DECODER]
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def with_attention(names: list[str]) -> list[tuple[str, str]]:
    """All pairs of a family and an attention implementation that it has."""
    return [(name, attention) for name in names for attention in FAMILIES[name].attention]


def make_model(name: str, attention: str = "sdpa", *, seed: int = 0, **changes: Any) -> Any:
    family = FAMILIES[name]
    options = family.options | changes
    if "layer_types" in options:
        options["layer_types"] = options["layer_types"][: options["num_hidden_layers"]]
    if attention not in family.attention:
        attention = family.attention[0]
    model_class = getattr(transformers, family.model)
    config = model_class.config_class(**options)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return model_class(config).eval()


def vattn_cache(model: Any, **options: Any) -> VAttnCache:
    return VAttnCache(model.config, **({"memory": "64MiB"} | options))


def stock_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def given(cache: Any) -> dict[str, Any]:
    """The argument of models and of generate() that hands them a cache."""
    return {CACHE_ARGUMENT: cache}


def cache_in(arguments_or_output: Any) -> Any:
    """The cache among what a layer of transformers was given, or in what a model returned."""
    return arguments_or_output[CACHE_ARGUMENT]


def left_padded(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(1, VOCAB, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def followed_by(inputs: dict[str, torch.Tensor], *turns: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same prompts with more tokens, none of them padding."""
    more = torch.cat(turns, dim=1)
    return {
        "input_ids": torch.cat([inputs["input_ids"], more], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1),
    }


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, **options: Any) -> Any:
    defaults = {"max_new_tokens": 40, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **given(cache), **(GREEDY | defaults | options))


def filled(model: Any, cache: Any, inputs: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        model(**inputs, **given(cache))
    return cache


def assert_close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def assert_same(ours: Any, stock: Any) -> None:
    assert ours.sequences.tolist() == stock.sequences.tolist()
    for mine, theirs in zip(ours.logits, stock.logits, strict=True):
        assert_close(mine, theirs)


def assert_varied(result: Any, more_than: int = 10) -> None:
    said = result.sequences[:, -len(result.logits) :]
    assert len(said.unique()) > more_than, "the model says too little to compare"


def assert_same_with(model: Any, run: Callable[[Any], Any], **options: Any) -> None:
    """What ``run`` returns is the same with a VAttnCache as with a DynamicCache."""
    stock = run(stock_cache(model))
    assert_varied(stock)
    with vattn_cache(model, **options) as cache:
        assert_same(run(cache), stock)
