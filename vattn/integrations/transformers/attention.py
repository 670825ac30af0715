"""``attn_implementation="vattn"``: attention over a VAttnCache, as transformers registers it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vattn.integrations.transformers import cpu_attention, cuda_attention

NAME = "vattn"


def register() -> None:
    """Make the name known to transformers: the attention and the mask that it wants."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    *,
    q_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """Return the mask that :func:`attention_forward` wants, see ``transformers.masking_utils``.

    Returns
    -------
    torch.Tensor or None
        None where causal attention over all keys is right. With a flash kernel on CUDA, which keys
        are no padding, [batch, keys]; else which query sees which key, [batch, 1, queries, keys].

    Raises
    ------
    ValueError
        The mask has fewer columns than there are tokens in the cache and in this forward: the
        cache holds another text than the prompt continues.
    """
    is_2d = attention_mask is not None and attention_mask.dim() == 2
    if is_2d and isinstance(q_offset, int) and q_offset:
        _check_columns(attention_mask, q_offset, q_length)
    dtype = options.get("dtype", torch.float32)
    if allow_is_causal_skip and cuda_attention.has_flash(torch.device(device), dtype):
        if attention_mask is None:
            return None
        padding = attention_mask[:, -kv_length:]
        if is_2d and padding.shape[1] == kv_length and _is_left_only(padding):
            return None if bool(padding.all()) else padding
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length,
        q_offset=q_offset,
        kv_length=kv_length,
        attention_mask=attention_mask,
        device=device,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )
    return mask


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to the views that a VAttnCache returns, where they are.

    What has nothing to do with a cache is left to transformers' sdpa: training with dropout, and
    learned position biases.

    Parameters
    ----------
    module, dropout, scaling, is_causal, sliding_window, softcap, s_aux, position_bias, **options
        As for every attention function of transformers.
    query : torch.Tensor
        [batch, heads, queries, head_dim]
    key, value : torch.Tensor
        [batch, num_kv_heads, keys, head_dim]
    attention_mask : torch.Tensor, optional
        What :func:`attention_mask` returned.

    Returns
    -------
    output : torch.Tensor
        [batch, queries, heads, head_dim of values]
    weights : None
    """
    if dropout or position_bias is not None:
        if position_bias is not None:
            options["position_bias"] = position_bias
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return result
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries = query.shape[2]
    attend = cpu_attention.attend
    extra: dict[str, Any] = {}
    if query.is_cuda:
        attend, extra = cuda_attention.attend, {"window": sliding_window}
    elif causal and attention_mask is None and 1 < queries < key.shape[2]:
        # The first forward on a cache of static length: what is behind the queries is not written.
        key, value = key[:, :, :queries], value[:, :, :queries]
    output = attend(
        query,
        key,
        value,
        mask=attention_mask,
        is_causal=bool(causal) and attention_mask is None and queries > 1,
        scaling=scaling,
        softcap=softcap,
        sinks=s_aux,
        **extra,
    )
    return output.transpose(1, 2).contiguous(), None


def _is_left_only(padding: torch.Tensor) -> bool:
    """Whether every row is False until some column and True from there on."""
    return bool((padding[:, 1:] >= padding[:, :-1]).all())


def _check_columns(mask: torch.Tensor | None, in_cache: int, new: int) -> None:
    assert mask is not None
    if mask.shape[1] < in_cache + new:
        raise ValueError(
            f"the attention mask has {mask.shape[1]} columns, but {in_cache} tokens are in the "
            f"cache and {new} are new; give generate() all tokens so far and the new ones, or "
            "reset() the cache for another prompt"
        )
