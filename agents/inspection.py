"""What a policy looks at: its responses to each feature, and what becomes of its actions and runs without one.

Features are judged by permutation over runs on given tasks: at a decision, a feature (or a group of
`agents.reasons.GROUPS`) is taken from a random run of another task at the same share of the run. Two measures: how far
the actions change, offline, on the observations of the policy's own runs; and, for groups, how much the final
validation loss of runs rises that see the permuted group all along. The progress itself cannot be judged this way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.observations import FEATURES
from inner_models.tasks import Task

from .application import Cohort, Controller, Run
from .cells import Cell, Store, run_cells
from .controllers import MEASURED, Attached, Elsewhere, WithPolicy
from .evaluation import labels
from .measures import Interval, capped, interquartile_mean, log_ratio, mean
from .policy import CONSTANT, ControlPolicy
from .reasons import GROUPS

Members = NDArray[np.bool_]
Observations = Mapping[str, NDArray[np.float32]]
"""Label of a task -> `[runs, decisions, features]`."""

ALL_MEASURED = "all that is measured"
"""Name of the set of all features that tell of the run's course."""

DRAWS = 8
"""Permutations that a change of the actions is the mean of."""

BACKGROUND = 256
"""Observations at which responses are taken, at most."""

_NAMES = [feature.name for feature in FEATURES]
_AVAILABLE = np.array([_NAMES.index(f"{name}_available") for name in CONTROLS])
_SHARED = ("progress", "first_decision")
"""Alike in all runs at the same share of the run, so permutation says nothing about them."""

_FLAGS = ("examples_known", "momentum_sgd", "first_decision", "val_missing", "gradients_missing", "non_finite")


def blind(policy: ControlPolicy) -> list[str]:
    """Features that no action depends on: those that the policy does not know, those that never varied in
    meta-training, and those whose weights are 0."""
    first = next(layer for layer in policy.network if isinstance(layer, nn.Linear))
    ranges = policy.header.trained_ranges
    constant = [name for name, (low, high) in ranges.items() if high - low <= CONSTANT]
    columns = zip(policy.header.features, first.weight.detach().numpy().T, strict=True)
    sighted = [name for name, column in columns if name not in constant and column.any()]
    return [name for name in _NAMES if name not in sighted]


def sets_of_features(policy: ControlPolicy) -> dict[str, Members]:
    """What is permuted together: group -> `[features]`, which belong to it; the last is `ALL_MEASURED`."""
    left_out = [*_SHARED, *blind(policy)]
    groups = {group.name: [name for name in group.features if name not in left_out] for group in GROUPS}
    return {**{name: np.isin(_NAMES, members) for name, members in groups.items() if members}, ALL_MEASURED: MEASURED}


@dataclass(frozen=True)
class Response:
    """Actions against one feature, the others as they were in real observations.

    Attributes:
        values: of the feature, `[points]`, over the range that meta-training saw.
        actions: `[3, points, controls]`: 10 %, median and 90 % over the observations.
        usual: where the middle 90 % of the real observations lie.
    """

    values: Array
    actions: Array
    usual: tuple[float, float]


def responses(policy: ControlPolicy, observations: NDArray[np.float32], points: int = 33) -> dict[str, Response]:
    """The response to each feature that the policy is not blind to.

    Args:
        observations: real ones, `[n, features]`; `BACKGROUND` of them are used.
        points: values of a feature; 2 for flags.
    """
    order = np.random.default_rng(0).permutation(len(observations))[:BACKGROUND]
    background = observations[order]
    found = {}
    for index, feature in enumerate(FEATURES):
        if feature.name in blind(policy):
            continue
        low, high = policy.header.trained_ranges.get(feature.name, (feature.low, feature.high))
        flag = feature.name in _FLAGS or feature.name.endswith("_available")
        values = np.linspace(low, high, 2 if flag else points)
        swept = np.repeat(background[None], len(values), axis=0)
        swept[:, :, index] = values[:, None]
        actions = policy.act(swept.reshape(-1, len(FEATURES)))[0].reshape(len(values), len(background), -1)
        usual = np.quantile(observations[:, index], [0.05, 0.95])
        found[feature.name] = Response(
            values, np.quantile(actions, [0.1, 0.5, 0.9], axis=1), (float(usual[0]), float(usual[1]))
        )
    return found


