"""Schedules learned by differentiating the validation loss through unrolled training.

Maclaurin, Duvenaud and Adams 2015 (arXiv:1502.03492); reverse mode as in Franceschi et al. 2017 (arXiv:1703.01785),
cut into windows of K steps: the state goes from one window into the next as a constant. A short window does not see
what a step costs later, so that the rates learned through it are too small (Wu et al. 2018, arXiv:1803.02021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo_env.base_schedules import REGULARIZERS, calibrated
from hpo_env.hyperparameters import CONTROLS, Binding, Hyperparameter
from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import OptimizerName
from inner_models.training import Training
from inner_models.updates import SGD_MOMENTUM

from .application import Controller, RunController, Runs
from .schedules import DEFAULTS, Listed
from .unrolled import Problem, State, Unrolled, hats

LEARNED: dict[str, Hyperparameter] = {
    "lr": CONTROLS["lr"],
    "weight_decay": CONTROLS["weight_decay"],
    "momentum": Hyperparameter("momentum", 0.01, 0.999, "logit"),
}
"""What is learned, on its own scale; momentum is AdamW's first beta."""

KIND = "learned-schedule"


@dataclass(frozen=True)
class LearnedSchedule:
    """Values at equally spaced points of a run, the first at its start and the last at its end; linear in between on
    each one's scale (log, logit). The engine moves no momentum: `attach` leaves it out, `EveryStep` sets it.

    Attributes:
        lr, weight_decay, momentum: equally many values each; one is a constant.
        optimizer: whose hyperparameters they are.
    """

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    momentum: tuple[float, ...]
    batch_size: int = MICRO_BATCH
    dropout: float = 0.0
    optimizer: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        if not self.lr or len({len(getattr(self, name)) for name in LEARNED}) != 1:
            raise ValueError(f"{', '.join(LEARNED)} must have equally many values, at least one")
        for name, kind in LEARNED.items():
            for value in getattr(self, name):
                if not kind.low <= value <= kind.high:
                    raise ValueError(f"{name} must lie in {kind.low:g}..{kind.high:g}, not be {value}")
        if self.batch_size < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"batch_size must be positive and dropout in 0..1, not {self.batch_size}, {self.dropout}")

    @classmethod
    def untrained(cls, optimizer: OptimizerName = "adamw", knots: int = 6) -> LearnedSchedule:
        """What learning begins with: the usual defaults, constant; batch size and dropout, which are not learned, are
        the calibrated schedule's."""
        moving, fixed = DEFAULTS[optimizer], calibrated(optimizer)
        rates, decays, momenta = ((value,) * knots for value in (moving.lr, moving.weight_decay, SGD_MOMENTUM))
        return cls(rates, decays, momenta, int(fixed.batch_size), fixed.dropout, optimizer)

    @property
    def scaled(self) -> Tensor:
        """`[3, knots]`, in units of the scales of `LEARNED`."""
        rows = [kind.to_scale(np.array(getattr(self, name))) for name, kind in LEARNED.items()]
        return torch.from_numpy(np.stack(rows)).float()

    def with_scaled(self, scaled: Tensor) -> LearnedSchedule:
        """The inverse of `scaled`, clipped to the ranges."""
        rows = zip(LEARNED.items(), scaled.detach().double().numpy(), strict=True)
        values: dict[str, Any] = {name: tuple(kind.from_scale(row).tolist()) for (name, kind), row in rows}
        return replace(self, **values)

    def at(self, progress: float) -> dict[str, float]:
        """Values of `LEARNED` at `progress`, 0..1 of the run."""
        found = self.scaled.double().numpy() @ hats(torch.tensor([progress]), len(self.lr))[:, 0].double().numpy()
        return {name: float(kind.from_scale(value)) for (name, kind), value in zip(LEARNED.items(), found, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"kind": KIND, **asdict(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LearnedSchedule:
        """The inverse of `state_dict`.

        Raises:
            ValueError: not a schedule's.
        """
        values = {name: value for name, value in state.items() if name != "kind"}
        if state.get("kind") != KIND or set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"this is not the state of a {KIND}, but of {state.get('kind')!r}")
        return cls(**values)

    def check(self, optimizer: str) -> None:
        """Raise a ValueError unless the values are for this optimizer."""
        if optimizer != self.optimizer:
            raise ValueError(f"the schedule was learned for {self.optimizer}, and means nothing to {optimizer}")

    def attach(self, runs: Runs) -> Controller:
        self.check(runs.task.optimizer)
        fixed = {"batch_size": float(self.batch_size), "dropout": self.dropout, **dict.fromkeys(REGULARIZERS, 0.0)}
        horizon = runs.task.horizon
        return Listed([self.at((interval + 0.5) / horizon) | fixed for interval in range(horizon)], runs.runs)


@dataclass(frozen=True)
class EveryStep:
    """A learned schedule on a torch run, momentum and all, set anew before every step of the optimizer."""

    schedule: LearnedSchedule

    def __call__(self, run: Training) -> RunController:
        return _EveryStep(self.schedule, run)


class _EveryStep:
    def __init__(self, schedule: LearnedSchedule, run: Training) -> None:
        schedule.check(run.task.optimizer)
        self._schedule, self._taken = schedule, 0
        self._binding = Binding(run.optimizer, run.model, run.batch_sampler, run.criterion)
        fixed = {"batch_size": schedule.batch_size, "dropout": schedule.dropout, **dict.fromkeys(REGULARIZERS, 0.0)}
        self._binding.write({name: value for name, value in fixed.items() if name in self._binding.available})
        self._steps = run.task.horizon * len(run.batch_sampler)
        run.optimizer.register_step_pre_hook(self._before)
        self._set(run.optimizer)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._set(optimizer)
        self._taken += 1

    def _set(self, optimizer: torch.optim.Optimizer) -> None:
        values = self._schedule.at(min(1.0, (self._taken + 0.5) / self._steps))
        momentum = values.pop("momentum")
        self._binding.write({name: value for name, value in values.items() if name in self._binding.available})
        for group in optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum

    @property
    def hyperparameters(self) -> dict[str, float]:
        return self._binding.read()

    def step(self, *, train_loss: float, val_loss: float | None = None) -> None: ...


@dataclass(frozen=True)
class Config:
    """How schedules are learned.

    Attributes:
        updates: hypergradient steps, each of whole runs of one problem.
        unroll: K, the steps of a window; None for the whole run.
        replicas: runs of the problem, with their own initial weights and data order.
        lr: Adam's learning rate for log lr and the like; it falls linearly to 0.
        learned: which of `LEARNED` move.
        clip: norm to which the hypergradient of a replica in a window is clipped, so that no task outweighs the others.
        memory: GiB that a window may take.
    """

    updates: int = 40
    unroll: int | None = None
    replicas: int = 4
    lr: float = 0.2
    learned: tuple[str, ...] = ("lr", "weight_decay")
    clip: float = 0.1
    memory: float = 8.0

    def __post_init__(self) -> None:
        for name in ("updates", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.unroll is not None and self.unroll < 1:
            raise ValueError(f"unroll must be 1 step or more, not {self.unroll}; leave it out for the whole run")
        if min(self.lr, self.clip, self.memory) <= 0:
            raise ValueError(f"lr, clip and memory must be positive, not {self.lr}, {self.clip} and {self.memory}")
        if not self.learned or not set(self.learned) <= set(LEARNED):
            raise ValueError(f"learned must be some of {', '.join(LEARNED)}, not {', '.join(self.learned) or 'none'}")


def hypergradient(
    runs: Unrolled, scaled: Tensor, unroll: int | None = None, clip: float = 0.1
) -> tuple[Tensor, Tensor]:
    """d log(validation loss at the end of a window) / d scaled, mean over the windows of a run.

    Every K costs the same inner steps; only what a window sees of the future differs.

    Args:
        scaled: `[3, knots]`.
        unroll, clip: as in `Config`.

    Returns:
        `[replicas, 3, knots]`, zeros where a replica has none that is finite, and the last log losses, `[replicas]`.
    """
    total, state, windows = scaled.new_zeros(len(runs.start.weights), *scaled.shape), runs.start, 0
    with torch.random.fork_rng(devices=[]):  # vmap draws dropout's masks from the global generator
        torch.manual_seed(runs.mask_seed)
        for first in range(0, runs.problem.steps, unroll or runs.problem.steps):
            own = scaled.detach().expand_as(total).clone().requires_grad_()
            steps = min(unroll or runs.problem.steps, runs.problem.steps - first)
            state = runs.run(own, State(*(part.detach() for part in state)), first, steps)
            losses = runs.val_loss(state).log()
            (slope,) = torch.autograd.grad(losses.sum(), own)
            norm = slope.flatten(1).norm(dim=1)[:, None, None]
            total += torch.where(norm.isfinite(), slope * (clip / norm).clamp(max=1), 0.0)
            windows += 1
    return total / windows, losses.detach()


def learn(
    draw: Callable[[int], Problem],
    start: LearnedSchedule,
    config: Config,
    generator: torch.Generator,
    report: Callable[[int, float], None] = lambda update, loss: None,
) -> tuple[LearnedSchedule, int]:
    """Learn a schedule on the problems that `draw` gives, from that of `start`. On the one problem of a new task it is
    how a schedule is adapted to it.

    Args:
        draw: the problem of an update, by its number.
        report: called after each update with its number and the mean of the last log losses.

    Returns:
        The schedule, and the inner steps that it took, of all replicas together.

    Raises:
        ValueError: no replica's loss is finite any more.
        MemoryError: the unrolled window does not fit.
    """
    scaled = start.scaled.requires_grad_()
    mask = torch.tensor([[float(name in config.learned)] for name in LEARNED])
    optimizer = torch.optim.Adam([scaled], config.lr)
    decline = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.updates)
    taken = 0
    for update in range(config.updates):
        problem = draw(update)
        start.check(problem.optimizer)
        runs = Unrolled(problem, config.replicas, generator)
        steps = min(config.unroll or problem.steps, problem.steps)
        if (needed := runs.gibibytes(steps)) > config.memory:  # torch would go on until the system ends the process
            raise MemoryError(
                f"windows of {steps} steps take at least {needed:.1f} GiB and may take {config.memory:g}; lower unroll "
                "or replicas, or raise memory"
            )
        slopes, losses = hypergradient(runs, scaled, config.unroll, config.clip)
        if not losses.isfinite().any():
            raise ValueError(f"no replica's validation loss is finite in update {update}; begin with a lower lr")
        scaled.grad = slopes.mean(0) * mask
        optimizer.step()
        decline.step()
        with torch.no_grad():  # what the ranges cut off would have no effect, nor a way back
            scaled.copy_(start.with_scaled(scaled).scaled)
        taken += problem.steps * config.replicas
        report(update + 1, losses[losses.isfinite()].mean().item())
    return start.with_scaled(scaled), taken
