"""Metric-based warm start: a new run begins with what did best on the studied tasks that resemble its own most.

As in Feurer, Springenberg and Hutter 2015 ("Initializing Bayesian Hyperparameter Optimization via Meta-Learning"), but
for one trial: the configuration that is best on average over the nearest tasks, in place of each one's own best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from hpo_env.actions import RANGES
from hpo_env.base_schedules import BaseSchedule
from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.observations import FEATURES
from inner_models.names import unknown
from inner_models.tasks import Task

from .application import Cohort, Controller, Runs
from .calibration import SEARCHED
from .controllers import WithPolicy
from .learned_distance import Learning, learn_weights
from .meta_dataset import Studied, from_unit
from .meta_features import meta_features
from .policy import ControlPolicy
from .schedules import Listed
from .state_file import load_state, save_state

Metric = Literal["euclidean", "cosine", "learned"]
METRICS: tuple[Metric, ...] = get_args(Metric)

KIND = "warm-start"

CLIP = 3.0
"""In standard deviations: what lies farther outside is as far as anything was."""

_TINY = 1e-9
_FIRST_DECISION = [feature.name for feature in FEATURES].index("first_decision")


@dataclass(frozen=True, eq=False)
class Table:
    """What was studied with one optimizer.

    Attributes:
        mean, std: `[features]`, of the tasks' meta-features.
        places: `[tasks, features]`, these standardized.
        weights: `[features]`, at least 0: of the squared differences.
        scores: `[tasks, trials]`, see `Studied`.
        settings: `[trials, searched]`, see `Studied`.
    """

    mean: Array
    std: Array
    places: Array
    weights: Array
    scores: Array
    settings: Array

    def __post_init__(self) -> None:
        (tasks, trials), size = self.scores.shape, len(self.mean)
        wanted = ((size,), (size,), (tasks, size), (size,), (tasks, trials), (trials, len(SEARCHED)))
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        for (name, array), shape in zip(arrays.items(), wanted, strict=True):
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite and of the shape {shape}, not {array.shape}")
        if (self.std <= 0).any() or (self.weights < 0).any():
            raise ValueError("std must be above 0, and no weight below")

    @classmethod
    def of(cls, studied: Sequence[Studied], learn: bool, learning: Learning | None) -> Self:
        """Of tasks with the same optimizer, features and number of trials."""
        raw = np.array([list(one.features.values()) for one in studied])
        mean, std = raw.mean(axis=0), raw.std(axis=0)
        std = np.where(std > _TINY, std, 1.0)
        places, weights = _standardized(raw, mean, std), np.ones(len(mean))
        scores = np.stack([one.scores for one in studied])
        if learn:
            weights = learn_weights(places, scores, [one.task.dataset for one in studied], learning)
        return cls(mean, std, places, weights, scores, studied[0].settings)


@dataclass(frozen=True, eq=False)
class WarmStart:
    """A method of one trial: warm-up and cosine decay, with the values that the nearest studied tasks recommend.

    Attributes:
        neighbours: tasks that have a say.
        features: names of the meta-features.
        tables: by optimizer.
    """

    metric: Metric
    neighbours: int
    features: tuple[str, ...]
    tables: Mapping[str, Table]

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(unknown("metric", str(self.metric), METRICS))
        if not self.tables or any(len(table.mean) != len(self.features) for table in self.tables.values()):
            raise ValueError(f"tables of {len(self.features)} features are needed, and at least one")
        counts = {name: len(table.scores) for name, table in self.tables.items()}
        fewest = min(counts.values())
        if not 1 <= self.neighbours <= fewest:
            studied = ", ".join(f"{count} with {name}" for name, count in counts.items())
            raise ValueError(
                f"neighbours must lie in 1..{fewest}, not {self.neighbours}; tasks studied: {studied}; study more"
            )

    @classmethod
    def fit(
        cls,
        studied: Sequence[Studied],
        metric: Metric = "euclidean",
        neighbours: int = 16,
        learning: Learning | None = None,
    ) -> Self:
        """Remember the studied tasks, and learn weights if that is the metric.

        Args:
            studied: all with the same features; with one optimizer, all with the same number of trials.

        Raises:
            ValueError: an unknown metric, fewer tasks with an optimizer than neighbours, tasks that do not go
                together, or all on one data set where a distance is to be learned.
        """
        if not studied:
            raise ValueError("there must be studied tasks, not none")
        groups: dict[str, list[Studied]] = {}
        for one in studied:
            groups.setdefault(one.task.optimizer, []).append(one)
        features = tuple(studied[0].features)
        if any(tuple(one.features) != features for one in studied):
            raise ValueError("the tasks studied differ in the names of their features")
        if any(len({len(one.runs) for one in own}) > 1 for own in groups.values()):
            raise ValueError("the tasks studied with an optimizer differ in their numbers of trials")
        tables = {name: Table.of(own, metric == "learned", learning) for name, own in groups.items()}
        return cls(metric, neighbours, features, tables)

    def distances(self, task: Task) -> Array:
        """From `task` to those studied with its optimizer, `[tasks]`, in the order that they were given in.

        Raises:
            ValueError: there are none.
        """
        self.check(task.optimizer)
        table, found = self.tables[task.optimizer], meta_features(task)
        own = _standardized(np.array([found[name] for name in self.features]), table.mean, table.std)
        if self.metric == "cosine":
            norms = np.linalg.norm(table.places, axis=1) * np.linalg.norm(own)
            return np.asarray(1 - table.places @ own / np.maximum(norms, _TINY))
        return np.asarray(np.sqrt((table.places - own) ** 2 @ table.weights))

    def choose(self, task: Task) -> int:
        """The trial with the least mean score over the nearest tasks: its number in their table.

        Raises:
            ValueError: as `distances`.
        """
        distances, scores = self.distances(task), self.tables[task.optimizer].scores
        order = np.argsort(distances, kind="stable")
        nearest, others = order[: self.neighbours], order[self.neighbours :]
        # Epanechnikov's kernel, as wide as the first task that has no say is far.
        width = distances[others[0]] if len(others) else 2 * distances[nearest[-1]]
        shares = 1 - (distances[nearest] / max(width, _TINY)) ** 2 + _TINY
        return int((shares @ scores[nearest]).argmin())

    def suggest(self, task: Task) -> BaseSchedule:
        """That trial's values. Costs the landmarks (`meta_features.LANDMARK_COST`), once a task."""
        trial = self.choose(task)
        return from_unit(self.tables[task.optimizer].settings[trial], task.optimizer)

    def attach(self, runs: Runs) -> Controller:
        return Listed.of(self.suggest(runs.task), runs)

    def check(self, optimizer: str) -> None:
        """Raise a ValueError unless tasks with this optimizer were studied."""
        if optimizer not in self.tables:
            raise ValueError(f"no task with {optimizer} was studied, only with {', '.join(self.tables)}")

    def state_dict(self) -> dict[str, Any]:
        tables = {
            name: {field.name: torch.from_numpy(getattr(table, field.name)) for field in fields(table)}
            for name, table in self.tables.items()
        }
        about = {"kind": KIND, "metric": self.metric, "neighbours": self.neighbours}
        return {**about, "features": self.features, "tables": tables}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `state_dict`.

        Raises:
            ValueError: not a warm start's.
        """
        try:
            if state["kind"] != KIND:
                raise ValueError(f"it is of a {state['kind']}")
            tables = {
                name: Table(**{field.name: table[field.name].numpy() for field in fields(Table)})
                for name, table in state["tables"].items()
            }
            return cls(state["metric"], state["neighbours"], tuple(state["features"]), tables)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is not the state of a {KIND}: {error}") from error

    def save(self, path: Path) -> None:
        """Write it as one file (`agents.state_file`)."""
        save_state(path, self.state_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: it is damaged, or something else.
        """
        state = load_state(path)
        try:
            return cls.from_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class PolicyWarmStart:
    """A policy on the engine whose first decision is a warm start's: it begins with the values suggested, as far as a
    first decision reaches (`hpo_env.actions.RANGES`), and decides for itself from then on."""

    policy: ControlPolicy
    warm_start: WarmStart

    def attach(self, cohort: Cohort) -> Controller:
        rule = self.policy.header.base_rule(cohort.task.optimizer)
        base = rule.schedule(cohort.examples, cohort.parameters)
        return WithPolicy(Beginning(self.policy, base, self.warm_start.suggest(cohort.task))).attach(cohort)


class Beginning(ControlPolicy):
    """`policy`, but for its first decision, which leads from the schedule `base` to the schedule `first`."""

    def __init__(self, policy: ControlPolicy, base: BaseSchedule, first: BaseSchedule) -> None:
        super().__init__(policy.header)
        self.load_state_dict(policy.state_dict())
        self._action = np.array(
            [
                float(control.to_scale(getattr(first, name)) - control.to_scale(getattr(base, name)))
                / RANGES[name].first
                for name, control in CONTROLS.items()
            ]
        )

    def act(
        self, observation: NDArray[np.float32], state: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
        actions, state = super().act(observation, state)
        return np.where(observation[:, [_FIRST_DECISION]] == 1, self._action, actions), state


def _standardized(features: Array, mean: Array, std: Array) -> Array:
    return np.asarray(np.clip((features - mean) / std, -CLIP, CLIP))
