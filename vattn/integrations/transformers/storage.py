"""The memory behind the layers of one shape: rows 0 to B-1 of one KVCache, all equally long."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import vattn
from vattn.integrations.transformers import compiled
from vattn.integrations.transformers.common import Common, States, repeated_rows
from vattn.integrations.transformers.memory import Memory, head_major, order_for
from vattn.units import dtype_name

# Tokens up to so many pages in each region are copied: to map others in their place takes longer.
_COPIED_PAGES = 3


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
    """Makes a KVCache when the first keys show what is needed, and steps it once per forward.

    Rows that have tokens in common have them in the same memory; what one appends is in memory of
    its own.
    """

    # Whether rows may have memory in common: then no token that there is can be written again.
    may_share = True

    def __init__(self, options: StorageOptions, memory: Memory) -> None:
        self.options = options
        self.memory = memory
        self.cache: vattn.KVCache | None = None
        self.batch_size = 0  # rows held: always 0 to batch_size - 1
        self.seq_len = 0  # tokens that every row held has memory for
        self.lengths = [0] * options.num_layers  # tokens that each layer uses of them
        self.common = Common()
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
            self.common.forget(k.shape[0])
        if k.shape[0] != self.batch_size:
            raise ValueError(
                f"the batch has {k.shape[0]} rows, the tokens in the cache belong to "
                f"{self.batch_size}; call reset() to start a new batch, or "
                "batch_repeat_interleave() to continue one prompt in several ways"
            )

    def make_writable(self, start: int, end: int, states: States | None = None) -> None:
        """Back every row with memory for ``end`` tokens, to write those from ``start`` on.

        Of the very first ones, rows that get the same have only one copy, as when ``generate``
        repeats a prompt for ``num_return_sequences``.

        Parameters
        ----------
        start, end : int
            Tokens of one layer.
        states : sequence of torch.Tensor, optional
            What will be written, each [batch, heads, end - start, dim]. Not given: it may differ in
            each row.
        """
        if not self.common.takes(start, states):
            self._move(self.existing().config.max_batch_size)
        if self.seq_len == 0 and states is not None and self.may_share and self._pages(end) >= 1:
            self.check_length(end)
            self._begin(end, repeated_rows(states))
        self.extend(end)

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
        cache = self.existing()
        lengths = [seq_len] * batch_size + [0] * (cache.config.max_batch_size - batch_size)
        try:
            cache.step(lengths)
        except vattn.OutOfPagesError as error:
            raise self._explained(error, seq_len, batch_size) from error
        self.seq_len = seq_len
        self.common.cut(seq_len)

    def hold(self, batch_size: int) -> None:
        """Hold the rows 0 to ``batch_size - 1`` and no others.

        Those let go become idle: still mapped, but their memory can be had by the others.
        """
        cache = self.existing()
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

    def grow_batch(self, rows: list[int]) -> None:
        """Hold more rows, which ``gather`` will put there. All or nothing."""
        before = self.batch_size
        self.hold(len(rows))
        if self._shares(rows):
            return
        try:
            self.step(self.seq_len, len(rows))
        except MemoryError:
            self.hold(before)
            raise

    def gather(self, rows: list[int]) -> None:
        """Put row ``rows[b]`` at row ``b`` for each ``b``, in all layers; others are let go.

        Rows that stay where they are cost nothing. Few tokens are copied, without the driver. Where
        there are more, the whole pages of their parent are mapped in the place of their own, and
        only what is left is copied. All or nothing. For more rows than are held, ``grow_batch``
        comes first.
        """
        moved = [b for b, parent in enumerate(rows) if b != parent]
        parents = [rows[b] for b in moved]
        if self._shares(rows) and self._share(moved, parents, must=self._has_to_share(rows)):
            self.common.reordered(rows, self.seq_len)
        elif moved:
            self._copy_rows(moved, parents)
        self.hold(len(rows))
        self.common.copied(len(rows))

    def pages_to_gather(self, rows: list[int]) -> int:
        """Pages that ``gather`` cannot do without, if the tokens end in extents of single pages."""
        moved = sum(b != parent for b, parent in enumerate(rows))
        return moved * self.existing().regions_per_row if self._has_to_share(rows) else 0

    def reset(self) -> None:
        """Let go of all rows; their memory stays mapped for the next ones."""
        self.seq_len = 0
        self.common.forget(0)
        self.lengths = [0] * self.options.num_layers
        if self.cache is not None:
            self.hold(0)

    def close(self) -> None:
        """Give all memory back. The next keys start afresh."""
        self.tensors = []
        if self.cache is not None:
            self.cache.close()
        self.cache, self.batch_size, self.seq_len = None, 0, 0
        self.common.forget(0)
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
        twin.common.forget(self.batch_size)
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

    def existing(self) -> vattn.KVCache:
        """Return the cache underneath, of which there must be one."""
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
            self.existing().trim()
        return self._move(max_batch_size)

    def _move(self, max_batch_size: int) -> vattn.KVCache:
        """Move to another cache, in which each row has memory of its own."""
        other = self.copy(max_batch_size)
        self.cache, self.tensors = other.cache, other.tensors
        self.common.forget(self.batch_size)
        return self.existing()

    def _pages(self, seq_len: int) -> float:
        """Pages that so many tokens take in each region, on average."""
        cache = self.existing()
        return seq_len * cache.token_bytes / (cache.page_bytes * cache.regions_per_row)

    def _has_to_share(self, rows: list[int]) -> bool:
        """Whether ``gather`` cannot copy: into shared memory, or into rows that have none yet."""
        if self.common.with_parents(rows) is None:
            return True
        return self._shares(rows) and len(rows) > len(self.common.families)

    def _shares(self, rows: list[int]) -> bool:
        """Whether ``gather`` should let rows share the memory of their parents."""
        in_common = self.common.with_parents(rows)
        if in_common is None:
            return True
        if not self.may_share or rows == list(range(len(rows))):
            return False
        has_new_rows = len(rows) > len(self.common.families)
        limit = 1 if has_new_rows else _COPIED_PAGES
        return self._pages(self.seq_len - in_common) >= limit

    def _share(self, moved: list[int], parents: list[int], *, must: bool) -> bool:
        """Map the memory of their parents under these rows. False: there was none for the rest."""
        try:
            self.existing().reorder(moved, parents)
        except vattn.OutOfPagesError as error:
            if must:
                raise self._explained(error, self.seq_len, self.batch_size) from error
            return False
        return True

    def _begin(self, seq_len: int, repeats: list[int]) -> None:
        """Back all rows with their first tokens, of which ``repeats`` have those of the row before.

        All or nothing. The tokens themselves are still to be written, to all rows.
        """
        if not repeats:
            return
        cache, rows = self.existing(), range(self.batch_size)
        self.common.begin(self.batch_size, repeats, seq_len)
        try:
            cache.step({row: 0 if row in repeats else seq_len for row in rows})
            cache.reorder(repeats, [self.common.families[row] for row in repeats])
        except (vattn.OutOfPagesError, vattn.DriverError) as error:
            explained = error
            if isinstance(error, vattn.OutOfPagesError):
                explained = self._explained(error, seq_len, self.batch_size)
            # Not a step to 0 tokens: an active row keeps the memory that it may have written to.
            self.reset()
            raise explained from error
        self.seq_len = seq_len

    def _copy_rows(self, to: list[int], parents: list[int]) -> None:
        """Copy what is not in common to these rows from their parents."""
        device = torch.device(str(self.existing().config.device))
        targets, sources = torch.tensor(to, device=device), torch.tensor(parents, device=device)
        for index, length in enumerate(self.lengths):
            for tensor in self.kv(index, length):
                own = tensor[:, :, self.common.tokens :]
                # index_select copies, so that no row is overwritten before it was read.
                own.index_copy_(0, targets, own.index_select(0, sources))

    def _explained(
        self, error: vattn.OutOfPagesError, seq_len: int, batch_size: int
    ) -> vattn.OutOfPagesError:
        """Say what the memory was wanted for."""
        cache = self.existing()
        return vattn.OutOfPagesError(
            f"{batch_size} rows of {seq_len} tokens need {error.needed} more pages of "
            f"{cache.page_bytes} bytes, {error.free} are free of a budget of "
            f"{cache.stats().budget_bytes} bytes; raise memory of VAttnCache, or generate for "
            "fewer prompts at a time. The cache is unchanged: reset() makes it usable again",
            error.needed,
            error.free,
        )

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
        config = self.existing().config
        have = k.shape[1], k.shape[3], v.shape[1], v.shape[3]
        want = config.num_kv_heads, config.head_dim, config.num_kv_heads, config.v_head_dim
        if have != want:
            raise NotImplementedError(
                f"attention layer {index} has heads and dimensions {have} of K and V, the first "
                f"one {want}; VAttnCache does not yet serve models whose layers differ other than "
                "by their window, use DynamicCache"
            )
