"""The final loss of a run foretold from its beginning, beside other models on the same data.

A regression across data sets, of what is still to come on the partial curve and on the model (Baker et al. 2017,
"Accelerating Neural Architecture Search using Performance Prediction", arXiv:1705.10823).

All losses are *deficits*: ln(1 + ln(loss / the least of the candidates' losses) / `UNIT`). Only how candidates compare
matters to a choice, and most among those that are close to the best; a deficit has no unit, and grows slowly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import ArrayLike

from hpo_env.hyperparameters import Array
from inner_models.models import ModelKind, build_model
from inner_models.replicated_layers import parameter_count
from inner_models.tasks import Task, prepare

from .application import Run
from .ensemble import Ensemble, Fit
from .measures import LOSS_FLOOR, capped

UNIT = 0.1
"""Of ln losses, in deficits."""

PARTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Of a run, after which it is learned what is to come."""

SUBSETS = 2
"""Sets of candidates that are compared at each of them: all, and random ones, likelier the better half."""

FIT = Fit(hidden=64, steps=1500, noise=0.1)

_GAP = 2.0
"""Largest ln(validation / training loss)."""


@dataclass(frozen=True)
class Curve:
    """A run so far, or several seeds' together.

    Attributes:
        val: ln validation loss before training and after each interval, `[1 + intervals]`; the mean over seeds.
        train: ln training loss of each interval, `[intervals]`.
    """

    val: Array
    train: Array

    @classmethod
    def from_losses(cls, initial: ArrayLike, val: ArrayLike, train: ArrayLike) -> Self:
        """From losses before training, `[seeds]`, and of the intervals, `[intervals, seeds]`; lost runs are capped."""
        start = np.asarray(initial, np.float64)
        own, fitted = (capped(np.reshape(losses, (-1, len(start))), start) for losses in (val, train))
        logs = (np.log(np.maximum(losses, LOSS_FLOOR)).mean(axis=1) for losses in (np.vstack([start, own]), fitted))
        return cls(*logs)

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Self:
        """Of one model's runs, one a seed."""
        val, train = (np.transpose([getattr(run, name) for run in runs]) for name in ("val_loss", "train_loss"))
        return cls.from_losses([run.initial_loss for run in runs], val, train)

    def until(self, intervals: int) -> Curve:
        """Its first intervals."""
        return Curve(self.val[: 1 + intervals], self.train[:intervals])


@dataclass(frozen=True)
class Trained:
    """Candidates for one data set, all trained to the end.

    Attributes:
        runs: of each candidate, one a seed.
    """

    tasks: tuple[Task, ...]
    runs: tuple[Sequence[Run], ...]


def intervals_of(part: float, horizon: int) -> int:
    """A part of a run, at least one interval."""
    return max(1, round(part * horizon))


def deficits(log_losses: ArrayLike) -> Array:
    """From ln losses of candidates, `[candidates]`: 0 for the best."""
    values = np.asarray(log_losses, np.float64)
    return np.asarray(np.log1p((values - values.min()) / UNIT))


