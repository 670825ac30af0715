"""Traces of requests: lengths and arrival times, read from the formats that are published."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

Record = Mapping[str, Any]
MAX_TOKENS = 10**9  # nobody has longer requests: it is a broken line


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Requests in the order of their arrival.

    Attributes
    ----------
    name : str
        Of the file, without its suffix.
    source : str
        The format it was read from, or how it was made.
    prompt_tokens, generated_tokens : numpy.ndarray of int64, shape (requests,)
        At least one prompt token; a request may generate none.
    arrival_s : numpy.ndarray of float64, shape (requests,), or None
        Seconds since the first arrival; None if the trace does not say.
    """

    name: str
    source: str
    prompt_tokens: NDArray[np.int64]
    generated_tokens: NDArray[np.int64]
    arrival_s: NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def head(self, n: int) -> Trace:
        """Return the first ``n`` requests, or all if there are fewer."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[:n],
            generated_tokens=self.generated_tokens[:n],
            arrival_s=None if self.arrival_s is None else self.arrival_s[:n],
        )

    def arriving(self, arrival_s: NDArray[np.float64]) -> Trace:
        """Return the same requests in the same order, at other times, which start at 0."""
        return replace(self, arrival_s=arrival_s - arrival_s[0])


def make_trace(
    name: str,
    source: str,
    prompt_tokens: ArrayLike,
    generated_tokens: ArrayLike,
    arrival_s: ArrayLike | None = None,
) -> Trace:
    """Make a trace of sequences: puts them in the order of arrival, which then starts at 0.

    >>> make_trace("two", "by hand", [5, 7], [1, 1], [9.0, 8.5]).prompt_tokens.tolist()
    [7, 5]
    """
    prompts = np.asarray(prompt_tokens, dtype=np.int64)
    generated = np.asarray(generated_tokens, dtype=np.int64)
    if arrival_s is None:
        order, arrival = np.arange(len(prompts)), None
    else:
        times = np.asarray(arrival_s, dtype=np.float64)
        order = np.argsort(times, kind="stable")
        arrival = times[order] - times.min()
    return Trace(
        name=name,
        source=source,
        prompt_tokens=prompts[order],
        generated_tokens=generated[order],
        arrival_s=arrival,
    )


class Request(NamedTuple):
    """One line of a trace."""

    prompt_tokens: int
    generated_tokens: int
    arrival_s: float | None


class Format(NamedTuple):
    """A published format: the fields that it is known by, and how they become a request."""

    name: str
    prompt: str
    generated: str
    arrival: str | None
    seconds: Callable[[Any], float] = float

    def fields(self) -> list[str]:
        return [field for field in (self.arrival, self.prompt, self.generated) if field]

    def request(self, record: Record) -> Request:
        """Read one record. Raises ValueError, which names the field, its value and the remedy."""
        return Request(
            _count(record, self.prompt, at_least=1),
            _count(record, self.generated, at_least=0),
            None if self.arrival is None else self._time(record, self.arrival),
        )

    def _time(self, record: Record, field: str) -> float:
        value = record[field]
        try:
            seconds = self.seconds(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not math.isfinite(seconds):
            raise ValueError(f"{field} is {value!r}, expected a time")
        return seconds


def _count(record: Record, field: str, *, at_least: int) -> int:
    value = record[field]
    try:
        number = float(value)  # "1724.0" is how pandas writes an integer
    except (TypeError, ValueError):
        number = math.nan
    if not (at_least <= number <= MAX_TOKENS and number.is_integer()):
        raise ValueError(
            f"{field} is {value!r}, expected a whole number of {at_least} to {MAX_TOKENS}"
        )
    return int(number)


def _timestamp_seconds(text: str) -> float:
    """Seconds of a "2023-11-16 18:15:46.6805900", which has more digits than datetime takes."""
    whole, _, fraction = text.partition(".")
    time = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
    return time.timestamp() + float(f"0.{fraction or 0}")


VATTENTION = Format("vAttention CSV", "num_prefill_tokens", "num_decode_tokens", None)
AZURE = Format(
    "Azure CSV", "ContextTokens", "GeneratedTokens", "TIMESTAMP", seconds=_timestamp_seconds
)
MOONCAKE = Format(
    "Mooncake JSONL",
    "input_length",
    "output_length",
    "timestamp",
    seconds=lambda milliseconds: float(milliseconds) / 1000,
)


FORMATS = (VATTENTION, AZURE, MOONCAKE)


def read_trace(path: Path) -> Trace:
    """Read a trace. The first line says which format it has.

    Parameters
    ----------
    path : pathlib.Path
        A vAttention CSV (num_prefill_tokens, num_decode_tokens), an Azure CSV (TIMESTAMP,
        ContextTokens, GeneratedTokens) or a Mooncake JSONL (timestamp in ms, input_length,
        output_length). Other fields are ignored, and so are empty lines.

    Raises
    ------
    ValueError
        The format is none of these, a line cannot be read (the message names the file, the line,
        the value, and what was expected), or there are no requests.
    OSError
        The file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error.reason} at byte {error.start}") from None
    form, parse, n_header = _recognise(path, lines[0] if lines else "")
    requests = []
    for number, line in enumerate(lines[n_header:], start=n_header + 1):
        if not line.strip():
            continue
        try:
            requests.append(form.request(parse(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} ({form.name}): {error}") from None
    if not requests:
        raise ValueError(f"{path} has no requests, expected one on each line ({form.name})")
    prompts, generated, arrivals = zip(*requests, strict=True)
    return make_trace(path.stem, form.name, prompts, generated, arrivals if form.arrival else None)


def _recognise(path: Path, first: str) -> tuple[Format, Callable[[str], Record], int]:
    """Return the format, how a line becomes a record, and how many lines come before the first."""
    if first.lstrip().startswith("{"):
        return MOONCAKE, partial(_json_record, MOONCAKE.fields()), 0
    columns = [name.strip() for name in _split(first)]
    for form in (VATTENTION, AZURE):
        if set(form.fields()) <= set(columns):
            return form, partial(_csv_record, columns), 1
    known = "; ".join(f"{form.name}: {', '.join(form.fields())}" for form in FORMATS)
    raise ValueError(
        f"{path}, line 1 is {first[:80]!r}, expected the header or the fields of one of {known}"
    )


def _split(line: str) -> list[str]:
    return next(csv.reader([line]), [])


def _csv_record(columns: list[str], line: str) -> Record:
    values = _split(line)
    if len(values) != len(columns):
        raise ValueError(f"{line[:80]!r} has {len(values)} values, expected {len(columns)}")
    return dict(zip(columns, values, strict=True))


def _json_record(fields: list[str], line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{line[:80]!r} is not JSON: {error.msg}") from None
    missing = [field for field in fields if not isinstance(record, dict) or field not in record]
    if missing:
        raise ValueError(f"{line[:80]!r} lacks {', '.join(missing)}, expected an object with it")
    return cast(Record, record)
