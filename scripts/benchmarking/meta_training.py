"""Where the time of a meta-training iteration (a rollout and PPO's update) goes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from agents.ppo import build, meta_train
from agents.presets import MetaTrainingConfig
from agents.rollout_ppo import RolloutPPO
from agents.vec_env import CohortVecEnv
from inner_models.batched_training import BatchedTraining
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from scripts.benchmarking.processes import Crew

_VALIDATION = Task("digits", ModelSpec("mlp", 8, 1), horizon=1, interval_examples=16, train_rows=64, eval_rows=16)


class Clock:
    """Seconds spent in calls, each call apart. A watched call within another one is part of that."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._within = False

    @contextmanager
    def watch(self, owner: type, *methods: str) -> Iterator[None]:
        """Time the methods of a class for a while."""
        with ExitStack() as stack:
            for method in methods:
                stack.enter_context(patch.object(owner, method, self._timed(getattr(owner, method))))
            yield

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._within:
                return function(*arguments, **named)
            self._within, started = True, time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._within = False
                self.seconds.append(time.perf_counter() - started)

        return timed

    def since(self, share: float) -> float:
        """Seconds of the calls after the first `share` (0..1) of them, which warm up."""
        return sum(self.seconds[round(share * len(self.seconds)) :])


class WorkersShare:
    """A worker's cohorts, in place of those that a meta-training keeps out of reach in its worker processes."""

    def __init__(self, config: MetaTrainingConfig, workers: int, device: str) -> None:
        cohorts = config.cohorts // max(1, workers)
        self._env = CohortVecEnv(
            config.tasks, cohorts=cohorts, replicas=config.replicas, variation=config.variation, device=device
        )
        self._actor = build(config, self._env).actor

    def split(self, steps: int) -> tuple[float, float]:
        """Shares of a rollout's time: inner training (data, initialization, training, evaluation), and the policy."""
        first = self._env.reset()
        inner, policy, started = Clock(), Clock(), time.perf_counter()
        with (
            inner.watch(BatchedTraining, "__init__", "advance", "evaluate", "restart"),
            policy.watch(ActorCriticPolicy, "forward"),
        ):
            for _ in self._env.collect(self._actor, first, steps):
                pass
        seconds = time.perf_counter() - started
        return inner.since(0) / seconds, policy.since(0) / seconds


def iteration_split(config: MetaTrainingConfig, iterations: int, device: str) -> dict[str, Any]:
    """Shares of an iteration's time, of a real meta-training without meta-validation, its first iteration left out.

    Inner training, policy and observation (with decisions, rewards and all else that workers do) together are what the
    learner waits for; their proportions are measured afterwards, in as many processes over the same task distribution.
    """
    decisions = config.cohorts * config.replicas * config.rollout_steps
    config = replace(
        config, timesteps=(1 + iterations) * decisions, validation=(_VALIDATION,), validation_seeds=1,
        validate_every=10**9,
    )  # fmt: skip
    workers = config.workers if device == "cpu" else 0
    rollout, update, other = Clock(), Clock(), Clock()
    with ExitStack() as stack:
        stack.enter_context(rollout.watch(RolloutPPO, "collect_rollouts"))
        stack.enter_context(update.watch(PPO, "train"))
        stack.enter_context(other.watch(BaseCallback, "on_rollout_start", "on_step"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        meta_train(config, Path(folder) / "run", device=device)
    with Crew(workers) as crew:
        crew.build("share", WorkersShare, config, workers, device)
        inner, policy = np.mean(crew.call("share", "split", max(1, config.rollout_steps // 2)), axis=0).tolist()
    warm_up = 1 / (1 + iterations)
    total = rollout.since(warm_up) + update.since(warm_up)
    wait = (rollout.since(warm_up) - other.since(warm_up)) / total
    shares = {
        "inner_training": inner * wait,
        "observation_and_reward": (1 - inner - policy) * wait,
        "policy": policy * wait,
        "ppo_update": update.since(warm_up) / total,
    }
    return {
        "shares": {**shares, "other": 1 - sum(shares.values())},
        "learner_share": shares["ppo_update"],
        "seconds_per_iteration": total / iterations,
        "decisions_per_iteration": decisions,
        "iterations": iterations,
    }
