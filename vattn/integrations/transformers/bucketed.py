"""Layers that ``generate`` compiles: attention sees the rows in steps of a bucket of tokens.

Between two buckets all shapes stay, and where to write is a tensor, so a compiled forward serves
every token. The tokens behind the last one are mapped and zero, and the mask hides them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from vattn.integrations.transformers.layer import VAttnLayer
from vattn.integrations.transformers.storage import Storage


class BucketedStorage(Storage):
    """A Storage that also holds the views which the layers show: whole buckets."""

    # Zeros lie behind the last token, and are written over from inside a compiled graph.
    may_share = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.visible = 0  # tokens in the windows
        self.windows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def bucket_end(self, seq_len: int) -> int:
        """Tokens that are shown when there are ``seq_len``."""
        bucket = self.options.bucket_len
        assert bucket is not None
        return min(-(-seq_len // bucket) * bucket, max(seq_len, self.options.max_cache_len))

    def open_window(self, seq_len: int) -> None:
        """Show the buckets of ``seq_len`` tokens. Comes before the forward that gets there."""
        if (end := self.bucket_end(seq_len)) > self.visible:
            before = self.visible
            self.extend(end)
            self._show(end, clean_from=before)
        self.lengths = [seq_len] * len(self.lengths)

    def shrink(self) -> None:
        """Do nothing: what is shown stays mapped."""

    def gather(self, rows: list[int]) -> None:
        """See the base class."""
        super().gather(rows)
        self._show(self.visible, clean_from=max(self.lengths))

    def copy(self, max_batch_size: int | None = None) -> Storage:
        """See the base class."""
        twin = super().copy(max_batch_size)
        assert isinstance(twin, BucketedStorage)
        if twin.cache is not None:
            twin._show(self.visible, clean_from=max(self.lengths))
        return twin

    def reset(self) -> None:
        """See the base class."""
        super().reset()
        self.visible, self.windows = 0, []

    def close(self) -> None:
        """See the base class."""
        super().close()
        self.visible, self.windows = 0, []

    def _show(self, end: int, *, clean_from: int) -> None:
        self.visible = end
        self.windows = [self.kv(index, end) for index in range(self.options.num_layers)]
        # Pages that were used before may hold NaN, which no mask hides.
        for window in self.windows:
            for tensor in window:
                tensor[:, :, clean_from:].zero_()


class BucketedLayer(VAttnLayer):  # type: ignore[no-untyped-call]
    """A VAttnLayer of fixed shapes, as ``StaticLayer`` is, that grows by buckets."""

    is_compileable = True
    storage: BucketedStorage
    # A tensor, so that no compiled code depends on its value.
    cumulative_length: torch.Tensor  # type: ignore[assignment]

    def __init__(self, storage: Storage, index: int, sliding_window: int | None = None) -> None:
        assert isinstance(storage, BucketedStorage)
        self.cumulative_length = torch.tensor(0)
        super().__init__(storage, index, sliding_window)

    @property
    def length(self) -> int:
        """Tokens so far. Waits for the device."""
        return int(self.cumulative_length)

    @length.setter
    def length(self, value: int) -> None:
        self.cumulative_length.fill_(value)

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of the tokens so far, a view; None before the first ones."""
        return self._visible(0, self.length) if self.is_initialized else None

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> NoReturn:
        _refuse_assignment()

    @property
    def values(self) -> torch.Tensor | None:
        """Values of these tokens, a view; None before the first ones."""
        return self._visible(1, self.length) if self.is_initialized else None

    @values.setter
    def values(self, value: torch.Tensor | None) -> NoReturn:
        _refuse_assignment()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens behind the others, and return all buckets so far.

        See :meth:`VAttnLayer.update`. In a compiled graph there must be room for them:
        ``get_mask_sizes`` makes it, which ``generate`` calls before each forward.
        """
        new = key_states.shape[-2]
        if not torch.compiler.is_compiling():
            self.storage.prepare(self._index, key_states, value_states)
            self.storage.open_window(self.length + new)
            self.cumulative_length = self.cumulative_length.to(key_states.device)
        positions = torch.arange(new, device=key_states.device) + self.cumulative_length
        self.cumulative_length.add_(new)
        keys, values = self.storage.windows[self._index]
        keys.index_copy_(2, positions, key_states)
        values.index_copy_(2, positions, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next ``update`` returns."""
        if not torch.compiler.is_compiling():
            seq_len = self.length + query_length
            if not self.storage.windows:
                return self.storage.bucket_end(seq_len), 0
            self.storage.open_window(seq_len)
        return self.storage.visible, 0

    def get_seq_length(self) -> Any:
        """Tokens so far, padding included; a tensor inside a compiled graph."""
        return self.cumulative_length if torch.compiler.is_compiling() else self.length


def _refuse_assignment() -> NoReturn:
    raise NotImplementedError(
        "keys and values cannot be assigned to a cache with bucket_len; make it without"
    )
