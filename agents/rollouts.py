"""Whole runs under a controller, and the meta-validation score that is taken from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from scipy.stats import trim_mean

from hpo_env.actions import BaseSchedule
from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.vector_env import HPOVectorEnv
from inner_models.tasks import Task

from .policy import ControlPolicy

LOST = 1e3
"""Loss that a diverged run counts with where losses are compared."""

Decide = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""Observations `[runs, features]` to actions `[runs, controls]`."""


@dataclass(frozen=True)
class Rollout:
    """Runs of one task, one a seed. After a run has ended early (diverged), its losses repeat, its controls are NaN.

    Attributes:
        val_loss: `[runs, horizon + 1]`, the first entry before training.
        returns: `[runs]`, sums of the environment's rewards.
        controls: name -> `[runs, horizon]`, the values in use.
    """

    val_loss: Array
    returns: Array
    controls: dict[str, Array]


def stay(observations: NDArray[np.float32]) -> NDArray[np.float64]:
    """Keep every offset: the base schedule itself."""
    return np.zeros((len(observations), len(CONTROLS)))


def roll_out(
    task: Task, decide: Decide, seeds: Sequence[int], *, base: BaseSchedule | None = None, device: str = "cpu"
) -> Rollout:
    """Train `task` once a seed, under `decide`."""
    env = HPOVectorEnv(len(seeds), task=task, base=base, device=device)
    observations, infos = env.reset(seed=list(seeds))
    losses, controls = [infos["val_loss"]], []
    returns, alive = np.zeros(len(seeds)), np.ones(len(seeds), bool)
    for _ in range(task.horizon):
        observations, rewards, terminated, _, infos = env.step(decide(observations).astype(np.float32))
        infos = {key: np.where(terminated, infos["final_info"][key], infos[key]) if terminated.any() else infos[key]
                 for key in ("val_loss", *CONTROLS)}  # fmt: skip
        losses.append(np.where(alive, infos["val_loss"], losses[-1]))
        controls.append({name: np.where(alive, infos[name], np.nan) for name in CONTROLS})
        returns += np.where(alive, rewards, 0.0)
        alive &= ~terminated
    return Rollout(
        np.stack(losses, axis=1), returns, {name: np.stack([c[name] for c in controls], axis=1) for name in CONTROLS}
    )


@dataclass(frozen=True)
class Score:
    """Meta-validation figures of a policy.

    Attributes:
        returns: task -> mean return (fall of the log validation loss).
        log_ratios: task -> mean of log(final loss of the base schedule / of the policy), seeds paired; above 0 is a
            win.
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
    """Scores policies on fixed tasks and seeds, against the base schedule on the same.

    Args:
        tasks: the tasks.
        seeds: runs of each.
        workers: processes that share the tasks; 1 runs them here.
    """

    def __init__(self, tasks: Sequence[Task], seeds: Sequence[int], *, workers: int = 1, device: str = "cpu") -> None:
        self.tasks, self.seeds, self.device = tuple(tasks), tuple(seeds), device
        self._parallel = Parallel(n_jobs=workers)
        self.names = [f"{index}-{task.name.replace('/', '-')}" for index, task in enumerate(self.tasks)]
        self._base = self._run(stay)

    def __call__(self, policy: ControlPolicy) -> Score:
        runs = self._run(_PolicyDecision(policy))
        ratios = [
            np.log(capped(base.val_loss[:, -1]) + 1e-12) - np.log(capped(run.val_loss[:, -1]) + 1e-12)
            for run, base in zip(runs, self._base, strict=True)
        ]
        return Score(
            returns={name: float(run.returns.mean()) for name, run in zip(self.names, runs, strict=True)},
            log_ratios={name: float(ratio.mean()) for name, ratio in zip(self.names, ratios, strict=True)},
            log_ratio_iqm=float(trim_mean(np.concatenate(ratios), 0.25)),
        )

    @property
    def base_return(self) -> float:
        """Mean return of the base schedule."""
        return float(np.mean([run.returns.mean() for run in self._base]))

    def _run(self, decide: Decide) -> list[Rollout]:
        jobs = (delayed(_single_threaded)(task, decide, self.seeds, self.device) for task in self.tasks)
        return list(self._parallel(jobs))


@dataclass(frozen=True)
class _PolicyDecision:
    policy: ControlPolicy

    def __call__(self, observations: NDArray[np.float32]) -> NDArray[np.float64]:
        return self.policy.act(observations)[0]


def _single_threaded(task: Task, decide: Decide, seeds: Sequence[int], device: str) -> Rollout:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return roll_out(task, decide, seeds, device=device)
    finally:
        torch.set_num_threads(threads)


def capped(losses: Array) -> Array:
    """A run that was lost counts as a loss of `LOST`."""
    return np.minimum(np.where(np.isfinite(losses), losses, np.inf), LOST)
