"""Worker processes that train beside one another."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes started inside use one thread: with more, they fight for the cores and all are slower.

    The libraries read this when they are loaded, so it cannot be set from inside a process.
    """
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def give_back_memory() -> None:
    """Return to the system what has been freed. glibc keeps it, in pieces that models of another size do not fit, and a
    process that trains model after model grows; other C libraries have no such call, and need none."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
