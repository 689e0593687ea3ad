"""An object in a process of its own, whose death, silence or exception reaches the caller as one kind of error."""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from inner_models.workers import one_thread_each

_PR_SET_PDEATHSIG = 1
_PARTS = 20


class WorkerFault(RuntimeError):
    """A worker died, did not answer in time, or raised. The message is one line.

    Attributes:
        details: the worker's traceback, as far as there is one.
    """

    def __init__(self, line: str, details: str = "") -> None:
        super().__init__(line)
        self.details = details


class Patience:
    """A time to wait for answers, shared by all that are waited for. While the process is stopped (Ctrl-Z) it hardly
    passes: it does so in parts, and a stop takes one of them at most."""

    def __init__(self, seconds: float) -> None:
        self._part, self._parts = seconds / _PARTS, _PARTS

    def wait(self, connection: Connection) -> bool:
        """Whether there comes something to receive."""
        while not connection.poll(self._part if self._parts else 0):
            if not self._parts:
                return False
            self._parts -= 1
        return True


class Remote:
    """A process that holds one object and applies functions to it, one call at a time.

    It ignores Ctrl-C, which a terminal sends to all its processes: the parent decides. It ends when `end` is called and
    when the parent is gone, however that went: at once if the parent's main thread made it, on Linux; else as soon as
    what it runs lets another thread run (code that holds Python's lock does not), at the latest when its call is over.

    Args:
        make: a pickled function that makes the object, which has a `close` method. What comes of it is the answer to a
            first call: `receive` it.
    """

    def __init__(self, make: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._words, words = context.Pipe(duplex=False)
        in_main_thread = threading.current_thread() is threading.main_thread()
        arguments = (theirs, words, in_main_thread)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with one_thread_each(), _without_interrupts():
            self._process.start()
        theirs.close()
        words.close()
        self._call = 0
        with suppress(OSError):  # see `send`
            self._connection.send_bytes(make)

    def send(self, function: Callable[[Any], Any]) -> None:
        """Begin to apply `function` to the object. It is pickled, and what its module imports, the worker imports."""
        message = ForkingPickler.dumps(function)
        self._call += 1
        with suppress(OSError):  # the worker is gone: `receive` says what it died of
            self._connection.send_bytes(message)

    def receive(self, patience: Patience) -> Any:
        """What the last call gave. Answers to earlier ones that were not received (an interrupt) are dropped.

        Raises:
            WorkerFault: the call raised (the worker lives on), the worker died, or hung (it is killed).
        """
        call, error, answer = -1, None, None
        while call != self._call:
            try:
                if not patience.wait(self._connection):
                    raise self._end_found(hung=self._process.is_alive())
                call, error, answer = self._connection.recv()
            except (EOFError, OSError):
                raise self._end_found(hung=False) from None
        if error is not None:
            raise WorkerFault(*error)
        return answer

    def _end_found(self, hung: bool) -> WorkerFault:
        """Make sure that the process is over, and say how it ended."""
        if hung:
            self._process.terminate()  # on which it writes where it is
        self._process.join(1)
        self._process.kill()
        self._process.join(1)
        details = os.read(self._words.fileno(), 1 << 16).decode(errors="replace") if self._words.poll() else ""
        if hung:
            return WorkerFault("the worker did not answer in time, and was killed", details)
        code = self._process.exitcode or 0
        reason = f"exit code {code}" if code >= 0 else signal.strsignal(-code)
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        return WorkerFault(f"the worker died ({reason}{hint})", details)


def end(remotes: Sequence[Remote], grace: float = 0.0) -> None:
    """Close the objects and end the processes. Those that have not ended within `grace` seconds are killed."""
    for remote in remotes:
        remote._connection.close()
    deadline = time.monotonic() + grace
    for remote in remotes:
        remote._process.join(max(0.0, deadline - time.monotonic()))
    for remote in remotes:
        remote._process.kill()
    for remote in remotes:
        remote._process.join(1)
        remote._words.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside do not see Ctrl-C, not even before they can ask for it."""
    resource_tracker.ensure_running()  # else started inside, where it would change what is set here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, words: Connection, in_main_thread: bool) -> None:
    """The process: answer each call with (its number, None, answer) or (its number, (line, traceback), None)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if sys.platform == "linux" and in_main_thread:  # the signal comes when the *thread* is over that made the process
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.enable(words.fileno(), all_threads=False)
    faulthandler.register(signal.SIGTERM, words.fileno(), all_threads=False, chain=True)
    held: Any = None
    with suppress(EOFError, OSError):  # the parent has closed its end
        for call in itertools.count():
            message = connection.recv_bytes()
            try:
                function = pickle.loads(message)
                if call == 0:
                    held, answer = function(), None
                else:
                    answer = function(held)
                reply = ForkingPickler.dumps((call, None, answer))
            except BaseException as error:  # also an environment's sys.exit()
                line = " ".join("".join(traceback.format_exception_only(error)).split())
                reply = ForkingPickler.dumps((call, (line, traceback.format_exc()), None))
            connection.send_bytes(reply)
    if held is not None:
        held.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
