"""One attention layer of a VAttnCache, as transformers wants it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from vattn.integrations.transformers.storage import Storage


class VAttnLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer: a window on the rows of a shared :class:`Storage`.

    ``CacheLayerMixin.__init__`` is not called: all it does is to set attributes that are
    properties here.

    Parameters
    ----------
    storage : Storage
        Holds the memory of all layers.
    index : int
        Which of its layers this one is.
    """

    # What update() returns grows: True would make generate() compile for one fixed length.
    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = True

    def __init__(self, storage: Storage, index: int) -> None:
        self._storage = storage
        self._index = index
        self.length = 0

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there is memory to write to."""
        return self._storage.cache is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of the tokens so far, a view; None before the first ones."""
        return self._storage.kv(self._index, self.length)[0] if self.is_initialized else None

    @keys.setter
    def keys(self, _value: object) -> NoReturn:
        self._refuse_assignment("keys")

    @property
    def values(self) -> torch.Tensor | None:
        """Values of the tokens so far, a view; None before the first ones."""
        return self._storage.kv(self._index, self.length)[1] if self.is_initialized else None

    @values.setter
    def values(self, _value: object) -> NoReturn:
        self._refuse_assignment("values")

    def _refuse_assignment(self, name: str) -> NoReturn:
        raise NotImplementedError(
            f"assigning the {name} of a layer is not supported by VAttnCache yet; use DynamicCache"
        )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the memory, if it is not there; these tensors show its shape."""
        self._storage.prepare(self._index, key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens behind the others, and return all of them as views.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            [batch, num_kv_heads, new tokens, head_dim]

        Returns
        -------
        keys, values : torch.Tensor
            [batch, num_kv_heads, all tokens, head_dim], views of the cache.
        """
        self._storage.prepare(self._index, key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        self._storage.extend(end)
        keys, values = self._storage.kv(self._index, end)
        keys[:, :, start:].copy_(key_states)
        values[:, :, start:].copy_(value_states)
        self.length = end
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next ``update`` returns."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self._storage.options.max_cache_len

    def get_max_cache_shape(self) -> int:
        """``get_max_length`` under the name it had until transformers 5.15."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Cut tokens off the end.

        Parameters
        ----------
        tokens_to_remove : int or torch.Tensor
            Negative: how many to remove. Positive, as transformers before 5.17 has it: how many to
            keep. The cache itself frees nothing: the memory is for the tokens that come instead.
        """
        count = int(tokens_to_remove)
        self.length = min(count, self.length) if count > 0 else max(self.length + count, 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put row ``beam_idx[b]`` at row ``b``, by copying."""
        if self.length:
            self.gather(beam_idx, self.length)

    def gather(self, rows: torch.Tensor, length: int) -> None:
        """Put row ``rows[b]`` at row ``b`` for each ``b``, by copying."""
        for tensor in self._storage.kv(self._index, length):
            # index_select copies, so that no row is overwritten before it was read.
            tensor[: len(rows)].copy_(tensor.index_select(0, rows.to(tensor.device)))

    def offload(self) -> NoReturn:
        """Raise: not supported."""
        raise NotImplementedError("VAttnCache cannot offload layers yet; use DynamicCache")

    def prefetch(self) -> NoReturn:
        """Raise: not supported."""
        raise NotImplementedError("VAttnCache cannot offload layers yet; use DynamicCache")
