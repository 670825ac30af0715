"""The cache that ``generate`` takes."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NoReturn

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import vattn
from vattn.integrations.transformers.layer import VAttnLayer
from vattn.integrations.transformers.storage import Storage, StorageOptions
from vattn.units import parse_bytes


class VAttnCache(DynamicCache):
    """KV cache for HuggingFace ``generate`` that grows in place, page by page.

    Pass it as ``past_key_values``. New tokens are written behind the others instead of
    concatenating; attention gets views of exactly the live tokens, so any implementation works.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's, ``model.config``.
    max_cache_len : int, optional
        Tokens that a row can grow to, padding included. Costs addresses, not memory. Default: the
        model's limit, ``config.max_position_embeddings``.
    max_batch_size : int, optional
        Largest batch, beams included. Default: that of the first forward.
    device : torch.device or str, optional
        Where the model's keys are. Default: where the first ones come from.
    dtype : torch.dtype, optional
        Type of the keys. Default: that of the first ones.
    memory : int or str, optional
        Budget of physical memory, in bytes or as "4GiB"; used page by page, not taken at once.
        Default: half of the memory available on the CPU, 80 % of what is free on CUDA, when the
        first keys come.

    Raises
    ------
    NotImplementedError
        The model has layers with a chunked window. At the first use: keys that require a gradient,
        layers whose shapes differ, a model on several devices.
    ValueError
        No layer of the model has a KV cache; there is no default for ``max_cache_len``; at the
        first use, more tokens or rows than there is room for.
    vattn.OutOfPagesError
        From inside ``generate``: the budget is used up. ``reset`` makes the cache usable again.

    Notes
    -----
    Layers with a sliding window keep all their tokens for now; the mask hides those outside.
    Layers without attention are left to transformers.

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
    ) -> None:
        super().__init__(config=config)
        text_config = config.get_text_config(decoder=True)
        ours = [i for i, layer in enumerate(self.layers) if _can_serve(layer)]
        _check_config(text_config, ours)
        if max_cache_len is None:
            max_cache_len = getattr(text_config, "max_position_embeddings", None)
        if max_cache_len is None:
            raise ValueError(
                f"{type(text_config).__name__} has no max_position_embeddings; pass max_cache_len"
            )
        for name, value in (("max_cache_len", max_cache_len), ("max_batch_size", max_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if memory is not None:
            parse_bytes(memory, "memory")
        self._storage = Storage(
            StorageOptions(
                num_layers=len(ours),
                max_cache_len=max_cache_len,
                max_batch_size=max_batch_size,
                # A tensor knows which device "cuda" is.
                device=None if device is None else torch.empty(0, device=device).device,
                dtype=dtype,
                memory=memory,
            )
        )
        for index, layer_idx in enumerate(ours):
            self.layers[layer_idx] = VAttnLayer(self._storage, index)

    @property
    def kv_cache(self) -> vattn.KVCache | None:
        """The cache underneath, for ``stats`` and the like; None before the first keys."""
        return self._storage.cache

    def crop(self, tokens_to_remove: int) -> None:
        """Cut tokens off the end of every row: ``-n`` removes n, a positive number is the rest.

        Parameters
        ----------
        tokens_to_remove : int
            Negative, or positive as transformers before 5.17 has it. More than there are: all.
        """
        super().crop(tokens_to_remove)
        self._storage.shrink(max(layer.length for layer in self._our_layers()))

    def reset(self) -> None:
        """Forget all tokens, to use the cache for something else. Memory stays mapped for that."""
        super().reset()  # type: ignore[no-untyped-call]
        self._storage.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put row ``beam_idx[b]`` at row ``b`` for each ``b``, by copying: what beam search needs.

        Parameters
        ----------
        beam_idx : torch.Tensor
            One row for each row of the batch.
        """
        if self._storage.seq_len and len(beam_idx) != self._storage.batch_size:
            raise ValueError(
                f"beam_idx has {len(beam_idx)} entries, expected one for each of the "
                f"{self._storage.batch_size} rows; batch_select_indices() changes their number"
            )
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, to continue each prompt in several ways.

        Parameters
        ----------
        repeats : int
            How often. The batch that results may be at most ``max_batch_size``.
        """
        self._take_rows(torch.arange(self._storage.batch_size).repeat_interleave(repeats))
        for layer in self._other_layers():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only, in this order.

        Parameters
        ----------
        indices : torch.Tensor
            Rows, or a bool for each row.
        """
        self._take_rows(torch.arange(self._storage.batch_size)[indices.cpu()])
        for layer in self._other_layers():
            layer.batch_select_indices(indices)

    def _take_rows(self, rows: torch.Tensor) -> None:
        storage = self._storage
        if storage.seq_len == 0:
            return
        if len(rows) == 0:
            raise ValueError("no row is selected; call reset() to forget them all")
        if len(rows) > storage.batch_size:
            storage.grow_batch(len(rows))
        for layer in self._our_layers():
            layer.gather(rows, layer.length)
        storage.hold(len(rows))

    def close(self) -> None:
        """Give all memory back now. Views of keys and values must not be used any more."""
        super().reset()  # type: ignore[no-untyped-call]
        self._storage.close()

    def __enter__(self) -> VAttnCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, _memo: Any) -> NoReturn:
        raise NotImplementedError(
            "VAttnCache cannot be copied yet; make one for each conversation, or use "
            "batch_repeat_interleave() to continue a prompt in several ways"
        )

    def _our_layers(self) -> list[VAttnLayer]:
        return [layer for layer in self.layers if isinstance(layer, VAttnLayer)]

    def _other_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, VAttnLayer)]


def _can_serve(layer: object) -> bool:
    # Not isinstance: subclasses hold more than keys and values.
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _check_config(config: Any, ours: list[int]) -> None:
    name = type(config).__name__
    if not ours:
        raise ValueError(
            f"no layer of {name} has a KV cache that VAttnCache can hold; use DynamicCache"
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise NotImplementedError(
            f"{name} has attention_chunk_size {config.attention_chunk_size}; VAttnCache does not "
            "serve chunked attention yet, use DynamicCache"
        )
