"""A surrogate of training: predicts how trials will end from their task, their settings and their curves so far.

Meta-regression across tasks (meta-models in Vanschoren 2018, "Meta-Learning: A Survey", arXiv:1810.03548) with partial
learning curves among the inputs (Baker et al. 2017, "Accelerating Neural Architecture Search using Performance
Prediction", arXiv:1705.10823). It proposes configurations before anything is trained, and ranks trials that run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata

from hpo_env.base_schedules import BaseSchedule
from hpo_env.hyperparameters import Array
from inner_models.tasks import Task

from .application import Controller, Runs
from .calibration import SEARCHED
from .ensemble import Ensemble, Fit
from .measures import LOSS_FLOOR, capped
from .meta_dataset import Studied, from_unit
from .meta_features import meta_features
from .schedules import Listed
from .state_file import load_state, save_state

SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Of a run: where its curve is looked at, to learn from."""

CANDIDATES = 4096

ELITE = 64
"""A proposal is the mean of so many of the best candidates: the very best one of thousands is where the regression errs
most in its favour."""

SPACING = 0.25
"""Distance in the unit cube of settings that makes configurations different ones."""

KAPPA = 1.0
"""A candidate counts as its mean plus so many standard deviations: what is doubtful must promise more."""

FIT = Fit(hidden=64, steps=1500)
"""How the ensemble is fitted if nothing else is said."""

KIND = "surrogate"


@dataclass(frozen=True)
class Configured:
    """A configuration as a one-trial method: warm-up and cosine decay of its learning rate, the rest constant."""

    schedule: BaseSchedule

    def attach(self, runs: Runs) -> Controller:
        return Listed.of(self.schedule, runs)


