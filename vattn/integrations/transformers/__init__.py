"""vattn inside HuggingFace transformers.

:class:`VAttnCache` goes into ``generate`` as ``past_key_values`` (``cache`` from transformers 5.24
on), :func:`enabled` puts it there for you; :func:`generate_batch` serves many requests without
padding. Importing this registers ``attn_implementation="vattn"``.
"""

from __future__ import annotations

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.9"):
    raise ImportError(
        f"transformers is {transformers.__version__}, vattn.integrations.transformers needs 5.9 "
        "or later: pip install -U transformers"
    )

from vattn.integrations.transformers import attention
from vattn.integrations.transformers.batching import ContinuousBatch, generate_batch, stream_batch
from vattn.integrations.transformers.cache import VAttnCache
from vattn.integrations.transformers.transparent import enabled

attention.register()

__all__ = ["ContinuousBatch", "VAttnCache", "enabled", "generate_batch", "stream_batch"]
