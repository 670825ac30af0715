"""The scheduler's process asks its workers and waits; other programs ask the scheduler's process.

There is one socket per engine, made by the process of the scheduler. Workers connect to it and then
answer calls; so a worker that is killed leaves no file. Clients connect, ask and go.

The other side of everything here may be a program that speaks nonsense or dies half way: it gets an
error or a closed connection, and the engine goes on.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vattn.integrations.vllm import sockets, wire
from vattn.integrations.vllm.sockets import runtime_dir, socket_path
from vattn.integrations.vllm.wire import (
    AnotherEngine,
    Answer,
    ChannelClosed,
    Json,
    Line,
    RemoteError,
)
from vattn.integrations.vllm.worker_link import WorkerLink

__all__ = [
    "ChannelClosed",
    "Json",
    "RemoteError",
    "Server",
    "WorkerLink",
    "ask",
    "running",
    "runtime_dir",
    "socket_path",
]

_LOG = logging.getLogger(__name__)
_IDLE_CLIENT_S = 60.0  # a client that says nothing for so long is sent away
_CLOSE_S = 5.0  # close() waits so long for a thread in the middle of an answer
_ACCEPT_AGAIN_S = 0.5  # descriptors have run out, and may be given back


class Server:
    """The scheduler's end. Workers say hello and are called; clients ask.

    Parameters
    ----------
    name : str
        Of the engine, and of its socket: see :func:`socket_path`.
    answer : callable
        Answers a client's request, on a thread of that client. What it raises becomes the answer
        ``{"error": message, "kind": name of the type}``.
    engine_id : str
        Of this start of the engine. Workers that say hello with another one are sent away.
    n_workers : int
        How many the engine has, with ranks from 0. As none is taken in twice, once all are there
        nobody who says hello gets calls. An engine without workers only answers clients.
    on_lost : callable, optional
        Called with a worker's rank, on a thread of this object, when its connection ends before
        :meth:`close`. By then ``lost`` is True and the socket's file is gone.

    Attributes
    ----------
    path : Path
        The socket.
    lost : bool
        A worker is gone, so the engine is about to end. :meth:`call` raises from then on.

    Raises
    ------
    ValueError
        Not a name, or an engine of this name is running.
    OSError
        The socket cannot be made.
    """

    def __init__(
        self,
        name: str,
        answer: Answer,
        *,
        engine_id: str = "",
        n_workers: int = 0,
        on_lost: Callable[[int], None] | None = None,
    ) -> None:
        self.path = socket_path(name)
        self.lost = False
        self._name = name
        self._answer = answer
        self._engine_id = engine_id
        self._n_workers = n_workers
        self._on_lost = on_lost
        self._pid = os.getpid()
        self._calling = threading.Lock()  # held during a call; taken before _changed
        self._unfinished = False  # a call was left half way; guarded by _calling
        self._changed = threading.Condition()  # guards lost and all below
        self._closed = False
        self._threads: dict[Line, threading.Thread] = {}
        self._workers: dict[int, Line] = {}
        self._facts: dict[int, Json] = {}
        self._listener, self._made = sockets.listen(self.path)
        atexit.register(self.close)
        self._accepting = threading.Thread(
            target=self._accept, name=f"vattn {name} accept", daemon=True
        )
        self._accepting.start()

    def wait_for_workers(self, timeout_s: float) -> list[Json]:
        """Wait until all workers have said hello.

        Returns
        -------
        list of dict
            What each said about itself besides its rank, by rank.

        Raises
        ------
        TimeoutError
            Fewer came.
        ChannelClosed
            One came and is gone, or this object was closed.
        """
        n = self._n_workers
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._workers) == n or self.lost or self._closed, timeout_s
            )
            self._check_open()
            if len(self._workers) < n:
                raise TimeoutError(
                    f"{len(self._workers)} of {n} workers have connected to {self.path} within "
                    f"{timeout_s:g} s; see the workers' log for the reason, and check that they "
                    "have the same kv_connector_extra_config and XDG_RUNTIME_DIR"
                )
            return [self._facts[rank] for rank in sorted(self._facts)]

    def call(self, request: Json) -> list[Json]:
        """Ask all workers at the same time, and wait for all answers, however long it takes.

        A call of another thread waits for this one.

        Returns
        -------
        list of dict
            By rank. A worker's error is ``{"error": message, "kind": name of the type}``; what the
            others have done is for the caller to undo.

        Raises
        ------
        ChannelClosed
            A worker is gone. What it and the others did is not known; nor will a later call work.
            Or not all have come yet, and nobody was asked.
        TypeError, ValueError
            The request has no form in JSON, or is too long. Nobody was asked.
        """
        message = wire.encode(request)
        with self._calling:
            with self._changed:
                self._check_open()
                workers = sorted(self._workers.items())
            if len(workers) < self._n_workers:
                raise ChannelClosed(
                    f"{len(workers)} of {self._n_workers} workers have connected; call "
                    "wait_for_workers() first"
                )
            if self._unfinished:
                raise ChannelClosed("an earlier call was interrupted: its answers are not read")
            self._unfinished = True
            answers = []
            for rank, line in workers:
                with self._reaching(rank, line):
                    line.send(message)
            for rank, line in workers:
                with self._reaching(rank, line):
                    answers.append(line.expect())
            self._unfinished = False
        return answers

    def close(self) -> None:
        """Remove the socket and end all connections; workers and clients see that. Idempotent."""
        if os.getpid() != self._pid:
            return  # in a forked child, which has neither the threads nor the sockets
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            threads = dict(self._threads)
        atexit.unregister(self.close)
        sockets.remove(self.path, self._made)
        sockets.shutdown(self._listener)
        for line in threads:
            line.shutdown()
        _join(self._accepting, *threads.values())
        self._listener.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the channel of {self._name!r} is closed")
        if self.lost:
            raise ChannelClosed(f"a worker of {self._name!r} is gone; see its log for the reason")

    @contextmanager
    def _reaching(self, rank: int, line: Line) -> Iterator[None]:
        try:
            yield
        except (ChannelClosed, ValueError) as error:
            self._lose()
            line.shutdown()
            raise ChannelClosed(f"no answer of worker {rank} of {self._name!r}: {error}") from error

    def _lose(self) -> bool:
        """Note that a worker is gone; False if that is so because this object was closed."""
        with self._changed:
            if self._closed:
                return False
            self.lost = True
            self._changed.notify_all()
        sockets.remove(self.path, self._made)
        return True

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError as error:
                with self._changed:
                    if self._closed:
                        return
                _LOG.warning("accepting a connection to %s failed: %s", self.path, error)
                time.sleep(_ACCEPT_AGAIN_S)
                continue
            line = Line(connected)
            if not sockets.is_trusted(connected) or not self._start(line):
                line.close()

    def _start(self, line: Line) -> bool:
        """Serve a connection on a thread of its own; False if there cannot be one."""
        thread = threading.Thread(
            target=self._serve, args=(line,), name=f"vattn {self._name} connection", daemon=True
        )
        with self._changed:
            if self._closed:
                return False
            try:
                thread.start()
            except RuntimeError as error:
                _LOG.warning("no thread for a connection to %s: %s", self.path, error)
                return False
            self._threads[line] = thread
            return True

    def _serve(self, line: Line) -> None:
        lost = None
        try:
            while (request := line.receive(time.monotonic() + _IDLE_CLIENT_S)) is not None:
                if "hello" in request:
                    lost = self._attend(line, request)
                    break
                answer = wire.respond(self._answer, request)
                line.send(answer, time.monotonic() + _IDLE_CLIENT_S)
        except ValueError as error:  # nonsense: there is no telling where the next message begins
            wire.try_to_send(line, wire.encode_error(error))
        except (ChannelClosed, TimeoutError) as error:
            _LOG.debug("a client of %s is gone: %s", self.path, error)
        finally:
            with self._changed:
                del self._threads[line]
            line.close()
        if lost is not None and self._on_lost is not None:
            self._on_lost(lost)

    def _attend(self, line: Line, hello: Json) -> int | None:
        """Take in a worker, and return its rank when it has gone; None if that was close()."""
        rank, facts = hello.get("rank"), hello.get("facts")
        if type(rank) is not int or rank < 0 or not isinstance(facts, dict):
            raise ValueError(f"a worker says hello with rank {rank!r} and facts {facts!r:.100}")
        if hello.get("engine_id") != self._engine_id:
            raise AnotherEngine(
                f"another engine named {self._name!r} is running (process {self._pid}); end it, or "
                "set another name for this one in kv_connector_extra_config"
            )
        if rank >= self._n_workers:
            raise ValueError(
                f"a worker says hello with rank {rank}, expected less than {self._n_workers}"
            )
        with self._changed:
            if rank in self._workers:
                raise ValueError(
                    f"{self._name!r} has a worker of rank {rank} already; set another name for the "
                    "second engine in kv_connector_extra_config"
                )
            line.send(wire.encode({"hello": "scheduler"}))  # before a call() can send anything
            self._workers[rank] = line
            self._facts[rank] = facts
            self._changed.notify_all()
        line.wait_closed()
        if not self._lose():
            return None
        _LOG.info("worker %d of %r is gone", rank, self._name)
        return rank


def ask(name: str, request: Json, *, timeout_s: float = 10.0) -> Json:
    """Ask an engine one thing.

    Raises
    ------
    ValueError
        No engine of this name is running.
    RemoteError
        It answered with an error.
    TimeoutError
        It did not answer in time.
    ChannelClosed
        It ended meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    message = wire.encode(request)
    path = socket_path(name)
    try:
        with Line(sockets.connect(path, deadline)) as line:
            line.send(message, deadline)
            answer = line.expect(deadline)
    except (FileNotFoundError, ConnectionRefusedError):
        raise ValueError(
            f"no engine named {name!r} in {path.parent}; running: {', '.join(running()) or 'none'}"
        ) from None
    except TimeoutError:
        raise TimeoutError(
            f"{name!r} did not answer within {timeout_s:g} s; look whether it is busy or hangs"
        ) from None
    except ChannelClosed as error:
        raise ChannelClosed(f"{name!r} ended before it answered: {error}") from error
    if "error" in answer:
        raise RemoteError(str(answer["error"]), str(answer.get("kind", "")))
    return answer


def running() -> list[str]:
    """Names of the engines that listen. Sockets of engines that were killed are removed.

    Raises
    ------
    OSError
        As :func:`runtime_dir`.
    """
    return [
        path.stem
        for path in sorted(runtime_dir().glob("*.sock"))
        if sockets.is_listening(path) or not sockets.remove_stale(path)
    ]


def _join(*threads: threading.Thread) -> None:
    end = time.monotonic() + _CLOSE_S
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(end - time.monotonic(), 0.0))
