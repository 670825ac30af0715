"""Lines of JSON: one object per line, UTF-8.

Never pickle: who can write to a socket can make the other side read numbers and strings, and run
nothing.
"""

from __future__ import annotations

import json
import logging
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vattn.integrations.vllm import sockets

Json = dict[str, Any]
Answer = Callable[[Json], Json]

MAX_LINE_BYTES = 16 * 2**20
_CHUNK_BYTES = 64 * 2**10
_LOG = logging.getLogger(__name__)


class RemoteError(RuntimeError):
    """The other side answered with an error.

    Parameters
    ----------
    message : str
        What it said.
    kind : str
        Name of the exception's type over there, such as ``"ValueError"``.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


class AnotherEngine(ValueError):
    """A worker has come to an engine that it is not of, but whose name its own engine has."""


class ChannelClosed(ConnectionError):
    """The other side is gone, or there is no telling any more what it has done."""


def encode(message: Json) -> bytes:
    """Write one line.

    Raises
    ------
    TypeError
        Not a dictionary, or something in it has no form in JSON.
    ValueError
        It is longer than ``MAX_LINE_BYTES``.
    """
    if not isinstance(message, dict):
        raise TypeError(f"a message is a {type(message).__name__}, expected a dict")
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a message has {len(line)} bytes, at most {MAX_LINE_BYTES} can be sent")
    return line


def respond(answer: Answer, request: Json) -> bytes:
    """Make the line that answers a request; an error if ``answer`` raises or cannot be sent."""
    try:
        return encode(answer(request))
    except Exception as error:  # whatever it is: who asked waits for an answer
        if not isinstance(error, (ValueError, OSError, MemoryError)):
            _LOG.exception("a request failed: %.200r", request)
        return encode_error(error)


def encode_error(error: Exception) -> bytes:
    """Write an error as the other side's :class:`RemoteError` wants it."""
    return encode({"error": str(error)[:4096], "kind": type(error).__name__})


def try_to_send(line: Line, message: bytes) -> None:
    """Send to somebody who may be gone or may not read."""
    try:
        line.send(message, time.monotonic() + 1.0)
    except (ChannelClosed, TimeoutError) as error:
        _LOG.debug("an error could not be sent: %s", error)


class Line:
    """A connection. One thread reads and writes at a time; any may :meth:`shutdown`."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = sockets.keep_from_children(connected)
        self._read = bytearray()  # what came after the last line that was returned

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; only for the thread that reads and writes."""
        self._socket.close()

    def send(self, line: bytes, deadline: float | None = None) -> None:
        """Send what :func:`encode` made.

        Raises
        ------
        ChannelClosed
            The other side is gone.
        TimeoutError
            ``deadline`` (of ``time.monotonic()``; none if None) has passed. Part may be sent.
        """
        with self._translated(deadline):
            self._socket.sendall(line)

    def receive(self, deadline: float | None = None) -> Json | None:
        """Read one line; None if the other side has closed.

        Raises
        ------
        ChannelClosed, TimeoutError
            As :meth:`send`. After a timeout the call can be made again.
        ValueError
            The line is too long, or is no JSON object. The connection is of no more use.
        """
        line = self._next(deadline)
        if line is None:
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a message is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise ValueError(f"a message is a {type(message).__name__}, expected an object")
        return message

    def expect(self, deadline: float | None = None) -> Json:
        """Read one line, which the other side owes: as :meth:`receive`, but a close is an error."""
        message = self.receive(deadline)
        if message is None:
            raise ChannelClosed("the other side has closed the connection")
        return message

    def wait_closed(self) -> None:
        """Wait until the other side, or :meth:`shutdown`, closes. Reads nothing."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.poll()

    def shutdown(self) -> None:
        """Wake whoever waits here, on both sides. Safe from any thread, and more than once."""
        sockets.shutdown(self._socket)

    def _next(self, deadline: float | None) -> bytes | None:
        searched = 0
        while True:
            end = self._read.find(b"\n", searched)
            searched = len(self._read)
            if (end if end >= 0 else searched) >= MAX_LINE_BYTES:
                raise ValueError(f"a message has more than {MAX_LINE_BYTES} bytes")
            if end >= 0:
                line = bytes(self._read[:end])
                del self._read[: end + 1]
                return line
            with self._translated(deadline):
                chunk = self._socket.recv(_CHUNK_BYTES)
            if not chunk:
                return None  # half a line says nothing
            self._read += chunk

    @contextmanager
    def _translated(self, deadline: float | None) -> Iterator[None]:
        try:
            # Not 0 when it is late: that would mean "do not wait", which fails differently.
            left_s = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
            self._socket.settimeout(left_s)
            yield
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(f"the other side is gone: {error}") from error