@dataclass(frozen=True)
class Importance:
    """What permuting some features does.

    Attributes:
        action: mean absolute change of the actions on the controls that a run has, in -1..1.
        by_control: the same of each control that some run has.
        loss: ln(final validation loss with the features permuted / without), above 0 where they help; None where it
            has not been run.
        loss_by_task: its mean over the seeds of each task.
    """

    action: Interval
    by_control: dict[str, float]
    loss: Interval | None = None
    loss_by_task: dict[str, float] | None = None


@dataclass(frozen=True)
class Inspection:
    """Figures of one policy.

    Attributes:
        tasks: label -> task.
        seeds: runs of each.
        decisions: decisions that the observations are of.
        groups: set of features -> its importance; the last is `ALL_MEASURED`.
        features: feature -> its importance, but for what is blind and what all runs share (the progress).
        responses: feature -> its response.
        blind: the other features.
    """

    tasks: dict[str, Task]
    seeds: int
    decisions: int
    groups: dict[str, Importance]
    features: dict[str, Importance]
    responses: dict[str, Response]
    blind: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "tasks": {label: repr(task) for label, task in self.tasks.items()},
            "seeds": self.seeds,
            "decisions": self.decisions,
            "blind": self.blind,
            "groups": {name: asdict(importance) for name, importance in self.groups.items()},
            "features": {name: asdict(importance) for name, importance in self.features.items()},
            "responses": {
                name: {
                    "values": response.values.tolist(),
                    "actions": response.actions.tolist(),
                    "usual": response.usual,
                }
                for name, response in self.responses.items()
            },
        }


@dataclass(frozen=True)
class Permuted(WithPolicy):
    """A policy that sees some features of other runs: `sees`, at the same share of the run, drawn at every decision.

    Attributes:
        features: their names.
    """

    features: tuple[str, ...] = ()

    def attach(self, cohort: Cohort) -> Controller:
        return _Permuted(self, cohort)


