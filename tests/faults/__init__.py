"""Faults brought about on purpose, and what must hold. `make faults` runs the long forms and prints a table; the tests
run short forms of the same functions."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What came of one kind of fault.

    Attributes:
        count: how many times it was brought about.
        failures: what did not hold, a line each; empty when all held.
        remark: figures worth knowing, such as the slowest recovery.
    """

    count: int
    failures: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        name: the fault, as the table calls it.
        must_hold: what is promised, in one line.
        run: `run(count, folder)` brings the fault about `count` times (in an empty folder of its own).
        count: how often in the long form.
    """

    name: str
    must_hold: str
    run: Callable[[int, Path], Outcome]
    count: int


def hear_ctrl_c() -> None:
    """For `preexec_fn`: what a shell starts in the background is deaf to Ctrl-C, and so would be its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
