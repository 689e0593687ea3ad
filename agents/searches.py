"""Hyperparameter search at a fixed total budget, by Optuna's samplers and pruners.

All studies of a call (one a seed) train as one cohort of the engine. Each replica is a worker: it asks its study for a
trial, trains it interval by interval, tells how it ended, and takes the next. No trial is begun that what is left of
the budget could not finish, so that no budget goes into trials without a result; what pruning frees goes into more
trials. The engine is built without the test split: samplers and pruners see validation losses alone.

A loss that is not finite is reported to pruners as NaN, on which they prune at their next rung, and told to samplers
as infinity, which Optuna accepts where it turns NaN into a failed trial that samplers ignore: TPE and CMA-ES, which
rank, put it last; the Gaussian process clips it to the worst finite loss. So diverged trials teach, and cannot win.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, cast, get_args

import numpy as np
from torch import Tensor

from hpo_env.base_schedules import REGULARIZERS, BaseSchedule
from hpo_env.hyperparameters import CONTROLS
from inner_models.batched_training import BatchedTraining
from inner_models.datasets import Split
from inner_models.names import unknown
from inner_models.tasks import OptimizerName, Task

from .application import held_out_rows, jsonable
from .calibration import REGULARIZER_RANGE, SEARCH_RANGES
from .optional import require
from .schedules import DEFAULTS

SearchName = Literal["grid", "classic-grid", "tpe", "gp", "cma-es", "successive-halving", "hyperband"]
SEARCHES: tuple[SearchName, ...] = get_args(SearchName)

SETTINGS: dict[SearchName, str] = {
    "grid": "64 points in random order, each level in the middle of its share of the range: learning rate 4 x batch "
    "size 4 x weight decay 2 x dropout 2, or 4 x 4 x 4 without dropout",
    "classic-grid": "learning rate 4 (decades) x batch size 4 (16, 32, 64, 128) x epochs 3 (1/4, 1/2 and all of the "
    "run, each with a whole cosine) in random order, the rest at its default; 28 full runs in all",
    "tpe": "TPESampler(multivariate=True, constant_liar=True), 10 random trials first",
    "gp": "GPSampler(), 10 random trials first",
    "cma-es": "CmaEsSampler(), from the middle of the range",
    "successive-halving": "RandomSampler(), SuccessiveHalvingPruner(min_resource=1, reduction_factor=4), asynchronous",
    "hyperband": "TPESampler(multivariate=True, constant_liar=True), HyperbandPruner(min_resource=1, "
    "max_resource=<intervals of a run>, reduction_factor=3)",
}
"""What each search is, in a line: Optuna's defaults but for what is named."""

EPOCH_SHARES = (0.25, 0.5, 1.0)
"""The lengths of the classic grid's trials, in full runs."""

