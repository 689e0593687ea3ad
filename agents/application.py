"""Train a task under a method: in plain PyTorch, as a user's run would be, or all seeds as one cohort of the engine."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self, cast

import numpy as np
from torch import Tensor

from hpo_env.hyperparameters import CONTROLS, Array, Binding
from inner_models.batched_training import BatchedTraining
from inner_models.datasets import Split
from inner_models.tasks import Task, prepare
from inner_models.training import Training

from .files import ScalarWriter

TEST_ROWS = 4096
"""Rows of the test split that runs are judged on, at most; splits are in random order."""


class Runs(Protocol):
    """What a schedule needs to know: the task, and how many runs of it there are."""

    @property
    def task(self) -> Task: ...

    @property
    def runs(self) -> int: ...


class Controller(Protocol):
    """Sets the hyperparameters of several runs of one task, interval by interval.

    Attributes:
        values: control -> `[runs]`, for the coming interval.
    """

    @property
    def values(self) -> Mapping[str, Array]: ...

    def step(self, signals: Mapping[str, Array]) -> None:
        """Take in the signals of the interval that has just been trained, `[runs]` each
        (`inner_models.signals.SIGNALS`), and set `values` anew."""


class Schedule(Protocol):
    """A method that needs nothing but the losses. A frozen dataclass; its fields are its settings."""

    def attach(self, runs: Runs) -> Controller: ...


class Cohort:
    """Runs of one task that train together, as their controller sees them: no test split in reach.

    Attributes:
        initial_loss: `[runs]`, validation losses before training.
        parameters: trainable parameters of the model.
        examples: training examples of a whole run.
        hyperparameters: names of those that the runs have.
    """

    def __init__(self, training: BatchedTraining) -> None:
        self._training = training
        self.task, self.runs = training.task, training.replicas
        self.parameters, self.hyperparameters = training.parameters, training.hyperparameters
        self.examples = prepare(self.task).interval_examples * self.task.horizon
        self.initial_loss = training.evaluate("val")

    def snapshot(self, run: int) -> dict[str, Tensor]:
        """Copy of a run's weights and optimizer state."""
        return self._training.snapshot(run)

    def restore(self, run: int, snapshot: Mapping[str, Tensor]) -> None:
        """Set a run back to a snapshot."""
        self._training.restore(run, snapshot)


class CohortMethod(Protocol):
    """A method that runs on the engine: every `Schedule`, and what looks closer. A frozen dataclass."""

    def attach(self, cohort: Cohort, /) -> Controller: ...


class RunController(Protocol):
    """Sets one torch run's hyperparameters epoch by epoch. `Tuner` is one."""

    @property
    def hyperparameters(self) -> dict[str, float]: ...

    def step(self, *, train_loss: float, val_loss: float | None = None) -> Any: ...


MakeController = Callable[[Training], RunController]
"""Attaches a controller to a torch run."""


@dataclass(frozen=True)
class Run:
    """A finished run. Lists have one entry an interval; controls that the model lacks are absent.

    Attributes:
        initial_loss: validation loss before training.
        test_loss: at the interval of the best validation loss, as a user would deploy it.
        final_test_loss: at the end.
        seconds: wall-clock, controller included, evaluation on the test split not; a cohort's divided by its runs.
        notes: what the controller wrote down (`Controller.notes`), if anything.
    """

    seed: int
    initial_loss: float
    train_loss: list[float]
    val_loss: list[float]
    controls: dict[str, list[float]]
    test_loss: float
    final_test_loss: float
    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; a loss that is not finite is null."""
        return cast(dict[str, Any], jsonable(asdict(self)))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; null is NaN."""
        numbers = {name: number_of(record[name]) for name in ("initial_loss", "test_loss", "final_test_loss")}
        losses = {name: [number_of(value) for value in record[name]] for name in ("train_loss", "val_loss")}
        return cls(**{**record, **numbers, **losses})


def train_cohort(task: Task, method: CohortMethod, seeds: Sequence[int], *, device: str = "cpu") -> list[Run]:
    """Train `task` once a seed under `method`, all as one cohort.

    Args:
        seeds: initial weights, data order and dropout masks; equal seeds pair runs.
    """
    started = time.perf_counter()
    training = BatchedTraining(task, seeds, device=device)  # without the test split
    cohort = Cohort(training)
    controller = method.attach(cohort)
    names = [name for name in CONTROLS if name in training.hyperparameters]
    history: list[Mapping[str, Array]] = []
    controls: list[dict[str, Array]] = []
    best = np.full(len(seeds), np.inf)
    snapshots = [cohort.snapshot(run) for run in range(len(seeds))]
    for _ in range(task.horizon):
        controls.append({name: np.array(controller.values[name]) for name in names})
        signals = training.advance(controls[-1])
        history.append(signals)
        for run in np.flatnonzero(signals["val_loss"] < best).tolist():
            best[run], snapshots[run] = signals["val_loss"][run], cohort.snapshot(run)
        if len(history) == task.horizon:
            ends = [cohort.snapshot(run) for run in range(len(seeds))]
        controller.step(signals)
    notes = copy.deepcopy(getattr(controller, "notes", [{}] * len(seeds)))
    seconds = (time.perf_counter() - started) / len(seeds)
    # Only now, when nothing is decided any more, does the test split come in.
    test = held_out_rows(task)
    final, at_best = (_judged(training, kept, test) for kept in (ends, snapshots))
    at_best = np.where(np.isfinite(best), at_best, np.inf)
    return [
        Run(
            seed=int(seed),
            initial_loss=float(cohort.initial_loss[run]),
            train_loss=[float(signals["train_loss"][run]) for signals in history],
            val_loss=[float(signals["val_loss"][run]) for signals in history],
            controls={name: [float(values[name][run]) for values in controls] for name in names},
            test_loss=float(at_best[run]),
            final_test_loss=float(final[run]),
            seconds=seconds,
            notes=notes[run],
        )
        for run, seed in enumerate(seeds)
    ]


