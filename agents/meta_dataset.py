"""The meta-dataset: how the same random trials did on many tasks of meta-train, for the meta-learners that study them.

Its trials are a random search of the judge's own kind, but not the same one: the judge's banks remain unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpo_env.base_schedules import BaseSchedule
from hpo_env.hyperparameters import CONTROLS, Array
from inner_models.tasks import OptimizerName, Task, TaskDistribution

from .application import Run
from .calibration import SEARCH_RANGES, RandomTrials, sample_schedules
from .cells import Cell, Store, run_cells
from .measures import LOSS_FLOOR, capped
from .meta_features import meta_features
from .schedules import Cosine

SEED = 1
"""Of the random search; the judge's banks have 0."""

CALIBRATED_SEEDS = (0, 1, 2)
"""Runs that the calibrated schedule's loss is a mean over."""

SCORE_CAP = 1.0
"""Largest score: one failure does not decide."""


@dataclass(frozen=True)
class Studied:
    """A task, and how trials did on it.

    A score is ln(a trial's validation loss at its end / that of the calibrated schedule), at most `SCORE_CAP`: below 0
    the trial is better. The i-th trials of all tasks with the same optimizer have the same settings.

    Attributes:
        features: `agents.meta_features.meta_features`.
        runs: of the trials.
        calibrated: runs of the calibrated schedule.
    """

    task: Task
    features: Mapping[str, float]
    runs: Sequence[Run]
    calibrated: Sequence[Run]

    @cached_property
    def settings(self) -> Array:
        """`[trials, searched]`, as `to_unit` gives them."""
        trials = sampled(self.task.optimizer, len(self.runs))
        return np.stack([to_unit(trial, self.task.optimizer) for trial in trials])

    @cached_property
    def reference(self) -> float:
        """The geometric mean of the calibrated schedule's losses."""
        ends = capped([run.val_loss[-1] for run in self.calibrated], [run.initial_loss for run in self.calibrated])
        return float(np.exp(np.log(np.maximum(ends, LOSS_FLOOR)).mean()))

    @cached_property
    def curves(self) -> Array:
        """`[trials, 1 + horizon]`: the scores that the trials would have had at the end of each interval, the first
        before training; at most `SCORE_CAP` only at the end, but finite."""
        initial = np.array([run.initial_loss for run in self.runs])
        losses = np.array([[run.initial_loss, *run.val_loss] for run in self.runs])
        return np.asarray(np.log(np.maximum(capped(losses, initial[:, None]), LOSS_FLOOR) / self.reference))

    @property
    def scores(self) -> Array:
        """`[trials]`."""
        return np.minimum(self.curves[:, -1], SCORE_CAP)


def sampled(optimizer: OptimizerName, count: int) -> list[BaseSchedule]:
    """The settings of the first `count` trials."""
    return sample_schedules(optimizer, count, np.random.default_rng(SEED))


def to_unit(schedule: BaseSchedule, optimizer: OptimizerName) -> Array:
    """A configuration's place in `SEARCH_RANGES`, `[searched]` in 0..1 (clipped); on a log scale but for dropout."""
    place = []
    for name, (low, high) in SEARCH_RANGES[optimizer].items():
        value = getattr(schedule, name)
        scaled = np.array([value, low, high]) if name == "dropout" else np.log([value, low, high])
        place.append((scaled[0] - scaled[1]) / (scaled[2] - scaled[1]))
    return np.asarray(np.clip(place, 0.0, 1.0))


def from_unit(place: Array, optimizer: OptimizerName) -> BaseSchedule:
    """The inverse of `to_unit`; the batch size becomes one that the engine can train."""
    values = {}
    for at, (name, (low, high)) in zip(np.clip(place, 0.0, 1.0), SEARCH_RANGES[optimizer].items(), strict=True):
        value = low + at * (high - low) if name == "dropout" else low * (high / low) ** at
        control = CONTROLS[name]
        values[name] = float(control.from_scale(control.to_scale(np.asarray(value))))
    return BaseSchedule(**values)


def study(
    tasks: Sequence[Task],
    trials: int,
    store: Store,
    *,
    workers: int = 2,
    report: Callable[[float, float, str], None] = lambda done, total, name: None,
) -> list[Studied]:
    """Run what `store` does not hold yet, and gather it, in the order of `tasks`.

    Args:
        trials: random trials of each task, at least 2; they train with the seeds of `CALIBRATED_SEEDS` in turn.
        workers, report: as for `agents.cells.run_cells`.
    """
    if trials < 2:
        raise ValueError(f"trials must be at least 2, not {trials}")
    seeds = tuple(CALIBRATED_SEEDS[trial % len(CALIBRATED_SEEDS)] for trial in range(trials))
    banks = [Cell(task, RandomTrials(0, trials, SEED), seeds) for task in tasks]
    references = [Cell(task, Cosine("calibrated"), CALIBRATED_SEEDS) for task in tasks]
    run_cells([*banks, *references], store, workers=workers, report=report)
    return [
        Studied(task, meta_features(task), store.load(bank), store.load(reference))  # type: ignore[arg-type]
        for task, bank, reference in zip(tasks, banks, references, strict=True)
    ]


def draw(distribution: TaskDistribution, count: int, seed: int = 0) -> list[Task]:
    """`count` tasks of a distribution."""
    rng = np.random.default_rng(seed)
    return [distribution.sample(rng) for _ in range(count)]
