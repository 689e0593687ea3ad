"""Checkpoints: kills, disks that are full or broken, damaged files."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count as numbers
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from agents.checkpoints import Checkpoint, Checkpoints
from tests.faults import Fault, Outcome

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, f"{__package__}.writers"])

CALLS = ("mkdir", "open", "chmod", "write", "fsync", "close", "replace", "unlink")
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
LARGE, SMALL = 250_000, 5_000
"""Numbers in a checkpoint: about 1 MB, and enough for several writes."""


def save(checkpoints: Checkpoints, step: int, size: int) -> None:
    """Save a checkpoint whose contents follow from its step."""
    weights = torch.full((size,), float(step))
    checkpoints.save(step, {"weights": weights, "rng": 3**80 + step, "best": float("-inf")})


def whole(found: Checkpoint | None) -> bool:
    """Whether something was found that is as `save` left it."""
    return (
        found is not None
        and found.state.keys() == {"weights", "rng", "best"}
        and bool((found.state["weights"] == found.step).all())
        and (found.state["rng"], found.state["best"]) == (3**80 + found.step, float("-inf"))
    )


def litter(folder: Path) -> int:
    """How many half-written files lie in `folder` and below."""
    return len(list(folder.rglob("*.partial")))


@contextmanager
def before_each_call(fault: Callable[[int, str], None]) -> Iterator[None]:
    """Call `fault(number, name)` before each system call that writes files (after, with `close`); what it raises is the
    call's error. A write takes half of what it is given, unless that is little."""
    number = numbers()
    mine = threading.get_ident()

    def tampered(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            if threading.get_ident() != mine:
                return call(*arguments, **named)
            if name == "close":
                call(*arguments)
            fault(next(number), name)
            if name == "write" and len(arguments[1]) > 4096:
                arguments = (arguments[0], arguments[1][: len(arguments[1]) // 2])
            return None if name == "close" else call(*arguments, **named)

        return wrapper

    replacements: dict[str, Any] = {name: tampered(name, getattr(os, name)) for name in CALLS}
    with patch.multiple(os, **replacements):
        yield


def _save_forever(folder: Path, step: int, size: int, saved: Connection, die_at: int | None) -> None:
    def die(number: int, name: str) -> None:
        if number == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    with before_each_call(die):
        for number in numbers(step):
            save(Checkpoints(folder, keep=1), number, size)
            saved.send(number)


def kills(count: int, folder: Path, size: int, at_calls: bool) -> Outcome:
    failures, left, last, step = [], 0, -1, 0
    for kill in range(count):
        reader, writer = PROCESSES.Pipe(duplex=False)
        arguments = (folder, step, size, writer, kill if at_calls else None)
        process = PROCESSES.Process(target=_save_forever, args=arguments)
        process.start()
        writer.close()
        if not at_calls:
            last = reader.recv()
            time.sleep(random.uniform(0, 0.03))
            process.kill()
        process.join()
        try:
            while True:
                last = reader.recv()
        except EOFError:
            pass
        left += litter(folder)
        found = Checkpoints(folder).newest()
        reached = found.step if found else -1
        if not (last <= reached <= last + 1) or (found and not whole(found)):
            failures.append(f"kill {kill}: step {last} was saved, but {reached} is the newest, or it is not whole")
        if process.exitcode != -signal.SIGKILL:
            failures.append(f"kill {kill}: the writer ended with {process.exitcode}")
        last, step = reached, reached + 1
    save(Checkpoints(folder, keep=1), step, size)
    if litter(folder):
        failures.append("what killed writers left was not removed")
    return Outcome(count, tuple(failures), f"{step} checkpoints saved, {left} kills left a half-written file")


def failing_calls(count: int, folder: Path, errors: Sequence[int] = ERRORS) -> Outcome:
    """Each call of a save fails in turn, with each error, once or from then on: at most `count`, and all there are."""
    failures, checkpoints, variants = list[str](), Checkpoints(folder, keep=1), list(product(errors, (False, True)))
    for step in range(3):
        save(checkpoints, step, SMALL)
    last = 2
    for attempt in range(count):
        at, (code, lasting) = attempt // len(variants), variants[attempt % len(variants)]
        hit, error = "", None

        def fail(number: int, name: str, at: int = at, code: int = code, lasting: bool = lasting) -> None:
            nonlocal hit
            if number == at or (lasting and number > at and name not in ("unlink", "close")):
                hit = hit or name
                raise OSError(code, os.strerror(code), "somewhere")

        try:
            with before_each_call(fail):
                save(checkpoints, last + 1, SMALL)
        except OSError as raised:
            error = raised
        if not hit:
            return Outcome(attempt, tuple(failures), f"{at} calls in a save")
        label = f"{errno.errorcode[code]} {'from' if lasting else 'at'} call {at} ({hit}): "
        found = checkpoints.newest()
        if not whole(found) or found is None or not (last + (error is None) <= found.step <= last + 1):
            failures.append(f"{label}{found and found.step} is the newest, {last} was")
        if (error is None) != (hit in ("chmod", "unlink")):
            failures.append(f"{label}{error!r} was raised")
        if error and not clear(error, code, checkpoints.folder):
            failures.append(f"{label}no clear message: {error}")
        if litter(folder):
            failures.append(f"{label}half-written files are left")
        last += 2
        save(checkpoints, last, SMALL)
        if len(list(checkpoints.folder.iterdir())) > 1:
            failures.append(f"{label}old checkpoints are left")
    return Outcome(count, tuple(failures), "not all calls were tried")


def clear(error: OSError, code: int, path: Path) -> bool:
    """Whether the error says in one line what could not be written, why, and what to do."""
    text = str(error)
    parts = (f"cannot write {path}", f"{os.strerror(code)}; ")
    return error.errno == code and all(part in text for part in parts) and "\n" not in text


def file_size_limit(count: int, folder: Path) -> Outcome:
    """The kernel cuts the writes of another process short (RLIMIT_FSIZE)."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return Outcome(count, tuple(pool.submit(exhaust, count, folder, errno.EFBIG).result()))


def full_disk(count: int, folder: Path) -> Outcome:
    """A file system of 4 MB that is nearly full, in a mount namespace of its own."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4m none "$0" && exec "$@"']
    if not shutil.which("unshare") or subprocess.run([*mount, str(folder), "true"], capture_output=True).returncode:
        return Outcome(0, remark="not done: needs the right to mount")
    code = f"from tests.faults.storage import *; print(json.dumps(exhaust({count}, Path.cwd(), errno.ENOSPC)))"
    command = [*mount, str(folder), "sh", "-c", 'cd "$0" && exec "$@"', str(folder), sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    failures = json.loads(done.stdout) if not done.returncode else [done.stderr[-500:]]
    return Outcome(count, tuple(failures))


def exhaust(count: int, folder: Path, code: int) -> list[str]:
    """Save `count` times with less room than is needed, and after each of them with enough."""
    failures, checkpoints, draw = [], Checkpoints(folder, keep=1), random.Random(0)
    save(checkpoints, 0, LARGE)
    for step in range(1, 2 * count, 2):
        room, error = draw.randrange(4 * LARGE), None
        with _little_room(folder, room) if code == errno.ENOSPC else _file_limit(room):
            try:
                save(checkpoints, step, LARGE)
            except OSError as raised:
                error = raised
            found = checkpoints.newest()
        if error is None or not clear(error, code, checkpoints.folder):
            failures.append(f"room for {room} bytes: {error!r} was raised")
        if not whole(found) or found is None or found.step != max(step - 1, 0) or litter(folder):
            failures.append(f"room for {room} bytes: the last checkpoint was lost, or litter left")
        save(checkpoints, step + 1, LARGE)
    return failures


@contextmanager
def _file_limit(room: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _little_room(folder: Path, room: int) -> Iterator[None]:
    space, ballast = os.statvfs(folder), folder / "ballast"
    ballast.write_bytes(bytes(space.f_bavail * space.f_bsize - room))
    try:
        yield
    finally:
        ballast.unlink()


def cuts(count: int, folder: Path) -> Outcome:
    """The newest checkpoint, cut short after so many bytes."""
    checkpoints, data = _two(folder)
    lengths = range(len(data))[:count]
    return Outcome(len(lengths), tuple(f for length in lengths for f in _damaged(checkpoints, data[:length])))


def flips(count: int, folder: Path) -> Outcome:
    """The newest checkpoint with one bit wrong."""
    (checkpoints, data), failures, draw = _two(folder), list[str](), random.Random(0)
    for _ in range(count):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        failures += _damaged(checkpoints, bytes(flipped))
    return Outcome(count, tuple(failures), f"{8 * len(data)} bits in the file")


def _two(folder: Path) -> tuple[Checkpoints, bytes]:
    checkpoints = Checkpoints(folder)
    for step in range(2):
        save(checkpoints, step, 10)
    return checkpoints, _newest_path(checkpoints).read_bytes()


def _newest_path(checkpoints: Checkpoints) -> Path:
    return max(checkpoints.folder.glob("*.safetensors"))


def _damaged(checkpoints: Checkpoints, data: bytes) -> list[str]:
    path = _newest_path(checkpoints)
    path.write_bytes(data)
    with patch.object(logging.getLogger("hyperpilot"), "warning") as warning:
        found = checkpoints.newest()
    told = [str(call) for call in warning.call_args_list]
    if found is None or found.step != 0 or not whole(found) or len(told) != 1 or path.name not in told[0]:
        return [f"damaged to {data!r}: found {found}, told {told}"]
    return []


FAULTS = (
    Fault(
        "SIGKILL while saving checkpoints",
        "the newest checkpoint is whole and no older than the last one reported as saved",
        partial(kills, size=LARGE, at_calls=False),
        200,
    ),
    Fault(
        "SIGKILL at each system call of a save",
        "the newest checkpoint is whole and no older than the last one reported as saved",
        partial(kills, size=SMALL, at_calls=True),
        60,
    ),
    Fault(
        "disk full, quota, broken, read-only at each call",
        "the last good checkpoint stays, no litter, one clear line",
        failing_calls,
        1000,
    ),
    Fault(
        "file size limit of the kernel",
        "the last good checkpoint stays, no litter, one clear line",
        file_size_limit,
        100,
    ),
    Fault("disk really full", "the last good checkpoint stays, no litter, one clear line", full_disk, 100),
    Fault("checkpoint cut short", "never a wrong load: the one before is found, one warning", cuts, 10_000),
    Fault("bit flipped in a checkpoint", "never a wrong load: the one before is found, one warning", flips, 2000),
)