def _judged(training: BatchedTraining, snapshots: Sequence[Mapping[str, Tensor]], rows: Split) -> Array:
    for run, snapshot in enumerate(snapshots):
        training.restore(run, snapshot)
    return training.evaluate(rows)


def train(
    task: Task,
    attach: MakeController,
    seed: int,
    *,
    device: str = "cpu",
    writer: ScalarWriter | None = None,
    report: Callable[[int], None] = lambda epoch: None,
) -> Run:
    """Train `task` once, in plain PyTorch.

    Args:
        seed: initial weights, data order and dropout masks; equal seeds pair runs.
        writer: receives `inner/*` and `control/*`, one step an epoch.
        report: called after each epoch with the number of epochs done.
    """
    run = Training(task, seed, device=device)  # without the test split
    initial_loss = run.evaluate("val")
    started = time.perf_counter()
    controller = attach(run)
    train_losses: list[float] = []
    val_losses: list[float] = []
    controls: dict[str, list[float]] = {name: [] for name in CONTROLS if name in controller.hyperparameters}
    best, at_best, final = math.inf, None, _weights(run)
    for epoch in range(task.horizon):
        for name in controls:
            controls[name].append(controller.hyperparameters[name])
        signals = run.advance()
        final = _weights(run)
        if signals["val_loss"] < best:
            best, at_best = signals["val_loss"], final
        train_losses.append(signals["train_loss"])
        val_losses.append(signals["val_loss"])
        if writer is not None:
            for name, value in signals.items():
                writer.add_scalar(f"inner/{name}", value, epoch + 1)
            for name, values in controls.items():
                writer.add_scalar(f"control/{name}", values[-1], epoch + 1)
        controller.step(train_loss=signals["train_loss"], val_loss=signals["val_loss"])
        report(epoch + 1)
    seconds = time.perf_counter() - started
    # Only now, and with a model that no controller has had its hands on, does the test split come in.
    test = held_out_rows(task)
    judge = Training(task, seed, device=device)
    judge.model.load_state_dict(final)
    final_test_loss = test_loss = judge.evaluate(test)
    if at_best is not final:
        test_loss = math.inf
        if at_best is not None:
            judge.model.load_state_dict(at_best)
            test_loss = judge.evaluate(test)
    return Run(seed, initial_loss, train_losses, val_losses, controls, test_loss, final_test_loss, seconds)


def _weights(run: Training) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@dataclass(frozen=True)
class _OneRun:
    task: Task
    runs: int = 1


class Following:
    """A schedule on a torch run."""

    def __init__(self, schedule: Schedule, run: Training) -> None:
        self._binding = Binding(run.optimizer, run.model, run.batch_sampler, run.criterion)
        self._controller = schedule.attach(_OneRun(run.task))
        self._apply()

    @property
    def hyperparameters(self) -> dict[str, float]:
        return self._binding.read()

    def step(self, *, train_loss: float, val_loss: float | None = None) -> None:
        losses = {"train_loss": train_loss, "val_loss": math.nan if val_loss is None else val_loss}
        self._controller.step({name: np.array([value]) for name, value in losses.items()})
        self._apply()

    def _apply(self) -> None:
        self._binding.write({name: float(self._controller.values[name][0]) for name in self._binding.available})


def following(schedule: Schedule) -> MakeController:
    """`schedule`, for a torch run."""
    return lambda run: Following(schedule, run)


def held_out_rows(task: Task) -> Split:
    """What runs of `task` are judged on: the first `TEST_ROWS` rows of its test split."""
    test = prepare(task, with_test=True).dataset.test
    assert test is not None
    return Split(test.inputs[:TEST_ROWS], test.targets[:TEST_ROWS])


def jsonable(value: Any) -> Any:
    """`value`, numbers and containers of them, with null for what is not finite."""
    if isinstance(value, dict):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_of(value: float | None) -> float:
    """The inverse of `jsonable`, for a number: null is one that was not finite."""
    return math.nan if value is None else value
