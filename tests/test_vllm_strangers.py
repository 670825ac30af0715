"""Who says hello to an engine and is not taken in: it is told why, and the engine goes on."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from vattn.integrations.vllm import sockets, wire, worker_link
from vattn.integrations.vllm.channel import Server, WorkerLink, ask, socket_path
from vattn.integrations.vllm.wire import Line

Json = dict[str, Any]
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    """Workers whose attempts follow each other soon."""
    monkeypatch.setattr(worker_link, "_RETRY_REFUSED_S", 0.03)
    monkeypatch.setattr(worker_link, "_LAST_LOOK_S", 0.1)


@pytest.fixture
def serve(stack: ExitStack) -> Callable[..., Server]:
    def make(engine_id: str, n_workers: int = 2) -> Server:
        server = Server("chat", lambda request: request, engine_id=engine_id, n_workers=n_workers)
        stack.callback(server.close)
        return server

    return make


@pytest.fixture
def join(stack: ExitStack) -> Callable[..., WorkerLink]:
    """A worker that answers with the engine it is of and its rank."""

    def make(engine_id: str, rank: int, **options: Any) -> WorkerLink:
        def answer(request: Json) -> Json:
            return {"of": [engine_id, rank]}

        link = WorkerLink("chat", rank, answer, engine_id=engine_id, **options)
        stack.callback(link.close)
        return link

    return make


@pytest.fixture
def say_hello(stack: ExitStack) -> Callable[..., tuple[socket.socket, Json]]:
    """Say hello, and nothing more; the connection stays open."""

    def say(**hello: Any) -> tuple[socket.socket, Json]:
        silent = stack.enter_context(socket.socket(socket.AF_UNIX))
        silent.settimeout(PATIENCE_S)
        silent.connect(str(socket_path("chat")))
        silent.sendall(wire.encode({"hello": "worker", "facts": {}, **hello}))
        with silent.makefile("rb") as lines:
            return silent, json.loads(lines.readline())

    return say


def eventually(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def gives_up(link: WorkerLink) -> None:
    eventually(lambda: not link._thread.is_alive())


def test_workers_of_another_engine_are_not_called_and_do_not_end_this_one(
    serve: Any, join: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As when two engines have a name, and the second one's workers come before its scheduler."""
    server = serve("first")
    others = [join("second", rank) for rank in range(2)]
    eventually(lambda: caplog.text.count("waits, as another engine named 'chat' is running") == 2)
    for rank in range(2):
        join("first", rank)
    server.wait_for_workers(PATIENCE_S)
    assert server.call({}) == [{"of": ["first", 0]}, {"of": ["first", 1]}]
    with pytest.raises(ValueError, match="an engine named 'chat' is running"):
        serve("second")
    for link in others:
        link.close()
    assert server.call({}) == [{"of": ["first", 0]}, {"of": ["first", 1]}]
    assert not server.lost
    assert ask("chat", {"still": "there"}) == {"still": "there"}


