"""Writing to a VAttnCache from inside a graph of ``torch.compile``.

The graph has the tensors of whole rows among its inputs and calls one operator per layer, which
maps what is missing and writes. Inductor runs it on the inputs themselves. A backend that hands
operators copies of the inputs (aot_eager) cannot work and gets an error.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vattn.integrations.transformers.storage import Storage

_STORAGES: weakref.WeakValueDictionary[int, Storage] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def register(storage: Storage) -> int:
    """Return a number by which :func:`append` finds this storage: graphs take no Python objects."""
    number = next(_NUMBERS)
    _STORAGES[number] = storage
    return number


@torch.library.custom_op("vattn::append", mutates_args=("keys", "values"))
def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    number: int,
    index: int,
    start: int,
) -> None:
    """Write new tokens of one layer at ``start``, mapping what is missing.

    Parameters
    ----------
    keys, values : torch.Tensor
        All rows of the layer, as the storage has them.
    key_states, value_states : torch.Tensor
        [batch, num_kv_heads, new tokens, head_dim]
    number : int
        From :func:`register`.
    index : int
        Which layer of the storage.
    start : int
        Tokens of the layer so far.
    """
    storage = _STORAGES[number]
    storage.prepare(index, key_states, value_states)
    end = start + key_states.shape[-2]
    storage.make_writable(start, end)
    if keys.data_ptr() != storage.tensors[index][0].data_ptr():
        raise RuntimeError(
            "the compiled model was given a copy of the cache's memory; compile with the backend "
            "'inductor' or 'eager'"
        )
    for rows, states in zip(storage.kv(index, end), (key_states, value_states), strict=True):
        rows[:, :, start:].copy_(states)
