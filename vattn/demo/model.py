"""What the demo runs: a model, a tokenizer and prompts."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import vattn

# Qwen3-0.6B but for its vocabulary; see its config.json.
QWEN3_06B = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    # Larger than in training, so that the text depends on all of the prompt and a wrong key shows.
    "initializer_range": 0.06,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}
# Bytes of the prompts. The cache of the full model grows soon after the longest: at 241 tokens.
PROMPT_BYTES = (40, 60, 80, 110)
_PACKAGE = Path(vattn.__file__).parent


class ByteTokenizer:
    """A token is a byte: needs no file."""

    pad_id = 256
    vocab_size = 259  # bytes, padding, begin, end

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokens of a batch, padded on the left."""
        tokens = [list(text.encode()) for text in texts]
        longest = max(map(len, tokens))
        ids = [[self.pad_id] * (longest - len(row)) + row for row in tokens]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in tokens]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class PretrainedTokenizer:
    """The tokenizer of a pretrained model, as the demo uses it."""

    def __init__(self, name: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.pad_id = self._tokenizer.pad_token_id

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokens of a batch, padded on the left."""
        batch = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its tokenizer, and what to say about it."""

    name: str
    model: Any
    tokenizer: ByteTokenizer | PretrainedTokenizer
    trained: bool

    @property
    def max_seq_len(self) -> int:
        """Tokens that the model takes: what a reservation would be made for."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)


def load(name: str | None, device: torch.device, *, tiny: bool) -> Subject:
    """Get the model: a pretrained one, or random weights in a real model's shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa"
        )
        tokenizer = PretrainedTokenizer(name)
        return Subject(name=name, model=model.to(device).eval(), tokenizer=tokenizer, trained=True)
    shape: dict[str, Any] = TINY if tiny else QWEN3_06B
    config = Qwen3Config(vocab_size=ByteTokenizer.vocab_size, **shape)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen3ForCausalLM(config)  # type: ignore[no-untyped-call]
    finally:
        torch.set_default_dtype(before)
    title = "a tiny Qwen3" if tiny else "Qwen3-0.6B's shape with a vocabulary of bytes"
    return Subject(name=title, model=model.eval(), tokenizer=ByteTokenizer(), trained=False)


def prompts() -> list[str]:
    """Pieces of the project's documentation, of different lengths."""
    text = " ".join(_documentation().split())
    pieces = []
    at = 0
    for size in PROMPT_BYTES:
        # Where the text is short, start over: what counts is that lengths differ.
        at = at if at + size <= len(text) else 0
        pieces.append(text[at : at + size])
        at += size
    return pieces


def _documentation() -> str:
    root = _PACKAGE.parent
    files = [root / "README.md", *sorted(root.glob("docs/*.md")), root / "CHANGELOG.md"]
    # Beside an installed package there may be a README.md of whatever; a checkout has this too.
    is_checkout = (root / "pyproject.toml").is_file() and (root / "csrc").is_dir()
    texts = [path.read_text() for path in files if is_checkout and path.is_file()]
    modules = sorted(_PACKAGE.glob("*.py"))
    texts += [ast.get_docstring(ast.parse(path.read_text())) or "" for path in modules]
    texts.append(vattn.KVCache.__doc__ or "")
    return "\n".join(texts)