class _Permuted(Attached):
    def _seen(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        assert isinstance(self._method, Permuted)
        assert isinstance(self._method.sees, Elsewhere)
        share = self._intervals.epoch / self._intervals.epochs
        others = _at(self._method.sees.runs, np.full(len(observations), share), self._rng)
        return np.where(np.isin(_NAMES, self._method.features), others, observations)


def inspect(
    policy: ControlPolicy,
    tasks: Sequence[Task],
    seeds: int,
    store: Store,
    *,
    workers: int = 2,
    device: str = "cpu",
    report: Callable[[float, float, str], None] = lambda done, total, name: None,
) -> Inspection:
    """Run what `store` does not hold yet, and measure.

    Args:
        tasks: at least 2.
        seeds: runs of each, at least 2.
        workers, device, report: as for `agents.cells.run_cells`.

    Raises:
        ValueError: too few tasks or seeds; a damaged cell.
    """
    if len(tasks) < 2 or seeds < 2:
        raise ValueError(f"permutation needs at least 2 tasks and 2 seeds, not {len(tasks)} and {seeds}")
    named, numbers = labels(tasks), tuple(range(seeds))
    settings: dict[str, Any] = {"workers": workers, "device": device}
    own = {label: Cell(task, WithPolicy(policy, record=True), numbers) for label, task in named.items()}
    sets = sets_of_features(policy)
    total = (len(sets) + 1) * sum(cell.cost for cell in own.values())
    run_cells(list(own.values()), store, report=lambda done, _, name: report(done, total, name), **settings)
    runs: dict[str, list[Run]] = {label: store.load(cell) for label, cell in own.items()}  # type: ignore[misc]
    seen = {label: np.array([run.notes["observations"] for run in found], np.float32) for label, found in runs.items()}
    permuted = {
        name: {label: Cell(task, _permuted(policy, seen, label, members), numbers) for label, task in named.items()}
        for name, members in sets.items()
    }
    begun = total / (len(sets) + 1)
    cells = [cell for by_label in permuted.values() for cell in by_label.values()]
    run_cells(cells, store, report=lambda done, _, name: report(begun + done, total, name), **settings)
    sighted = [name for name in _NAMES if name not in (*_SHARED, *blind(policy))]
    members = np.array([*sets.values(), *(np.array(_NAMES) == name for name in sighted)])
    changes = action_changes(policy, seen, members)
    importances = [
        _importance({label: change[index] for label, change in changes.items()}) for index in range(len(members))
    ]
    groups = {
        name: _with_loss(importance, runs, {label: store.load(cell) for label, cell in permuted[name].items()})
        for name, importance in zip(sets, importances, strict=False)
    }
    everything = np.concatenate([rows.reshape(-1, len(FEATURES)) for rows in seen.values()])
    return Inspection(
        named,
        seeds,
        len(everything),
        groups,
        dict(zip(sighted, importances[len(sets) :], strict=True)),
        responses(policy, everything),
        blind(policy),
    )


def action_changes(
    policy: ControlPolicy, observations: Observations, members: Members, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Array]:
    """Mean absolute change of the actions of each run when features are permuted, over its decisions and `draws`.

    Args:
        observations: of two tasks or more.
        members: `[sets, features]`, what is permuted together.

    Returns:
        Label -> `[sets, runs, controls]`; NaN for a control that the run lacks.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for label, seen in observations.items():
        runs, decisions, features = seen.shape
        others = _others(observations, label)
        shares = np.tile(np.arange(decisions) / decisions, runs)
        rows = seen.reshape(-1, features)
        actions = policy.act(rows)[0]
        total = np.zeros((len(members), *actions.shape))
        for _ in range(draws):
            drawn = _at(others, shares, rng)
            for index, which in enumerate(members):
                total[index] += np.abs(policy.act(np.where(which, drawn, rows))[0] - actions)
        changes = (total / draws).reshape(len(members), runs, decisions, -1).mean(axis=2)
        found[label] = np.where(seen[:, 0, _AVAILABLE] > 0, changes, np.nan)
    return found


def _at(runs: Sequence[NDArray[np.float32]], shares: Array, rng: np.random.Generator) -> NDArray[np.float32]:
    """An observation of a random run for each of `shares` (0..1 of a run), at that share: `[shares, features]`."""
    chosen = rng.integers(len(runs), size=len(shares))
    return np.stack([runs[run][int(share * len(runs[run]) + 1e-9)] for run, share in zip(chosen, shares, strict=True)])


def _others(observations: Observations, label: str) -> tuple[NDArray[np.float32], ...]:
    return tuple(run for other, runs in observations.items() if other != label for run in runs)


def _permuted(policy: ControlPolicy, observations: Observations, label: str, members: Members) -> Permuted:
    features = tuple(name for name, member in zip(_NAMES, members, strict=True) if member)
    return Permuted(policy, sees=Elsewhere(_others(observations, label)), features=features)


def _importance(changes: Mapping[str, Array]) -> Importance:
    """Of changes `[runs, controls]` on each task."""
    pooled = np.concatenate(list(changes.values()))
    return Importance(
        mean([np.nanmean(change, axis=1) for change in changes.values()]),
        {
            name: float(np.nanmean(column))
            for name, column in zip(CONTROLS, pooled.T, strict=True)
            if np.isfinite(column).any()
        },
    )


def _with_loss(importance: Importance, runs: Mapping[str, list[Run]], permuted: Mapping[str, Any]) -> Importance:
    ratios = {label: log_ratio(_final(permuted[label]), _final(own)) for label, own in runs.items()}
    by_task = {label: float(ratio.mean()) for label, ratio in ratios.items()}
    return Importance(importance.action, importance.by_control, interquartile_mean(list(ratios.values())), by_task)


def _final(runs: Sequence[Run]) -> Array:
    return capped([run.val_loss[-1] for run in runs], [run.initial_loss for run in runs])
