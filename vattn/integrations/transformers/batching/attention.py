"""``vattn_ragged``: an attention implementation of transformers that follows the current batch.

Which tokens belong to which request reaches it through a context variable and not through the
arguments of the model, since not every family hands those on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "vattn_ragged"


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer asks for besides plain causal attention.

    Parameters
    ----------
    scaling : float, optional
        Factor of the scores; by default ``head_dim ** -0.5``.
    window : int, optional
        Tokens that a token sees, itself included; all by default.
    softcap : float, optional
        Scores are bent to stay within this.
    sinks : torch.Tensor, optional
        [heads], score of a key without value.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class Attention(Protocol):
    """What ``vattn_ragged`` does at the moment."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Return [1, tokens, heads, v_head_dim] for a query of [1, heads, tokens, head_dim]."""


_CURRENT: ContextVar[Attention | None] = ContextVar(ATTENTION, default=None)


@contextmanager
def attention_is(attention: Attention) -> Iterator[None]:
    """Let ``vattn_ragged`` do this for the length of a ``with`` block."""
    token = _CURRENT.set(attention)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_attention() -> Attention:
    """Return what ``vattn_ragged`` does at the moment."""
    attention = _CURRENT.get()
    if attention is None:
        raise RuntimeError(
            "the model is part of a ContinuousBatch, whose attention serves no other forward; "
            "close the batch first, or call step() of it"
        )
    return attention


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, with the signature that transformers expects."""
    if attention_mask is not None or position_bias is not None:
        raise NotImplementedError(
            f"{type(module).__name__} adds a mask or a bias of its own to its attention, which a "
            "continuous batch does not serve; use model.generate()"
        )
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    return current_attention().attend(module, query, key, value, options), None


def no_mask(*_: Any, **options: Any) -> None:
    """Make no mask: attention reads of each row no more than a token may see."""
    if not options.get("allow_is_causal_skip", True):
        raise NotImplementedError(
            "the model's attention is not just causal, which a continuous batch does not serve; "
            "use model.generate()"
        )


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
