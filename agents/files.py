"""Files of a run: written so that nothing that existed is lost, by one training at a time."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

CONFIG_FILE = "config.json"
"""The effective settings, in every run's folder."""

LOCK_FILE = "writer.lock"
"""Locked while a training writes to the folder; what it contains is only for messages."""

_PARTIAL = ".partial"
"""How the names of files end that are not yet written to the end."""

_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "check the disk",
}

_log = logging.getLogger("hyperpilot")


class ScalarWriter(Protocol):
    """What a TensorBoard `SummaryWriter` offers here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class FolderInUse(ValueError):
    """Another training writes to the folder."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the old file stays whole until the new one is, through power cuts too.

    The file has the old one's permissions; a new one has those that the umask leaves.

    Raises:
        OSError: not written, for lack of space or rights for example; the message names the path and what to do.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}{_PARTIAL}")
    with _explained(path):
        _make_folder(path.parent)
        try:
            _write(partial, data, like=path)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        _sync_folder(path.parent)


def remove_partial(folder: Path) -> None:
    """Remove what killed writers left half-written in `folder`. Only for the folder's only writer."""
    for path in folder.glob(f".*{_PARTIAL}"):
        with suppress(OSError):  # it harms nobody, and the next writer tries again
            os.unlink(path)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder (made if need be) for this process, until the context is left or the process dies, however.

    What killed writers left half-written is removed. Child processes do not hold the folder.

    Raises:
        FolderInUse: another training holds it.
        OSError: the folder cannot be written to.
    """
    import fcntl  # not on Windows, where all else works

    lock = folder / LOCK_FILE
    with _explained(lock):
        _make_folder(folder)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # the other may have got it this moment, and not yet said who it is
            holder = os.read(descriptor, 500).decode(errors="replace").strip() or "another process"
            raise FolderInUse(
                f"{folder} is in use by {holder}; wait for it, stop it or choose another folder"
            ) from None
        except OSError as error:
            _log.warning("cannot lock %s (%s): see to it that nothing else writes there", lock, error.strerror)
        else:
            remove_partial(folder)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        yield
    finally:
        if descriptor in _held:  # not in a forked child, which may come by here too
            _held.remove(descriptor)
            os.close(descriptor)


_held: set[int] = set()
"""Descriptors of lock files. A lock lives as long as any copy of its descriptor, so forked children close theirs."""


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "choose a folder that can be written to")
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; {remedy}") from error


def _write(path: Path, data: bytes, like: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with suppress(OSError):  # there may be no old one, and not all file systems have permissions
            os.chmod(path, like.stat().st_mode)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` outlast a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # of file systems that cannot do it
                raise
        finally:
            os.close(descriptor)