@pytest.mark.parametrize(
    ("hello", "kind", "error"),
    [
        ({"rank": 9}, "AnotherEngine", "another engine named 'chat' is running"),
        ({"rank": 1}, "AnotherEngine", "another engine named 'chat' is running"),
        ({"rank": 1, "engine_id": None}, "AnotherEngine", "another engine named 'chat'"),
        ({"rank": 1, "engine_id": ["first"]}, "AnotherEngine", "another engine named 'chat'"),
        ({"rank": 2, "engine_id": "first"}, "ValueError", "rank 2, expected less than 2"),
        ({"rank": 0, "engine_id": "first"}, "ValueError", "has a worker of rank 0 already"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_one_who_says_hello_and_is_silent_keeps_nobody_waiting(
    complete: bool, hello: Json, kind: str, error: str, serve: Any, join: Any, say_hello: Any
) -> None:
    server = serve("first")
    join("first", 0)
    eventually(lambda: server._workers)
    if complete:
        join("first", 1)
        server.wait_for_workers(PATIENCE_S)
    silent, answer = say_hello(**hello)
    assert answer["kind"] == kind
    assert error in answer["error"]
    assert silent.recv(1) == b""  # and is sent away
    if not complete:
        join("first", 1)
        server.wait_for_workers(PATIENCE_S)
    assert server.call({}) == [{"of": ["first", 0]}, {"of": ["first", 1]}]
    silent.close()
    assert server.call({}) == [{"of": ["first", 0]}, {"of": ["first", 1]}]
    assert not server.lost


def test_a_worker_waits_for_the_end_of_another_engine_and_finds_its_own(
    serve: Any, join: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As when an engine is restarted before the old one has ended."""
    old = serve("old", n_workers=1)
    join("old", 0)
    old.wait_for_workers(PATIENCE_S)
    join("new", 0)
    eventually(lambda: "worker 0 waits, as another engine named 'chat' is" in caplog.text)
    assert old.call({}) == [{"of": ["old", 0]}]
    old.close()
    new = serve("new", n_workers=1)
    new.wait_for_workers(PATIENCE_S)
    assert new.call({}) == [{"of": ["new", 0]}]


def test_a_worker_whose_connection_ends_without_an_answer_tries_again(
    serve: Any, join: Any, stack: ExitStack
) -> None:
    """As when it meets the other engine's socket in the moment in which that engine ends."""
    listener, made = sockets.listen(socket_path("chat"))
    stack.callback(listener.close)
    listener.settimeout(PATIENCE_S)
    join("new", 0)
    connected, _ = listener.accept()
    with Line(connected) as line:
        assert line.receive() == {"hello": "worker", "engine_id": "new", "rank": 0, "facts": {}}
        sockets.remove(socket_path("chat"), made)
        listener.close()
    new = serve("new", n_workers=1)
    new.wait_for_workers(PATIENCE_S)
    assert new.call({}) == [{"of": ["new", 0]}]


def test_a_worker_gives_up_when_another_engine_keeps_the_name(
    serve: Any, join: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve("first", n_workers=1)
    gives_up(join("second", 0, connect_timeout_s=0.2))
    assert caplog.text.count("worker 0 waits, as") == 1  # however often it tried
    (end,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert end.getMessage().startswith("worker 0 has no scheduler: another engine named 'chat'")
    assert "set another name for this one in kv_connector_extra_config" in end.getMessage()
    assert server.path.exists()


def test_a_worker_of_a_rank_that_the_engine_has_not_does_not_try_again(
    serve: Any, join: Any, caplog: pytest.LogCaptureFixture
) -> None:
    serve("first", n_workers=1)
    gives_up(join("first", 1))
    assert "a worker says hello with rank 1, expected less than 1" in caplog.text


def test_a_second_worker_of_a_rank_is_sent_away(
    serve: Any, join: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve("first", n_workers=1)
    join("first", 0)
    server.wait_for_workers(PATIENCE_S)
    gives_up(join("first", 0))
    assert "has a worker of rank 0 already; set another name" in caplog.text
    assert server.call({}) == [{"of": ["first", 0]}]
    assert not server.lost


def test_a_worker_that_gets_no_answer_says_so(
    join: Any,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(worker_link, "_ANSWER_S", 0.05)
    listener, _ = sockets.listen(socket_path("chat"))
    stack.callback(listener.close)
    gives_up(join("first", 0, connect_timeout_s=0.05))
    assert "chat.sock does not answer; look whether the engine there hangs" in caplog.text


@pytest.mark.parametrize("answers", [False, True])
def test_a_worker_that_has_not_been_taken_in_can_be_closed(
    answers: bool, serve: Any, join: Any, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    if answers:
        serve("first")
    else:
        listener, _ = sockets.listen(socket_path("chat"))
        stack.callback(listener.close)
    link = join("second", 0)
    eventually(lambda: link._line)
    link.close()
    assert not link._thread.is_alive()
    assert "has no scheduler" not in caplog.text