Snapshot = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    Attributes:
        params: the values used (`batch_size` as rounded); `epochs` where they vary, in intervals.
        val_loss: after each interval that it was trained for; infinity where not finite.
        pruned: whether it was stopped before its end.
    """

    params: dict[str, float]
    val_loss: list[float]
    pruned: bool


@dataclass(frozen=True)
class Searched:
    """A finished search (a study). `cost`, `best` and `test` have an entry each time that trials finished, one a trial.

    Attributes:
        cost: budget spent so far, in full runs; the same for trials of several workers that finish together.
        best: least final validation loss among the completed trials so far; infinity before the first.
        test: test loss of that incumbent, at the interval of its own best validation loss; infinity before the first.
        trials: in the order in which they finished.
        seconds: wall-clock of the whole cohort, the samplers' time included and evaluation on the test split not,
            divided by its number of studies.
    """

    seed: int
    cost: list[float]
    best: list[float]
    test: list[float]
    trials: list[Trial]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; infinity is null."""
        return cast(dict[str, Any], jsonable(asdict(self)))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, and of `dataclasses.asdict`."""
        curves = {name: _losses(record[name]) for name in ("best", "test")}
        trials = [Trial(**{**trial, "val_loss": _losses(trial["val_loss"])}) for trial in record["trials"]]
        return cls(**{**record, **curves, "trials": trials})


@dataclass(frozen=True)
class OptunaSearch:
    """A search by one of Optuna's samplers and pruners, over `SEARCH_RANGES`.

    Attributes:
        name: one of `SEARCHES`; what it stands for is in `SETTINGS`.
        budget: what a study may spend, in full runs. A grid ends where its points do.
        slots: workers a study: trials that train at the same time.
        first: configurations to begin with, a warm start; their values are clipped to the ranges. The sampler learns
            from them as from trials of its own. Not for grids.
    """

    name: SearchName
    budget: int
    slots: int = 4
    first: tuple[BaseSchedule, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in SEARCHES:
            raise ValueError(unknown("search", self.name, SEARCHES))
        if self.first and "grid" in self.name:
            raise ValueError(f"a {self.name} takes no first configurations; a sampler such as tpe does")
        for name in ("budget", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def run(self, task: Task, seeds: Sequence[int], device: str = "cpu") -> list[Searched]:
        """Search once a seed.

        Args:
            seeds: a study's seed is its sampler's, and that of the inner training of each of its trials: initial
                weights, data order and dropout masks are those of every other method at this seed.

        Raises:
            MissingPackage: Optuna, or what the sampler needs beside it, is not installed.
        """
        optuna = _optuna("cmaes") if self.name == "cma-es" else _optuna()
        started = time.perf_counter()
        workers = min(self.slots, self.budget)
        training = BatchedTraining(task, [seed for seed in seeds for _ in range(workers)], device=device)
        with _quiet(optuna):
            studies = [_Study(optuna, self, task, seed, training.hyperparameters) for seed in seeds]
            study_of = [study for study in studies for _ in range(workers)]
            running: dict[int, _Running] = {}  # replica -> trial
            while True:
                for replica, study in enumerate(study_of):
                    if replica not in running and (trial := study.begin()):
                        training.restart(replica, study.seed)
                        running[replica] = trial
                if not running:
                    break
                rows = [running[replica].values() if replica in running else _IDLE for replica in range(len(study_of))]
                signals = training.advance(
                    {name: np.array([row[name] for row in rows]) for name in training.hyperparameters}
                )
                for replica in running:
                    study_of[replica].spend()
                for replica, trial in sorted(running.items()):
                    loss = float(signals["val_loss"][replica])
                    if loss < trial.best:
                        trial.best, trial.snapshot = loss, training.snapshot(replica)
                    if study_of[replica].observe(trial, loss):
                        del running[replica]
        seconds = (time.perf_counter() - started) / len(seeds)
        snapshots = [snapshot for study in studies for snapshot in study.incumbents]
        test = iter(held_out_losses(training, snapshots, held_out_rows(task)))
        return [study.searched(seconds, [next(test) for _ in study.incumbents]) for study in studies]


def held_out_losses(training: BatchedTraining, snapshots: Sequence[Snapshot], rows: Split) -> list[float]:
    """Mean loss on `rows` of each snapshot, infinity where not finite. The replicas are overwritten."""
    losses: list[float] = []
    for start in range(0, len(snapshots), training.replicas):
        batch = snapshots[start : start + training.replicas]
        for replica, snapshot in enumerate(batch):
            training.restore(replica, snapshot)
        losses += training.evaluate(rows)[: len(batch)].tolist()
    return [finite_or_infinity(loss) for loss in losses]


def finite_or_infinity(loss: float) -> float:
    """`loss`, or infinity where it is not finite."""
    return loss if math.isfinite(loss) else math.inf


def publish(searched: Sequence[Searched], storage: str, name: str) -> None:
    """Write studies into an Optuna storage, where `optuna-dashboard` shows them.

    Each is called `<name>/seed<seed>`. Trials that the storage has of it already are left alone, those beyond them are
    added. Trials whose final loss is not finite are failed ones there.

    Args:
        storage: an Optuna storage URL, such as `sqlite:///searches.db`.

    Raises:
        ValueError: the storage cannot be opened.
        MissingPackage: Optuna is not installed.
    """
    optuna = _optuna()
    with _quiet(optuna):
        try:
            opened = optuna.storages.RDBStorage(storage)
        except Exception as error:  # of the URL, of SQLAlchemy, of the database's own driver
            raise ValueError(f"no Optuna storage at {storage!r} (such as sqlite:///searches.db): {error}") from error
        for record in searched:
            study = optuna.create_study(
                study_name=f"{name}/seed{record.seed}", storage=opened, direction="minimize", load_if_exists=True
            )
            there = len(study.get_trials(deepcopy=False))
            study.add_trials([_frozen(optuna, trial) for trial in record.trials[there:]])


@dataclass
class _Running:
    """A trial in training.

    Attributes:
        asked: Optuna's trial.
        intervals: that it takes.
        best: least validation loss so far, and `snapshot` the weights there.
    """

    asked: Any
    params: dict[str, float]
    intervals: int
    val_loss: list[float] = field(default_factory=list)
    best: float = math.inf
    snapshot: Snapshot | None = None
    schedule: BaseSchedule = field(init=False)

    def __post_init__(self) -> None:
        values = {name: self.params.get(name, 0.0) for name in CONTROLS}
        self.schedule = BaseSchedule(**values)

    def values(self) -> dict[str, float]:
        """Hyperparameters of the coming interval."""
        values = self.schedule.values(np.asarray((len(self.val_loss) + 0.5) / self.intervals))
        return {name: float(value) for name, value in values.items()}


_IDLE = {**dict.fromkeys(CONTROLS, 0.0), "batch_size": CONTROLS["batch_size"].high}


class _Study:
    """A study and its budget. Intervals are the unit of all costs.

    Attributes:
        incumbents: the weights of each trial that was the best when it finished, where its validation loss was least.
    """

    def __init__(self, optuna: Any, search: OptunaSearch, task: Task, seed: int, has: Sequence[str]) -> None:
        self.seed, self._optuna, self._horizon = seed, optuna, task.horizon
        self._defaults = {name: getattr(DEFAULTS[task.optimizer], name) for name in CONTROLS if name in has}
        levels = _levels(search.name, task, has)
        self._space = _space(optuna, search.name, task, has)
        self._points = math.prod(len(values) for values in levels.values()) if levels else math.inf
        self._shortest = int(min(levels.get("epochs", [task.horizon])))
        pruner = _pruner(optuna, search.name, task.horizon)
        self._prunes = pruner is not None
        self._study = optuna.create_study(
            study_name=f"{search.name}/seed{seed}",  # from which Hyperband draws the brackets
            sampler=_sampler(optuna, search.name, levels, seed),
            pruner=pruner or optuna.pruners.NopPruner(),
        )
        for schedule in search.first:
            values = {name: np.clip(getattr(schedule, name), d.low, d.high) for name, d in self._space.items()}
            self._study.enqueue_trial({name: float(value) for name, value in values.items()})
        self._left = search.budget * task.horizon  # neither spent nor promised to a trial that runs
        self._spent = 0
        self._cost: list[float] = []
        self._best: list[float] = []
        self._trials: list[Trial] = []
        self._incumbent: list[int] = []  # of each entry of `_best`, in `incumbents`
        self.incumbents: list[Snapshot] = []

    def begin(self) -> _Running | None:
        """The next trial, if the budget holds one and the grid has one."""
        if self._left < self._shortest or self._points < 1:
            return None
        self._points -= 1
        asked = self._study.ask(self._space)
        params = self._defaults | {name: _used(name, value) for name, value in asked.params.items()}
        trial = _Running(asked, params, int(params.get("epochs", self._horizon)))
        if trial.intervals > self._left:  # the next point of a grid whose trials differ in length: here it ends
            self._points = 0
            return None
        self._left -= trial.intervals
        return trial

    def spend(self) -> None:
        """Count an interval of a trial."""
        self._spent += 1

    def observe(self, trial: _Running, val_loss: float) -> bool:
        """Take in the loss after an interval of a trial, once the whole interval is spent. Returns whether the trial is
        over."""
        trial.val_loss.append(finite_or_infinity(val_loss))
        left = trial.intervals - len(trial.val_loss)
        if self._prunes:
            trial.asked.report(val_loss if math.isfinite(val_loss) else math.nan, len(trial.val_loss))
        pruned = bool(left) and self._prunes and trial.asked.should_prune()
        if left and not pruned:
            return False
        self._left += left
        with suppress(RuntimeError):  # a grid's last trial, when its sampler stops a loop that is not there
            if pruned:
                self._study.tell(trial.asked, state=self._optuna.trial.TrialState.PRUNED)
            else:
                self._study.tell(trial.asked, trial.val_loss[-1])
        self._cost.append(self._spent / self._horizon)
        self._trials.append(Trial(trial.params, trial.val_loss, pruned))
        best = self._best[-1] if self._best else math.inf
        if not pruned and trial.val_loss[-1] < best:
            assert trial.snapshot is not None
            best = trial.val_loss[-1]
            self.incumbents.append(trial.snapshot)
        self._best.append(best)
        self._incumbent.append(len(self.incumbents) - 1)
        trial.snapshot = None
        return True

    def searched(self, seconds: float, test: Sequence[float]) -> Searched:
        """The record.

        Args:
            test: test losses of `incumbents`.
        """
        losses = [*test, math.inf]  # -1: there is none yet
        curve = [losses[index] for index in self._incumbent]
        return Searched(self.seed, self._cost, self._best, curve, self._trials, seconds)


def _ranges(optimizer: OptimizerName, has: Sequence[str]) -> dict[str, tuple[float, float]]:
    ranges = SEARCH_RANGES[optimizer] | dict.fromkeys(REGULARIZERS, REGULARIZER_RANGE)
    return {name: bounds for name, bounds in ranges.items() if name in has}


def _levels(name: SearchName, task: Task, has: Sequence[str]) -> dict[str, list[float]]:
    """A grid's values of each hyperparameter; empty for other searches. `REGULARIZERS` are not in it."""
    ranges = _ranges(task.optimizer, [control for control in has if control not in REGULARIZERS])
    if name == "grid":
        counts = {"lr": 4, "batch_size": 4, "weight_decay": 2 if "dropout" in has else 4, "dropout": 2}
        levels = {}
        for control, (low, high) in ranges.items():
            shares = (np.arange(counts[control]) + 0.5) / counts[control]
            middles = low + shares * (high - low) if control == "dropout" else low * (high / low) ** shares
            levels[control] = [_used(control, float(middle)) for middle in middles]
        return levels
    if name == "classic-grid":
        epochs = sorted({float(math.ceil(share * task.horizon)) for share in EPOCH_SHARES})
        return {
            "lr": np.geomspace(*ranges["lr"], 4).tolist(),
            "batch_size": [16.0, 32.0, 64.0, 128.0],
            "epochs": epochs,
        }
    return {}


