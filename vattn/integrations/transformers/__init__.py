"""vattn as the KV cache of HuggingFace transformers: pass it as ``past_key_values``."""

from __future__ import annotations

from vattn.integrations.transformers.cache import VAttnCache

__all__ = ["VAttnCache"]
