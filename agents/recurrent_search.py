"""Hyperparameter search by a proposer that was learned on meta-train (`agents.proposer`), one trial after the other.

The first trial is the calibrated schedule. Scores are relative to its loss, and so they can be told on a new task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hpo_env.base_schedules import BaseSchedule, calibrated
from hpo_env.hyperparameters import CONTROLS
from inner_models.batched_training import BatchedTraining
from inner_models.tasks import Task

from .application import held_out_rows
from .calibration import SEARCHED
from .emulators import flattened
from .measures import LOSS_FLOOR, capped
from .meta_dataset import from_unit, to_unit
from .proposer import History, Proposer
from .searches import Searched, Snapshot, Trial, finite_or_infinity, held_out_losses


@dataclass(frozen=True)
class RecurrentSearch:
    """A search by a learned proposer, one trial after the other.

    Attributes:
        budget: trials of a study, a full run each. Landmarks, where the proposer reads any, come on top, and count in
            the cost.
    """

    proposer: Proposer
    budget: int

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, not {self.budget}")

    def run(self, task: Task, seeds: Sequence[int], device: str = "cpu") -> list[Searched]:
        """Search once a seed.

        Args:
            seeds: a study's seed is that of its proposals, and of the inner training of each of its trials: initial
                weights, data order and dropout masks are those of every other method at this seed.

        Raises:
            ValueError: as from `Proposer.context`.
        """
        started = time.perf_counter()
        training = BatchedTraining(task, seeds, device=device)
        initial = training.evaluate("val")
        studies = [_Study(seed) for seed in seeds]
        schedules = [calibrated(task.optimizer)] * len(seeds)
        settings = torch.tensor(np.stack([to_unit(schedule, task.optimizer) for schedule in schedules])).float()
        score = torch.zeros(len(seeds))
        history = History(self.proposer.context(task).expand(len(seeds), -1), settings, score)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        reference = np.zeros(len(seeds))
        for trial in range(self.budget):
            if trial:
                noise = torch.stack([torch.randn(len(SEARCHED), generator=generator) for generator in generators])
                settings, history = self.proposer(history, settings, score, noise)
                schedules = [from_unit(place, task.optimizer) for place in settings.double().numpy()]
            ends = np.log(np.maximum(capped(_train(training, studies, schedules), initial), LOSS_FLOOR))
            reference = reference if trial else ends
            score = torch.from_numpy(flattened(ends - reference)).float()
        seconds = (time.perf_counter() - started) / len(seeds)
        snapshots = [snapshot for study in studies for snapshot in study.incumbents]
        test = iter(held_out_losses(training, snapshots, held_out_rows(task)))
        costs = [self.proposer.landmark_cost + trial for trial in range(1, self.budget + 1)]
        return [study.searched(costs, [next(test) for _ in study.incumbents], seconds) for study in studies]


class _Study:
    """The trials of a search so far.

    Attributes:
        incumbents: the weights of each trial that was the best when it finished, where its validation loss was least.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._trials: list[Trial] = []
        self._best: list[float] = []
        self._incumbent: list[int] = []  # of each entry of `_best`, in `incumbents`
        self.incumbents: list[Snapshot] = []

    def observe(self, trial: Trial, snapshot: Snapshot | None) -> None:
        best = self._best[-1] if self._best else math.inf
        if trial.val_loss[-1] < best:
            assert snapshot is not None
            best = trial.val_loss[-1]
            self.incumbents.append(snapshot)
        self._trials.append(trial)
        self._best.append(best)
        self._incumbent.append(len(self.incumbents) - 1)

    def searched(self, cost: list[float], test: Sequence[float], seconds: float) -> Searched:
        """The record; `test` has the test losses of `incumbents`."""
        losses = [*test, math.inf]  # -1: there is none yet
        curve = [losses[index] for index in self._incumbent]
        return Searched(self.seed, cost, self._best, curve, self._trials, seconds)


def _train(training: BatchedTraining, studies: Sequence[_Study], schedules: Sequence[BaseSchedule]) -> list[float]:
    """Train a trial of each study from the start, and let the study have it. Returns the final validation losses."""
    horizon = training.task.horizon
    losses: list[list[float]] = [[] for _ in studies]
    best: list[Snapshot | None] = [None] * len(studies)
    for replica, study in enumerate(studies):
        training.restart(replica, study.seed)
    for interval in range(horizon):
        values = [schedule.values(np.asarray((interval + 0.5) / horizon)) for schedule in schedules]
        signals = training.advance({name: np.array([float(row[name]) for row in values]) for name in CONTROLS})
        for replica, loss in enumerate(map(finite_or_infinity, signals["val_loss"].tolist())):
            if loss < min(losses[replica], default=math.inf):
                best[replica] = training.snapshot(replica)
            losses[replica].append(loss)
    for study, schedule, curve, snapshot in zip(studies, schedules, losses, best, strict=True):
        params = {name: float(getattr(schedule, name)) for name in SEARCHED if name in training.hyperparameters}
        study.observe(Trial(params, curve, pruned=False), snapshot)
    return [curve[-1] for curve in losses]
