"""The score that chooses between checkpoints: the policy against the calibrated schedule, on fixed tasks and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import trim_mean

from hpo_env.hyperparameters import Array
from inner_models.tasks import Task

from .application import CohortMethod, Run, train_cohort
from .controllers import WithPolicy
from .measures import capped, log_ratio
from .policy import ControlPolicy
from .schedules import Cosine


@dataclass(frozen=True)
class Score:
    """Meta-validation figures of a policy.

    Attributes:
        returns: task -> mean fall of the log validation loss over a run.
        log_ratios: task -> mean of log(final loss of the calibrated schedule / of the policy), seeds paired; above 0 is
            a win.
        log_ratio_iqm: interquartile mean of these log ratios over task x seed: a few tasks whose losses lie near zero
            do not decide.
    """

    returns: dict[str, float]
    log_ratios: dict[str, float]
    log_ratio_iqm: float

    @property
    def mean_return(self) -> float:
        return float(np.mean(list(self.returns.values())))


class MetaValidation:
    """Scores policies as users attach them (guard on, no loss before training) against the calibrated schedule.

    Args:
        tasks: the tasks.
        seeds: runs of each.
        map: runs a function on every item, such as `RolloutWorkers.map`; the builtin one works here.

    Attributes:
        base_return: mean return of the calibrated schedule.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seeds: Sequence[int],
        *,
        device: str = "cpu",
        map: Callable[[Callable[[Task], list[Run]], Sequence[Task]], Iterable[list[Run]]] = map,
    ) -> None:
        self.tasks, self.seeds, self.device = tuple(tasks), tuple(seeds), device
        self._map = map
        self.names = [f"{index}-{task.name.replace('/', '-')}" for index, task in enumerate(self.tasks)]
        self._base = self._run(Cosine("calibrated"))
        self.base_return = float(np.mean([_falls(runs).mean() for runs in self._base]))

    def __call__(self, policy: ControlPolicy) -> Score:
        found = self._run(WithPolicy(policy))
        ratios = [log_ratio(_final(base), _final(runs)) for runs, base in zip(found, self._base, strict=True)]
        return Score(
            returns={name: float(_falls(runs).mean()) for name, runs in zip(self.names, found, strict=True)},
            log_ratios={name: float(ratio.mean()) for name, ratio in zip(self.names, ratios, strict=True)},
            log_ratio_iqm=float(trim_mean(np.concatenate(ratios), 0.25)),
        )

    def _run(self, method: CohortMethod) -> list[list[Run]]:
        return list(self._map(partial(_train, method=method, seeds=self.seeds, device=self.device), self.tasks))


def _train(task: Task, *, method: CohortMethod, seeds: Sequence[int], device: str) -> list[Run]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_cohort(task, method, seeds, device=device)
    finally:
        torch.set_num_threads(threads)


def _final(runs: list[Run]) -> Array:
    return capped([run.val_loss[-1] for run in runs], _initial(runs))


def _initial(runs: list[Run]) -> Array:
    return np.array([run.initial_loss for run in runs])


def _falls(runs: list[Run]) -> Array:
    return log_ratio(_initial(runs), _final(runs))
