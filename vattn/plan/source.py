"""Where ``--model`` leads: a shape by name, a file, a folder, or an ID of the Hugging Face Hub."""

from __future__ import annotations

import importlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vattn.models import MODELS, ModelShape

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was found: a shape, or a configuration and where it is.

    Attributes
    ----------
    name : str
        For people.
    shape : ModelShape or None
        Of :data:`vattn.models.MODELS`.
    config : dict or None
        What is in ``config.json``.
    weight_bytes : int or None
        Bytes of the weights beside the configuration; None if they are not there.
    """

    name: str
    shape: ModelShape | None = None
    config: dict[str, Any] | None = None
    weight_bytes: int | None = None


def find(model: str) -> Source:
    """Find a model: what ``--model`` means.

    Raises
    ------
    ValueError
        It is nowhere, or is no configuration; the message says where was looked and what helps.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _read(path / "config.json", name=path.resolve().name)
    if path.is_file():
        generic = path.name == "config.json"
        return _read(path, name=path.resolve().parent.name if generic else path.stem)
    if model in MODELS:
        return Source(name=model, shape=MODELS[model])
    if path.suffix == ".json" or not _HUB_ID.fullmatch(model):
        raise ValueError(f"--model is {model!r}: there is no such file or folder")
    cached = _cached_config(model)
    return _read(cached or _download(model), name=model)


def hub_cache() -> Path:
    """Folder in which ``huggingface_hub`` keeps what it has downloaded."""
    if folder := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(home).expanduser() / "hub"


def _cached_config(model: str) -> Path | None:
    folder = hub_cache() / f"models--{model.replace('/', '--')}"
    main = folder / "refs" / "main"
    if main.is_file():
        path = folder / "snapshots" / main.read_text().strip() / "config.json"
        if path.is_file():
            return path
    found = list(folder.glob("snapshots/*/config.json"))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _download(model: str) -> Path:
    remedy = "pass the path of its config.json, or one of " + ", ".join(MODELS)
    where = f"--model {model!r} is no file or folder and not in {hub_cache()}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise ValueError(f"{where}, and HF_HUB_OFFLINE is set; {remedy}")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ValueError(f"{where}; {remedy}; or install huggingface_hub to fetch it") from error
    try:
        return Path(hub.hf_hub_download(model, "config.json"))
    # Whatever it is (no network, no such model, a gated one, each with classes of its own and of
    # the HTTP library below), the remedy is the same.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{where}, and fetching it failed ({reason}); {remedy}") from error


def _read(path: Path, *, name: str) -> Source:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}; pass the path of a config.json") from error
    except ValueError as error:  # both of JSON and of UTF-8
        raise ValueError(f"{path} is not JSON ({error}); pass a config.json") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    return Source(name=name, config=config, weight_bytes=_weight_bytes(path.parent))


def _weight_bytes(folder: Path) -> int | None:
    """Bytes of the weights: by their index, which may be there without them, or of their files."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = folder / index
        if path.is_file():
            try:
                size = json.loads(path.read_text())["metadata"]["total_size"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} has no metadata.total_size ({error}); say --weights"
                ) from error
            return int(size)
    for pattern in _WEIGHT_FILES:
        sizes = [path.stat().st_size for path in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None
