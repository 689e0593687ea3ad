"""Run folders and stores: several processes write there at the same time."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from agents.cells import Cell, Store
from agents.files import FolderInUse, only_writer
from agents.schedules import Constant
from tests import fabricated
from tests.faults import Fault, Outcome
from tests.faults.storage import PROCESSES


def records(count: int, folder: Path) -> Outcome:
    """Ten processes write a tenth of the records each, at the same time."""
    each = -(-count // 10)
    cells = [Cell(fabricated.TASK, Constant(), (seed,)) for seed in range(10 * each)]
    expected = {cell.key: [fabricated.run(cell.seeds[0] / 7, seed) for seed in range(20)] for cell in cells}
    barrier = PROCESSES.Barrier(10)
    shares = [[(cell, expected[cell.key]) for cell in cells[start::10]] for start in range(10)]
    processes = [PROCESSES.Process(target=_write_records, args=(folder, share, barrier)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failures = [f"a writer ended with {process.exitcode}" for process in processes if process.exitcode]
    if (found := len(list(folder.iterdir()))) != len(cells):
        failures.append(f"{found} files instead of {len(cells)}")
    store = Store(folder)
    failures += [f"record {c.seeds} is wrong" for c in cells if c not in store or store.load(c) != expected[c.key]]
    return Outcome(len(cells), tuple(failures))


def _write_records(folder: Path, share: list[tuple[Cell, Any]], barrier: Any) -> None:
    barrier.wait()
    for cell, results in share:
        Store(folder).save(cell, results, "cpu")


def races(count: int, folder: Path) -> Outcome:
    """Two processes want the same folder at the same time; the one that gets it is then killed, its child is not."""
    failures, slowest = [], 0.0
    for race in range(count):
        barrier, pipes = PROCESSES.Barrier(2), [PROCESSES.Pipe() for _ in range(2)]
        processes = [PROCESSES.Process(target=_hold, args=(folder, barrier, pipe)) for _, pipe in pipes]
        for process, (_, pipe) in zip(processes, pipes, strict=True):
            process.start()
            pipe.close()
        told = [reader.recv() for reader, _ in pipes]
        won = [child for child, _ in told if child]
        said = " ".join(message for _, message in told)
        if len(won) != 1 or "in use by" not in said:
            failures.append(f"race {race}: {len(won)} had the folder; {said}")
        for process in processes:
            process.kill()
            process.join()
        started = time.monotonic()
        try:
            with only_writer(folder):
                slowest = max(slowest, time.monotonic() - started)
        except FolderInUse as error:
            failures.append(f"race {race}: the dead one still has it: {error}")
        for child in won:
            os.kill(child, signal.SIGKILL)  # fails if it had died, and with it the test its point
    return Outcome(count, tuple(failures), f"free after {1000 * slowest:.1f} ms at most")


def _hold(folder: Path, barrier: Any, told: Connection) -> None:
    barrier.wait()
    try:
        with only_writer(folder):
            child = os.fork()
            if child:
                told.send((child, ""))
            time.sleep(60)
            if not child:
                os._exit(0)
    except FolderInUse as error:
        told.send((0, str(error)))


FAULTS = (
    Fault("ten processes write records", "exactly as many whole records as were written", records, 2000),
    Fault("two trainings in one folder", "one wins, the other is told who; free once the winner is dead", races, 20),
)