@dataclass(frozen=True)
class Surrogate:
    """Predicts the standings of trials (`standings`): below 0 is better than the median random trial of the task.

    Standings, not losses, as tasks differ far more from one another than trials on a task do. What the ensemble learns
    is how a standing will change: that of trials that have not begun is 0.

    Attributes:
        names: of the meta-features that it reads, in order.
        optimizers: whose settings it knows.
        kappa: see `KAPPA`.
    """

    names: tuple[str, ...]
    optimizers: tuple[str, ...]
    ensemble: Ensemble
    kappa: float = KAPPA

    @classmethod
    def fit(
        cls,
        studied: Sequence[Studied],
        config: Fit | None = None,
        *,
        names: Sequence[str] | None = None,
        kappa: float = KAPPA,
    ) -> Self:
        """Learn from whole runs, before they began and at each of `SHARES`.

        Args:
            studied: of at least as many data sets as the ensemble has members: each member leaves some of them out.
            names: meta-features to read; all when left out.

        Raises:
            ValueError: too few data sets, a task without some of the meta-features.
        """
        if not studied:
            raise ValueError("a surrogate needs studied tasks to learn from, and there are none")
        names = tuple(studied[0].features if names is None else names)
        inputs, targets, groups = [], [], []
        for one in studied:
            for seen in sorted({intervals(share, one.task.horizon) for share in (0.0, *SHARES)}):
                logs, share = one.curves[:, : seen + 1], seen / one.task.horizon
                inputs.append(_inputs(names, one.features, one.settings, logs, share))
                targets.append(standings(one.scores) - _present(logs))
                groups += [one.task.dataset] * len(logs)
        ensemble = Ensemble.fit(np.concatenate(inputs), np.concatenate(targets), groups, config or FIT)
        return cls(names, tuple(sorted({one.task.optimizer for one in studied})), ensemble, kappa)

    def predict(
        self, features: Mapping[str, float], settings: ArrayLike, losses: ArrayLike | None = None, share: float = 0.0
    ) -> tuple[Array, Array]:
        """The final standings of trials on a task: mean and standard deviation over the ensemble, `[trials]` each.

        Args:
            features: of the task, as from `agents.meta_features.meta_features`.
            settings: `[trials, controls]`, as `agents.meta_dataset.to_unit` gives them.
            losses: validation losses so far, `[trials, 1 + intervals]`, the first before training; nothing has been
                trained when left out. They are compared with one another: a random sample of trials is what it knows.
            share: of the run that `losses` reach to, in 0..1.

        Raises:
            ValueError: a meta-feature that is missing; shapes that do not fit; losses without a share.
        """
        places = np.atleast_2d(np.asarray(settings, np.float64))
        curves = np.ones((len(places), 1)) if losses is None else np.atleast_2d(np.asarray(losses, np.float64))
        logs = np.log(np.maximum(capped(curves, curves[:, :1]), LOSS_FLOOR))
        mean, std = self.ensemble.predict(_inputs(self.names, features, places, logs, share))
        return mean + _present(logs), std

    def propose(self, task: Task, count: int = 1) -> list[BaseSchedule]:
        """Configurations to try, the most promising first: the mean of the `ELITE` best of `CANDIDATES` random ones,
        then such means around the best one that is left, `SPACING` away from those before. Costs the landmarks of the
        task's meta-features (`agents.meta_features.LANDMARK_COST`).

        Raises:
            ValueError: an optimizer that it has not studied; more proposals than find room.
        """
        self.check(task.optimizer)
        features = meta_features(task)
        candidates = np.random.default_rng(0).uniform(size=(CANDIDATES, len(SEARCHED)))
        mean, std = self.predict(features, candidates)
        left = near = _effective(features, candidates)[np.argsort(mean + self.kappa * std, kind="stable")]
        chosen: list[Array] = []
        while len(chosen) < count and len(near):
            chosen.append(near[:ELITE].mean(axis=0))
            left = left[np.linalg.norm(left - chosen[-1], axis=1) >= SPACING]
            near = left[np.linalg.norm(left - left[:1], axis=1) < SPACING]
        if not 1 <= count <= len(chosen):
            raise ValueError(f"count must lie in 1..{max(1, len(chosen))}, for proposals to be distinct, not {count}")
        return [from_unit(place, task.optimizer) for place in chosen]

    def attach(self, runs: Runs) -> Controller:
        """Its first proposal, as a one-trial method."""
        return Configured(self.propose(runs.task)[0]).attach(runs)

    def check(self, optimizer: str) -> None:
        """Raise a ValueError unless tasks with this optimizer were studied."""
        if optimizer not in self.optimizers:
            raise ValueError(f"the surrogate has studied {', '.join(self.optimizers)}, not {optimizer}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "names": list(self.names),
            "optimizers": list(self.optimizers),
            "kappa": self.kappa,
            "ensemble": self.ensemble.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `state_dict`.

        Raises:
            ValueError: not a surrogate's.
        """
        if state.get("kind") != KIND:
            raise ValueError(f"this is not the state of a {KIND} but of {state.get('kind')!r}")
        ensemble = Ensemble.from_state_dict(state["ensemble"])
        return cls(tuple(state["names"]), tuple(state["optimizers"]), ensemble, state["kappa"])

    def save(self, path: Path) -> None:
        save_state(path, self.state_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged, or not a surrogate.
        """
        return cls.from_state_dict(load_state(path))


def intervals(share: float, horizon: int) -> int:
    """That make up a share of a run: whole ones, at least one of any share but 0."""
    return max(1, round(share * horizon)) if share else 0


def held_out(studied: Sequence[Studied], parts: int, config: Fit | None = None) -> Iterator[tuple[Surrogate, Studied]]:
    """Each task, with a surrogate that has seen no task of the same data set: one for each of `parts` of the data sets.

    Raises:
        ValueError: fewer than two parts, more than there are data sets, and as from `Surrogate.fit`.
    """
    datasets = sorted({one.task.dataset for one in studied})
    if not 2 <= parts <= len(datasets):
        raise ValueError(f"{len(datasets)} data sets can be held out in 2..{len(datasets)} parts, not {parts}")
    part_of = dict(zip(datasets, np.random.default_rng(0).permutation(len(datasets)) % parts, strict=True))
    for part in range(parts):
        inside = [one for one in studied if part_of[one.task.dataset] != part]
        surrogate = Surrogate.fit(inside, config)
        yield from ((surrogate, one) for one in studied if part_of[one.task.dataset] == part)


def standings(losses: ArrayLike) -> Array:
    """Normal scores of the ranks among trials on a task, `[trials]`: the normal quantile of (rank - 1/2) / trials, -1.6
    for the best of ten, -2.6 for the best of a hundred, 0 where all are equal."""
    return np.asarray(norm.ppf((rankdata(losses) - 0.5) / np.size(losses)))


def _present(logs: Array) -> Array:
    """Standings by the present losses, of `logs` as in `_inputs`; 0 before training, when losses tell nothing."""
    return standings(logs[:, -1]) if logs.shape[1] > 1 else np.zeros(len(logs))


def _inputs(names: Sequence[str], features: Mapping[str, float], settings: Array, logs: Array, share: float) -> Array:
    """What the ensemble reads, `[trials, inputs]`.

    Args:
        logs: of losses so far, `[trials, 1 + intervals]`.
    """
    missing = [name for name in (*names, "has_dropout") if name not in features]
    if missing:
        raise ValueError(f"the task lacks the meta-features {', '.join(missing)}")
    if settings.shape[1:] != (len(SEARCHED),) or logs.ndim != 2 or len(logs) != len(settings):
        raise ValueError(f"settings and losses have the shapes {settings.shape} and {logs.shape}")
    if not 0 <= share <= 1 or (share > 0) != (logs.shape[1] > 1):
        raise ValueError(f"{logs.shape[1] - 1} intervals of a run cannot be the share {share} of it")
    task = np.tile([features[name] for name in names], (len(settings), 1))
    return np.hstack([task, _effective(features, settings), _curve_features(logs, share)])


def _effective(features: Mapping[str, float], settings: Array) -> Array:
    """`settings`, with the dropout of models that have none at 0."""
    used = np.ones(len(SEARCHED))
    used[SEARCHED.index("dropout")] = features["has_dropout"]
    return settings * used


def _curve_features(logs: Array, share: float) -> Array:
    """`[trials, 1 + intervals]` to `[trials, 5]`: the share of the run, the standing, and how far the present loss lies
    from those before training, halfway, and at the best. All depend on ratios of losses alone, and are 0 before it."""
    now = logs[:, -1:]
    before = [logs[:, :1], logs[:, [logs.shape[1] // 2]], logs.min(axis=1, keepdims=True)]
    about = np.column_stack([np.full(len(logs), share), _present(logs)])
    return np.hstack([about, *(now - then for then in before)])
