"""Processes that do the same work at the same time, and the memory that they use."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch

from inner_models.workers import one_thread_each

START_METHOD: Final = "forkserver"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def starting_workers() -> Iterator[ForkServerContext]:
    """The context to start worker processes of any side in, `START_METHOD`'s, of one thread each.

    They are forked from a server, started with the first of them, which has imported what they need (torch alone takes
    seconds) under these variables, and has run nothing.
    """
    multiprocessing.set_forkserver_preload(["sklearn.datasets", "torch._dynamo", "scripts.benchmarking.sides"])
    with one_thread_each():
        yield multiprocessing.get_context(START_METHOD)


class _Desk:
    """Named objects, and calls of their methods."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}

    def __call__(self, name: str, method: str, *arguments: Any) -> Any:
        if method == "build":
            self._objects.pop(name, None)
            factory, *rest = arguments
            self._objects[name] = factory(*rest)
            return None
        if method == "drop":
            self._objects.pop(name, None)
            gc.collect()  # what refers to itself would stay a while
            return None
        return getattr(self._objects[name], method)(*arguments)


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    desk = _Desk()
    while True:
        try:
            message = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((True, desk(*message)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class Crew:
    """Worker processes, each with its own copy of every object built; all work at once, and all are waited for.

    Args:
        workers: processes, of one thread each; 0 works in this process (as on a GPU).
    """

    def __init__(self, workers: int) -> None:
        self.size = max(1, workers)
        self._desk = None if workers else _Desk()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        with starting_workers() as context:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    def build(self, name: str, factory: Any, *arguments: Any) -> None:
        """Have each worker keep `factory(*arguments)` under `name`, in place of what it kept there."""
        self.call(name, "build", factory, *arguments)

    def drop(self, name: str) -> None:
        """Have each worker forget `name`."""
        self.call(name, "drop")

    def call(self, name: str, method: str, *arguments: Any) -> list[Any]:
        """The results of a method of the object called `name`, one a worker.

        Raises:
            RuntimeError: it failed in a worker; the message is the worker's traceback.
        """
        if self._desk:
            return [self._desk(name, method, *arguments)]
        for connection in self._connections:
            connection.send((name, method, *arguments))
        answers = [connection.recv() for connection in self._connections]
        for succeeded, result in answers:
            if not succeeded:
                raise RuntimeError(result)
        return [result for _, result in answers]

    def close(self) -> None:
        """End the workers."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked to."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Memory:
    """What the process that it is built in uses: on the CPU the process's resident memory, on a GPU what is reserved:
    what is allocated leaves out the temporaries of graphs.

    Without /proc, the resident memory is that of the peak throughout.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def now(self) -> int:
        """Bytes in use."""
        if not self._device.startswith("cuda"):
            return _status("VmRSS")
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)


def _status(field: str) -> int:
    path = Path("/proc/self/status")
    if not path.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = path.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
