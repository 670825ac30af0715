"""The cache that ``generate`` takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import vattn
from vattn.integrations.transformers.bucketed import BucketedLayer, BucketedStorage
from vattn.integrations.transformers.kinds import extend_all, gather_all
from vattn.integrations.transformers.layer import VAttnLayer
from vattn.integrations.transformers.memory import Memory
from vattn.integrations.transformers.storage import Storage, StorageOptions

# Addresses for so many tokens, for models that work at any length and state none.
_UNSTATED_MAX_CACHE_LEN = 131_072


class VAttnCache(DynamicCache):
    """KV cache for HuggingFace ``generate`` that grows in place, page by page.

    Pass it as ``past_key_values``, which transformers from 5.24 on calls ``cache``. New tokens
    are written behind the others instead of concatenating; attention gets views of exactly the live
    tokens, so any implementation works.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's, ``model.config``.
    max_cache_len : int, optional
        Tokens that a row can grow to, padding included. Costs addresses, not memory. Default: the
        model's limit, ``config.max_position_embeddings``; 131,072 if it states none.
    max_batch_size : int, optional
        Largest batch, beams included. Default: none; a batch with more rows than any before moves
        the tokens there are to new addresses.
    device : torch.device or str, optional
        Where the model's keys are. Default: where the first ones come from.
    dtype : torch.dtype, optional
        Type of the keys. Default: that of the first ones.
    memory : int or str, optional
        Budget of physical memory, in bytes or as "4GiB"; used page by page, not taken at once.
        Default: half of the memory available on the CPU, 80 % of what is free on CUDA, when the
        first keys come. Copies of the cache take from the same budget.
    bucket_len : int, optional
        Show attention each row in steps of so many tokens, with zeros behind the last, instead of
        exactly what there is. Then all shapes stay for as many tokens, and ``generate`` compiles
        the forward where it does so with a ``StaticCache``. Default: exact lengths.
    offloading : bool
        As in ``DynamicCache``; not supported yet.

    Raises
    ------
    NotImplementedError
        ``offloading``. At the first use: keys that require a gradient, layers whose shapes differ
        other than by their window, a model on several devices.
    TypeError
        ``config`` is not a configuration.
    ValueError
        No layer of the model has a KV cache; at the first use, more tokens or rows than there is
        room for.
    vattn.OutOfPagesError
        From inside ``generate``: the budget is used up. ``reset`` makes the cache usable again.

    Notes
    -----
    Rows with the same tokens share their memory: samples and beams of one prompt have it once. What
    ``layer.keys`` shows is for reading; assign to change it.

    Layers with a sliding window show attention what transformers' own do, but keep memory for all
    their tokens for now. Layers without attention are left to transformers. For an encoder-decoder
    model pass ``EncoderDecoderCache(VAttnCache(config), VAttnCache(config))``.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, max_position_embeddings=256)).eval()
    >>> prompt = torch.tensor([[1, 2, 3, 4]])
    >>> with VAttnCache(model.config, memory="16MiB") as cache:
    ...     tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=4,
    ...                             do_sample=False, pad_token_id=0, eos_token_id=None)
    ...     tuple(tokens.shape), cache.get_seq_length()
    ((1, 8), 7)
    """

    def __init__(
        self,
        config: Any,
        *,
        max_cache_len: int | None = None,
        max_batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory: int | str | None = None,
        bucket_len: int | None = None,
        offloading: bool = False,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(
                f"config is a {type(config).__name__}, expected the model's configuration: "
                "VAttnCache(config=model.config)"
            )
        if offloading:
            raise NotImplementedError(
                "VAttnCache cannot offload layers yet; leave offloading out, or use DynamicCache"
            )
        super().__init__(config=config)
        if not any(_can_serve(layer) for layer in self.layers):
            raise ValueError(
                f"no layer of {type(config).__name__} has a KV cache that VAttnCache can hold; use "
                "DynamicCache"
            )
        self._take_over(
            config,
            Memory(memory),
            max_cache_len=max_cache_len,
            max_batch_size=max_batch_size,
            # A tensor knows which device "cuda" is.
            device=None if device is None else torch.empty(0, device=device).device,
            dtype=dtype,
            bucket_len=bucket_len,
        )

    def _take_over(
        self,
        config: Any,
        memory: Memory,
        *,
        max_cache_len: int | None,
        max_batch_size: int | None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        bucket_len: int | None = None,
    ) -> None:
        """Become what the class documents, from an empty DynamicCache."""
        if max_cache_len is None:
            text_config = config.get_text_config(decoder=True)
            max_cache_len = getattr(text_config, "max_position_embeddings", None)
        counts = {
            "max_cache_len": max_cache_len,
            "max_batch_size": max_batch_size,
            "bucket_len": bucket_len,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        options = StorageOptions(
            num_layers=1,
            max_cache_len=max_cache_len or _UNSTATED_MAX_CACHE_LEN,
            max_batch_size=max_batch_size,
            device=device,
            dtype=dtype,
            bucket_len=bucket_len,
        )
        self._memory = memory
        self._storages = self._replace_layers(options)

    @classmethod
    def from_dynamic(cls, cache: DynamicCache, config: Any, memory: Memory, **limits: Any) -> None:
        """Make an empty DynamicCache one of these, if it has a layer that can be served.

        Parameters
        ----------
        cache : DynamicCache
            Made from ``config``.
        config, **limits
            As of the class: ``max_cache_len`` and ``max_batch_size``.
        memory : Memory
            Where its memory comes from.
        """
        if any(_can_serve(layer) for layer in cache.layers):
            cache.__class__ = cls
            assert isinstance(cache, cls)
            cache._take_over(config, memory, **limits)

    def _replace_layers(self, options: StorageOptions) -> list[Storage]:
        """Put our layers in place of those we can serve; layers with one window share a storage."""
        storage_class: type[Storage] = Storage
        layer_class: type[VAttnLayer] = VAttnLayer
        if options.bucket_len is not None:
            storage_class, layer_class = BucketedStorage, BucketedLayer
        kinds: dict[int | None, list[int]] = {}
        for layer_idx, layer in enumerate(self.layers):
            if _can_serve(layer):
                kinds.setdefault(getattr(layer, "sliding_window", None), []).append(layer_idx)
        storages = []
        for window, members in kinds.items():
            storage = storage_class(replace(options, num_layers=len(members)), self._memory)
            for index, layer_idx in enumerate(members):
                self.layers[layer_idx] = layer_class(storage, index, window)
            storages.append(storage)
        return storages

    @property
    def kv_caches(self) -> tuple[vattn.KVCache, ...]:
        """The caches underneath, one for each kind of layer, for ``stats`` and the like.

        Empty before the first keys. They take their memory from one budget.
        """
        return tuple(storage.cache for storage in self._storages if storage.cache is not None)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens of one layer; see :meth:`VAttnLayer.update`.

        Raises
        ------
        vattn.OutOfPagesError
            There is no memory for them, in this layer or in one of those that follow. No layer
            changed.
        """
        if len(self._storages) > 1 and not torch.compiler.is_compiling():
            self._extend_all(layer_idx, key_states.shape[-2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def _extend_all(self, layer_idx: int, new: int) -> None:
        """Make room in all kinds of layers before the first of a forward is written to."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, VAttnLayer) or layer.length + new <= layer.storage.seq_len:
            return
        # In the very first forward the shapes of those that follow are not known yet.
        storages = [storage for storage in self._storages if storage.seq_len]
        if layer.storage in storages:
            extend_all(storages, new)

    def crop(self, tokens_to_remove: int) -> None:
        """Cut tokens off the end of every row: ``-n`` removes n, a positive number is the rest.

        Parameters
        ----------
        tokens_to_remove : int
            Negative, or positive as transformers before 5.17 has it. More than there are: all.
        """
        super().crop(tokens_to_remove)
        for storage in self._storages:
            storage.shrink()

    def reset(self) -> None:
        """Forget all tokens, to use the cache for something else. Memory stays mapped for that."""
        super().reset()  # type: ignore[no-untyped-call]
        for storage in self._storages:
            storage.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put row ``beam_idx[b]`` at row ``b`` for each ``b``: what beam search needs.

        Rows that keep their parent are left alone. The others copy what they have not in common
        with theirs; where that is much, they share its memory and copy the last page only.

        Parameters
        ----------
        beam_idx : torch.Tensor
            One row for each row of the batch.

        Raises
        ------
        vattn.OutOfPagesError
            There is no memory for the last pages. No row changed.
        ValueError
            Too many entries, or too few.
        """
        batch_size = self._storages[0].batch_size
        if self._storages[0].seq_len and len(beam_idx) != batch_size:
            raise ValueError(
                f"beam_idx has {len(beam_idx)} entries, expected one for each of the {batch_size} "
                "rows; batch_select_indices() changes their number"
            )
        others = self._calls_of_others("reorder_cache")
        self._gather(beam_idx)
        for call in others:
            call(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, to continue each prompt in several ways, over the same memory.

        Parameters
        ----------
        repeats : int
            How often.

        Raises
        ------
        vattn.OutOfPagesError
            There is no memory for the last page of each. No row changed.
        ValueError
            More rows than ``max_batch_size``.
        """
        others = self._calls_of_others("batch_repeat_interleave")
        self._gather(torch.arange(self._storages[0].batch_size).repeat_interleave(repeats))
        for call in others:
            call(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only, in this order.

        Parameters
        ----------
        indices : torch.Tensor
            Rows, or a bool for each row. Those that are named twice share their memory.

        Raises
        ------
        vattn.OutOfPagesError, ValueError
            As ``batch_repeat_interleave``.
        """
        others = self._calls_of_others("batch_select_indices")
        self._gather(torch.arange(self._storages[0].batch_size)[indices.cpu()])
        for call in others:
            call(indices)

    def _gather(self, rows: torch.Tensor) -> None:
        if not any(storage.seq_len for storage in self._storages):
            return
        if len(rows) == 0:
            raise ValueError("no row is selected; call reset() to forget them all")
        gather_all(self._storages, rows.tolist(), empty=self.reset)

    def close(self) -> None:
        """Give all memory back now. Views of keys and values must not be used any more."""
        super().reset()  # type: ignore[no-untyped-call]
        for storage in self._storages:
            storage.close()

    def __enter__(self) -> VAttnCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> VAttnCache:
        """Copy the tokens there are, and no more, into a cache with the same budget."""
        twin = VAttnCache.__new__(type(self))
        memo[id(self)] = twin
        storages = {id(storage): storage.copy() for storage in self._storages}
        for name, value in vars(self).items():
            if name == "_memory":
                twin._memory = self._memory
            elif name == "_storages":
                twin._storages = list(storages.values())
            elif name == "layers":
                twin.layers = [
                    layer.copy_to(storages[id(layer.storage)])
                    if isinstance(layer, VAttnLayer)
                    else copy.deepcopy(layer, memo)
                    for layer in self.layers
                ]
            else:
                setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    def _calls_of_others(self, name: str) -> list[Callable[[Any], None]]:
        """Find a method of the layers that are not ours, before ours change."""
        others = [layer for layer in self.layers if not isinstance(layer, VAttnLayer)]
        for layer in others:
            if not hasattr(layer, name):
                raise NotImplementedError(
                    f"{type(layer).__name__} of transformers has no {name}(), so the cache of a "
                    "model that has such layers cannot do it; call the model for the new batch"
                )
        return [getattr(layer, name) for layer in others]


def _can_serve(layer: object) -> bool:
    # Not isinstance: subclasses hold more than keys and values.
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
