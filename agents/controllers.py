"""The policy on a cohort of the engine, as the tuner is on one torch run; and the controls that it must beat.

A test holds `WithPolicy` to `Tuner`: the same decisions, guard included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hpo_env.actions import apply_offsets
from hpo_env.base_schedules import BaseRule, BaseSchedule, calibrated
from hpo_env.control import ControlLoop, Intervals
from hpo_env.hyperparameters import CONTROLS, Array, by_name, in_columns
from hpo_env.observations import FEATURES
from inner_models.training import Training

from .application import Cohort, Controller, MakeController, Run
from .policy import ControlPolicy
from .tuner import MAX_FACTOR, Tuner
from .watch import LOWERED, Finding, Watch

_KNOWN = (
    "progress",
    "horizon",
    "parameters",
    "examples",
    "examples_known",
    "momentum_sgd",
    "first_decision",
    "val_missing",
    "gradients_missing",
)
MEASURED = np.array([f.name not in _KNOWN and not f.name.startswith(tuple(CONTROLS)) for f in FEATURES])
"""`[features]`, which of them tell of the run's course; the others could be known without looking at it."""


@dataclass(frozen=True)
class Elsewhere:
    """Observations of other runs.

    Attributes:
        runs: one array a run, `[decisions, features]`.
        seed: seed of the choice.
    """

    runs: tuple[NDArray[np.float32], ...]
    seed: int = 0


@dataclass(frozen=True)
class WithPolicy:
    """A policy, attached as `Tuner` attaches it.

    Attributes:
        controls: those that it moves; the others follow the base schedule.
        guard: whether divergence is answered by the best snapshot and a lower learning rate.
        start: as in `Tuner`; with `given`, the user's own values are the calibrated ones.
        lr_factor: with `given`, a factor on the user's learning rate.
        batch_size: where the run's batch size stays, in place of one that the policy moves.
        initial_loss: whether the validation loss before training is told.
        examples: whether the number of training examples is told.
        sees: its own run; nothing measured (after the first decision, those features stand at the mean of its
            meta-training); or, in their place, those of another run at the same progress, drawn anew at every decision.
        acts: as the policy says, or uniformly at random.
        record: write observations and offsets down in the runs' notes.
    """

    policy: ControlPolicy
    controls: tuple[str, ...] = tuple(CONTROLS)
    guard: bool = True
    start: Literal["policy", "given"] = "policy"
    lr_factor: float = 1.0
    batch_size: float | None = None
    initial_loss: bool = False
    examples: bool = True
    sees: Literal["own", "nothing"] | Elsewhere = "own"
    acts: Literal["policy", "random"] = "policy"
    record: bool = False

    def attach(self, cohort: Cohort) -> Controller:
        return Attached(self, cohort)


def with_policy(policy: ControlPolicy) -> MakeController:
    """The tuner with `policy`, attached as the README's three lines do: all controls, no loss before training."""

    def attach(run: Training) -> Tuner:
        tuner = Tuner(
            policy,
            run.optimizer,
            model=run.model,
            criterion=run.criterion,
            total_epochs=run.task.horizon,
            examples_per_epoch=run.data.interval_examples,
            batch_size=run.batch_sampler.batch_size,
        )
        tuner.follow(run.batch_sampler)
        return tuner

    return attach


