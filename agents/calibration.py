"""Calibration on meta-train: the one configuration that is best on average, and the rule that policies deviate from.

The one configuration comes from random search in two rounds: every configuration on every task of the first round, then
the best ones on fresh tasks. The rule, which follows the length and the size of a run, comes from a cross-entropy
method: trials on many tasks, a linear fit to the good ones of each, and again with trials around that fit.

A trial's score on a task is the logarithm of its final validation loss over that of the task's best trial, capped, so
that tasks weigh alike and one failure does not decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from joblib import Parallel, delayed

from hpo_env.base_schedules import TYPICAL, BaseRule, BaseSchedule
from hpo_env.hyperparameters import CONTROLS, Array
from inner_models.batched_training import BatchedTraining
from inner_models.models import build_model
from inner_models.replicated_layers import parameter_count
from inner_models.tasks import OptimizerName, Task, TaskDistribution, prepare

from .application import Controller, Runs

REGRET_CAP = 1.0
"""Largest regret (in log loss) that counts on one task."""

SEARCH_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "adamw": {"lr": (1e-4, 1e-1), "batch_size": (16, 256), "weight_decay": (1e-4, 3.0), "dropout": (0.005, 0.5)},
    "sgd": {"lr": (1e-3, 1.0), "batch_size": (16, 256), "weight_decay": (1e-6, 3e-2), "dropout": (0.005, 0.5)},
}
"""Log-uniform, but for dropout, which is uniform. SGD's decay is coupled to the gradient, hence its range."""


RULE_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "adamw": {"lr": (3e-4, 6e-2), "batch_size": (16, 128), "weight_decay": (1e-3, 3.0), "dropout": (0.005, 0.4)},
    "sgd": {"lr": (1e-3, 0.5), "batch_size": (16, 128), "weight_decay": (1e-6, 3e-2), "dropout": (0.005, 0.4)},
}
"""The same for the trials that a base rule is fitted to."""

REGULARIZER_RANGE = (0.005, 0.5)
"""Of each of `REGULARIZERS`, log-uniform, for tasks that have them."""

SEARCHED = tuple(SEARCH_RANGES["adamw"])
"""What every search covers, and every rule is fitted for."""


def sample_schedules(
    optimizer: OptimizerName,
    count: int,
    rng: np.random.Generator,
    ranges: Mapping[str, Mapping[str, tuple[float, float]]] = SEARCH_RANGES,
    *,
    regularizers: Sequence[str] = (),
) -> list[BaseSchedule]:
    """Draw schedules at random from `ranges`.

    Args:
        regularizers: further controls to draw, from a generator of their own: the others' values do not depend on it.
    """
    schedules = []
    (others,) = rng.spawn(1)
    for _ in range(count):
        values = {}
        for name, (low, high) in ranges[optimizer].items():
            drawn = (
                rng.uniform(low, high) if name == "dropout" else math.exp(rng.uniform(math.log(low), math.log(high)))
            )
            control = CONTROLS[name]
            values[name] = float(control.from_scale(control.to_scale(np.asarray(drawn))))
        low, high = np.log(REGULARIZER_RANGE)
        values |= {name: math.exp(others.uniform(low, high)) for name in regularizers}
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
        regularizers = prepare(runs.task).regularizers
        drawn = sample_schedules(runs.task.optimizer, trials.first + trials.count, rng, regularizers=regularizers)
        self._schedules = drawn[trials.first :]
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


@dataclass(frozen=True)
class Trials:
    """Trials of one task.

    Attributes:
        examples, parameters: of a run of the task.
        settings: `[trials, controls]`, in scale units, of those that `RULE_RANGES` has.
        regrets: `[trials]`.
    """

    examples: float
    parameters: float
    settings: Array
    regrets: Array


TEMPERATURE = 0.02
"""A trial weighs exp(-regret / TEMPERATURE) in the fit."""

SHRINKAGE = 20.0
"""Tasks' worth of evidence that slopes are 0."""