def _space(optuna: Any, name: SearchName, task: Task, has: Sequence[str]) -> dict[str, Any]:
    """Optuna's distributions. Batch sizes are rounded only where they are used."""
    Float = optuna.distributions.FloatDistribution
    space = {
        control: Float(low, high, log=control != "dropout")
        for control, (low, high) in _ranges(task.optimizer, has).items()
    }
    if name == "grid":
        return {control: floats for control, floats in space.items() if control not in REGULARIZERS}
    if name != "classic-grid":
        return space
    return {"lr": space["lr"], "batch_size": space["batch_size"], "epochs": Float(1, task.horizon)}


def _sampler(optuna: Any, name: SearchName, levels: Mapping[str, list[float]], seed: int) -> Any:
    samplers = optuna.samplers
    if levels:
        return samplers.GridSampler(levels, seed=seed)
    if name == "gp":
        return samplers.GPSampler(seed=seed)
    if name == "cma-es":
        return samplers.CmaEsSampler(seed=seed)
    if name == "successive-halving":
        return samplers.RandomSampler(seed=seed)
    return samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)


def _pruner(optuna: Any, name: SearchName, horizon: int) -> Any | None:
    if name == "successive-halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=4)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=horizon, reduction_factor=3)
    return None


def _used(name: str, value: float) -> float:
    """A suggested value as it is used: within the control's range, on its grid."""
    if name not in CONTROLS:
        return value
    control = CONTROLS[name]
    return float(control.from_scale(control.to_scale(np.asarray(value))))


def _frozen(optuna: Any, trial: Trial) -> Any:
    """A trial as Optuna stores finished ones."""
    states = optuna.trial.TrialState
    state = states.PRUNED if trial.pruned else states.COMPLETE if math.isfinite(trial.val_loss[-1]) else states.FAIL
    distributions = {}
    for name, value in trial.params.items():
        control = CONTROLS.get(name)
        distributions[name] = (
            optuna.distributions.FloatDistribution(control.low, control.high, log=control.scale == "log")
            if control
            else optuna.distributions.IntDistribution(1, max(1, int(value)))
        )
    return optuna.trial.create_trial(
        state=state,
        value=trial.val_loss[-1] if state == states.COMPLETE else None,
        params=trial.params,
        distributions=distributions,
        intermediate_values=dict(enumerate(trial.val_loss, start=1)),
    )


def _losses(record: Sequence[float | None]) -> list[float]:
    return [math.inf if loss is None else loss for loss in record]


def _optuna(*beside: str) -> Any:
    """Optuna, and a check that the packages `beside` it are there."""
    for package in beside:
        require(package, extra="compare")
    return require("optuna", extra="compare")


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna's log, and its warnings of what is meant here, off; both as they were afterwards."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "Clip non-finite values")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
