"""A worker's end of the channel to the scheduler's process."""

from __future__ import annotations

import logging
import threading
import time

from vattn.integrations.vllm import sockets, wire
from vattn.integrations.vllm.wire import Answer, Json, Line, RemoteError

_LOG = logging.getLogger(__name__)
_CLOSE_S = 5.0  # close() waits so long for an answer that is being made
_RETRY_S = 0.02
_LAST_LOOK_S = 2.0  # a process that is being killed may close its connections before its socket


class WorkerLink:
    """A worker's end: connects as soon as the scheduler is there, and answers its calls.

    All of that happens on a thread of this object, also what ``answer`` does. When the scheduler
    goes, the thread ends, and removes the socket if the scheduler was killed and could not.

    Parameters
    ----------
    name : str
        Of the engine.
    rank : int
        Of the worker, from 0.
    answer : callable
        Answers a call. What it raises becomes the answer, see ``Server.call``.
    facts : dict, optional
        What else the scheduler should know about this worker, in JSON.
    connect_timeout_s : float
        How long to wait for the scheduler. When it is over, an error is logged, and the
        scheduler's ``Server.wait_for_workers`` fails.

    Raises
    ------
    TypeError, ValueError
        Not a name or not a rank, or facts that have no form in JSON.
    OSError
        As ``runtime_dir()``.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        answer: Answer,
        *,
        facts: Json | None = None,
        connect_timeout_s: float = 600.0,
    ) -> None:
        if type(rank) is not int or rank < 0:
            raise ValueError(f"rank is {rank!r}, expected an int from 0")
        self.path = sockets.socket_path(name)
        self._hello = wire.encode({"hello": "worker", "rank": rank, "facts": facts or {}})
        self._rank = rank
        self._answer = answer
        self._timeout_s = connect_timeout_s
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards _line
        self._line: Line | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"vattn {name} worker {rank}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the connection. Idempotent. To the scheduler it looks as if the worker had died."""
        with self._lock:
            self._closing.set()
            if self._line is not None:
                self._line.shutdown()
        if self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        try:
            line = self._connect()
            if line is None:
                return
            with line:
                self._serve(line)
        except (OSError, ValueError, RemoteError) as error:
            if not self._closing.is_set():
                _LOG.error("worker %d has no scheduler: %s", self._rank, error)
        if not self._closing.is_set():
            self._clean_up()

    def _connect(self) -> Line | None:
        """Connect, and wait as long as needed; None if closed meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        while not self._closing.wait(_RETRY_S):
            try:
                line = Line(sockets.connect(self.path, deadline))
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"nobody listens at {self.path} after {self._timeout_s:g} s; see the "
                        "scheduler's log, and check that its XDG_RUNTIME_DIR is the same"
                    ) from None
                continue
            with self._lock:
                self._line = line
                if self._closing.is_set():
                    line.shutdown()
            return line
        return None

    def _serve(self, line: Line) -> None:
        line.send(self._hello)
        welcome = line.expect()
        if "error" in welcome:
            raise RemoteError(welcome["error"], welcome.get("kind", ""))
        while (request := line.receive()) is not None:
            line.send(wire.respond(self._answer, request))

    def _clean_up(self) -> None:
        end = time.monotonic() + _LAST_LOOK_S
        while not sockets.remove_stale(self.path) and time.monotonic() < end:
            if self._closing.wait(_RETRY_S):
                return
