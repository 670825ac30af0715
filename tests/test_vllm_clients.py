"""Clients over real sockets: whatever comes, the scheduler's process answers the next one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import pytest

from vattn.integrations.vllm import channel, sockets, wire
from vattn.integrations.vllm.channel import (
    ChannelClosed,
    RemoteError,
    Server,
    ask,
    running,
    socket_path,
)

Json = dict[str, Any]
PATIENCE_S = 20.0
pytestmark = pytest.mark.usefixtures("stack")


def echo(request: Json) -> Json:
    return {"echo": request}


@pytest.fixture
def serve(stack: ExitStack) -> Callable[..., Server]:
    return lambda answer=echo: stack.enter_context(closing(Server("chat", answer)))


@pytest.fixture
def server(serve: Callable[..., Server]) -> Iterator[Server]:
    """A server that has to be in order at the end."""
    made = serve()
    yield made
    assert ask("chat", {"still": "there"}) == {"echo": {"still": "there"}}
    assert not made.lost


@pytest.fixture
def stranger(server: Server) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(PATIENCE_S)
        connected.connect(str(server.path))
        yield connected


def everything(connected: socket.socket) -> bytes:
    """What comes until the other side closes."""
    got = b""
    while chunk := connected.recv(65536):
        got += chunk
    return got


@pytest.mark.parametrize(
    ("junk", "error"),
    [
        (b"\n", "a message is not JSON"),
        (b"{\n", "a message is not JSON"),
        (b"\xff\xfe\n", "a message is not JSON"),
        (b"GET / HTTP/1.1\r\n\r\n", "a message is not JSON"),
        (b"[" * 100_000 + b"\n", "a message is not JSON"),
        (b"[]\n", "a message is a list, expected an object"),
        (b"1\n", "a message is a int, expected an object"),
        (b'{"hello":"worker"}\n', "a worker says hello with rank None"),
        (b'{"hello":"worker","rank":-1,"facts":{}}\n', "a worker says hello with rank -1"),
        (b'{"hello":"worker","rank":true,"facts":{}}\n', "a worker says hello with rank True"),
        (b'{"hello":"worker","rank":0,"facts":[]}\n', r"facts []"),
    ],
)
def test_nonsense_is_answered_with_an_error_and_a_close(
    junk: bytes, error: str, stranger: socket.socket
) -> None:
    stranger.sendall(junk)
    answer = json.loads(everything(stranger))
    assert error in answer["error"]
    assert answer["kind"] == "ValueError"


def test_a_line_that_never_ends_is_cut_off(
    stranger: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 100_000)
    stranger.sendall(b'"' + b"x" * 99_999)
    answer = json.loads(everything(stranger))
    assert answer == {"error": "a message has more than 100000 bytes", "kind": "ValueError"}


def test_half_a_line_is_dropped(stranger: socket.socket) -> None:
    stranger.sendall(b'{"a":')
    stranger.shutdown(socket.SHUT_WR)
    assert everything(stranger) == b""


def test_a_line_may_come_in_pieces_and_two_at_once(stranger: socket.socket) -> None:
    for piece in (b'{"a"', b":1", b'}\n{"b":2}\n{"c"'):
        stranger.sendall(piece)
    stranger.sendall(b":3}\n")
    stranger.shutdown(socket.SHUT_WR)
    lines = everything(stranger).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"echo": {"a": 1}},
        {"echo": {"b": 2}},
        {"echo": {"c": 3}},
    ]


def test_one_who_asks_and_does_not_read_is_dropped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = wire.encode({"x": "x" * 4_000_000})
    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as greedy:
        patch.setattr(channel, "_IDLE_CLIENT_S", 0.5)
        greedy.settimeout(PATIENCE_S)
        greedy.connect(str(server.path))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            greedy.sendall(message * 10)


def test_one_who_says_nothing_is_sent_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as silent:
        patch.setattr(channel, "_IDLE_CLIENT_S", 0.1)
        silent.settimeout(PATIENCE_S)
        silent.connect(str(server.path))
        assert everything(silent) == b""


def test_another_user_is_not_heard(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sockets, "is_trusted", lambda connected: False)
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(PATIENCE_S)
            other.connect(str(server.path))
            assert everything(other) == b""


def test_no_thread_for_a_connection_means_no_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with socket.socket(socket.AF_UNIX) as unlucky:
            unlucky.settimeout(PATIENCE_S)
            unlucky.connect(str(server.path))
            assert everything(unlucky) == b""
    assert "no thread for a connection" in caplog.text


def test_accepting_goes_on_after_a_failure(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the process has run out of descriptors for a while."""
    monkeypatch.setattr(channel, "_ACCEPT_AGAIN_S", 0.01)
    failures = [OSError(24, "Too many open files")] * 2
    accept = socket.socket.accept

    def failing(self: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    for n in range(3):  # the first is accepted by the call that had begun before
        assert ask("chat", {"n": n}) == {"echo": {"n": n}}
    assert caplog.text.count("Too many open files") == 2


def test_many_clients_are_answered_at_once(serve: Any) -> None:
    serve()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: ask("chat", {"n": n}), range(200)))
    assert answers == [{"echo": {"n": n}} for n in range(200)]


def test_a_slow_answer_keeps_nobody_else_waiting(serve: Any) -> None:
    finish = threading.Event()

    def answer(request: Json) -> Json:
        return {"finished": finish.wait(PATIENCE_S if request["slow"] else 0)}

    serve(answer)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, "chat", {"slow": True}, timeout_s=PATIENCE_S)
        assert ask("chat", {"slow": False}) == {"finished": False}
        finish.set()
        assert slow.result() == {"finished": True}


@pytest.mark.parametrize("error", [ValueError("no"), OSError("no"), KeyError("no"), MemoryError()])
def test_an_error_comes_with_its_kind(error: Exception, serve: Any) -> None:
    def answer(request: Json) -> Json:
        raise error

    serve(answer)
    with pytest.raises(RemoteError) as caught:
        ask("chat", {})
    assert (str(caught.value), caught.value.kind) == (str(error), type(error).__name__)


def test_asking_nobody_names_who_is_there(serve: Any) -> None:
    with pytest.raises(ValueError, match=r"no engine named 'x' in .*/vattn; running: none"):
        ask("x", {})
    serve()
    with pytest.raises(ValueError, match=r"no engine named 'x' in .*/vattn; running: chat"):
        ask("x", {})
    assert running() == ["chat"]


def test_asking_ends_in_time(stack: ExitStack) -> None:
    listener, _ = sockets.listen(socket_path("chat"))
    stack.callback(listener.close)
    with pytest.raises(TimeoutError, match=r"'chat' did not answer within 0\.05 s"):
        ask("chat", {}, timeout_s=0.05)


def test_asking_one_who_ends_is_an_error(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    monkeypatch.setattr(sockets, "is_trusted", lambda connected: False)
    with pytest.raises(ChannelClosed, match="'chat' ended before it answered"):
        ask("chat", {})
