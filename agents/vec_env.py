"""`HPOVectorEnv` for stable-baselines3: cohorts divided among worker processes, rewards relative to the cohort."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpo_env.env import Variation, action_space, observation_space
from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.rewards import leave_one_out
from hpo_env.vector_env import HPOVectorEnv
from inner_models.tasks import Task, TaskDistribution

from .rollouts import RolloutWorkers, Step

_REWARD_CLIP = 5.0


class RelativeRewards:
    """Rewards relative to the cohort, in units of the task's own spread.

    A replica's reward at interval t less the mean of its cohort's other replicas at t, divided by the standard
    deviation of returns within cohorts on such tasks (same data set and model kind; a running geometric mean, constant
    over an episode), so that easy and hard tasks weigh alike. Each worker learns the spreads of its own cohorts. A
    replica that restarted after diverging is compared with the mean that its cohort had when it was at t.
    """

    MOMENTUM = 0.7
    FLOOR = 0.02

    def __init__(self, cohorts: int) -> None:
        self._spreads: dict[str, float] = {}
        self._overall: float | None = None
        self._means: list[dict[int, float]] = [{} for _ in range(cohorts)]
        self._returns: list[Array] = [np.zeros(0)] * cohorts
        self._scales = np.ones(cohorts)

    def begin(self, cohort: int, key: str) -> None:
        """A cohort begins an episode on a task of this key."""
        self._means[cohort], self._returns[cohort] = {}, np.zeros(0)
        self._scales[cohort] = max(self.FLOOR, self._spreads.get(key, self._overall or 0.1))

    def end(self, cohort: int, key: str) -> None:
        """A cohort's episode is over: learn the spread of its returns."""
        returns = self._returns[cohort]
        if np.isfinite(returns).sum() < 2:
            return
        spread = float(np.nanstd(returns))
        self._spreads[key] = self._mix(self._spreads.get(key), spread)
        self._overall = self._mix(self._overall, spread)

    def __call__(self, cohort: int, intervals: NDArray[np.int64], rewards: Array) -> Array:
        """Relative rewards of one cohort, `[replicas]`.

        Args:
            intervals: each replica's interval, counted before the step.
            rewards: the environment's own rewards.
        """
        age = len(self._means[cohort])
        aligned = intervals == age
        result = np.zeros_like(rewards)
        result[aligned] = leave_one_out(rewards[aligned])
        self._means[cohort][age] = float(rewards[aligned].mean()) if aligned.any() else 0.0
        for index in np.flatnonzero(~aligned):
            result[index] = rewards[index] - self._means[cohort].get(int(intervals[index]), 0.0)
        before = self._returns[cohort] if age else np.zeros_like(rewards)
        self._returns[cohort] = np.where(aligned, before + rewards, np.nan)
        return np.asarray(np.clip(result / self._scales[cohort], -_REWARD_CLIP, _REWARD_CLIP))

    def state_dict(self) -> dict[str, Any]:
        return {
            "spreads": dict(self._spreads),
            "overall": self._overall,
            "means": [list(means.values()) for means in self._means],
            "returns": [torch.from_numpy(returns) for returns in self._returns],
            "scales": self._scales.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._spreads, self._overall = dict(state["spreads"]), state["overall"]
        self._means = [dict(enumerate(means)) for means in state["means"]]
        self._returns = [returns.numpy() for returns in state["returns"]]
        self._scales = np.array(state["scales"])

    def _mix(self, old: float | None, new: float) -> float:
        """A running geometric mean: one wild episode should not make the next ones look small."""
        return new if old is None else float(old**self.MOMENTUM * max(new, 1e-6) ** (1 - self.MOMENTUM))


def task_key(task: Task) -> str:
    return f"{task.name}/{task.optimizer}"


class CohortEnv:
    """One worker's share: an `HPOVectorEnv` with relative rewards, in stable-baselines3's terms."""

    def __init__(self, tasks: TaskDistribution, cohorts: int, replicas: int, variation: Variation, device: str) -> None:
        self.env = HPOVectorEnv(cohorts * replicas, tasks=tasks, cohorts=cohorts, variation=variation, device=device)
        self._cohorts = cohorts

    def reset(self, seed: int) -> NDArray[np.float32]:
        observations, _ = self.env.reset(seed=seed)
        self._relative = RelativeRewards(self._cohorts)
        self._return = np.zeros(self.env.num_envs)
        self._keys = [task_key(task) for task in self.env.tasks]
        for cohort, key in enumerate(self._keys):
            self._relative.begin(cohort, key)
        return observations

    def state_dict(self) -> dict[str, Any]:
        """The episodes under way (see `HPOVectorEnv`) and what rewards are relative to: tensors and plain values."""
        returns = torch.from_numpy(self._return.copy())
        return {"env": self.env.state_dict(), "relative": self._relative.state_dict(), "return": returns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the episodes under way are trained again as far as they were."""
        self.env.load_state_dict(state["env"])
        self._relative = RelativeRewards(self._cohorts)
        self._relative.load_state_dict(state["relative"])
        self._return = state["return"].numpy()
        self._keys = [task_key(task) for task in self.env.tasks]

    def step(self, actions: NDArray[np.float32]) -> Step:
        before, tasks = self.env.intervals, self.env.tasks
        observations, raw, terminated, truncated, infos = self.env.step(actions)
        rewards = np.concatenate(
            [
                self._relative(cohort, before[rows], raw[rows])
                for cohort, rows in enumerate(np.split(np.arange(self.env.num_envs), self._cohorts))
            ]
        )
        self._return += raw
        over = terminated | truncated
        listed: list[dict[str, Any]] = [{} for _ in range(self.env.num_envs)]
        for index in np.flatnonzero(over):
            final = {key: infos["final_info"][key][index] for key in ("train_loss", "val_loss", "diverged")}
            listed[index] = {
                "terminal_observation": infos["final_obs"][index],
                "TimeLimit.truncated": bool(truncated[index]),
                "episode": {"r": self._return[index], "l": int(before[index]) + 1, "t": time.time()},
                "final": final,
            }
        used = {n: np.where(over, infos["final_info"][n], infos[n]) if over.any() else infos[n] for n in CONTROLS}
        in_use = {name: values[values > 0] for name, values in used.items()}
        listed[0]["controls"] = {name: float(np.exp(np.log(v).mean())) for name, v in in_use.items() if len(v)}
        self._return[over] = 0
        for cohort, task in enumerate(self.env.tasks):
            if task is not tasks[cohort]:
                self._relative.end(cohort, self._keys[cohort])
                self._keys[cohort] = task_key(task)
                self._relative.begin(cohort, self._keys[cohort])
        return observations, rewards, over, listed


class CohortVecEnv(RolloutWorkers):
    """Cohorts divided among workers.

    Args:
        tasks: what to sample from.
        cohorts: tasks under way at a time, a multiple of `workers` if there are any.
        replicas: runs of each task.
        workers: processes; 0 trains in this one (as on a GPU).
    """

    def __init__(
        self,
        tasks: TaskDistribution,
        *,
        cohorts: int,
        replicas: int,
        variation: Variation | None = None,
        workers: int = 0,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if workers and cohorts % workers:
            raise ValueError(f"cohorts must be a multiple of workers, not {cohorts} for {workers}")
        share = cohorts // max(1, workers)
        make = partial(CohortEnv, tasks, share, replicas, variation or Variation(), device)
        super().__init__(make, cohorts * replicas, observation_space(), action_space(), workers=workers, seed=seed)
