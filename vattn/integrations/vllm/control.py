"""Budgets of running vLLM engines, from any program of the same user."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields

from vattn.integrations.vllm.channel import Json, RemoteError, ask, running
from vattn.units import parse_bytes

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InstanceStatus:
    """What an engine says about itself. Bytes are those of one worker, that is of one GPU.

    Attributes
    ----------
    name : str
        What to call it, see ``name`` in ``kv_connector_extra_config``.
    mode : str
        ``"elastic"`` or ``"contiguous"``.
    pid : int
        Process of its scheduler.
    budget_bytes : int
        Physical memory that the KV cache may take.
    floor_bytes : int
        Physical memory that stays when the engine is idle.
    minimum_bytes, ceiling_bytes : int
        The smallest and the largest budget that it accepts.
    mapped_bytes : int
        Physical memory that the KV cache has now. More than the budget only while requests that
        began before it was lowered are running.
    idle : bool
        It has no request; after ``idle_seconds`` of that it gives memory back.
    running_requests : int
        Requests that have not ended, waiting ones as well.
    """

    name: str
    mode: str
    pid: int
    budget_bytes: int
    floor_bytes: int
    minimum_bytes: int
    ceiling_bytes: int
    mapped_bytes: int
    idle: bool
    running_requests: int


def instances() -> list[InstanceStatus]:
    """Ask all engines of this user, by name.

    One that does not answer is left out, with a warning in the log.

    Raises
    ------
    OSError
        The directory of the sockets cannot be used; the message says how to mend it.
    """
    asked = [_status_or_warn(name) for name in running()]
    return [found for found in asked if found is not None]


def status(name: str | None = None) -> InstanceStatus:
    """Ask one engine how much memory it has and may have.

    Parameters
    ----------
    name : str, optional
        May be left out while a single engine is running.

    Raises
    ------
    ValueError
        No such engine; the message lists those that are running.
    OSError
        It does not answer (``TimeoutError``), or has just ended.
    RemoteError
        It failed to answer.
    """
    chosen = _choose(name)
    return _read(chosen, ask(chosen, {"op": "status"}))


def set_budget(budget: int | str, *, name: str | None = None) -> InstanceStatus:
    """Set the physical memory that the KV cache of an engine may take on each of its workers.

    Returns at once. More memory can be used from the next iteration on. Of less, what no request
    uses is given back by then; the rest follows as requests end.

    Parameters
    ----------
    budget : int or str
        Bytes, or as ``"8GiB"``.
    name : str, optional
        May be left out while a single engine is running.

    Returns
    -------
    InstanceStatus
        After the change: ``mapped_bytes`` may still be above the new budget.

    Raises
    ------
    ValueError
        Less or more than the engine accepts (the message has its limits), or no such engine.
        Nothing has changed.
    OSError, RemoteError
        As :func:`status`. Whether the budget has changed is not known.

    Notes
    -----
    Thread-safe. When two programs set a budget, the last one holds.
    """
    size = parse_bytes(budget, "budget")
    chosen = _choose(name)
    try:
        return _read(chosen, ask(chosen, {"op": "budget", "bytes": size}))
    except RemoteError as error:
        if error.kind == "ValueError":
            raise ValueError(str(error)) from error
        raise


def _status_or_warn(name: str) -> InstanceStatus | None:
    try:
        return status(name)
    except (ValueError, OSError, RemoteError) as error:
        _LOG.warning("%s is left out: %s", name, error)
        return None


def _choose(name: str | None) -> str:
    if name is not None:
        return name
    names = running()
    if len(names) == 1:
        return names[0]
    if names:
        raise ValueError(f"{len(names)} engines are running; name one of {', '.join(names)}")
    raise ValueError(
        "no vLLM engine of this user is running with vattn; start one with --kv-transfer-config "
        '\'{"kv_connector": "VattnConnector", "kv_role": "kv_both"}\', and with the same '
        "XDG_RUNTIME_DIR as here"
    )


def _read(name: str, answer: Json) -> InstanceStatus:
    known = {field.name: field.type for field in fields(InstanceStatus)}
    told = answer.get("status")
    # Types are strings here, because annotations are not evaluated.
    if isinstance(told, dict) and {k: type(v).__name__ for k, v in told.items()} == known:
        return InstanceStatus(**told)
    raise ValueError(
        f"{name!r} answered {answer!r:.300}, which is no status; use the vattn that it runs with"
    )
