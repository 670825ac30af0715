"""One attention layer of a VAttnCache, as transformers wants it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from vattn.integrations.transformers import compiled
from vattn.integrations.transformers.storage import Storage


class VAttnLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer: a window on the rows of a shared :class:`Storage`.

    ``CacheLayerMixin.__init__`` is not called: all it does is to set attributes that are
    properties here.

    Parameters
    ----------
    storage : Storage
        Holds the memory of all layers of this kind.
    index : int
        Which of its layers this one is.
    sliding_window : int, optional
        Tokens that a query sees, itself included. Attention gets no more than it needs of the
        earlier ones, exactly as from transformers' own sliding layers.
    """

    # What update() returns grows: True would make generate() compile for one fixed length.
    is_compileable = False
    is_croppable = True
    supports_early_init = True

    def __init__(self, storage: Storage, index: int, sliding_window: int | None = None) -> None:
        self.storage = storage
        self._index = index
        self.sliding_window = sliding_window
        if sliding_window is not None:
            # How transformers tells, when it iterates over a cache, which layers have a window.
            self._sliding_window_tensor = torch.tensor(sliding_window)
        self.length = 0
        # Differs from length only between an assignment of keys and that of values.
        self._values_length = 0

    @property
    def is_sliding(self) -> bool:
        """Whether the layer has a window."""
        return self.sliding_window is not None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there is memory to write to."""
        return self.storage.cache is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of the tokens that the next query may see, a view; None before the first ones.

        For reading: rows may share memory. An assignment gives each its own. Whoever assigns fewer,
        as KV compression does, must assign as many values next. Memory of tokens that no layer
        keeps is there for what comes next.
        """
        return self._visible(0, self.length) if self.is_initialized else None

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self.length = self._assign("keys", 0, value, self.length)

    @property
    def values(self) -> torch.Tensor | None:
        """Values of these tokens, a view; None before the first ones."""
        return self._visible(1, self._values_length) if self.is_initialized else None

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._values_length = self._assign("values", 1, value, self._values_length)
        self.storage.shrink()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the memory, if it is not there; these tensors show its shape."""
        self.storage.prepare(self._index, key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens behind the others, and return them with those they may see.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            [batch, num_kv_heads, new tokens, head_dim]

        Returns
        -------
        keys, values : torch.Tensor
            [batch, num_kv_heads, tokens, head_dim], views of the cache. All tokens; with a sliding
            window the new ones and as many before as the first of them sees.
        """
        if torch.compiler.is_compiling() and self.is_initialized:
            return self._update_in_graph(key_states, value_states)
        self.storage.prepare(self._index, key_states, value_states)
        start, end = self.length, self.length + key_states.shape[-2]
        self.storage.make_writable(start, end, (key_states, value_states))
        keys, values = self.storage.kv(self._index, end)
        keys[:, :, start:].copy_(key_states)
        values[:, :, start:].copy_(value_states)
        first = self._first_visible(start)
        self._set_length(end)
        return keys[:, :, first:], values[:, :, first:]

    def _update_in_graph(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.storage.tensors[self._index]
        batch, start, end = key_states.shape[0], self.length, self.length + key_states.shape[-2]
        # Here too: slices of more than there is are shorter, and what fails then says nothing.
        self.storage.check_length(end)
        compiled.append(
            keys, values, key_states, value_states, self.storage.number, self._index, start
        )
        first = self._first_visible(start)
        self._set_length(end)
        return keys[:batch, :, first:end], values[:batch, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next ``update`` returns."""
        first = self._first_visible(self.length)
        return self.length - first + query_length, first

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.storage.options.max_cache_len

    def get_max_cache_shape(self) -> int:
        """``get_max_length`` under the name it had until transformers 5.15."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget all tokens."""
        self._set_length(0)

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Cut tokens off the end.

        Parameters
        ----------
        tokens_to_remove : int or torch.Tensor
            Negative: how many to remove. Positive, as transformers before 5.17 has it: how many to
            keep. The cache itself frees nothing: the memory is for the tokens that come instead.
        """
        count = int(tokens_to_remove)
        length = min(count, self.length) if count > 0 else max(self.length + count, 0)
        self._set_length(length)

    def copy_to(self, storage: Storage) -> VAttnLayer:
        """Return this layer over a copy of its storage."""
        twin = type(self)(storage, self._index, self.sliding_window)
        twin.length, twin._values_length = self.length, self._values_length
        return twin

    def offload(self) -> NoReturn:
        """Raise: not supported."""
        raise NotImplementedError("VAttnCache cannot offload layers yet; use DynamicCache")

    def prefetch(self) -> NoReturn:
        """Raise: not supported."""
        raise NotImplementedError("VAttnCache cannot offload layers yet; use DynamicCache")

    def _first_visible(self, length: int) -> int:
        """Return the first of ``length`` tokens that the next query sees."""
        return 0 if self.sliding_window is None else max(length - self.sliding_window + 1, 0)

    def _visible(self, which: int, length: int) -> torch.Tensor:
        return self.storage.kv(self._index, length)[which][:, :, self._first_visible(length) :]

    def _set_length(self, length: int) -> None:
        self.length = self._values_length = length
        self.storage.lengths[self._index] = length

    def _assign(self, name: str, which: int, value: torch.Tensor | None, length: int) -> int:
        """Put these in place of what is there; return how many tokens there are now."""
        if value is None or not length:
            raise ValueError(
                f"{name} can only be put in place of others, and the layer has {length}; fill it "
                "with update(), empty it with reset()"
            )
        first = self._first_visible(length)
        now = first + value.shape[-2]
        there = self.storage.kv(self._index, length)[which]
        if value.shape[:2] != there.shape[:2] or value.shape[3:] != there.shape[3:]:
            raise ValueError(
                f"the {name} have shape {tuple(value.shape)}, the layer has {tuple(there.shape)}: "
                "only the number of tokens may change; batch_select_indices() changes the batch"
            )
        if self.is_sliding and now != length:
            raise ValueError(
                f"{value.shape[-2]} {name} were assigned to a layer with {length - first} in its "
                "window; only layers without a window may change their number"
            )
        if value.untyped_storage().data_ptr() == there.untyped_storage().data_ptr():
            value = value.clone()
        self.storage.make_writable(first, now)
        self.storage.kv(self._index, now)[which][:, :, first:].copy_(value)
        self.storage.lengths[self._index] = max(now, self.length if which else self._values_length)
        return now
