"""Calibration of the base schedule: the one configuration that is best on average over meta-train.

Random search, in two rounds: every configuration on every task of the first round, then the best ones on fresh tasks.
A configuration's score on a task is the logarithm of its final validation loss over that of the task's best
configuration, capped, so that tasks weigh alike and one failure does not decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from joblib import Parallel, delayed

from hpo_env.actions import BaseSchedule
from hpo_env.hyperparameters import CONTROLS, Array
from inner_models.batched_training import BatchedTraining
from inner_models.tasks import OptimizerName, Task, TaskDistribution

from .application import Controller, Runs

REGRET_CAP = 1.0
"""Largest regret (in log loss) that counts on one task."""

SEARCH_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "adamw": {"lr": (1e-4, 1e-1), "batch_size": (16, 256), "weight_decay": (1e-4, 3.0), "dropout": (0.005, 0.5)},
    "sgd": {"lr": (1e-3, 1.0), "batch_size": (16, 256), "weight_decay": (1e-6, 3e-2), "dropout": (0.005, 0.5)},
}
"""Log-uniform, but for dropout, which is uniform. SGD's decay is coupled to the gradient, hence its range."""


def sample_schedules(optimizer: OptimizerName, count: int, rng: np.random.Generator) -> list[BaseSchedule]:
    """Draw schedules at random from `SEARCH_RANGES`."""
    schedules = []
    for _ in range(count):
        values = {}
        for name, (low, high) in SEARCH_RANGES[optimizer].items():
            drawn = (
                rng.uniform(low, high) if name == "dropout" else math.exp(rng.uniform(math.log(low), math.log(high)))
            )
            control = CONTROLS[name]
            values[name] = float(control.from_scale(control.to_scale(np.asarray(drawn))))
        schedules.append(BaseSchedule(**values))
    return schedules


@dataclass(frozen=True)
class RandomTrials:
    """Part of a random search: trials `first` .. `first + count`, one a run, each with warm-up and cosine decay.

    Attributes:
        seed: seed of the whole search.
    """

    first: int
    count: int
    seed: int = 0

    def attach(self, runs: Runs) -> Controller:
        if runs.runs != self.count:
            raise ValueError(f"{self.count} trials need as many runs, not {runs.runs}")
        return _Trials(self, runs)


class _Trials:
    def __init__(self, trials: RandomTrials, runs: Runs) -> None:
        rng = np.random.default_rng(trials.seed)
        self._schedules = sample_schedules(runs.task.optimizer, trials.first + trials.count, rng)[trials.first :]
        self._horizon = runs.task.horizon
        self._interval = 0

    @property
    def values(self) -> dict[str, Array]:
        progress = np.asarray((min(self._interval, self._horizon - 1) + 0.5) / self._horizon)
        values = [schedule.values(progress) for schedule in self._schedules]
        return {name: np.array([float(v[name]) for v in values]) for name in CONTROLS}

    def step(self, signals: Mapping[str, Array]) -> None:
        self._interval += 1


def final_losses(task: Task, schedules: Sequence[BaseSchedule], seed: int, device: str = "cpu") -> Array:
    """Validation loss at the end of `task` under each schedule, `[len(schedules)]`; all trained as one cohort."""
    training = BatchedTraining(task, [seed] * len(schedules), device=device)
    for interval in range(task.horizon):
        progress = np.asarray((interval + 0.5) / task.horizon)
        values = [schedule.values(progress) for schedule in schedules]
        signals = training.advance({name: np.array([float(v[name]) for v in values]) for name in CONTROLS})
    return signals["val_loss"]


def regrets(losses: Array) -> Array:
    """Log of each loss over the task's best, capped (also where not finite): `[tasks, schedules]` to the same."""
    logs = np.log(np.where(np.isfinite(losses), losses, np.inf) + 1e-12)
    best = np.minimum(logs.min(axis=1, keepdims=True), np.finfo(np.float64).max)  # finite where nothing converged
    return np.asarray(np.minimum(logs - best, REGRET_CAP))


def calibrate(
    optimizer: OptimizerName,
    distribution: TaskDistribution,
    *,
    configurations: int = 256,
    finalists: int = 16,
    tasks: int = 24,
    seed: int = 0,
    workers: int = 2,
    report: Callable[[str], None] = print,
) -> tuple[BaseSchedule, dict[str, float]]:
    """Find the schedule with the least mean regret.

    Returns:
        The schedule, and figures: its mean regret on the second round's tasks, against the best of the finalists; the
        median configuration's on the first round's, against the best of all; the numbers of configurations and tasks.
    """
    rng = np.random.default_rng(seed)
    schedules = sample_schedules(optimizer, configurations, rng)
    distribution = replace(distribution, optimizers=(optimizer,))
    median = math.nan
    for round_, count in enumerate((tasks, 2 * tasks)):
        drawn = [distribution.sample(rng) for _ in range(count)]
        results = Parallel(n_jobs=workers, verbose=0, return_as="generator")(
            delayed(_single_threaded)(task, schedules, index) for index, task in enumerate(drawn)
        )
        losses = []
        for index, result in enumerate(results):
            losses.append(result)
            report(f"{optimizer}: round {round_ + 1}, task {index + 1} of {count} ({drawn[index].name})")
        mean = regrets(np.array(losses)).mean(axis=0)
        if round_ == 0:
            median = float(np.median(mean))
            schedules = [schedules[index] for index in np.argsort(mean)[:finalists]]
    best = int(np.argmin(mean))
    figures = {
        "mean_regret": float(mean[best]),
        "median_configuration_regret": median,
        "configurations": float(configurations),
        "tasks": float(3 * tasks),
    }
    return schedules[best], figures


def _single_threaded(task: Task, schedules: Sequence[BaseSchedule], seed: int) -> Array:
    torch.set_num_threads(1)
    return final_losses(task, schedules, seed)
