"""Sizes as people write them, and element types by name."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter + "b"] = 1000**_power
    _UNITS[_letter + "ib"] = 1024**_power


def parse_bytes(value: int | str, name: str = "size") -> int:
    """Turn ``"60GiB"``, ``"1.5 GB"`` or a number of bytes into a number of bytes.

    Parameters
    ----------
    value : int or str
        Units: B, KiB, MiB, GiB, TiB (powers of 1024) and KB, MB, GB, TB (powers of 1000).
    name : str
        What the value is, for the error message.

    Raises
    ------
    ValueError
        Not a size, or not at least one byte.

    Examples
    --------
    >>> parse_bytes("2MiB")
    2097152
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name} is {value!r}, expected bytes as an int or a string like '60GiB'")
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(
                f"{name} is {value!r}, expected a number and one of B, KiB, MiB, GiB, TiB, "
                "KB, MB, GB, TB, such as '60GiB'"
            )
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise ValueError(f"{name} is {value!r}, expected at least one byte")
    return size


def format_bytes(n: int) -> str:
    """Write bytes with a binary unit that fits.

    Examples
    --------
    >>> format_bytes(2 * 2**20), format_bytes(100), format_bytes(150_754_820_096)
    ('2 MiB', '100 bytes', '140.4 GiB')
    """
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >= 2**power:
            return f"{n / 2**power:.1f}".removesuffix(".0") + f" {unit}"
    return f"{n} bytes"


class DType(NamedTuple):
    """An element type: how DLPack names it, and whether torch must reinterpret it."""

    dlpack_code: int
    bits: int
    reinterpret: bool = False


_FLOAT, _BFLOAT, _INT, _UINT = 2, 4, 0, 1
DTYPES = {
    "float32": DType(_FLOAT, 32),
    "float16": DType(_FLOAT, 16),
    "bfloat16": DType(_BFLOAT, 16),
    # DLPack has had codes for these only since 1.1: they travel as bytes.
    "float8_e4m3fn": DType(_UINT, 8, reinterpret=True),
    "float8_e5m2": DType(_UINT, 8, reinterpret=True),
    "int8": DType(_INT, 8),
    "uint8": DType(_UINT, 8),
}


def dtype_name(dtype: Any) -> str:
    """Name of a ``torch.dtype`` or of a string, without importing torch.

    Examples
    --------
    >>> dtype_name("torch.bfloat16")
    'bfloat16'
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return name
