"""The memory behind the layers of one shape: rows 0 to B-1 of one KVCache, all equally long."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import vattn
from vattn.integrations.transformers import compiled
from vattn.integrations.transformers.memory import Memory, head_major, order_for
from vattn.units import dtype_name


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """What is known before the first keys come; see ``VAttnCache`` for the meaning."""

    num_layers: int
    max_cache_len: int
    max_batch_size: int | None
    device: torch.device | None
    dtype: torch.dtype | None
    bucket_len: int | None = None


class Storage:
    """Makes a KVCache when the first keys show what is needed, and steps it once per forward."""

    def __init__(self, options: StorageOptions, memory: Memory) -> None:
        self.options = options
        self.memory = memory
        self.cache: vattn.KVCache | None = None
        self.batch_size = 0  # rows held: always 0 to batch_size - 1
        self.seq_len = 0  # tokens that every row held has memory for
        self.lengths = [0] * options.num_layers  # tokens that each layer uses of them
        self.tensors: list[tuple[torch.Tensor, torch.Tensor]] = []  # of whole rows, per layer
        self.number = compiled.register(self)

    def prepare(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Get ready to take these keys and values of one layer, or say why not."""
        self._check_device_and_dtype(k, v)
        if self.cache is None:
            self._use(self._open(k, v))
        self._check_shape(index, k, v)
        if self.seq_len == 0 and k.shape[0] != self.batch_size:
            self.hold(k.shape[0])
        if k.shape[0] != self.batch_size:
            raise ValueError(
                f"the batch has {k.shape[0]} rows, the tokens in the cache belong to "
                f"{self.batch_size}; call reset() to start a new batch, or "
                "batch_repeat_interleave() to continue one prompt in several ways"
            )

    def extend(self, seq_len: int) -> None:
        """Back every row with memory for this many tokens. The first layer of a forward does it."""
        if seq_len > self.seq_len:
            self.check_length(seq_len)
            self.step(seq_len, self.batch_size)

    def check_length(self, seq_len: int) -> None:
        """Raise if a row cannot have so many tokens."""
        limit = self.options.max_cache_len
        if seq_len > limit:
            raise ValueError(
                f"the sequence would have {seq_len} tokens, the cache takes {limit}; generate "
                "fewer, or raise max_cache_len of VAttnCache (it costs addresses, not memory)"
            )

    def shrink(self) -> None:
        """Let go of the tokens that no layer uses. Their memory stays mapped, for the next ones."""
        longest = max(self.lengths)
        if longest < self.seq_len:
            self.step(longest, self.batch_size)

    def step(self, seq_len: int, batch_size: int) -> None:
        """Back this many rows with memory for this many tokens each. All or nothing."""
        cache = self._existing()
        lengths = [seq_len] * batch_size + [0] * (cache.config.max_batch_size - batch_size)
        try:
            cache.step(lengths)
        except vattn.OutOfPagesError as error:
            raise vattn.OutOfPagesError(
                f"{batch_size} rows of {seq_len} tokens need {error.needed} more pages of "
                f"{cache.page_bytes} bytes, {error.free} are free of a budget of "
                f"{cache.stats().budget_bytes} bytes; raise memory of VAttnCache, or generate for "
                "fewer prompts at a time. The cache is unchanged: reset() makes it usable again",
                error.needed,
                error.free,
            ) from error
        self.seq_len = seq_len

    def hold(self, batch_size: int) -> None:
        """Hold the rows 0 to ``batch_size - 1`` and no others.

        Those let go become idle: still mapped, but their memory can be had by the others.
        """
        cache = self._existing()
        if batch_size > cache.config.max_batch_size:
            if self.options.max_batch_size is not None:
                raise ValueError(
                    f"the batch has {batch_size} rows, max_batch_size is "
                    f"{self.options.max_batch_size}; pass max_batch_size={batch_size} to VAttnCache"
                )
            cache = self._make_room(batch_size)
        # alloc() chooses the row, so take all there are and let go of those not wanted.
        keep = min(batch_size, self.batch_size)
        taken = list(range(keep, self.batch_size))
        try:
            if batch_size > self.batch_size:
                while self.batch_size + len(taken) < cache.config.max_batch_size:
                    taken.append(cache.alloc())
                keep = batch_size
        finally:
            for row in taken:
                if row >= keep:
                    cache.free(row)
        self.batch_size = batch_size

    def grow_batch(self, batch_size: int) -> None:
        """Hold more rows, with memory for as many tokens as the others. All or nothing."""
        before = self.batch_size
        self.hold(batch_size)
        try:
            self.step(self.seq_len, batch_size)
        except MemoryError:
            self.hold(before)
            raise

    def gather(self, rows: list[int]) -> None:
        """Put row ``rows[b]`` at row ``b`` for each ``b``, in all layers; others are let go.

        Rows that stay where they are cost nothing. For more rows than are held, ``grow_batch``
        comes first.
        """
        moved = [b for b, source in enumerate(rows) if b != source]
        if moved:
            device = torch.device(str(self._existing().config.device))
            to = torch.tensor(moved, device=device)
            come_from = torch.tensor([rows[b] for b in moved], device=device)
            for index, length in enumerate(self.lengths):
                for tensor in self.kv(index, length):
                    # index_select copies, so that no row is overwritten before it was read.
                    tensor.index_copy_(0, to, tensor.index_select(0, come_from))
        self.hold(len(rows))

    def reset(self) -> None:
        """Let go of all rows; their memory stays mapped for the next ones."""
        self.seq_len = 0
        self.lengths = [0] * self.options.num_layers
        if self.cache is not None:
            self.hold(0)

    def close(self) -> None:
        """Give all memory back. The next keys start afresh."""
        self.tensors = []
        if self.cache is not None:
            self.cache.close()
        self.cache, self.batch_size, self.seq_len = None, 0, 0
        self.lengths = [0] * self.options.num_layers

    def copy(self, max_batch_size: int | None = None) -> Storage:
        """Copy the tokens that there are, and no more, into a storage of its own.

        Parameters
        ----------
        max_batch_size : int, optional
            Rows that it has room for; as many as this one by default.
        """
        twin = type(self)(self.options, self.memory)
        if self.cache is None:
            return twin
        rows = max_batch_size or self.cache.config.max_batch_size
        twin._use(self.memory.open(replace(self.cache.config, max_batch_size=rows)))
        twin.hold(self.batch_size)
        twin.step(self.seq_len, self.batch_size)
        twin.lengths = list(self.lengths)
        for index, length in enumerate(self.lengths):
            for mine, theirs in zip(twin.kv(index, length), self.kv(index, length), strict=True):
                mine.copy_(theirs)
        return twin

    def kv(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer as views of shape [batch, heads, seq_len, dim]."""
        k, v = self.tensors[index]
        return k[: self.batch_size, :, :seq_len], v[: self.batch_size, :, :seq_len]

    def _use(self, cache: vattn.KVCache) -> None:
        self.cache = cache
        self.tensors = head_major(cache)

    def _existing(self) -> vattn.KVCache:
        assert self.cache is not None, "prepare() comes first"
        return self.cache

    def _open(self, k: torch.Tensor, v: torch.Tensor) -> vattn.KVCache:
        options = self.options
        return self.memory.open(
            vattn.CacheConfig(
                num_layers=options.num_layers,
                num_kv_heads=k.shape[1],
                head_dim=k.shape[3],
                v_head_dim=v.shape[3],
                dtype=dtype_name(k.dtype),
                max_batch_size=options.max_batch_size or k.shape[0],
                max_seq_len=options.max_cache_len,
                device=str(k.device),
                order=order_for(k.device),
            )
        )

    def _make_room(self, max_batch_size: int) -> vattn.KVCache:
        """Move to a cache with more rows. Views of the old one stay valid while they live."""
        if self.seq_len == 0:
            self.hold(0)
            self._existing().trim()
        roomier = self.copy(max_batch_size)
        self.cache, self.tensors = roomier.cache, roomier.tensors
        return self._existing()

    def _check_device_and_dtype(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise NotImplementedError(
                "the keys require a gradient, but VAttnCache writes in place, which autograd "
                "cannot follow; call the model under torch.no_grad(), or train with use_cache=False"
            )
        if self.cache is not None:
            config = self.cache.config
            device, dtype = torch.device(str(config.device)), getattr(torch, config.dtype_name)
        else:
            device, dtype = self.options.device or k.device, self.options.dtype or k.dtype
        for name, tensor in (("keys", k), ("values", v)):
            if tensor.dtype != dtype:
                raise ValueError(f"the {name} are {tensor.dtype}, the cache holds {dtype}")
            if tensor.device != device:
                raise NotImplementedError(
                    f"the {name} are on {tensor.device}, the cache is on {device}; VAttnCache does "
                    "not yet serve a model that is spread over several devices, use DynamicCache"
                )

    def _check_shape(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        config = self._existing().config
        have = k.shape[1], k.shape[3], v.shape[1], v.shape[3]
        want = config.num_kv_heads, config.head_dim, config.num_kv_heads, config.v_head_dim
        if have != want:
            raise NotImplementedError(
                f"attention layer {index} has heads and dimensions {have} of K and V, the first "
                f"one {want}; VAttnCache does not yet serve models whose layers differ other than "
                "by their window, use DynamicCache"
            )
