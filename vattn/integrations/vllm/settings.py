"""What a user can set: ``kv_connector_extra_config`` of ``--kv-transfer-config``."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vattn.units import parse_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONNECTOR = "VattnConnector"
MODES = ("elastic", "contiguous")
NAME = re.compile(r"[A-Za-z0-9._-]{1,40}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How vattn backs the KV cache of one vLLM engine.

    Parameters
    ----------
    mode : {"elastic", "contiguous"}
        Whether blocks go to requests as stock vLLM hands them out, or a request owns one row.
    budget : int or str, optional
        Physical memory that the KV cache may take on each worker, in bytes or as "8GiB". Default:
        all that vLLM reserved addresses for.
    floor : int or str, optional
        Physical memory that an idle engine keeps, with the prefixes that are cached in it. Default:
        what the null block needs, about a page for each layer.
    idle_seconds : float
        How long the engine has no request before it shrinks to the floor.
    page_bytes : int or str, optional
        Unit in which memory is mapped: a power of two and a multiple of the driver's granularity.
        Default: 2 MiB on CUDA; on the CPU what a block needs, at least 64 KiB, at most 2 MiB.
    kernels : str
        Elastic mode on CUDA: vLLM's backend whose kernels run, such as "FLASHINFER".
    name : str, optional
        What ``vattn vllm budget`` calls this engine. Default: made from vLLM's engine id.

    Raises
    ------
    ValueError, TypeError
        The message names the value, the limit and the remedy.
    """

    mode: str = "elastic"
    budget: int | str | None = None
    floor: int | str | None = None
    idle_seconds: float = 10.0
    page_bytes: int | str | None = None
    kernels: str = "FLASH_ATTN"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        for size in ("budget", "floor", "page_bytes"):
            if getattr(self, size) is not None:
                parse_bytes(getattr(self, size), size)
        if self.budget_bytes is not None and self.floor_bytes > self.budget_bytes:
            raise ValueError(
                f"floor is {self.floor}, more than budget = {self.budget}; lower floor"
            )
        seconds: Any = self.idle_seconds  # from JSON, so anything
        if type(seconds) not in (int, float) or not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"idle_seconds is {seconds!r}, expected a number of at least 0")
        name: Any = self.name
        if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
            raise ValueError(
                f"name is {name!r}, expected text of at most 40 letters, digits, '.', '_' or '-'"
            )

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Settings:
        """Read ``kv_connector_extra_config``; a name it does not know is an error."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ValueError(
                    f"kv_connector_extra_config has {name!r}, which vattn does not know; {hint}"
                    f"It knows {', '.join(known)}"
                )
        return cls(**options)

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes; None if only vLLM's own limit holds."""
        return None if self.budget is None else parse_bytes(self.budget, "budget")

    @property
    def floor_bytes(self) -> int:
        """The floor in bytes; 0 if only the null block's memory stays."""
        return 0 if self.floor is None else parse_bytes(self.floor, "floor")

    def page_bytes_for(self, device_type: str, block_bytes: int) -> int:
        """Choose the unit of mapping, for blocks of ``block_bytes`` in one stripe of the buffer."""
        if self.page_bytes is not None:
            return parse_bytes(self.page_bytes, "page_bytes")
        if device_type == "cuda":
            return 2 * 2**20
        return min(max(1 << (block_bytes - 1).bit_length(), 64 * 2**10), 2 * 2**20)


def active_settings(config: VllmConfig | None) -> Settings | None:
    """Return the settings, or None if this engine does not use vattn's connector."""
    transfer = None if config is None else config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        return None
    return Settings.parse(transfer.kv_connector_extra_config)


def engine_name(config: VllmConfig, settings: Settings, rank: int | None = None) -> str:
    """Name the engine: the same in its scheduler and in its workers, and in no other engine.

    Parameters
    ----------
    config : VllmConfig
        Of the engine, or of the front end of several.
    settings : Settings
        The user's.
    rank : int, optional
        In the front end of a data-parallel group, which of its engines is meant.
    """
    engine_id = config.kv_transfer_config.engine_id
    # vLLM appends the rank to the id of every engine of such a group, in that engine's process.
    if rank is None and (match := re.search(r"_dp(\d+)$", engine_id)) is not None:
        engine_id, rank = engine_id[: match.start()], int(match[1])
    base = _default_name(engine_id) if settings.name is None else settings.name
    return base if rank is None else f"{base}-dp{rank}"


def _default_name(engine_id: str) -> str:
    name = f"vllm-{engine_id}"
    if NAME.fullmatch(name) is not None:
        return name
    # As vLLM's own ids, which are UUIDs. The beginning of one that a user has set says too little.
    return f"vllm-{hashlib.sha256(engine_id.encode()).hexdigest()[:8]}"


def start_id(config: VllmConfig) -> str:
    """Identify one start of an engine: the same in its scheduler and workers, and nowhere else.

    vLLM's engine id alone is not that: a user can set it, for two engines or for one that is
    restarted. Its instance id is the time at which the configuration was made, in nanoseconds. That
    the engines of a data-parallel group have in common, and in their engine ids they differ.
    """
    return f"{config.kv_transfer_config.engine_id}@{config.instance_id}"
