"""What a user would do without a policy, in one trial: schedules of the learning rate, and optimizers that set it.

Schedules run on the engine, all seeds at once, and on a torch run (`agents.application.Following`). `OwnOptimizer`s
need torch: they act at every step of the optimizer.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from hpo_env.base_schedules import BaseSchedule, calibrated
from hpo_env.hyperparameters import CONTROLS, Array, Binding
from inner_models.tasks import OptimizerName
from inner_models.training import Training, parameter_groups

from .application import Controller, RunController, Runs
from .optional import require

Values = Literal["default", "calibrated"]

DEFAULTS: dict[str, BaseSchedule] = {
    "adamw": BaseSchedule(lr=1e-3, batch_size=32, weight_decay=0.01, dropout=0.1),
    "sgd": BaseSchedule(lr=0.1, batch_size=32, weight_decay=1e-4, dropout=0.1),
}
"""The usual starting points: torch's AdamW as most people start it, batches of 32, a tenth dropped."""


def values_of(values: Values, optimizer: OptimizerName) -> BaseSchedule:
    """The default or the calibrated hyperparameters for an optimizer."""
    return DEFAULTS[optimizer] if values == "default" else calibrated(optimizer)


class Listed:
    """Every run follows the same table.

    Args:
        table: the values of each interval, of every control.
    """

    def __init__(self, table: Sequence[Mapping[str, float]], runs: int) -> None:
        self._table, self._runs, self._interval = table, runs, 0

    @classmethod
    def of(cls, schedule: BaseSchedule, runs: Runs) -> Self:
        """`schedule` over the whole run, its warm-up and decay included."""
        horizon = runs.task.horizon
        values = schedule.values((np.arange(horizon) + 0.5) / horizon)
        return cls([{name: float(values[name][row]) for name in CONTROLS} for row in range(horizon)], runs.runs)

    @property
    def values(self) -> dict[str, Array]:
        row = self._table[min(self._interval, len(self._table) - 1)]
        return {name: np.full(self._runs, row[name]) for name in CONTROLS}

    def step(self, signals: Mapping[str, Array]) -> None:
        self._interval += 1


def _listed(runs: Runs, schedule: BaseSchedule, shape: Any) -> Listed:
    """`schedule` with its learning rate times `shape(progress)` in place of its own warm-up and decay."""
    table = []
    for interval in range(runs.task.horizon):
        values = {name: float(getattr(schedule, name)) for name in CONTROLS}
        table.append(values | {"lr": schedule.lr * shape((interval + 0.5) / runs.task.horizon)})
    return Listed(table, runs.runs)


@dataclass(frozen=True)
class Constant:
    """Nothing ever changes."""

    values: Values = "default"

    def attach(self, runs: Runs) -> Controller:
        return _listed(runs, values_of(self.values, runs.task.optimizer), lambda progress: 1.0)


