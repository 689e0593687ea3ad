"""What augmentation and label smoothing are worth: runs of the calibrated schedule at fixed strengths of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from hpo_env.base_schedules import REGULARIZERS, calibrated
from hpo_env.hyperparameters import Array
from inner_models.tasks import Regularizer, Task, prepare

from .application import Controller, Run, Runs
from .cells import Cell, Store, run_cells
from .measures import log_ratio
from .summary import losses


@dataclass(frozen=True)
class AtStrengths:
    """The calibrated schedule at fixed strengths of one regularizer, without the other.

    Attributes:
        strengths: the runs are divided evenly among them, in order.
    """

    regularizer: Regularizer
    strengths: tuple[float, ...]

    def attach(self, runs: Runs) -> Controller:
        if runs.runs % len(self.strengths):
            raise ValueError(f"{runs.runs} runs cannot be divided evenly among {len(self.strengths)} strengths")
        return _AtStrengths(self, runs)


class _AtStrengths:
    def __init__(self, method: AtStrengths, runs: Runs) -> None:
        self._schedule = replace(calibrated(runs.task.optimizer), **dict.fromkeys(REGULARIZERS, 0.0))
        self._strengths = np.repeat(method.strengths, runs.runs // len(method.strengths))
        self._regularizer, self._horizon, self._interval = method.regularizer, runs.task.horizon, 0

    @property
    def values(self) -> dict[str, Array]:
        at = (min(self._interval, self._horizon - 1) + 0.5) / self._horizon
        return self._schedule.values(np.full(len(self._strengths), at)) | {self._regularizer: self._strengths}

    def step(self, signals: Mapping[str, Array]) -> None:
        self._interval += 1


@dataclass(frozen=True)
class Effect:
    """What a regularizer did on one task.

    Attributes:
        modality: of the task's data.
        val, test: ln(loss of the run without / with it), above 0 where it helped, `[strengths, seeds]`: at the end on
            the validation split, and on the test split at the run's best validation loss.
    """

    label: str
    modality: str
    regularizer: Regularizer
    val: Array
    test: Array


def measure(
    tasks: Mapping[str, Task],
    strengths: Sequence[float],
    store: Store,
    *,
    seeds: int = 5,
    workers: int = 2,
    report: Callable[[float, float, str], None] = lambda done, total, name: None,
) -> list[Effect]:
    """Every regularizer on every task that can have it, paired with runs without.

    Args:
        tasks: by label; their own regularizers do not matter.
        workers, report: as for `agents.cells.run_cells`.

    Raises:
        ValueError: fewer than 2 seeds, or a strength outside of 0..1 (both excluded).
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, not {seeds}")
    if not strengths or not all(0 < strength < 1 for strength in strengths):
        raise ValueError(f"strengths must lie between 0 and 1, not {', '.join(map(str, strengths)) or 'none at all'}")
    cells: dict[tuple[str, Regularizer], Cell] = {}
    for name in get_args(Regularizer):
        method = AtStrengths(name, (0.0, *strengths))
        for label, task in tasks.items():
            regularized = replace(task, regularizers=(name,))
            if prepare(regularized).regularizers:
                cells[label, name] = Cell(regularized, method, tuple(range(seeds)) * len(method.strengths))
    run_cells(list(cells.values()), store, workers=workers, report=report)
    return [_effect(label, name, cell, store, seeds) for (label, name), cell in cells.items()]


def _effect(label: str, name: Regularizer, cell: Cell, store: Store, seeds: int) -> Effect:
    runs: list[Run] = store.load(cell)  # type: ignore[assignment]
    without, *others = (runs[start : start + seeds] for start in range(0, len(runs), seeds))
    val, test = (
        np.array([log_ratio(losses(without, kind), losses(own, kind)) for own in others]) for kind in ("val", "test")
    )
    return Effect(label, prepare(cell.task).dataset.modality, name, val, test)