def fit_rule(
    optimizer: OptimizerName,
    distribution: TaskDistribution,
    *,
    trials: int = 32,
    tasks: tuple[int, ...] = (160, 120),
    seed: int = 0,
    workers: int = 2,
    report: Callable[[str], None] = print,
) -> tuple[BaseRule, dict[str, float]]:
    """Fit a base rule to `trials` of each of `tasks` tasks, round after round.

    Returns:
        The rule fitted to all rounds, and figures: mean regret of the rule before the last round on that round's tasks,
        and of a median trial around it.
    """
    rng = np.random.default_rng(seed)
    distribution = replace(distribution, optimizers=(optimizer,))
    rule: BaseRule | None = None
    spread = np.zeros(len(SEARCHED))
    found: list[Trials] = []
    for round_, count in enumerate(tasks):
        jobs = []
        for index in range(count):
            task = distribution.sample(rng)
            if rule is None:
                schedules = sample_schedules(optimizer, trials, rng, RULE_RANGES)
            else:
                schedules = _around(rule, task, spread, trials, rng)
            jobs.append((task, schedules, index))
        results = Parallel(n_jobs=workers, return_as="generator")(delayed(_single_threaded)(*job) for job in jobs)
        before = len(found)
        for (task, schedules, _), losses in zip(jobs, results, strict=True):
            settings = np.array([[getattr(schedule, name) for name in SEARCHED] for schedule in schedules])
            scaled = [CONTROLS[name].to_scale(column) for name, column in zip(SEARCHED, settings.T, strict=True)]
            found.append(Trials(*_size(task), np.stack(scaled, axis=1), regrets(losses[None])[0]))
            report(f"{optimizer}: round {round_ + 1}, task {len(found) - before} of {count} ({task.name})")
        rule, spread = linear_fit(found)
    assert rule is not None
    figures = {
        "mean_regret": float(np.mean([task.regrets[0] for task in found[before:]])),
        "median_regret_around": float(np.mean([np.median(task.regrets) for task in found[before:]])),
        "tasks": float(sum(tasks)),
        "trials": float(trials),
    }
    return rule, figures


def linear_fit(found: Sequence[Trials]) -> tuple[BaseRule, Array]:
    """The rule through the good trials of each task, and how far they lie from it, `[controls]`, in scale units."""
    weights = [np.exp(-task.regrets / TEMPERATURE) for task in found]
    good = np.array([weight @ task.settings / weight.sum() for weight, task in zip(weights, found, strict=True)])
    sizes = np.array([(task.examples, task.parameters) for task in found]) / list(TYPICAL.values())
    design = np.column_stack([np.ones(len(found)), np.log(sizes)])
    gram = design.T @ design + np.diag([0, SHRINKAGE, SHRINKAGE])
    coefficients = np.linalg.solve(gram, design.T @ good)
    rows = {name: (float(a), float(b), float(c)) for name, (a, b, c) in zip(SEARCHED, coefficients.T, strict=True)}
    rule = BaseRule.from_dict({"coefficients": rows, "warmup": BaseRule.warmup})
    return rule, np.asarray((good - design @ coefficients).std(axis=0))


def _around(rule: BaseRule, task: Task, spread: Array, count: int, rng: np.random.Generator) -> list[BaseSchedule]:
    """The rule's own schedule, and `count` - 1 around it."""
    peaks = rule.peaks(*(np.array([size]) for size in _size(task)))
    center = np.array([float(CONTROLS[name].to_scale(peaks[name])[0]) for name in SEARCHED])
    settings = center + 0.8 * spread * rng.normal(size=(count, len(SEARCHED))) * (np.arange(count) > 0)[:, None]
    return [
        BaseSchedule(
            **{
                name: float(CONTROLS[name].from_scale(np.asarray(value)))
                for name, value in zip(SEARCHED, row, strict=True)
            }
        )
        for row in settings
    ]


def _size(task: Task) -> tuple[float, float]:
    """Training examples of a run, and trainable parameters."""
    data = prepare(task)
    parameters = parameter_count(build_model(task.model, data.dataset))
    return float(data.interval_examples * task.horizon), float(parameters)


def _single_threaded(task: Task, schedules: Sequence[BaseSchedule], seed: int) -> Array:
    torch.set_num_threads(1)
    return final_losses(task, schedules, seed)
