"""A worker's end of the channel to the scheduler's process."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack

from vattn.integrations.vllm import sockets, wire
from vattn.integrations.vllm.wire import AnotherEngine, Answer, Json, Line, RemoteError

_LOG = logging.getLogger(__name__)
_CLOSE_S = 5.0  # close() waits so long for an answer that is being made
_RETRY_S = 0.02
_RETRY_REFUSED_S = 0.25  # the other engine has work with each attempt
_ANSWER_S = 1.0  # the last attempt, too, waits so long for an answer
_LAST_LOOK_S = 2.0  # a process that is being killed may close its connections before its socket


class WorkerLink:
    """A worker's end: connects as soon as its scheduler is there, and answers its calls.

    While another engine has the name, perhaps one that is about to end, it waits for that as well.

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
    engine_id : str
        Of this start of the engine: see ``Server``.
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
        engine_id: str,
        facts: Json | None = None,
        connect_timeout_s: float = 600.0,
    ) -> None:
        if type(rank) is not int or rank < 0:
            raise ValueError(f"rank is {rank!r}, expected an int from 0")
        self.path = sockets.socket_path(name)
        self._hello = wire.encode(
            {"hello": "worker", "engine_id": engine_id, "rank": rank, "facts": facts or {}}
        )
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
            line = self._join()
            if line is None:
                return
            with line:
                while (request := line.receive()) is not None:
                    line.send(wire.respond(self._answer, request))
        except (OSError, ValueError, RemoteError) as error:
            if not self._closing.is_set():
                _LOG.error("worker %d has no scheduler: %s", self._rank, error)
        if not self._closing.is_set():
            self._clean_up()

    def _join(self) -> Line | None:
        """Connect to the scheduler, and wait as long as needed; None if closed meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        pause_s = _RETRY_S
        while not self._closing.wait(pause_s):
            try:
                return self._say_hello(deadline)
            except (FileNotFoundError, ConnectionError):  # not there, or about to end
                pause_s = _RETRY_S
                reason = (
                    f"nobody listens at {self.path}; see the scheduler's log, and check that its "
                    "XDG_RUNTIME_DIR is the same"
                )
            except TimeoutError:
                raise TimeoutError(
                    f"{self.path} does not answer; look whether the engine there hangs"
                ) from None
            except RemoteError as error:
                if error.kind != AnotherEngine.__name__:
                    raise
                if pause_s != _RETRY_REFUSED_S:
                    _LOG.warning("worker %d waits, as %s", self._rank, error)
                pause_s = _RETRY_REFUSED_S
                reason = str(error)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{reason} (tried for {self._timeout_s:g} s)")
        return None

    def _say_hello(self, deadline: float) -> Line:
        deadline = max(deadline, time.monotonic() + _ANSWER_S)
        with ExitStack() as on_error:
            line = on_error.enter_context(Line(sockets.connect(self.path, deadline)))
            with self._lock:
                self._line = line
                if self._closing.is_set():
                    line.shutdown()
            line.send(self._hello, deadline)
            welcome = line.expect(deadline)
            if "error" in welcome:
                raise RemoteError(welcome["error"], welcome.get("kind", ""))
            on_error.pop_all()
        return line

    def _clean_up(self) -> None:
        end = time.monotonic() + _LAST_LOOK_S
        while not sockets.remove_stale(self.path) and time.monotonic() < end:
            if self._closing.wait(_RETRY_S):
                return
