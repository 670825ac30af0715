"""What transformers takes for granted about families of models, as tables.

A ``config.json`` leaves out what equals the defaults of its class, above all in a nested
``text_config``; these are the defaults that matter for a KV cache, from transformers 5.17.
"""

from __future__ import annotations

import re
from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "mixtral": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
    "qwen2": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {"head_dim": 128},
    "qwen3_next": {"head_dim": 256, "full_attention_interval": 4},
    "gemma": {"num_hidden_layers": 28, "head_dim": 256, "max_position_embeddings": 8192},
    "gemma2": {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
    },
    "gemma3_text": {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gemma3n_text": {
        "hidden_size": 2048,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "sliding_window_pattern": 5,
        "num_kv_shared_layers": 15,
    },
    "gemma4_text": {
        "hidden_size": 2304,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma4_unified_text": {
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 2},
    "llama4_text": {
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
    },
    "nemotron_h": {"head_dim": 128},
    "gpt_bigcode": {"multi_query": True},
    "falcon": {"multi_query": True},
    "RefinedWebModel": {"multi_query": True},
}

# A sliding window that is there is that of every layer.
WINDOW_IN_ALL_LAYERS = {"ministral", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"}
# use_sliding_window says whether there is one, max_window_layers how many layers go without.
WINDOW_IN_LAST_LAYERS = {
    "dots1",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_5_vl_text",
    "qwen2_moe",
    "qwen2_vl",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_moe",
}
FALCON = {"falcon", "RefinedWeb", "RefinedWebModel"}
# Attention heads are twice as wide as the hidden size says.
ZAMBA = {"zamba", "zamba2"}
# Every layer has attention beside its recurrent part.
PARALLEL_HYBRID = {"falcon_h1"}

# Read by a test, or by many people, with the general rules.
GENERAL = {
    "bloom",
    "bamba",
    "chatglm",
    "codegen",
    "cohere",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "jamba",
    "kimi_k2",
    "kimi_linear",
    "lfm2",
    "minimax",
    "minimax_m2",
    "minimax_text_01",
    "mpt",
    "nemotron",
    "nemotron-nas",
    "olmo",
    "olmo2",
    "olmoe",
    "openelm",
    "opt",
    "phi",
    "recurrent_gemma",
    "smollm3",
    "stablelm",
}
KNOWN = (
    set(DEFAULTS)
    | WINDOW_IN_ALL_LAYERS
    | WINDOW_IN_LAST_LAYERS
    | FALCON
    | ZAMBA
    | PARALLEL_HYBRID
    | GENERAL
)

NO_CACHE = {
    "albert",
    "bert",
    "deberta-v2",
    "distilbert",
    "electra",
    "falcon_mamba",
    "mamba",
    "mamba2",
    "modernbert",
    "roberta",
    "rwkv",
    "xlm-roberta",
    "xlstm",
}
REFUSED = {
    "mimo_v2_flash": "sliding_window: comes with other KV heads, which is not understood",
    "longcat_flash": "num_layers: counts layers of two attentions each, which is not understood",
}

# What a kind of layer, by any of its names, keeps: every token, those in a window, none.
FULL = {"full_attention", "attention", "hybrid"}
SLIDING = {"sliding_attention"}
CHUNKED = {"chunked_attention"}
WITHOUT_KV = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"}

# Fields that say which layer is of which kind: whoever reads one has no need of the others.
KIND_FIELDS = (
    "layer_types",
    "layers_block_type",
    "block_types",
    "hybrid_override_pattern",
    "attn_type_list",
    "attn_layer_indices",
    "attn_layer_period",
    "attn_layer_offset",
    "full_attn_idxs",
    "full_attention_interval",
    "linear_attn_config",
    "no_rope_layers",
    "no_rope_layer_interval",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "global_attn_every_n_layers",
    "max_window_layers",
    "use_sliding_window",
    "sliding_window",
    "attention_chunk_size",
)

# A field with such a name may change what the cache holds, so it must have been understood...
_SUSPICIOUS = re.compile(
    r"kv|key_value|window|sliding|swa|layer_type|layers_type|block_type|block_config|pattern"
    r"|cross_att|per_layer_config|lora_rank|chunk|index|latent|compress|attn|attention|head|mamba|ssm|conv|linear"
)
# ... unless it is one of these, which do not.
_HARMLESS = re.compile(
    r".*(bias|dropout|pdrop|dropout_prob|multipliers?|softcapping|softmax_in_fp32|_in_fp32"
    r"|attn_implementation\w*|temperature_tuning|(alpha|beta)(_factor)?|embeddings?|classifier"
    r"|token_ind(ex|ices)|token_id)"
    r"|attn_scale|attention_value_scale|query_pre_attn_scalar|scale_att\w+|parallel_attn|use_qk_norm"
    r"|q_lora_rank|qk_(nope_|rope_)?head_dim|lm_head\w*|mlp_layer_types|.*experts?(_\w+)?|moe_\w+"
    r"|activation_sparsity_pattern|rope_\w+|mtp_\w+|quantization\w*|compression_config"
    r"|for_llm_compressor|use_bidirectional_attention|num_ln_in_parallel_attn|head_type|cache_\w+"
)
# The recurrent part of layers that were told apart from those with attention.
_RECURRENT = re.compile(r".*(mamba|ssm|conv|linear|chunk_size)\w*")


def may_change_the_cache(field: str, *, knows_recurrent_layers: bool) -> bool:
    """Whether a field of this name must have been understood for the cache to be known.

    Examples
    --------
    >>> may_change_the_cache("kv_compression", knows_recurrent_layers=False)
    True
    >>> may_change_the_cache("attention_dropout", knows_recurrent_layers=False)
    False
    """
    if not _SUSPICIOUS.search(field) or _HARMLESS.fullmatch(field):
        return False
    return not (knows_recurrent_layers and _RECURRENT.fullmatch(field))
