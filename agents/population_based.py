"""Population-based training (Jaderberg et al. 2017, "Population Based Training of Neural Networks").

Exploitation is their truncation selection: every tenth of a run, the members in the bottom fifth by validation loss
take over the weights, optimizer state and hyperparameters of a random member of the top fifth. Exploration is theirs
in Ray Tune's form: each hyperparameter taken over is drawn anew with probability 0.25, else multiplied by 0.8 or 1.2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpo_env.base_schedules import REGULARIZERS
from hpo_env.hyperparameters import CONTROLS, Array
from inner_models.batched_training import BatchedTraining
from inner_models.tasks import Task, prepare

from .application import held_out_rows
from .calibration import sample_schedules
from .searches import Searched, Snapshot, Trial, finite_or_infinity, held_out_losses

SELECTED = 0.2
"""Share of the population that is replaced, and share that replaces it; at least one member."""

RESAMPLED = 0.25
"""Probability with which exploring draws a hyperparameter anew."""

FACTORS = (0.8, 1.2)

SETTINGS: dict[str, str] = {
    "population-based": "truncation selection (bottom and top fifth) every tenth of the run, hyperparameters x 0.8 or "
    "1.2 or, with probability 0.25 each, drawn anew; no schedule on top; its cost is its size, in full runs"
}


@dataclass(frozen=True)
class PopulationBased:
    """Population-based training.

    Attributes:
        population: members, and with them the cost in full runs.
    """

    population: int

    def __post_init__(self) -> None:
        if self.population < 2:
            raise ValueError(f"population must be at least 2, not {self.population}")

    def run(self, task: Task, seeds: Sequence[int], device: str = "cpu") -> list[Searched]:
        """Train one population a seed, all as one cohort.

        Args:
            seeds: of a population's choices, and of the inner training of each of its members: initial weights, data
                order and dropout masks are those of every other method at this seed.

        Returns:
            Records whose curves have one entry, the end: the member with the least final validation loss, judged on
            the test split at the interval of its own best validation loss. A member's history is that of its weights:
            with another's weights it takes over where those were best.
        """
        started = time.perf_counter()
        training = BatchedTraining(task, [seed for seed in seeds for _ in range(self.population)], device=device)
        populations = [
            Population(training, range(start, start + self.population), seed)
            for start, seed in zip(range(0, training.replicas, self.population), seeds, strict=True)
        ]
        every = math.ceil(task.horizon / 10)
        for interval in range(task.horizon):
            if interval and not interval % every:
                for population in populations:
                    population.select()
            values = {name: np.concatenate([p.values(name) for p in populations]) for name in training.hyperparameters}
            losses = training.advance(values)["val_loss"]
            for population in populations:
                population.observe(losses)
        seconds = (time.perf_counter() - started) / len(seeds)
        winners = [population.winner() for population in populations]
        kept = [snapshot for _, snapshot in winners if snapshot is not None]
        test = iter(held_out_losses(training, kept, held_out_rows(task)))
        return [
            Searched(
                seed=population.seed,
                cost=[float(self.population)],
                best=[best],
                test=[math.inf if snapshot is None else next(test)],
                trials=population.trials(),
                seconds=seconds,
            )
            for population, (best, snapshot) in zip(populations, winners, strict=True)
        ]


class Population:
    """The members of one population.

    Args:
        members: their replicas.

    Attributes:
        losses: `[members]` for each interval so far, infinity where not finite.
    """

    def __init__(self, training: BatchedTraining, members: Sequence[int], seed: int) -> None:
        self._training, self._members, self.seed = training, members, seed
        self._rng = np.random.default_rng(seed)
        self._regularizers = prepare(training.task).regularizers
        names = [name for name in CONTROLS if name not in REGULARIZERS or name in self._regularizers]
        drawn = sample_schedules(training.task.optimizer, len(members), self._rng, regularizers=self._regularizers)
        self._values = {name: np.array([getattr(schedule, name) for schedule in drawn]) for name in names}
        self._start = {name: self.values(name) for name in names if name in training.hyperparameters}
        self._best = np.full(len(members), math.inf)  # of the weights that a member has, and where that was:
        self._snapshots: list[Snapshot | None] = [None] * len(members)
        self.losses: list[Array] = []

    def values(self, name: str) -> Array:
        """A hyperparameter of each member as it is used, `[members]`. Unrounded values are kept, lest 16 x 1.2 stay
        16 forever."""
        control = CONTROLS[name]
        return control.from_scale(control.to_scale(self._values[name]))

    def observe(self, val_loss: Array) -> None:
        """Take in the losses after an interval, `[replicas]` of the whole cohort."""
        losses = np.array([finite_or_infinity(float(val_loss[replica])) for replica in self._members])
        self.losses.append(losses)
        for member in np.flatnonzero(losses < self._best).tolist():
            self._best[member] = losses[member]
            self._snapshots[member] = self._training.snapshot(self._members[member])

    def select(self) -> dict[int, int]:
        """Exploit and explore. Diverged members are replaced wherever they rank, and never taken over.

        Returns:
            Member -> the member whose place it took.
        """
        losses = self.losses[-1]
        order = np.argsort(losses, kind="stable").tolist()
        count = math.ceil(SELECTED * len(order))
        donors = [member for member in order[:count] if math.isfinite(losses[member])]
        losers = [*order[-count:], *(member for member in order[:-count] if losses[member] == math.inf)]
        taken = {loser: int(self._rng.choice(donors)) for loser in losers} if donors else {}
        for loser, donor in taken.items():
            self._training.restore(self._members[loser], self._training.snapshot(self._members[donor]))
            self._best[loser], self._snapshots[loser] = self._best[donor], self._snapshots[donor]
            self._explore(loser, donor)
        return taken

    def _explore(self, loser: int, donor: int) -> None:
        anew = sample_schedules(self._training.task.optimizer, 1, self._rng, regularizers=self._regularizers)[0]
        for name, values in self._values.items():
            moved = values[donor] * self._rng.choice(FACTORS)
            value = getattr(anew, name) if self._rng.random() < RESAMPLED else moved
            values[loser] = np.clip(value, CONTROLS[name].low, CONTROLS[name].high)

    def winner(self) -> tuple[float, Snapshot | None]:
        """Least final loss, and the weights of that member where it was best; none if all have diverged."""
        member = int(np.argmin(self.losses[-1]))
        loss = float(self.losses[-1][member])
        return loss, self._snapshots[member] if math.isfinite(loss) else None

    def trials(self) -> list[Trial]:
        """One a member, with its values at the start and the losses of its replica."""
        return [
            Trial(
                params={name: float(values[member]) for name, values in self._start.items()},
                val_loss=[float(losses[member]) for losses in self.losses],
                pruned=False,
            )
            for member in range(len(self._members))
        ]
