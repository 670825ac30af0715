"""What `vattn plan` reads from a configuration is what transformers puts into its cache."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import cache_in  # noqa: E402

from vattn.plan.hf_config import read_config  # noqa: E402

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
TYPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("gemma3_text", {"head_dim": 16}),
    ("gemma4_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32}),
    ("cohere2", {}),
    ("llama4_text", {"head_dim": 16, "num_local_experts": 2}),
    ("falcon", {"num_key_value_heads": None}),
    ("gpt_bigcode", {}),
    ("gpt2", {"num_key_value_heads": None}),
    ("phi3", {"pad_token_id": 0}),
    ("starcoder2", {}),
    ("zamba2", {"layers_block_type": ["mamba", "hybrid"] * 3, "num_mem_blocks": 1}),
]


@pytest.mark.parametrize(("model_type", "more"), TYPES)
def test_a_cache_of_transformers_has_these_tensors(model_type: str, more: dict[str, Any]) -> None:
    known = transformers.CONFIG_MAPPING[model_type]
    # None: a field that the family does not have.
    config = known(**{name: v for name, v in (SMALL | more).items() if v is not None})
    plan = read_config(config.to_dict())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        cache = cache_in(model(torch.zeros((1, 3), dtype=torch.long), use_cache=True))
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    theirs = sorted((k.keys.shape[1], k.keys.shape[3], k.values.shape[3]) for k in held)
    groups = [group.shape() for group in plan.shape.layer_groups]
    ours = sorted(shape for layers, *rest in groups for shape in [tuple(rest[:3])] * len(layers))
    assert ours == theirs
    windows = [getattr(layer, "sliding_window", None) for layer in held]
    ours_windows = list(plan.shape.windows) or [None] * plan.shape.num_layers
    assert [window is None for window in ours_windows] == [window is None for window in windows]
    # Files of before layer_types leave it to the family which layers have a window.
    older = {name: v for name, v in config.to_dict().items() if name != "layer_types"}
    assert read_config(older).shape == plan.shape
