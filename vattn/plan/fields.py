"""The fields of a ``config.json``: checked when read, and remembered, so that none goes unseen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vattn.plan.families import DEFAULTS, KIND_FIELDS, may_change_the_cache

# Where configurations of composed models keep that of the language model.
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")


class Fields:
    """Fields of one model type, with the defaults of its family.

    Attributes
    ----------
    model_type : str
        Of the language model.
    notes : list of str
        What a reader should be told.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        values: Mapping[str, Any] = config
        outer_type = config.get("model_type")
        while nested := next((n for n in NESTED if isinstance(values.get(n), Mapping)), None):
            values = values[nested]
        self._values = values
        self._outer = config
        self._seen: set[str] = set()
        inner_type = values.get("model_type")
        if inner_type is None and values is not config and outer_type is not None:
            inner_type = f"{outer_type}_text"
        if not isinstance(inner_type, str):
            raise ValueError(
                "model_type is missing, so this is no config.json of a transformers model; pass one"
            )
        self.model_type = inner_type
        self.notes: list[str] = []

    def wrong(self, field: str, why: str) -> ValueError:
        """Make the error about a field: it names the field and the model type."""
        return ValueError(f"{field} of model_type {self.model_type!r} {why}")

    def get(self, *names: str) -> Any:
        """Return the first of these fields that has a value, else the default of the family.

        A field that is there as null has no value, and no default either.
        """
        for name in names:
            self._seen.add(name)
        for name in names:
            if self._values.get(name) is not None:
                return self._values[name]
        if any(name in self._values for name in names):
            return None
        defaults = DEFAULTS.get(self.model_type, {})
        for name in names:
            if name in defaults:
                note = f"{name} is not given: {defaults[name]}, as transformers has it"
                if note not in self.notes:
                    self.notes.append(note)
                return defaults[name]
        return None

    def outer(self, *names: str) -> Any:
        """Like :meth:`get`, or else that field of the composed model."""
        value = self.get(*names)
        if value is not None:
            return value
        return next((self._outer[n] for n in names if self._outer.get(n) is not None), None)

    def integer(self, *names: str) -> int | None:
        """Return a whole number of at least 1; None if no such field is there."""
        value = self.get(*names)
        return None if value is None else self.checked(names[0], value)

    def needed(self, *names: str) -> int:
        """Like :meth:`integer`, but there must be one."""
        value = self.integer(*names)
        if value is None:
            raise self.wrong(names[0], "is missing; add it to the configuration")
        return value

    def checked(self, name: str, value: Any) -> int:
        """Return ``value`` if it is a whole number of at least 1."""
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, f"is {value!r}, expected a whole number of at least 1")
        return value

    def sequence(self, name: str) -> list[Any] | None:
        """Return a list; None if the field is missing or empty."""
        value = self.get(name)
        if value is None or value == []:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, f"is {value!r}, expected a list")
        return value

    def understood(self, names: Iterable[str]) -> None:
        """Say that these fields have no further meaning here."""
        self._seen.update(names)

    def expect_all_understood(self, *, knows_recurrent_layers: bool, knows_kinds: bool) -> None:
        """Raise ValueError for a field that nobody read though it may change what is cached."""
        if knows_kinds:
            self.understood(KIND_FIELDS)
        for name, value in self._values.items():
            if name in self._seen or value in (None, False, 0, [], {}, ""):
                continue
            if may_change_the_cache(name, knows_recurrent_layers=knows_recurrent_layers):
                shown = repr(value)
                shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
                raise self.wrong(
                    name,
                    f"is {shown}, which may change what a KV cache holds and is not understood; "
                    "remove it from the configuration if it does not",
                )
