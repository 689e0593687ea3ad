"""Train a task once under a controller, in plain PyTorch, as a user's run would be."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hpo_env.actions import calibrated
from hpo_env.hyperparameters import CONTROLS, Binding
from inner_models.tasks import Task, prepare
from inner_models.training import Training

from .policy import ControlPolicy
from .schedules import Constant, Controller, Cosine, Plateau, defaults
from .tuner import ScalarWriter, Tuner

MakeController = Callable[[Training], Controller]
"""Attaches a controller to a run."""

BASELINES: dict[str, MakeController] = {
    "constant": lambda run: Constant(_bind(run), defaults(run.optimizer)),
    "cosine": lambda run: Cosine(_bind(run), defaults(run.optimizer), run.task.horizon),
    "plateau": lambda run: Plateau(_bind(run), defaults(run.optimizer), run.optimizer, run.task.horizon),
    "calibrated": lambda run: Cosine(_bind(run), calibrated(run.task.optimizer), run.task.horizon),
}
"""Name -> controller. The first three use the usual defaults (`agents.schedules`), `calibrated` the base schedule."""


def with_policy(policy: ControlPolicy) -> MakeController:
    """The tuner with `policy`, attached as the README's three lines do: all controls its own, no initial loss."""

    def attach(run: Training) -> Tuner:
        tuner = Tuner(
            policy,
            run.optimizer,
            model=run.model,
            total_epochs=run.task.horizon,
            batch_size=run.batch_sampler.batch_size,
        )
        tuner.follow(run.batch_sampler)
        return tuner

    return attach


@dataclass(frozen=True)
class Run:
    """A finished run. Lists have one entry an epoch; controls that the model lacks are absent.

    Attributes:
        test_loss: at the epoch of the best validation loss, as a user would deploy it.
        final_test_loss: at the end.
        seconds: wall-clock, controller included, evaluation on the test split not.
    """

    train_loss: list[float]
    val_loss: list[float]
    controls: dict[str, list[float]]
    test_loss: float
    final_test_loss: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: the controls are keys beside the losses; a loss that is not finite is null."""
        flat = asdict(self)
        return {key: jsonable(value) for key, value in {**flat, **flat.pop("controls")}.items() if key != "controls"}


def train(
    task: Task,
    attach: MakeController,
    seed: int,
    *,
    device: str = "cpu",
    writer: ScalarWriter | None = None,
    report: Callable[[int], None] = lambda epoch: None,
) -> Run:
    """Train `task` once.

    Args:
        seed: initial weights, data order and dropout masks; equal seeds pair runs.
        writer: receives `inner/*` and `control/*`, one step an epoch.
        report: called after each epoch with the number of epochs done.
    """
    run = Training(task, seed, data=prepare(task, with_test=True), device=device)
    started, testing = time.perf_counter(), 0.0
    controller = attach(run)
    train_losses: list[float] = []
    val_losses: list[float] = []
    controls: dict[str, list[float]] = {name: [] for name in CONTROLS if name in controller.hyperparameters}
    best = test_loss = final_test_loss = math.inf
    for epoch in range(task.horizon):
        for name in controls:
            controls[name].append(controller.hyperparameters[name])
        signals = run.advance()
        before = time.perf_counter()
        final_test_loss = run.evaluate("test")
        testing += time.perf_counter() - before
        if signals["val_loss"] < best:
            best, test_loss = signals["val_loss"], final_test_loss
        train_losses.append(signals["train_loss"])
        val_losses.append(signals["val_loss"])
        if writer is not None:
            for name, value in signals.items():
                writer.add_scalar(f"inner/{name}", value, epoch + 1)
            for name, values in controls.items():
                writer.add_scalar(f"control/{name}", values[-1], epoch + 1)
        controller.step(train_loss=signals["train_loss"], val_loss=signals["val_loss"])
        report(epoch + 1)
    seconds = time.perf_counter() - started - testing
    return Run(train_losses, val_losses, controls, test_loss, final_test_loss, seconds)


def _bind(run: Training) -> Binding:
    return Binding(run.optimizer, run.model, run.batch_sampler)


def jsonable(value: Any) -> Any:
    """`value`, numbers and lists of them, with null for what is not finite."""
    if isinstance(value, list):
        return [jsonable(entry) for entry in value]
    return value if math.isfinite(value) else None
