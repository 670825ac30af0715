"""Where the sockets of engines are, who may use them, and which of them are stale."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vattn.integrations.vllm import sockets
from vattn.integrations.vllm.channel import running, runtime_dir, socket_path


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of this test; its path is short, as a socket's has to be."""
    with TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def leave_stale(path: Path) -> None:
    """Do what a process that was killed does: leave a socket that nobody listens to."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


def test_the_directory_is_made_for_this_user_alone(base: Path) -> None:
    before = os.umask(0)
    try:
        made = runtime_dir()
    finally:
        os.umask(before)
    assert made == base / "vattn"
    assert mode(made) == 0o700
    assert runtime_dir() == made


@pytest.mark.parametrize("unset", [None, ""])
def test_without_a_runtime_directory_it_is_in_tmp(
    unset: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(f"/tmp/vattn-{os.geteuid()}")
    was_there = path.exists()
    if unset is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", unset)
    assert runtime_dir() == path
    if not was_there:
        path.rmdir()


def test_a_directory_that_is_open_to_others_is_refused(base: Path) -> None:
    runtime_dir().chmod(0o750)
    with pytest.raises(PermissionError, match=r"open to others \(mode 750\); run chmod 700 /"):
        runtime_dir()


def test_a_directory_of_somebody_else_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = os.geteuid()
    runtime_dir()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match=rf"belongs to user {owner}.*set XDG_RUNTIME_DIR"):
        runtime_dir()


def test_a_link_to_a_directory_is_refused(base: Path) -> None:
    (base / "elsewhere").mkdir(mode=0o700)
    (base / "vattn").symlink_to(base / "elsewhere")
    with pytest.raises(NotADirectoryError, match="is not a directory; remove it"):
        runtime_dir()


def test_a_directory_that_cannot_be_made_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "missing"))
    with pytest.raises(OSError, match=r"cannot make .*missing/vattn: No such file.*; set XDG_RUN"):
        runtime_dir()


@pytest.mark.parametrize("name", ["", "a/b", "..\0", "a b", "ä", "x" * 49, "a\n"])
def test_a_name_that_is_none_is_refused(name: str, base: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 1 to 48 letters, digits and \. _ -"):
        socket_path(name)


def test_a_name_becomes_a_path(base: Path) -> None:
    assert socket_path("my-Chat_1.0") == base / "vattn" / "my-Chat_1.0.sock"


def test_a_path_that_no_socket_can_have_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = 107 - len(f"{base}//vattn/x.sock")
    (base / ("d" * rest)).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / ("d" * rest)))
    listener, _ = sockets.listen(socket_path("x"))  # 107 bytes are allowed, and possible
    listener.close()
    with pytest.raises(ValueError, match=r"has 108 bytes, a socket's path at most 107; set a"):
        socket_path("xx")


def test_nobody_else_can_connect_at_any_moment(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = socket_path("chat")
    modes = []
    listen = socket.socket.listen

    def spy(self: socket.socket, backlog: int) -> None:
        modes.append(mode(path))
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", spy)
    before = os.umask(0)
    try:
        listener, _ = sockets.listen(path)
    finally:
        os.umask(before)
    with listener:
        assert modes == [0o600]
        assert mode(path) == 0o600


@pytest.mark.parametrize(("uid", "trusted"), [(1234, True), (0, True), (1235, False)])
def test_the_same_user_and_root_are_trusted(
    uid: int, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Connected:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
            return struct.pack("3i", 77, uid, 1234)

    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert sockets.is_trusted(Connected()) is trusted  # type: ignore[arg-type]


def test_a_stale_socket_is_replaced(base: Path) -> None:
    path = socket_path("chat")
    leave_stale(path)
    listener, _ = sockets.listen(path)
    with listener:
        assert sockets.is_listening(path)


def test_a_socket_in_use_is_not_replaced(base: Path) -> None:
    path = socket_path("chat")
    listener, _ = sockets.listen(path)
    with listener:
        with pytest.raises(ValueError, match=r"named 'chat' is running .* set another name"):
            sockets.listen(path)
        assert sockets.remove_stale(path) is False
        assert sockets.is_listening(path)


def test_a_socket_with_a_full_queue_is_in_use(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_BACKLOG", 0)
    path = socket_path("chat")
    listener, _ = sockets.listen(path)
    with listener, sockets.connect(path, deadline=0.0):
        with pytest.raises(TimeoutError, match="accepts no more connections"):
            sockets.connect(path, deadline=0.0)
        assert sockets.is_listening(path)


def test_a_file_that_is_no_socket_is_left_alone(base: Path) -> None:
    path = socket_path("chat")
    path.write_text("mine")
    assert running() == []
    with pytest.raises(OSError, match=r"Address already in use; remove the file: .*chat\.sock"):
        sockets.listen(path)
    assert path.read_text() == "mine"


def test_stale_sockets_are_removed_by_whoever_looks(base: Path) -> None:
    leave_stale(socket_path("dead"))
    listener, _ = sockets.listen(socket_path("chat"))
    with listener:
        assert running() == ["chat"]
        assert [path.name for path in runtime_dir().iterdir()] == ["chat.sock"]


def test_a_successors_socket_is_not_removed(base: Path) -> None:
    path = socket_path("chat")
    first, made = sockets.listen(path)
    path.unlink()  # by hand, or by a cleaner of /tmp
    second, _ = sockets.listen(path)
    with first, second:
        sockets.remove(path, made)
        assert sockets.is_listening(path)


def test_removing_twice_or_with_the_directory_is_no_error(base: Path) -> None:
    path = socket_path("chat")
    listener, made = sockets.listen(path)
    listener.close()
    sockets.remove(path, made)
    sockets.remove(path, made)
    path.parent.rmdir()
    sockets.remove(path, made)
    assert sockets.remove_stale(path) is True


def test_a_file_is_not_stale_while_its_maker_holds_the_directory(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between bind() and listen() a socket refuses, as a stale one does: nobody may look then."""
    path = socket_path("chat")
    listen = socket.socket.listen
    looking = threading.Thread(target=sockets.remove_stale, args=(path,))

    def spy(self: socket.socket, backlog: int) -> None:
        looking.start()
        looking.join(0.3)
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", spy)
    listener, _ = sockets.listen(path)
    with listener:
        looking.join()
        assert path.exists()
