"""Local sockets in a directory of the user's own: where they are, who may connect, what is stale.

Files of sockets are made and removed while the directory is locked, so that nobody takes the socket
of a program that is just starting for a stale one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import struct
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAX_PATH_BYTES = 107  # sun_path of sockaddr_un has 108, of which one ends the string
_NAME = re.compile(r"[A-Za-z0-9._-]{1,48}")
_BACKLOG = 128

# Sockets of this process. A child that is forked without exec must not keep them: while it lived,
# nobody would notice that its parent has died.
_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    for inherited in list(_open_sockets):
        inherited.close()  # not shutdown(), which would end the parent's connection


os.register_at_fork(after_in_child=_close_in_child)


def runtime_dir() -> Path:
    """Directory of the sockets: ``$XDG_RUNTIME_DIR/vattn``, else ``/tmp/vattn-<uid>``.

    It is made if it is not there.

    Raises
    ------
    OSError
        It cannot be made, or others can write to it: then they could answer in an engine's place.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    uid = os.geteuid()
    path = Path(base) / "vattn" if base else Path(f"/tmp/vattn-{uid}")
    remedy = "set XDG_RUNTIME_DIR to a directory of your own, in the engine's environment as well"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass  # made before, and looked at below like a new one
    except OSError as error:
        raise OSError(f"cannot make {path}: {error.strerror}; {remedy}") from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is not a directory; remove it, or {remedy}")
    if found.st_uid != uid:
        raise PermissionError(f"{path} belongs to user {found.st_uid}, not to {uid}; {remedy}")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise PermissionError(f"{path} is open to others (mode {mode:o}); run chmod 700 {path}")
    return path


def socket_path(name: str) -> Path:
    """Path of the socket of the engine called ``name``, whether or not it is there.

    Raises
    ------
    ValueError
        Not a name, or the path is longer than a socket's may be.
    OSError
        As :func:`runtime_dir`.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"name is {name!r}, expected 1 to 48 letters, digits and . _ -")
    path = runtime_dir() / f"{name}.sock"
    length = len(os.fsencode(path))
    if length > _MAX_PATH_BYTES:
        raise ValueError(
            f"{path} has {length} bytes, a socket's path at most {_MAX_PATH_BYTES}; set a shorter "
            "name, or XDG_RUNTIME_DIR to a shorter path"
        )
    return path


def keep_from_children(open_socket: socket.socket) -> socket.socket:
    """Close a socket in children that are forked from now on; return it."""
    _open_sockets.add(open_socket)
    return open_socket


def shutdown(open_socket: socket.socket) -> None:
    """Wake whoever waits on a socket, as often as one likes."""
    try:
        open_socket.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.EBADF):  # the other side or we were first
            raise


def is_trusted(connected: socket.socket) -> bool:
    """Whether the other side runs as the same user, or as root."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


def connect(path: Path, deadline: float) -> socket.socket:
    """Connect; wait only while the other side has too many connections to accept.

    Raises
    ------
    FileNotFoundError, ConnectionRefusedError
        Nobody listens there.
    TimeoutError
        ``deadline`` has passed.
    """
    while True:
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connecting.settimeout(0)  # a local connection is made at once or not at all
            connecting.connect(str(path))
            return keep_from_children(connecting)
        except BlockingIOError:
            connecting.close()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} accepts no more connections") from None
            time.sleep(0.01)
        except BaseException:
            connecting.close()
            raise


def is_listening(path: Path) -> bool:
    """Whether a program listens there."""
    try:
        with connect(path, deadline=0.0):
            return True
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except TimeoutError:
        return True  # and has much to do


def listen(path: Path) -> tuple[socket.socket, os.stat_result]:
    """Make a socket that only this user may connect to; replace one that nobody listens to.

    Returns
    -------
    socket, os.stat_result
        The result is of the file, for :func:`remove`.

    Raises
    ------
    ValueError
        Somebody listens there.
    OSError
        The file cannot be made.
    """
    with _locked(path.parent):
        if is_listening(path):
            raise ValueError(
                f"an engine named {path.stem!r} is running ({path}); set another name for this one "
                "in kv_connector_extra_config"
            )
        _unlink_socket(path)
        listener = keep_from_children(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            listener.bind(str(path))
            path.chmod(0o600)  # before listen(): until then every connection is refused
            listener.listen(_BACKLOG)
            return listener, path.stat()
        except OSError as error:
            listener.close()
            raise OSError(error.errno, f"{error.strerror}; remove the file", str(path)) from error


def remove(path: Path, made: os.stat_result) -> None:
    """Remove the file that :func:`listen` made, unless another has taken its place.

    Call it before the socket is closed: after that, another file may be given the same inode.
    """
    try:
        with _locked(path.parent):
            if os.path.samestat(path.lstat(), made):
                path.unlink()
    except FileNotFoundError:
        return  # somebody removed it, or the whole directory


def remove_stale(path: Path) -> bool:
    """Remove a socket that nobody listens to; False if somebody does."""
    try:
        with _locked(path.parent):
            if is_listening(path):
                return False
            _unlink_socket(path)
    except FileNotFoundError:
        return True  # with the whole directory
    return True


def _unlink_socket(path: Path) -> None:
    if path.is_socket():  # connecting to any other file is refused as well, and it is not ours
        path.unlink()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # of the directory itself: it leaves no file behind
        yield
    finally:
        # Closing would not be enough: a child forked meanwhile has the lock as well.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
