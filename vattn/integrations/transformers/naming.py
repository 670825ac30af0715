"""What the argument is called that takes the cache: ``cache`` from transformers 5.24 on.

Before that it is ``past_key_values``, a name that warns since. Signatures tell, not versions: a
model may have a ``forward`` of its own, written for the one name or the other.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

_OLD, _NEW = "past_key_values", "cache"


def _first_of(names: tuple[str, ...], function: Any) -> str | None:
    parameters = inspect.signature(function).parameters
    return next((name for name in names if name in parameters), None)


# generate() itself takes it as one of its **kwargs, and hands those to this.
CACHE_ARGUMENT = _first_of((_NEW, _OLD), GenerationMixin.prepare_inputs_for_generation) or _NEW
"""Its name in ``generate``, in models of transformers, and in what both return."""


def cache_argument(model: Any) -> str:
    """Return its name in the ``forward`` of a model, which may be somebody's own.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any; one that takes ``**kwargs`` only is expected to hand them to a model of transformers.
    """
    return _first_of((CACHE_ARGUMENT, _OLD), model.forward) or CACHE_ARGUMENT
