"""The memory behind all layers of one cache: rows 0 to B-1 of one KVCache, all equally long."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

import vattn
from vattn.units import dtype_name

_LOG = logging.getLogger(__name__)

# What is left is for activations, and for whatever else runs on the machine.
_CPU_SHARE = 0.5
_CUDA_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """What is known before the first keys come; see ``VAttnCache`` for the meaning."""

    num_layers: int
    max_cache_len: int
    max_batch_size: int | None
    device: torch.device | None
    dtype: torch.dtype | None
    memory: int | str | None


class Storage:
    """Makes a KVCache when the first keys show what is needed, and steps it once per forward."""

    def __init__(self, options: StorageOptions) -> None:
        self.options = options
        self.cache: vattn.KVCache | None = None
        self.batch_size = 0  # rows held: always 0 to batch_size - 1
        self.seq_len = 0  # tokens that every row held has memory for
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def max_batch_size(self) -> int:
        """Largest batch; not known before there is a cache."""
        return 0 if self.cache is None else self.cache.config.max_batch_size

    def prepare(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Get ready to take these keys and values of one layer, or say why not."""
        self._check_device_and_dtype(k, v)
        if self.cache is None:
            self.cache = self._open(k, v)
        if self.seq_len == 0 and k.shape[0] != self.batch_size:
            self.hold(k.shape[0])
        self._check_shape(index, k, v)

    def extend(self, seq_len: int) -> None:
        """Back every row with memory for this many tokens. The first layer of a forward does it."""
        if seq_len <= self.seq_len:
            return
        limit = self.options.max_cache_len
        if seq_len > limit:
            raise ValueError(
                f"the sequence would have {seq_len} tokens, the cache takes {limit}; generate "
                "fewer, or raise max_cache_len of VAttnCache (it costs addresses, not memory)"
            )
        self._step(seq_len, self.batch_size)

    def shrink(self, seq_len: int) -> None:
        """Take note that the rows were cut. Their memory stays mapped, for what comes next."""
        if seq_len < self.seq_len:
            self._step(seq_len, self.batch_size)

    def hold(self, batch_size: int) -> None:
        """Hold the rows 0 to ``batch_size - 1`` and no others.

        Those let go become idle: still mapped, but their memory can be had by the others.
        """
        cache = self._existing()
        if batch_size > self.max_batch_size:
            raise ValueError(
                f"the batch has {batch_size} rows, the cache {self.max_batch_size}; pass "
                f"max_batch_size={batch_size} to VAttnCache"
            )
        # alloc() chooses the row, so take all there are and let go of those not wanted.
        keep = min(batch_size, self.batch_size)
        taken = list(range(keep, self.batch_size))
        try:
            if batch_size > self.batch_size:
                while self.batch_size + len(taken) < self.max_batch_size:
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
            self._step(self.seq_len, batch_size)
        except MemoryError:
            self.hold(before)
            raise

    def reset(self) -> None:
        """Let go of all rows; their memory stays mapped for the next ones."""
        self.seq_len = 0
        if self.cache is not None:
            self.hold(0)

    def close(self) -> None:
        """Give all memory back. The next keys start afresh."""
        self._tensors.clear()
        if self.cache is not None:
            self.cache.close()
        self.cache, self.batch_size, self.seq_len = None, 0, 0

    def kv(self, index: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer as views of shape [batch, heads, seq_len, dim]."""
        if index not in self._tensors:
            cache = self._existing()
            # Made inside inference_mode, they could not be written outside of it.
            with torch.inference_mode(False):
                k, v = cache.kv(index)
                assert v is not None
                if cache.config.order == "NHD":
                    k, v = k.transpose(1, 2), v.transpose(1, 2)
            self._tensors[index] = k, v
        k, v = self._tensors[index]
        return k[: self.batch_size, :, :seq_len], v[: self.batch_size, :, :seq_len]

    def _step(self, seq_len: int, batch_size: int) -> None:
        cache = self._existing()
        lengths = [seq_len] * batch_size + [0] * (self.max_batch_size - batch_size)
        try:
            cache.step(lengths)
        except vattn.OutOfPagesError as error:
            raise vattn.OutOfPagesError(
                f"{batch_size} rows of {seq_len} tokens need {error.needed} more pages of "
                f"{cache.page_bytes} bytes, {error.free} are free of a budget of "
                f"{cache.config.memory_bytes} bytes; raise memory of VAttnCache, or generate for "
                "fewer prompts at a time. The cache is unchanged: reset() makes it usable again",
                error.needed,
                error.free,
            ) from error
        self.seq_len = seq_len

    def _existing(self) -> vattn.KVCache:
        assert self.cache is not None, "prepare() comes first"
        return self.cache

    def _open(self, k: torch.Tensor, v: torch.Tensor) -> vattn.KVCache:
        options = self.options
        batch_size, num_kv_heads, _, head_dim = k.shape
        on_cuda = k.device.type == "cuda"
        shape: dict[str, Any] = {
            "num_layers": options.num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v.shape[-1],
            "dtype": dtype_name(k.dtype),
            "max_batch_size": options.max_batch_size or batch_size,
            "max_seq_len": options.max_cache_len,
            "device": str(k.device),
            # FlashAttention reads the first; SDPA on the CPU is twice as fast on the second.
            "order": "NHD" if on_cuda else "HND",
        }
        memory = options.memory
        if memory is None:
            memory = _default_memory(k.device)
            _LOG.info(
                "vattn: the KV cache may use %.1f GiB, a share of the memory free now; pass memory "
                "to VAttnCache to choose",
                memory / 2**30,
            )
        return vattn.init(vattn.CacheConfig(**shape, memory=memory))

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
                    "not yet serve a model that is spread over several devices"
                )

    def _check_shape(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if k.shape[0] != self.batch_size:
            raise ValueError(
                f"the batch has {k.shape[0]} rows, the tokens in the cache belong to "
                f"{self.batch_size}; call reset() to start a new batch, or "
                "batch_repeat_interleave() to continue one prompt in several ways"
            )
        config = self._existing().config
        have = k.shape[1], k.shape[3], v.shape[1], v.shape[3]
        want = config.num_kv_heads, config.head_dim, config.num_kv_heads, config.v_head_dim
        if have != want:
            raise NotImplementedError(
                f"attention layer {index} has heads and dimensions {have} of K and V, the first "
                f"one {want}; VAttnCache does not yet serve models whose layers differ, use "
                "DynamicCache"
            )


def _default_memory(device: torch.device) -> int:
    """Return a share of the memory that is free on this device, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has cached but not in use is free for torch only.
        return max(1, int(free * _CUDA_SHARE))
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(available * _CPU_SHARE)