@dataclass(frozen=True)
class Cosine:
    """Warm-up and cosine decay of the learning rate; with calibrated values, what the policy deviates from.

    Attributes:
        lr_factor: factor on the learning rate, for bad starts.
        batch_size: in place of the usual one, which the learning rate follows (`hpo_env.base_schedules.lr_factor`).
    """

    values: Values = "default"
    lr_factor: float = 1.0
    batch_size: float | None = None

    def attach(self, runs: Runs) -> Controller:
        schedule = values_of(self.values, runs.task.optimizer)
        schedule = schedule.at_batch_size(self.batch_size, runs.task.optimizer == "sgd")
        return Listed.of(replace(schedule, lr=schedule.lr * self.lr_factor), runs)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Warm-up, a constant rate, and a last fifth in which it falls as 1 - sqrt (Hagele et al. 2024, arXiv:2405.18392).

    Attributes:
        lr_factor: the authors find the best rate at about half of the cosine's.
    """

    values: Values = "calibrated"
    lr_factor: float = 0.5
    warmup: float = 0.05
    decay: float = 0.2

    def attach(self, runs: Runs) -> Controller:
        schedule = values_of(self.values, runs.task.optimizer)
        return _listed(runs, replace(schedule, lr=schedule.lr * self.lr_factor), self._shape)

    def _shape(self, progress: float) -> float:
        fall = max(0.0, (progress - 1 + self.decay) / self.decay)
        return min(1.0, progress / self.warmup) * (1 - math.sqrt(fall))


@dataclass(frozen=True)
class Plateau:
    """`torch.optim.lr_scheduler.ReduceLROnPlateau` on the validation loss, or the training loss where there is none.

    Attributes:
        factor: on the learning rate, after `patience` of the run (at least 2 intervals) without improvement.
    """

    values: Values = "default"
    factor: float = 0.5
    patience: float = 0.1

    def attach(self, runs: Runs) -> Controller:
        return _OnPlateau(self, runs)


class _OnPlateau:
    def __init__(self, plateau: Plateau, runs: Runs) -> None:
        schedule = values_of(plateau.values, runs.task.optimizer)
        self._constant = {name: float(getattr(schedule, name)) for name in CONTROLS}
        patience = max(2, round(plateau.patience * runs.task.horizon))
        # The scheduler wants an optimizer to set; each run has one of its own.
        self._optimizers = [torch.optim.SGD([torch.zeros(1)], lr=schedule.lr) for _ in range(runs.runs)]
        self._schedulers = [
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=plateau.factor, patience=patience)
            for optimizer in self._optimizers
        ]

    @property
    def values(self) -> dict[str, Array]:
        values = {name: np.full(len(self._optimizers), value) for name, value in self._constant.items()}
        return values | {"lr": np.array([optimizer.param_groups[0]["lr"] for optimizer in self._optimizers])}

    def step(self, signals: Mapping[str, Array]) -> None:
        losses = np.where(np.isnan(signals["val_loss"]), signals["train_loss"], signals["val_loss"])
        for scheduler, loss in zip(self._schedulers, losses, strict=True):
            scheduler.step(float(loss))


BASELINES: dict[str, Constant | Cosine | Plateau] = {
    "constant": Constant(),
    "cosine": Cosine(),
    "plateau": Plateau(),
    "calibrated": Cosine("calibrated"),
}
"""What `apply_policy.py` lays beside a policy; the first three with the usual defaults."""


class _Set:
    """The values were set at the start; the optimizer or a scheduler does the rest."""

    def __init__(self, run: Training) -> None:
        self._binding = Binding(run.optimizer, run.model, run.batch_sampler, run.criterion)

    @property
    def hyperparameters(self) -> dict[str, float]:
        return self._binding.read()

    def step(self, *, train_loss: float, val_loss: float | None = None) -> None: ...


def _begin(run: Training, schedule: BaseSchedule) -> int:
    """Set the values of `schedule`. Returns the optimizer steps of the whole run."""
    binding = Binding(run.optimizer, run.model, run.batch_sampler, run.criterion)
    binding.write({name: getattr(schedule, name) for name in binding.available})
    return run.task.horizon * len(run.batch_sampler)


def _every_step(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimizer.register_step_post_hook(lambda *_: scheduler.step())


@dataclass(frozen=True)
class OneCycle:
    """`torch.optim.lr_scheduler.OneCycleLR` as it comes: momentum cycled too (Smith & Topin 2017, arXiv:1708.07120)."""

    values: Values = "calibrated"

    def __call__(self, run: Training) -> RunController:
        schedule = values_of(self.values, run.task.optimizer)
        steps = _begin(run, schedule)
        _every_step(run.optimizer, torch.optim.lr_scheduler.OneCycleLR(run.optimizer, schedule.lr, total_steps=steps))
        return _Set(run)


@dataclass(frozen=True)
class ScheduleFree:
    """Schedule-Free AdamW, or SGD (Defazio et al. 2024, arXiv:2405.15682; package `schedulefree`).

    Attributes:
        warmup: share of the steps.
        adamw_factor, sgd_factor: on the learning rate; its authors recommend 1 to 10 times that of a schedule with
            AdamW, and 10 to 50 times with SGD.
    """

    values: Values = "calibrated"
    warmup: float = 0.05
    adamw_factor: float = 1.0
    sgd_factor: float = 10.0

    def __call__(self, run: Training) -> RunController:
        package = require("schedulefree", extra="compare")
        schedule = values_of(self.values, run.task.optimizer)
        warmup = round(self.warmup * _begin(run, schedule))
        sgd = run.task.optimizer == "sgd"
        kind = package.SGDScheduleFree if sgd else package.AdamWScheduleFree
        lr = schedule.lr * (self.sgd_factor if sgd else self.adamw_factor)
        groups = parameter_groups(run.model)
        run.use(kind(groups, lr=lr, weight_decay=schedule.weight_decay, warmup_steps=warmup))
        return _Set(run)


@dataclass(frozen=True)
class Prodigy:
    """Prodigy with cosine annealing (Mishchenko & Defazio 2023, arXiv:2306.06101; package `prodigyopt`)."""

    values: Values = "calibrated"

    def __call__(self, run: Training) -> RunController:
        package = require("prodigyopt", extra="compare")
        schedule = values_of("calibrated", "adamw") if self.values == "calibrated" else DEFAULTS["adamw"]
        steps = _begin(run, values_of(self.values, run.task.optimizer))
        with redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
            optimizer = package.Prodigy(
                parameter_groups(run.model),
                weight_decay=schedule.weight_decay,
                use_bias_correction=True,
                safeguard_warmup=True,
            )
        run.use(optimizer)
        _every_step(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps))
        return _Set(run)


@dataclass(frozen=True)
class Hypergradient:
    """Hypergradient descent on the learning rate (Baydin et al. 2018, arXiv:1703.04782, Adam-HD and SGD-HD).

    lr_t = lr_{t-1} + beta g_t . d_{t-1}, where d_{t-1} is what the last step subtracted from the weights, over its lr.

    Attributes:
        beta_adamw, beta_sgd: the paper's own for its MNIST experiments.
    """

    values: Values = "default"
    beta_adamw: float = 1e-7
    beta_sgd: float = 1e-3

    def __call__(self, run: Training) -> RunController:
        _begin(run, values_of(self.values, run.task.optimizer))
        beta = self.beta_sgd if run.task.optimizer == "sgd" else self.beta_adamw
        _Descent(run.optimizer, beta)
        return _Set(run)


class _Descent:
    def __init__(self, optimizer: torch.optim.Optimizer, beta: float) -> None:
        self._beta = beta
        self._before: list[Tensor] = []
        self._direction: list[Tensor] = []
        optimizer.register_step_pre_hook(self._adjust)
        optimizer.register_step_post_hook(self._remember)

    @torch.no_grad()
    def _adjust(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = _parameters(optimizer)
        if self._direction:
            gain = sum(
                float(torch.dot(p.grad.flatten(), d.flatten()))
                for p, d in zip(parameters, self._direction, strict=True)
                if p.grad is not None
            )
            for group in optimizer.param_groups:
                group["lr"] = max(0.0, group["lr"] + self._beta * gain) if math.isfinite(gain) else group["lr"]
        self._before = [p.clone() for p in parameters]

    @torch.no_grad()
    def _remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        lr = optimizer.param_groups[0]["lr"]
        if lr > 0:
            pairs = zip(self._before, _parameters(optimizer), strict=True)
            self._direction = [(before - now) / lr for before, now in pairs]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