class FinalLoss:
    """A fitted prediction.

    Args:
        ensemble: from a candidate's features to the change of its deficit that is to come, over the share of the run
            that is left.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble

    @classmethod
    def fit(cls, trained: Sequence[Trained], config: Fit = FIT) -> Self:
        """Learn from candidates that were trained to the end.

        Raises:
            ValueError: of fewer data sets than the ensemble has members.
        """
        count = len({one.tasks[0].dataset for one in trained})
        if count < config.members:
            raise ValueError(f"final losses are learned from {config.members} data sets or more, not {count}")
        examples = list(_examples(trained, np.random.default_rng(config.seed)))
        inputs = np.concatenate([example.inputs for example in examples])
        targets = np.concatenate([(example.final - example.present) / example.left for example in examples])
        datasets = np.concatenate([np.repeat(example.dataset, len(example.final)) for example in examples])
        return cls(Ensemble.fit(inputs, targets, datasets, config))

    def predict(self, tasks: Sequence[Task], curves: Sequence[Curve]) -> Array:
        """Final deficits, up to a constant, `[candidates]`.

        Args:
            tasks, curves: of candidates for one data set, and equally many intervals of each, at least one.
        """
        to_come, _ = self._ensemble.predict(_inputs(tasks, curves))
        return _centred(curves) + (1 - _share(tasks, curves)) * to_come

    def state_dict(self) -> dict[str, Any]:
        return self._ensemble.state_dict()

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        return cls(Ensemble.from_state_dict(state))


@dataclass(frozen=True)
class _Example:
    """Candidates for one data set that are compared after a part of the run.

    Attributes:
        inputs: `[candidates, features]`.
        present, final: deficits less their mean, `[candidates]`.
        left: share of the run.
    """

    dataset: str
    left: float
    inputs: Array
    present: Array
    final: Array


def _examples(trained: Sequence[Trained], rng: np.random.Generator) -> Iterator[_Example]:
    """One a data set, seed, part and subset."""
    for one in trained:
        horizon = one.tasks[0].horizon
        for runs in zip(*one.runs, strict=True):
            whole = [Curve.of([run]) for run in runs]
            for intervals in sorted({intervals_of(part, horizon) for part in PARTS} - {horizon}):
                so_far = [curve.until(intervals) for curve in whole]
                for subset in range(SUBSETS):
                    chosen = _subset(so_far, rng) if subset else range(len(whole))
                    tasks, curves = [one.tasks[i] for i in chosen], [so_far[i] for i in chosen]
                    yield _Example(
                        one.tasks[0].dataset,
                        1 - _share(tasks, curves),
                        _inputs(tasks, curves),
                        _centred(curves),
                        _centred([whole[i] for i in chosen]),
                    )


def _subset(curves: Sequence[Curve], rng: np.random.Generator) -> list[int]:
    """Two or more candidates, such as a race may leave: those with low losses are likelier."""
    losses = np.array([curve.val[-1] for curve in curves])
    order = np.argsort(losses + rng.gumbel(scale=losses.std() / 2, size=len(losses)), kind="stable")
    return sorted(order[: rng.integers(2, max(3, len(losses)))].tolist())


def _share(tasks: Sequence[Task], curves: Sequence[Curve]) -> float:
    return len(curves[0].train) / tasks[0].horizon


def _centred(curves: Sequence[Curve]) -> Array:
    """Present deficits less their mean."""
    found = deficits([curve.val[-1] for curve in curves])
    return np.asarray(found - found.mean())


def _inputs(tasks: Sequence[Task], curves: Sequence[Curve]) -> Array:
    """`[candidates, features]`: the curves as they are and beside the others', and the models."""
    own = np.array([_shape(curve) for curve in curves])
    present = deficits([curve.val[-1] for curve in curves])[:, None]
    models = np.array([_model(task) for task in tasks])
    kinds = np.array([[task.model.kind == kind for kind in get_args(ModelKind)] for task in tasks])
    done = len(curves[0].train)
    shared = np.broadcast_to([done / tasks[0].horizon, np.log(done), present.mean()], (len(tasks), 3))
    relative = (values - values.mean(axis=0) for values in (present, own, models))
    return np.hstack([shared, present, own, models, *relative, kinds])


@lru_cache(maxsize=4096)
def _model(task: Task) -> tuple[float, ...]:
    """Logarithms: rows of the training split for each parameter, epochs of the run, width, depth."""
    data = prepare(task)
    rows = len(data.dataset.train)
    parameters = parameter_count(build_model(task.model, data.dataset))
    sizes = (rows / parameters, data.interval_examples * task.horizon / rows, task.model.width, task.model.depth)
    return tuple(math.log(size) for size in sizes)


def _shape(curve: Curve) -> list[float]:
    """How the validation loss has fallen, of late and in all; whether it rises or jumps; and the training loss."""
    val, done = curve.val, len(curve.train)
    late = max(1, done // 4)
    return [
        val[-1] - val[0],
        val[-1] - val[done // 2],
        val[-1] - val[-1 - late],
        val[-1] - val.min(),
        val[-1] - val[-1 - late :].mean(),
        curve.train[-1] - val[0],
        float(np.clip(val[-1] - curve.train[-1], -_GAP, _GAP)),
    ]
