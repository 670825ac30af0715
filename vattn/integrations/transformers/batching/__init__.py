"""Continuous batching of HuggingFace models over the rows of a KV cache."""

from __future__ import annotations

from vattn.integrations.transformers.batching.api import generate_batch, stream_batch
from vattn.integrations.transformers.batching.batch import ContinuousBatch

__all__ = ["ContinuousBatch", "generate_batch", "stream_batch"]
