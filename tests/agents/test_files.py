"""That what was written is never lost, and that a folder has one writer."""

from __future__ import annotations

import errno
import fcntl
import itertools
import multiprocessing
import os
import socket
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from agents.files import LOCK_FILE, FolderInUse, only_writer, write_atomically
from tests.faults import storage, writers


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_any_new_file(umask: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        write_atomically(tmp_path / "new", b"1")
    finally:
        os.umask(old)
    assert mode(tmp_path / "new") == 0o666 & ~umask


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_atomically(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", 0o640)


@pytest.mark.parametrize("there", [False, True])
def test_the_old_or_the_new_whichever_call_fails(there: bool, tmp_path: Path) -> None:
    old, new, failed = b"old" * 5000, b"new" * 9000, list[str]()
    for at in itertools.count():
        path = tmp_path / str(at) / "a" / "b" / "file.json"
        if there:
            path.parent.mkdir(parents=True)
            path.write_bytes(old)

        def fail(number: int, name: str, at: int = at) -> None:
            if number == at:
                failed.append(name)
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        error = None
        try:
            with storage.before_each_call(fail):
                write_atomically(path, new)
        except OSError as raised:
            error = raised
        if len(failed) == at:
            break
        assert (error is None) == (failed[-1] == "chmod")
        assert error is None or storage.clear(error, errno.EDQUOT, path)
        assert path.exists() or not there
        assert not path.exists() or path.read_bytes() in ((old, new) if error else (new,))
        assert storage.litter(tmp_path) == 0
    assert error is None
    assert path.read_bytes() == new
    first = ["open", "chmod"] if there else [*["mkdir", "open", "fsync", "close"] * 3, "open"]
    assert failed == [*first, *["write"] * 4, "fsync", "close", "replace", "open", "fsync", "close"]


@pytest.mark.parametrize(("error", "fsync"), [(KeyboardInterrupt(), 1), (OSError(errno.EINVAL, "Invalid argument"), 2)])
def test_interruptions_and_folders_that_cannot_be_synced(error: BaseException, fsync: int, tmp_path: Path) -> None:
    names, interrupted = list[str](), isinstance(error, KeyboardInterrupt)

    def fail(number: int, name: str) -> None:
        names.append(name)
        if name == "fsync" and names.count(name) == fsync:
            raise error

    with storage.before_each_call(fail), pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        write_atomically(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ([] if interrupted else ["file"])


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/below: .*; choose a folder that can be written to"):
        write_atomically(tmp_path / "file" / "below", b"")
    with pytest.raises(OSError, match="cannot write"), only_writer(tmp_path / "file"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="choose a folder that can be written to"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with only_writer(folder), pytest.raises(FolderInUse) as caught, only_writer(folder):
        pytest.fail("two writers")
    message = str(caught.value)
    assert message.startswith(f"{folder} is in use by process {os.getpid()} on {socket.gethostname()} since 20")
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    for _ in range(2):  # whatever became of the one before
        with pytest.raises(KeyError), only_writer(folder):
            raise KeyError


def test_the_lock_that_a_dead_process_left_is_free(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(100 * "process 1 since yesterday\n")
    with only_writer(tmp_path):
        (line,) = (tmp_path / LOCK_FILE).read_text().splitlines()
        assert line.startswith(f"process {os.getpid()} on {socket.gethostname()} since 20")


def test_only_the_only_writer_removes_what_is_half_written(tmp_path: Path) -> None:
    partial = tmp_path / ".0123.partial"
    with only_writer(tmp_path):
        partial.touch()
        with pytest.raises(FolderInUse), only_writer(tmp_path):
            pass
        assert partial.exists()
    with only_writer(tmp_path):
        assert not partial.exists()


def test_children_neither_hold_nor_release_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def child(ready: Any, done: Any) -> None:
        ready.set()
        done.wait(60)

    process = context.Process(target=child, args=(ready, done))
    with only_writer(tmp_path):
        process.start()
        ready.wait()
        with pytest.raises(FolderInUse), only_writer(tmp_path):
            pass
    with only_writer(tmp_path):
        assert process.is_alive()
        done.set()
        process.join()
        with pytest.raises(FolderInUse), only_writer(tmp_path):
            pass


def test_a_forked_child_may_leave_the_context_too(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    parent = os.getpid()
    try:
        with only_writer(tmp_path):
            if not os.fork():
                for _ in range(30):  # whatever number the lock's descriptor has, it is another file's now
                    os.open(os.devnull, os.O_RDONLY)
                before = len(os.listdir("/dev/fd"))
    finally:
        if os.getpid() != parent:
            os.write(writer, str(len(os.listdir("/dev/fd")) - before).encode())
            os._exit(0)
    assert os.read(reader, 10) == b"0"
    os.wait()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    partial = tmp_path / ".0123.partial"
    partial.touch()
    with only_writer(tmp_path):
        assert partial.exists()  # it may be another writer's
        assert f"cannot lock {tmp_path / LOCK_FILE} (No locks available)" in caplog.text


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    assert writers.races(2, tmp_path).failures == ()
