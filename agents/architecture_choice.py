"""Architecture choice: which model for a data set, without training a whole menu of them to the end.

All candidates train under the tuner, as cohorts that can be paused and continued. After parts of the run, those that
will hardly be the best are stopped: successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943) with a learned
prediction of the final loss (`agents.final_loss`) in place of the present one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from hpo_env.hyperparameters import Array
from inner_models.batched_training import BatchedTraining
from inner_models.datasets import Modality, load_dataset
from inner_models.models import ModelSpec
from inner_models.splits import META_TRAIN
from inner_models.tasks import COST_SHARE, Task

from .application import Cohort, CohortMethod, Run
from .cells import Cell, Store, run_cells
from .controllers import WithPolicy
from .final_loss import Curve, Trained, intervals_of
from .policy import ControlPolicy
from .tuner import pretrained_path

_MLPS = tuple(ModelSpec("mlp", width, depth) for depth in (1, 3) for width in (16, 64, 192))
_GRUS = tuple(ModelSpec("gru", width, depth) for width, depth in ((16, 1), (32, 1), (64, 1), (32, 2)))


def _transformers(*sizes: tuple[int, int]) -> tuple[ModelSpec, ...]:
    return tuple(ModelSpec("transformer", width, depth, "gelu") for width, depth in sizes)


MENUS: Mapping[Modality, tuple[ModelSpec, ...]] = {
    "table": (ModelSpec("linear"), *_MLPS, ModelSpec("mlp", 64, 2), ModelSpec("mlp", 64, 5)),
    "image": (
        ModelSpec("linear"),
        *(ModelSpec("mlp", width, depth) for depth in (1, 3) for width in (32, 128)),
        *(ModelSpec("cnn", width, depth) for depth in (1, 2) for width in (4, 8, 16)),
    ),
    "sequence": (
        ModelSpec("linear"),
        *(ModelSpec("mlp", 64, depth) for depth in (1, 3)),
        *_GRUS,
        *_transformers((16, 1), (32, 1), (32, 2)),
    ),
    "text": (*_GRUS, *_transformers((16, 1), (32, 1), (64, 1), (32, 2))),
}
"""The candidates, by the kind of data."""

PARTS = (1 / 8, 1 / 4, 1 / 2)
"""Of a run, after which it is decided who goes on."""

PROBLEMS = replace(
    META_TRAIN,
    entries=tuple(
        (name, (min(kinds, key=lambda kind: COST_SHARE.get(kind, 1.0)),)) for name, kinds in META_TRAIN.entries
    ),
    widths=(64, 64),
    optimizers=("adamw",),
    examples=(2048, 65_536),
)
"""What is learned from: data sets of meta-train with budgets, each with one kind of model, which the menu replaces."""

MAX_EXAMPLES = 16_384
"""Of a run that is learned from: menus are dear."""


def menu(task: Task) -> tuple[Task, ...]:
    """The candidates for the data and the budget of `task`, whatever its own model."""
    specs = MENUS[load_dataset(task.dataset, seed=task.seed).modality]
    return tuple(replace(task, model=spec) for spec in specs)


def problems(count: int, seed: int = 0) -> list[Task]:
    """Tasks of `PROBLEMS`, of another data set each until all have had their turn, and then again; fewer are a part of
    more.

    Raises:
        ValueError: less than one.
    """
    if count < 1:
        raise ValueError(f"at least 1 task is needed to learn from, not {count}")
    entries = PROBLEMS.entries
    rng = np.random.default_rng(seed)
    turns = np.resize(rng.permutation(len(entries)), count)
    drawn = [replace(PROBLEMS, entries=(entries[turn],)).sample(rng) for turn in turns]
    return [
        replace(
            task,
            eval_rows=PROBLEMS.eval_rows,
            interval_examples=min(task.interval_examples or MAX_EXAMPLES, MAX_EXAMPLES // task.horizon),
        )
        for task in drawn
    ]


def train_menus(
    tasks: Sequence[Task],
    method: CohortMethod,
    seeds: Sequence[int],
    store: Store,
    *,
    workers: int = 2,
    report: Callable[[float, float, str], None] = lambda done, total, name: None,
) -> list[Trained]:
    """Train all of `menu` of each task to the end, what `store` does not hold yet; arguments as in `run_cells`."""
    cells = [[Cell(candidate, method, tuple(seeds)) for candidate in menu(task)] for task in tasks]
    run_cells([cell for row in cells for cell in row], store, workers=workers, report=report)
    return [
        Trained(tuple(cell.task for cell in row), tuple(store.load(cell) for cell in row))  # type: ignore[misc]
        for row in cells
    ]


class Pool(Protocol):
    """Candidates that are trained a stretch at a time, equally many intervals of equally many examples in all."""

    @property
    def tasks(self) -> Sequence[Task]: ...

    def train(self, candidate: int, intervals: int) -> Curve:
        """Go on with a candidate until `intervals` of it are done."""


class Recorded:
    """Candidates whose whole runs are known.

    Args:
        runs: of each candidate, one a seed.
    """

    def __init__(self, tasks: Sequence[Task], runs: Sequence[Sequence[Run]]) -> None:
        self.tasks, self._curves = tasks, [Curve.of(seeds) for seeds in runs]

    def train(self, candidate: int, intervals: int) -> Curve:
        return self._curves[candidate].until(intervals)


class Cohorts:
    """Candidates that really train, each as a cohort under `method`, one replica a seed.

    Raises:
        ValueError: no candidate or no seed; candidates that differ in more than the model, or whose model does not take
            the data.
    """

    def __init__(self, tasks: Sequence[Task], method: CohortMethod, seeds: Sequence[int], device: str = "cpu") -> None:
        if not tasks or not seeds:
            raise ValueError(f"at least one candidate and one seed are needed, not {len(tasks)} and {len(seeds)}")
        for task in tasks:
            if replace(task, model=tasks[0].model) != tasks[0]:
                raise ValueError(f"candidates must differ in the model alone, but {task} and {tasks[0]} do not")
        self.tasks = tasks
        self._paused = [_Paused(task, method, seeds, device) for task in tasks]

    def train(self, candidate: int, intervals: int) -> Curve:
        return self._paused[candidate].train(intervals)


class _Paused:
    """A cohort between two intervals."""

    def __init__(self, task: Task, method: CohortMethod, seeds: Sequence[int], device: str) -> None:
        self._training = BatchedTraining(task, seeds, device=device)  # without the test split
        cohort = Cohort(self._training)
        self._controller = method.attach(cohort)
        self._initial = cohort.initial_loss
        self._signals: list[Mapping[str, Array]] = []

    def train(self, intervals: int) -> Curve:
        while len(self._signals) < intervals:
            self._signals.append(self._training.advance(self._controller.values))
            self._controller.step(self._signals[-1])
        val, train = ([signals[name] for signals in self._signals] for name in ("val_loss", "train_loss"))
        return Curve.from_losses(self._initial, val, train)


class Predictor(Protocol):
    """Foretells how candidates will compare."""

    def predict(self, tasks: Sequence[Task], curves: Sequence[Curve]) -> Array:
        """Numbers that order candidates, the best least, `[candidates]`, from equally many intervals of each."""


@dataclass(frozen=True)
class Halving:
    """Which candidates go on.

    Attributes:
        predictor: what they are ordered by, such as `agents.final_loss.FinalLoss`; without it, the present loss.
        share: of them that goes on, rounded up, between 0 and 1.
    """

    predictor: Predictor | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"the share that goes on must lie between 0 and 1, not {self.share}")

    def keep(self, tasks: Sequence[Task], curves: Sequence[Curve]) -> list[int]:
        """Positions of those that do, the best first."""
        losses = self.predictor.predict(tasks, curves) if self.predictor else [curve.val[-1] for curve in curves]
        return [int(position) for position in np.argsort(losses, kind="stable")[: math.ceil(self.share * len(tasks))]]


@dataclass(frozen=True)
class Choice:
    """What came of a race.

    Attributes:
        task: the candidate that was chosen, and `chosen` its position.
        curves: of all that have trained, by their positions, until they were stopped.
    """

    task: Task
    chosen: int
    curves: Mapping[int, Curve]

    @property
    def cost(self) -> float:
        """In full runs of one candidate."""
        return sum(len(curve.train) for curve in self.curves.values()) / self.task.horizon


def race(pool: Pool, rule: Halving, parts: Sequence[float] = PARTS, among: Sequence[int] | None = None) -> Choice:
    """Train candidates until a rule has stopped all but a few, and these to the end, where the best one is chosen.

    Args:
        parts: of the run, after which the rule decides.
        among: positions of the candidates that take part; all by default.

    Raises:
        ValueError: `parts` that do not rise between 0 and 1.
    """
    if not all(low < high for low, high in pairwise((0, *parts, 1))):
        raise ValueError(f"parts of a run must rise between 0 and 1, not {tuple(parts)}")
    horizon = pool.tasks[0].horizon
    left = list(range(len(pool.tasks))) if among is None else list(among)
    curves: dict[int, Curve] = {}
    for part in parts:
        if len(left) > 1:
            curves |= {candidate: pool.train(candidate, intervals_of(part, horizon)) for candidate in left}
            kept = rule.keep([pool.tasks[candidate] for candidate in left], [curves[candidate] for candidate in left])
            left = [left[position] for position in kept]
    curves |= {candidate: pool.train(candidate, horizon) for candidate in left}
    chosen = min(left, key=lambda candidate: curves[candidate].val[-1])
    return Choice(pool.tasks[chosen], chosen, curves)


def hyperband(pool: Pool, rng: np.random.Generator) -> Choice:
    """Hyperband (Li et al. 2018, arXiv:1603.06560): halvings by the present loss, from many candidates that are stopped
    early to few that are not, each among others drawn anew. What one has trained, the next does not pay again."""
    brackets = len(PARTS) + 1
    choices = []
    for start in range(brackets):
        count = math.ceil(brackets / (brackets - start) * 2 ** (brackets - 1 - start))
        among = rng.permutation(len(pool.tasks))[:count].tolist()
        choices.append(race(pool, Halving(), PARTS[start:], among))
    best = min(choices, key=lambda choice: choice.curves[choice.chosen].val[-1])
    curves: dict[int, Curve] = {}
    for choice in choices:
        for candidate, curve in choice.curves.items():
            curves[candidate] = max(curve, curves.get(candidate, curve), key=lambda known: len(known.train))
    return replace(best, curves=curves)


def choose(
    task: Task,
    rule: Halving,
    *,
    candidates: Sequence[Task] | None = None,
    method: CohortMethod | None = None,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
) -> Choice:
    """Choose a model for the data and the budget of `task`, by training.

    Args:
        rule: who goes on; `Halving(FinalLoss.fit(...))`, say.
        candidates: tasks that differ in the model alone; `menu(task)` by default.
        method: what they train under; by default the tuner, with the policy that ships with the package.
        seeds: of each candidate; what counts is the mean of the log losses.

    Raises:
        ValueError: as `Cohorts`.
    """
    method = method or WithPolicy(ControlPolicy.load(pretrained_path()))
    return race(Cohorts(menu(task) if candidates is None else candidates, method, seeds, device), rule)
