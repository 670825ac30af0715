"""Scheduler and workers over real sockets: who answers whom, and what a death does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from vattn.integrations.vllm import wire
from vattn.integrations.vllm.channel import (
    ChannelClosed,
    Server,
    WorkerLink,
    ask,
    socket_path,
)

Json = dict[str, Any]
PATIENCE_S = 20.0
pytestmark = pytest.mark.usefixtures("stack")


def echo(request: Json) -> Json:
    return {"echo": request}


def refuse(request: Json) -> Json:
    raise ValueError(f"op is {request.get('op')!r}")


@pytest.fixture
def serve(stack: ExitStack) -> Callable[..., Server]:
    def make(n_workers: int = 1, **options: Any) -> Server:
        server = Server("chat", echo, engine_id="1", n_workers=n_workers, **options)
        stack.callback(server.close)
        return server

    return make


@pytest.fixture
def join(stack: ExitStack) -> Callable[..., WorkerLink]:
    def make(rank: int, answer: Callable[[Json], Json] = echo, **options: Any) -> WorkerLink:
        link = WorkerLink("chat", rank, answer, engine_id="1", **options)
        stack.callback(link.close)
        return link

    return make


def start(stack: ExitStack, code: str) -> tuple[subprocess.Popen[str], int]:
    """Run code in a process of its own, up to where it prints a number."""
    imports = (
        "import os, time, signal\nfrom vattn.integrations.vllm.channel import Server, WorkerLink\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", imports + code], stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    stack.callback(process.stdout.close)
    return process, int(process.stdout.readline())


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def raw(stack: ExitStack) -> socket.socket:
    connected = stack.enter_context(socket.socket(socket.AF_UNIX))
    connected.settimeout(PATIENCE_S)
    connected.connect(str(socket_path("chat")))
    return connected


# Calls


def test_all_workers_answer_by_rank_and_tell_of_themselves(serve: Any, join: Any) -> None:
    join(1, lambda request: {"rank": 1, **request}, facts={"page_bytes": 4096})  # before it is up
    server = serve(n_workers=2)
    join(0, lambda request: {"rank": 0, **request}, facts={"page_bytes": 8192})
    told = server.wait_for_workers(PATIENCE_S)
    assert told == [{"page_bytes": 8192}, {"page_bytes": 4096}]
    for n in range(3):
        assert server.call({"n": n}) == [{"rank": 0, "n": n}, {"rank": 1, "n": n}]


def test_workers_work_at_the_same_time(serve: Any, join: Any) -> None:
    both = threading.Barrier(2, timeout=PATIENCE_S)
    server = serve(n_workers=2)
    for rank in range(2):
        join(rank, lambda request: {"place": both.wait()})
    server.wait_for_workers(PATIENCE_S)
    assert sorted(answer["place"] for answer in server.call({})) == [0, 1]


def test_an_error_of_one_worker_leaves_the_answers_of_the_others(serve: Any, join: Any) -> None:
    server = serve(n_workers=2)
    join(0, refuse)
    join(1)
    server.wait_for_workers(PATIENCE_S)
    for _ in range(2):
        error, answer = server.call({"op": "map"})
        assert error == {"error": "op is 'map'", "kind": "ValueError"}
        assert answer == {"echo": {"op": "map"}}


def test_an_answer_that_cannot_be_sent_is_an_error(serve: Any, join: Any) -> None:
    server = serve(n_workers=2)
    join(0, lambda request: {"bytes": b""})
    join(1, lambda request: None)  # type: ignore[arg-type,return-value]
    server.wait_for_workers(PATIENCE_S)
    assert [answer["kind"] for answer in server.call({})] == ["TypeError", "TypeError"]


def test_calls_of_several_threads_do_not_mix(serve: Any, join: Any) -> None:
    server = serve(n_workers=2)
    join(0)
    join(1)
    server.wait_for_workers(PATIENCE_S)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: server.call({"n": n}), range(200)))
    assert answers == [[{"echo": {"n": n}}] * 2 for n in range(200)]


def test_messages_up_to_the_limit_pass_and_longer_ones_are_not_begun(
    serve: Any, join: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_LINE_BYTES", 300_000)
    server = serve()
    join(0, lambda request: {})
    server.wait_for_workers(PATIENCE_S)
    text = "x" * (300_000 - len('{"text":""}\n'))
    assert server.call({"text": text}) == [{}]
    with pytest.raises(ValueError, match="has 300001 bytes, at most 300000 can be sent"):
        server.call({"text": text + "x"})
    assert server.call({}) == [{}]


def test_too_few_workers_are_counted(serve: Any, join: Any) -> None:
    server = serve(n_workers=2)
    with pytest.raises(ChannelClosed, match=r"call wait_for_workers\(\) first"):
        server.call({})
    join(0)
    eventually(lambda: list(server._workers) == [0])
    with pytest.raises(ChannelClosed, match="1 of 2 workers have connected"):
        server.call({})
    with pytest.raises(TimeoutError, match=r"1 of 2 workers .* 0\.05 s; see the workers' log"):
        server.wait_for_workers(0.05)


@pytest.mark.parametrize("rank", [-1, 1.0, True, "0", None])
def test_a_rank_is_a_number_from_0(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"rank is .*, expected an int from 0"):
        WorkerLink("chat", rank, echo, engine_id="1")


def test_a_worker_that_finds_no_scheduler_says_so(
    join: Any, caplog: pytest.LogCaptureFixture
) -> None:
    link = join(3, connect_timeout_s=0.05)
    eventually(lambda: not link._thread.is_alive())
    assert "worker 3 has no scheduler: nobody listens at" in caplog.text
    assert "its XDG_RUNTIME_DIR is the same" in caplog.text


def test_a_worker_that_waits_for_its_scheduler_can_be_closed(
    join: Any, caplog: pytest.LogCaptureFixture
) -> None:
    link = join(0)
    link.close()
    link.close()
    assert not link._thread.is_alive()
    assert caplog.text == ""


def test_answers_of_an_interrupted_call_are_not_taken_for_those_of_the_next(
    serve: Any, join: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    join(0)
    server.wait_for_workers(PATIENCE_S)
    with monkeypatch.context() as patch:

        def interrupted() -> Json:
            raise KeyboardInterrupt

        patch.setattr(server._workers[0], "expect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.call({"n": 1})
    with pytest.raises(ChannelClosed, match="an earlier call was interrupted"):
        server.call({"n": 2})


# Deaths

WORKER = (
    "link = WorkerLink('chat', 1, lambda r: os.kill(os.getpid(), 9), engine_id='1')\n"
    "print(1, flush=True)\n"
)
SERVER = (
    "server = Server('chat', dict, engine_id='1', n_workers=1)\n"
    "server.wait_for_workers(60)\n"
    "print(1, flush=True)\n"
)


def test_a_worker_that_is_killed_is_noticed_at_once(
    serve: Any, join: Any, stack: ExitStack
) -> None:
    lost: list[int] = []
    server = serve(n_workers=2, on_lost=lost.append)
    join(0)
    process, _ = start(stack, WORKER + "time.sleep(60)")
    server.wait_for_workers(PATIENCE_S)
    process.send_signal(signal.SIGKILL)
    eventually(lambda: lost == [1])
    assert server.lost
    assert not server.path.exists()
    with pytest.raises(ChannelClosed, match="a worker of 'chat' is gone"):
        server.call({})
    with pytest.raises(ChannelClosed, match="a worker of 'chat' is gone"):
        server.wait_for_workers(PATIENCE_S)


def test_a_worker_that_dies_during_a_call_ends_it(serve: Any, join: Any, stack: ExitStack) -> None:
    server = serve(n_workers=2)
    join(0)
    start(stack, WORKER + "time.sleep(60)")
    server.wait_for_workers(PATIENCE_S)
    with pytest.raises(ChannelClosed, match="no answer of worker 1 of 'chat'"):
        server.call({})
    assert server.lost
    assert not server.path.exists()


def test_a_worker_that_dies_is_noticed_though_its_child_lives(serve: Any, stack: ExitStack) -> None:
    server = serve()
    process, child = start(
        stack,
        "link = WorkerLink('chat', 0, dict, engine_id='1')\n"
        "while link._line is None: time.sleep(0.01)\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)",
    )
    stack.callback(os.kill, child, signal.SIGKILL)
    server.wait_for_workers(PATIENCE_S)
    process.send_signal(signal.SIGKILL)
    eventually(lambda: server.lost)


def test_a_worker_that_speaks_nonsense_is_lost_and_sent_away(serve: Any, stack: ExitStack) -> None:
    lost: list[int] = []
    server = serve(on_lost=lost.append)
    worker = raw(stack)
    worker.sendall(b'{"hello":"worker","engine_id":"1","rank":0,"facts":{}}\n')
    server.wait_for_workers(PATIENCE_S)
    worker.sendall(b"yes\n")
    with pytest.raises(ChannelClosed, match="no answer of worker 0 of 'chat': a message is not J"):
        server.call({})
    while worker.recv(1000):
        pass
    eventually(lambda: lost == [0])


def test_when_a_call_fails_the_socket_is_gone_already(
    serve: Any, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    worker = raw(stack)
    worker.sendall(b'{"hello":"worker","engine_id":"1","rank":0,"facts":{}}\nyes\n')
    server.wait_for_workers(PATIENCE_S)
    with monkeypatch.context() as patch:
        patch.setattr(server._workers[0], "shutdown", lambda: None)  # the watcher sees nothing
        with pytest.raises(ChannelClosed):
            server.call({})
    assert server.lost
    assert not server.path.exists()


def test_a_worker_that_goes_ends_the_wait_for_the_others(serve: Any, join: Any) -> None:
    server = serve(n_workers=2)
    link = join(0)
    eventually(lambda: list(server._workers) == [0])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.wait_for_workers, 2 * PATIENCE_S)
        link.close()
        with pytest.raises(ChannelClosed, match="a worker of 'chat' is gone"):
            waiting.result(PATIENCE_S)


def test_the_socket_of_a_scheduler_that_is_killed_is_removed_by_its_worker(
    join: Any, stack: ExitStack
) -> None:
    link = join(0)
    process, _ = start(stack, SERVER + "time.sleep(60)")
    assert link.path.exists()
    process.send_signal(signal.SIGKILL)
    eventually(lambda: not link._thread.is_alive())
    assert not link.path.exists()


def test_a_scheduler_that_forgets_to_close_leaves_no_socket(join: Any, stack: ExitStack) -> None:
    process, _ = start(stack, "server = Server('chat', dict)\nprint(1, flush=True)\n")
    assert process.wait(PATIENCE_S) == 0
    assert not socket_path("chat").exists()


def test_the_end_of_a_forked_child_leaves_the_socket(stack: ExitStack) -> None:
    start(
        stack,
        "server = Server('chat', dict)\n"
        "child = os.fork()\n"
        "if not child: raise SystemExit\n"
        "os.waitpid(child, 0)\n"
        "print(1, flush=True)\n"
        "time.sleep(60)",
    )
    assert ask("chat", {"still": "there"}) == {"still": "there"}


def test_closing_ends_everything_and_can_be_done_twice(
    serve: Any, join: Any, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    lost: list[int] = []
    server = serve(on_lost=lost.append)
    link = join(0)
    server.wait_for_workers(PATIENCE_S)
    client = raw(stack)
    server.close()
    server.close()
    assert not server.path.exists()
    assert client.recv(1) == b""
    eventually(lambda: not link._thread.is_alive())
    assert (lost, server.lost, caplog.text) == ([], False, "")
    with pytest.raises(ChannelClosed, match="the channel of 'chat' is closed"):
        server.call({})
    serve()  # the name is free


def test_closing_wakes_who_waits_for_workers(serve: Any) -> None:
    server = serve()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.wait_for_workers, 2 * PATIENCE_S)
        server.close()
        with pytest.raises(ChannelClosed):
            waiting.result(PATIENCE_S)


def test_closing_wakes_who_waits_for_an_answer(serve: Any, join: Any) -> None:
    asked, finish = threading.Event(), threading.Event()

    def hang(request: Json) -> Json:
        asked.set()
        finish.wait(PATIENCE_S)
        return {}

    server = serve()
    link = join(0, hang)
    server.wait_for_workers(PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(server.call, {})
        assert asked.wait(PATIENCE_S)
        server.close()
        with pytest.raises(ChannelClosed):
            called.result(PATIENCE_S)
    finish.set()
    eventually(lambda: not link._thread.is_alive())
