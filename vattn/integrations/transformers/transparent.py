"""VAttnCache without touching the code that calls ``generate``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from vattn.integrations.transformers.cache import VAttnCache
from vattn.integrations.transformers.memory import Memory

# Of nested blocks the innermost counts, so none calls that of another.
_STOCK_INIT = DynamicCache.__init__


@contextmanager
def enabled(
    *,
    max_cache_len: int | None = None,
    max_batch_size: int | None = None,
    memory: int | str | None = None,
) -> Iterator[None]:
    """Make every ``generate()`` inside the ``with`` block use a VAttnCache.

    Also those that a ``pipeline()`` or assisted decoding calls: wherever transformers makes a
    ``DynamicCache`` from a configuration, it gets a :class:`VAttnCache`. Caches that are passed
    explicitly, other kinds of caches, models without a layer that VAttnCache can serve, and
    forwards that record gradients are left as they are.

    Parameters
    ----------
    max_cache_len, max_batch_size : int, optional
        As of :class:`VAttnCache`, for each cache.
    memory : int or str, optional
        Budget of all caches together, on each device; as of :class:`VAttnCache`.

    Notes
    -----
    Holds for the whole process, for all threads, as long as the block runs. Blocks may be nested;
    the innermost counts.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, max_position_embeddings=256)).eval()
    >>> with enabled(memory="16MiB"):
    ...     output = model.generate(
    ...         torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0,
    ...         return_dict_in_generate=True)
    >>> type(output.past_key_values).__name__
    'VAttnCache'
    """
    budget = Memory(memory)
    before = DynamicCache.__init__

    @functools.wraps(_STOCK_INIT)
    def make(self: DynamicCache, *args: Any, **options: Any) -> None:
        _STOCK_INIT(self, *args, **options)
        config = options.get("config")
        if type(self) is DynamicCache and _wants_ours(args, options) and config is not None:
            VAttnCache.from_dynamic(
                self, config, budget, max_cache_len=max_cache_len, max_batch_size=max_batch_size
            )

    DynamicCache.__init__ = make  # type: ignore[method-assign]
    try:
        yield
    finally:
        DynamicCache.__init__ = before  # type: ignore[method-assign]


def _wants_ours(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    # Positional arguments are tokens to begin with, which only the distributed code has.
    return not args and not options.get("offloading") and not torch.is_grad_enabled()
