"""Who can write to the socket can make the engine run nothing: there is no pickle anywhere."""

from __future__ import annotations

import ast
import marshal
import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vattn.integrations.vllm as package
from vattn.integrations.vllm.channel import RemoteError, Server, WorkerLink, ask, socket_path

pytestmark = pytest.mark.vllm

NAME = "chat"
PATIENCE_S = 10.0
# What loads objects, code or both from bytes.
LOADERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
SOURCES = sorted(Path(str(package.__file__)).parent.rglob("*.py"))


class Touch:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, new_folder: Any) -> Iterator[Server]:
    """A scheduler's end with one worker, as in an engine."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(new_folder()))
    server = Server(NAME, echo, engine_id="this", n_workers=1)
    worker = WorkerLink(NAME, 0, echo, engine_id="this")
    server.wait_for_workers(PATIENCE_S)
    yield server
    worker.close()
    server.close()


def echo(request: dict[str, Any]) -> dict[str, Any]:
    return {"echo": request}


def send(message: bytes) -> bytes:
    """Send bytes to the engine, and return what it says until it closes the connection."""
    said = b""
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(PATIENCE_S)
        connected.connect(str(socket_path(NAME)))
        connected.sendall(message)
        connected.shutdown(socket.SHUT_WR)
        while chunk := connected.recv(65536):
            said += chunk
    return said


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("end", [b"", b"\n"], ids=["open", "line"])
def test_pickled_objects_are_not_loaded(
    protocol: int, end: bytes, server: Server, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    message = pickle.dumps(Touch(trace), protocol) + end
    said = send(message)
    assert not trace.exists()
    assert said == b"" or b'"error":"a message is not JSON' in said
    # The pickle is a good one.
    pickle.loads(message)
    assert trace.exists()
    # The engine goes on, with the worker that it had.
    assert ask(NAME, {"op": "status"}) == {"echo": {"op": "status"}}
    assert server.call({"op": "map"}) == [{"echo": {"op": "map"}}]


def test_marshalled_code_is_an_error(server: Server) -> None:
    said = send(marshal.dumps(compile("1", "a", "exec")).replace(b"\n", b" ") + b"\n")
    assert b'"error":"a message is not JSON' in said
    assert not server.lost


def test_an_object_in_a_field_stays_text(server: Server, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    text = pickle.dumps(Touch(trace), 0).decode("ascii")
    assert ask(NAME, {"op": text}) == {"echo": {"op": text}}
    assert not trace.exists()
    with pytest.raises(RemoteError):
        ask(NAME, {"hello": "worker", "rank": text})
    assert not server.lost


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_module_can_load_objects_from_bytes(source: Path) -> None:
    imported: set[str] = set()
    called: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(node.func.id)
    assert not imported & LOADERS
    assert not called & {"eval", "exec", "compile", "__import__"}


def test_all_modules_are_looked_at() -> None:
    assert {"channel", "wire", "sockets", "worker_link"} <= {source.stem for source in SOURCES}