class Attached:
    """A policy on a cohort: the controller of `WithPolicy`."""

    def __init__(self, method: WithPolicy, cohort: Cohort) -> None:
        self._method, self._cohort = method, cohort
        task = cohort.task
        rule = method.policy.header.base_rule(task.optimizer)
        given = _given(task.optimizer, method.lr_factor) if method.start == "given" else None
        sgd = task.optimizer == "sgd"
        self._base = rule.schedule(cohort.examples, cohort.parameters).at_batch_size(method.batch_size, sgd)
        if given:
            self._base = replace(given, batch_size=method.batch_size or given.batch_size)
        self._intervals = Intervals(task.horizon)
        self._loop = ControlLoop(
            cohort.runs,
            horizon=self._intervals.horizon,
            rule=rule,
            given=given,
            parameters=cohort.parameters,
            momentum_sgd=sgd,
            max_factor=MAX_FACTOR if method.start == "given" else math.inf,
        )
        has = set(cohort.hyperparameters) & set(method.policy.header.controls)
        stays = {"batch_size"} if method.batch_size is not None else set()
        self._moved = [name for name in method.controls if name in has - stays]
        lacking = {name: 0.0 for name in CONTROLS if name not in self._moved}
        if "batch_size" in lacking:
            lacking["batch_size"] = self._base.batch_size
        known = {"val_loss": cohort.initial_loss} if method.initial_loss else {}
        examples = np.full(cohort.runs, float(cohort.examples) if method.examples else np.nan)
        self._loop.restart(range(cohort.runs), known, examples=examples, fixed=[lacking] * cohort.runs)
        self._rng = np.random.default_rng(method.sees.seed if isinstance(method.sees, Elsewhere) else 0)
        self._watches = [Watch() for _ in range(cohort.runs)]
        self._snapshots = [cohort.snapshot(run) for run in range(cohort.runs)] if method.guard else []
        for run, watch in enumerate(self._watches):
            if known:
                watch.check({"val_loss": float(cohort.initial_loss[run])})
        self.notes: list[dict[str, Any]] = [{"guard": []} for _ in range(cohort.runs)]
        self.values: dict[str, Array] = {}
        self._decide()

    def step(self, signals: Mapping[str, Array]) -> None:
        losses = {name: signals[name] for name in ("train_loss", "val_loss")}
        losses = {name: np.where(np.isfinite(values), values, np.inf) for name, values in losses.items()}
        self._loop.tell_examples(self._cohort.examples)
        interval = self._intervals.finish_epoch({**signals, **losses})
        if interval is not None:
            self._loop.record(interval)
        if self._method.guard:
            for run, watch in enumerate(self._watches):
                self._check(run, watch.check({name: float(values[run]) for name, values in losses.items()}))
        if self._intervals.epoch < self._intervals.epochs:
            if interval is not None:
                self._decide()
            else:
                self._set(self._loop.values_at(self._intervals.progress))

    def _check(self, run: int, found: Finding) -> None:
        self._loop.scale_lr(run, LOWERED**-found.taken_back)
        if found.improved:
            self._snapshots[run] = self._cohort.snapshot(run)
        if found.verdict:
            self._cohort.restore(run, self._snapshots[run])
            self._loop.scale_lr(run, LOWERED)
            self.notes[run]["guard"].append(self._intervals.epoch)

    def _decide(self) -> None:
        observations = self._loop.observe()
        if self._method.acts == "random":
            drawn = self._rng.uniform(-1, 1, (self._cohort.runs, len(self._method.policy.header.controls)))
            actions = self._method.policy.on_all_controls(torch.from_numpy(drawn)).numpy()
        else:
            actions = self._method.policy.act(self._seen(observations))[0]
        lost = self._method.policy.out_of_depth(observations) & (self._method.acts == "policy")
        self._set(self._loop.decide(actions, lost, self._intervals.progress))
        if self._method.record:
            base = self._base.values(np.full(self._cohort.runs, self._intervals.progress))
            for run, note in enumerate(self.notes):
                offsets = self._loop.state.offsets[run].tolist()
                offsets[0] = math.log(self.values["lr"][run] / base["lr"][run])  # what the guard lowered included
                note.setdefault("observations", []).append(observations[run].tolist())
                note.setdefault("offsets", []).append(offsets)
                note.setdefault("out_of_depth", []).append(bool(lost[run]))

    def _set(self, values: dict[str, Array]) -> None:
        base = self._base.values(np.full(self._cohort.runs, self._intervals.progress))
        self.values = {name: values[name] if name in self._moved else base[name] for name in CONTROLS}

    def _seen(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        sees, method = self._method.sees, self._method
        if sees == "own" or not self._intervals.epoch:  # nothing is measured yet
            return observations
        if sees == "nothing":
            return np.where(MEASURED, method.policy.typical, observations)
        assert isinstance(sees, Elsewhere)
        chosen = [sees.runs[index] for index in self._rng.integers(len(sees.runs), size=self._cohort.runs)]
        others = np.stack([run[self._intervals.epoch * len(run) // self._cohort.task.horizon] for run in chosen])
        return np.where(MEASURED, others, observations)


GRID = 64


def _given(optimizer: str, lr_factor: float) -> BaseSchedule:
    """The calibrated values as the user's own, their learning rate off by a factor."""
    schedule = calibrated(optimizer)
    return replace(schedule, lr=schedule.lr * lr_factor)


@dataclass(frozen=True)
class Replay:
    """A policy's mean trajectory, open-loop; offsets of 0 are the base rule's schedule.

    Attributes:
        rules: the base rule of each optimizer.
        offsets: `[runs, GRID, controls]` (or `[1, ...]` for all runs alike), in scale units, at the middles of `GRID`
            equal parts of the run.
        lr_factor: deviate from the calibrated values instead, with this factor on their learning rate.
        batch_size: where the run's batch size stays.
    """

    rules: Mapping[str, Mapping[str, Any]]
    offsets: Array
    lr_factor: float | None = None
    batch_size: float | None = None

    def attach(self, cohort: Cohort) -> Controller:
        return _Replayed(self, cohort)


class _Replayed:
    def __init__(self, replay: Replay, cohort: Cohort) -> None:
        self._horizon = cohort.task.horizon
        rule = BaseRule.from_dict(replay.rules[cohort.task.optimizer])
        self._base = rule.schedule(cohort.examples, cohort.parameters)
        if replay.lr_factor is not None:
            self._base = _given(cohort.task.optimizer, replay.lr_factor)
        self._base = self._base.at_batch_size(replay.batch_size, cohort.task.optimizer == "sgd")
        progress = (np.arange(self._horizon) + 0.5) / self._horizon
        offsets = np.stack([resampled(run, progress) for run in replay.offsets])
        self._offsets = np.broadcast_to(offsets, (cohort.runs, *offsets.shape[1:]))
        if replay.batch_size is not None:
            self._offsets = np.where([name == "batch_size" for name in CONTROLS], 0, self._offsets)
        self._interval = 0

    @property
    def values(self) -> dict[str, Array]:
        interval = min(self._interval, self._horizon - 1)
        progress = np.full(len(self._offsets), (interval + 0.5) / self._horizon)
        return by_name(apply_offsets(in_columns(self._base.values(progress)), self._offsets[:, interval]))

    def step(self, signals: Mapping[str, Array]) -> None:
        self._interval += 1


def resampled(trajectory: Array, progress: Array) -> Array:
    """A trajectory `[intervals, controls]`, given at the middles of its intervals, at other points of the run."""
    at = (np.arange(len(trajectory)) + 0.5) / len(trajectory)
    return np.stack([np.interp(progress, at, column) for column in np.asarray(trajectory).T], axis=1)


def mean_trajectory(trajectories: Sequence[Array]) -> Array:
    """Mean of trajectories of any lengths, `[GRID, controls]`."""
    progress = (np.arange(GRID) + 0.5) / GRID
    return np.asarray(np.mean([resampled(trajectory, progress) for trajectory in trajectories], axis=0))


def of_the_others(runs: Sequence[Run]) -> Array:
    """For each of several runs that were recorded, the mean trajectory of the others, `[runs, GRID, controls]`."""
    trajectories = [np.array(run.notes["offsets"]) for run in runs]
    rest = [[*trajectories[:index], *trajectories[index + 1 :]] for index in range(len(trajectories))]
    return np.stack([mean_trajectory(others) for others in rest])
