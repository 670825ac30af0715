"""The KV cache that a config.json describes, on literal ones modelled on those of real models."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vattn.plan.hf_config import HfModel, read_config

Config = dict[str, Any]
# Layers, KV heads, head dim of K, head dim of V: of each group of layers.
Groups = list[tuple[int, int, int, int]]

LLAMA_3_8B: Config = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
QWEN2_7B: Config = {
    "attention_dropout": 0.0,
    "hidden_size": 3584,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
MISTRAL_7B: Config = {
    "hidden_size": 4096,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
GEMMA3_12B: Config = {
    "model_type": "gemma3",
    "image_token_index": 262144,
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27},
}
DEEPSEEK_V3: Config = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8"},
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
PATTERN = "M-M-M-MM-M-M-M*-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-MM-M-M-M-M-M-"


def small(model_type: str, **more: Any) -> Config:
    """8 layers, 16 heads of 64, 4 of them KV heads."""
    return {
        "model_type": model_type,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    } | more


def openelm() -> Config:
    return {
        "model_type": "openelm",
        "model_dim": 1280,
        "head_dim": 64,
        "num_transformer_layers": 4,
        "num_query_heads": [12, 12, 16, 20],
        "num_kv_heads": [3, 3, 4, 5],
        "max_context_length": 2048,
        "num_gqa_groups": 4,
        "qkv_multipliers": [0.5, 1.0],
        "ffn_multipliers": [0.5, 4.0],
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    }


def nemotron_nas() -> Config:
    kept = {"attention": {"n_heads_in_group": 8, "no_op": False}}
    gone = {"attention": {"n_heads_in_group": None, "no_op": True}}
    linear = {"attention": {"n_heads_in_group": None, "replace_with_linear": True}}
    config = small("nemotron-nas", num_hidden_layers=4, num_key_value_heads=None)
    return config | {"block_configs": [kept, gone, kept, linear]}


FALCON_40B: Config = {
    "model_type": "falcon",
    "hidden_size": 8192,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
    "multi_query": True,
}
FALCON_7B = FALCON_40B | {
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
    "new_decoder_architecture": False,
}
GPT2: Config = {
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "attn_pdrop": 0.1,
    "summary_type": "cls_index",
}
STARCODER = {**GPT2, "model_type": "gpt_bigcode", "multi_query": True}
DBRX: Config = {
    "model_type": "dbrx",
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "max_seq_len": 32768,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
}
CHATGLM: Config = {
    "model_type": "chatglm",
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "seq_length": 8192,
}
KIMI: Config = small("kimi_linear", num_hidden_layers=4, kv_lora_rank=512, qk_rope_head_dim=64) | {
    "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 128},
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}

SHAPES: list[tuple[str, Config, Groups]] = [
    ("GQA, no head_dim", LLAMA_3_8B, [(32, 8, 128, 128)]),
    ("head_dim null", LLAMA_3_8B | {"head_dim": None}, [(32, 8, 128, 128)]),
    ("head_dim not hidden / heads", LLAMA_3_8B | {"head_dim": 64}, [(32, 8, 64, 64)]),
    (
        "MHA",
        {k: v for k, v in LLAMA_3_8B.items() if k != "num_key_value_heads"},
        [(32, 32, 128, 128)],
    ),
    ("Qwen2", QWEN2_7B, [(28, 4, 128, 128)]),
    ("Qwen3", small("qwen3", head_dim=128), [(8, 4, 128, 128)]),
    ("Qwen3, head_dim by default", small("qwen3"), [(8, 4, 128, 128)]),
    ("Mixtral", small("mixtral", num_local_experts=8, sliding_window=None), [(8, 4, 64, 64)]),
    ("Gemma 2", small("gemma2", head_dim=256, sliding_window=4096), [(8, 4, 256, 256)]),
    ("nested, with defaults", GEMMA3_12B, [(48, 8, 256, 256)]),
    ("nested, all defaults", {"model_type": "llava", "text_config": {"model_type": "llama"}},
     [(32, 32, 128, 128)]),
    ("nested twice", {"model_type": "omni", "thinker_config": {"text_config": small("qwen2")}},
     [(8, 4, 64, 64)]),
    ("MLA", DEEPSEEK_V3, [(61, 1, 576, 0)]),
    ("Falcon-40B", FALCON_40B | {"max_position_embeddings": 2048}, [(60, 8, 64, 64)]),
    ("Falcon-7B", FALCON_7B | {"max_position_embeddings": 2048}, [(32, 1, 64, 64)]),
    ("Falcon, no MQA", small("falcon", multi_query=False, num_key_value_heads=None),
     [(8, 16, 64, 64)]),
    ("Falcon, its first name", {"model_type": "RefinedWeb", "n_layer": 4, "n_head": 16,
     "n_head_kv": 8, "hidden_size": 1024, "max_position_embeddings": 2048}, [(4, 8, 64, 64)]),
    ("GPT-2", GPT2, [(12, 12, 64, 64)]),
    ("StarCoder", STARCODER, [(12, 1, 64, 64)]),
    ("DBRX", DBRX, [(40, 8, 128, 128)]),
    ("MPT, MQA", DBRX | {"model_type": "mpt", "attn_config": {"attn_type": "multiquery_attention"}},
     [(40, 1, 128, 128)]),
    ("ChatGLM", CHATGLM, [(28, 2, 128, 128)]),
    ("K and V differ", small("llama", head_dim=192, v_head_dim=128), [(8, 4, 192, 128)]),
    ("a list of KV heads", openelm(), [(2, 3, 64, 64), (1, 4, 64, 64), (1, 5, 64, 64)]),
    ("KV heads per layer", small("deci", num_hidden_layers=3, num_key_value_heads=None,
     num_key_value_heads_per_layer=[4, 2, 4]), [(2, 4, 64, 64), (1, 2, 64, 64)]),
    ("attention taken out", nemotron_nas(), [(2, 2, 64, 64)]),
    ("Jamba", small("jamba", attn_layer_period=8, attn_layer_offset=4, mamba_d_state=16),
     [(1, 4, 64, 64)]),
    ("Qwen3-Next", small("qwen3_next", full_attention_interval=4, head_dim=256,
     linear_key_head_dim=128, linear_num_key_heads=16), [(2, 4, 256, 256)]),
    ("Zamba2", small("zamba2", layers_block_type=["mamba", "hybrid"] * 4, mamba_d_state=64,
     attention_head_dim=160, kv_channels=80), [(4, 4, 160, 160)]),
    ("Zamba", small("zamba", num_hidden_layers=10, attn_layer_period=6, attn_layer_offset=4,
     n_mamba_heads=2), [(2, 4, 128, 128)]),
    ("Bamba", small("bamba", attn_layer_indices=[2, 5], mamba_n_heads=128), [(2, 4, 64, 64)]),
    ("LFM2", small("lfm2", full_attn_idxs=[2, 5, 7], conv_L_cache=3), [(3, 4, 64, 64)]),
    ("Granite 4", small("granitemoehybrid", layer_types=["mamba"] * 7 + ["attention"],
     mamba_n_heads=128), [(1, 4, 64, 64)]),
    ("Falcon-H1", small("falcon_h1", mamba_d_ssm=1024, mamba_n_heads=32), [(8, 4, 64, 64)]),
    ("Nemotron-H", small("nemotron_h", hybrid_override_pattern=PATTERN, head_dim=128,
     num_hidden_layers=62, ssm_state_size=128, conv_kernel=4), [(4, 4, 128, 128)]),
    ("MiniMax", small("minimax_text_01", head_dim=128, attn_type_list=[0] * 7 + [1],
     layernorm_linear_attention_alpha=3.5), [(1, 4, 128, 128)]),
    ("Kimi Linear", KIMI, [(1, 1, 576, 0)]),
    ("shared by the last layers", small("gemma3n_text", head_dim=256, sliding_window=512,
     num_kv_shared_layers=3), [(5, 4, 256, 256)]),
    ("Gemma 4", small("gemma4_text", num_hidden_layers=6, head_dim=256, sliding_window=512,
     global_head_dim=512, attention_k_eq_v=True, num_global_key_value_heads=1),
     [(5, 4, 256, 256), (1, 1, 512, 512)]),
    ("a layer of its own", small("new", per_layer_config={"03": {"head_dim": 128}}),
     [(7, 4, 64, 64), (1, 4, 128, 128)]),
]  # fmt: skip


def groups_of(model: HfModel) -> Groups:
    return [(len(g.shape()[0]), *g.shape()[1:4]) for g in model.shape.layer_groups]


@pytest.mark.parametrize(("config", "groups"), [c[1:] for c in SHAPES], ids=[c[0] for c in SHAPES])
def test_layers_and_heads_are_those_of_the_model(config: Config, groups: Groups) -> None:
    model = read_config(config, max_seq_len=1024)
    assert groups_of(model) == groups
    assert model.shape.num_layers == sum(group[0] for group in groups)
    layers = sorted(layer for g in model.shape.layer_groups for layer in g.shape()[0])
    assert layers == list(range(model.shape.num_layers))


FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA4 = small("llama4_text", head_dim=64, attention_chunk_size=8192)

WINDOWS: list[tuple[str, Config, str]] = [
    # Layers by what they see: "." all, "w" a window.
    ("Llama", small("llama"), "........"),
    ("Qwen2, off", small("qwen2", use_sliding_window=False, sliding_window=64), "........"),
    ("Qwen2, not switched on", small("qwen2", sliding_window=64, max_window_layers=3), "........"),
    ("Qwen2, the last layers",
     small("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=5), ".....www"),
    ("Mistral", small("mistral", sliding_window=64), "wwwwwwww"),
    ("Mistral, null", small("mistral", sliding_window=None), "........"),
    ("Mistral, by default", small("mistral"), "wwwwwwww"),
    ("Gemma 2", small("gemma2", sliding_window=64), "w.w.w.w."),
    ("Gemma 3", small("gemma3_text", sliding_window=64), "wwwww.ww"),
    ("its pattern", small("gemma3_text", sliding_window=64, sliding_window_pattern=4), "www.www."),
    ("layer_types first", small("gemma3_text", sliding_window=64, sliding_window_pattern=4,
     layer_types=[FULL] * 7 + [SLIDING]), ".......w"),
    ("Gemma 3n, without the last layers", small("gemma3n_text", sliding_window=64,
     num_kv_shared_layers=3), "wwww."),
    ("gpt-oss", small("gpt_oss", sliding_window=64, layer_types=[SLIDING, FULL] * 4), "w.w.w.w."),
    ("Cohere 2", small("cohere2", sliding_window=64, sliding_window_pattern=4), "www.www."),
    ("Llama 4", LLAMA4, "www.www."),
    ("Llama 4, a list", LLAMA4 | {"no_rope_layers": [1, 0] * 4}, "w.w.w.w."),
    ("Llama 4, an empty list", LLAMA4 | {"no_rope_layers": []}, "www.www."),
    ("RecurrentGemma", small("recurrent_gemma", attention_window_size=64,
     block_types=["recurrent", "recurrent", "attention"]), "ww"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "seen"), [c[1:] for c in WINDOWS], ids=[c[0] for c in WINDOWS])
def test_windows_are_those_of_the_model(config: Config, seen: str) -> None:
    shape = read_config(config).shape
    windows = shape.windows or (None,) * shape.num_layers
    assert "".join("." if window is None else "w" for window in windows) == seen


def test_the_window_is_as_long_as_it_says() -> None:
    assert set(read_config(GEMMA3_12B).shape.windows) == {1024, None}
    assert read_config(GEMMA3_12B).shape.windows.count(None) == 8
    assert set(read_config(LLAMA4).shape.windows) == {8192, None}


ERRORS: list[tuple[str, Config, str]] = [
    ("no type", {"num_hidden_layers": 2}, "model_type is missing"),
    ("no layers", {"model_type": "new"}, "num_hidden_layers of model_type 'new' is missing"),
    ("no heads", small("new", num_attention_heads=None), "num_attention_heads .*is missing"),
    ("no length", small("new", max_position_embeddings=None), "say --max-seq-len"),
    ("an odd number", small("llama", num_key_value_heads=2.5), "num_key_value_heads .* is 2.5"),
    ("true", small("llama", num_hidden_layers=True), "num_hidden_layers .* is True"),
    ("heads that do not divide", small("llama", hidden_size=1000), "hidden_size .* is 1000"),
    ("what it does not know", small("llama", kv_compression=4), "kv_compression .*'llama' is 4"),
    ("an indexer", small("new", index_head_dim=128), "index_head_dim of model_type 'new'"),
    ("mamba, but where", small("new", mamba_d_state=16), "mamba_d_state of model_type 'new'"),
    ("a window, but where", small("new", sliding_window=64), "sliding_window .*add layer_types"),
    ("a kind of layer", small("llama", layer_types=["sparse"] * 8), "layer_types .*'sparse'"),
    ("too few kinds", small("llama", layer_types=[FULL]), "layer_types .*has 1 entries"),
    ("a window of no size", small("llama", layer_types=[SLIDING] * 8), "sliding_window .*missing"),
    ("a pattern", small("exaone4", sliding_window=64, sliding_window_pattern="LLLG"), "'LLLG'"),
    ("a letter", small("nemotron_h", hybrid_override_pattern="M?"), "hybrid_override_pattern"),
    ("no list", small("llama", layer_types="full"), "layer_types .*expected a list"),
    ("too few heads", small("new", num_key_value_heads=[4, 2]), "has 2 entries"),
    ("half of MLA", small("new", kv_lora_rank=512), "qk_rope_head_dim of model_type 'new'"),
    ("all shared", small("new", num_kv_shared_layers=8), "num_kv_shared_layers .*8 of 8"),
    ("cross attention", small("mllama_text_model", cross_attention_layers=[3]), "cross_attention"),
    ("an encoder and a decoder", small("t5", is_encoder_decoder=True), "is_encoder_decoder"),
    ("an encoder", small("bert"), "'bert' has no KV cache"),
    ("no attention", small("mamba2"), "'mamba2' has no KV cache"),
    ("only recurrent", small("new", layer_types=["mamba"] * 8), "no layer with a KV cache"),
    ("two attentions", small("longcat_flash", num_layers=4), "num_layers of .*'longcat_flash'"),
    ("overrides", small("new", per_layer_config={"3": {"window": 1}}), "per_layer_config"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), [c[1:] for c in ERRORS], ids=[c[0] for c in ERRORS])
def test_what_is_not_understood_is_named(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(config)


def test_a_sequence_longer_or_of_no_known_length_can_be_asked_for() -> None:
    assert read_config(LLAMA_3_8B).shape.max_seq_len == 8192
    assert read_config(LLAMA_3_8B, max_seq_len=100_000).shape.max_seq_len == 100_000
    assert read_config(FALCON_7B, max_seq_len=2048).shape.max_seq_len == 2048


def test_the_dtype_is_that_of_the_model_or_of_what_it_is_in() -> None:
    assert read_config(LLAMA_3_8B).dtype == "bfloat16"
    assert read_config(GEMMA3_12B).dtype == "bfloat16"
    assert read_config(small("llama", dtype="torch.float16")).dtype == "float16"
    assert read_config(GPT2).dtype is None


NOTES: list[tuple[str, Config, str]] = [
    ("defaults", GEMMA3_12B, "head_dim is not given: 256"),
    ("MLA", DEEPSEEK_V3, "latent stripe of 512 [+] 64"),
    ("more layers", DEEPSEEK_V3, "multi-token prediction"),
    ("hybrid", small("jamba", attn_layer_period=8, attn_layer_offset=4), "7 of 8 layers have no"),
    ("shared", small("gemma3n_text", num_kv_shared_layers=3), "last 3 layers"),
    ("Falcon-40B", FALCON_40B | {"n_positions": 2048}, "transformers' own Falcon copies"),
    ("unknown", small("brand_new"), "'brand_new' is not one that vattn knows"),
]


@pytest.mark.parametrize(("config", "note"), [c[1:] for c in NOTES], ids=[c[0] for c in NOTES])
def test_what_is_not_evident_is_said(config: Config, note: str) -> None:
    notes = read_config(config).notes
    assert any(re.search(note, line) for line in notes), notes
    assert len(notes) == len(set(notes))


def test_a_plain_model_has_no_notes() -> None:
    assert read_config(LLAMA_3_8B).notes == ()
    assert read_config(QWEN2_7B).notes == ()
    assert read_config(MISTRAL_7B).notes == ()
