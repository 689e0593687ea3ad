"""Adaptation: a finished policy goes on learning, for a few runs, on the one task that it is to be used for.

PPO (Schulman et al. 2017, arXiv:1707.06347) without a critic. The runs of a cohort share their inner seed, and their
rewards are relative to one another, so that what a run still gains over the others' mean is an unbiased estimate of the
advantage (the leave-one-out baseline of Kool, van Hoof and Welling 2019): a critic would have to be learned anew, from
too few runs.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat, configure
from stable_baselines3.common.utils import set_random_seed
from torch import nn

from hpo_env.base_schedules import calibrated_rule
from hpo_env.control import MAX_DECISIONS
from hpo_env.env import Variation
from hpo_env.hyperparameters import Array
from inner_models.tasks import Task, TaskDistribution

from .board import ABOUT, META_TRAINING_TAGS, about, write_hparams
from .files import CONFIG_FILE, only_writer, write_atomically
from .inspection import blind
from .policy import ControlPolicy
from .ppo import POLICY_FILE, actor_layers, linear_layers, record_runs
from .rollout_ppo import RolloutPPO
from .vec_env import CohortVecEnv


@dataclass(frozen=True)
class Adaptation:
    """Settings of an adaptation.

    Attributes:
        episodes: runs of the task to learn from, rounded up to whole cohorts.
        replicas: runs in a cohort, at most; after each cohort there is an update.
        steps: gradient steps of an update, each on the whole cohort.
        learning_rate: Adam's, falling linearly to zero.
        clip: PPO's.
        kl: the update ends early where the new policy is farther than this from the one that acted, in nats a decision.
        noise: standard deviation of the exploration, constant; actions lie in -1..1.
    """

    episodes: int = 32
    replicas: int = 8
    steps: int = 8
    learning_rate: float = 1e-3
    clip: float = 0.2
    kl: float = 0.05
    noise: float = 0.15

    def __post_init__(self) -> None:
        for name in ("episodes", "replicas"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"{name} must be at least 2, not {getattr(self, name)}: what a run is worth, others say"
                )

    @property
    def cohort(self) -> int:
        """Runs in each cohort."""
        return min(self.replicas, self.episodes)

    @property
    def updates(self) -> int:
        return -(-self.episodes // self.cohort)


@dataclass(frozen=True)
class _Only(TaskDistribution):
    """The distribution that always gives `task`: drawn tasks have cohorts that share their episodes."""

    task: Task | None = None

    def sample(self, rng: np.random.Generator) -> Task:
        assert self.task is not None
        return replace(self.task)  # another object each time: so environments know that a cohort's episode is over


def adapt(
    policy: ControlPolicy,
    task: Task,
    out: Path,
    settings: Adaptation | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    provenance: dict[str, Any] | None = None,
    report: Callable[[int, float], None] = lambda runs, fall: None,
) -> ControlPolicy:
    settings = settings or Adaptation()
    _check(policy, task)
    with only_writer(out):
        if (out / POLICY_FILE).exists():
            raise FileExistsError(f"{out} already holds a policy; choose another folder")
        set_random_seed(seed)
        only = _Only(((task.dataset, (task.model.kind,)),), task=task)
        env = CohortVecEnv(
            only, cohorts=1, replicas=settings.cohort, variation=Variation(blind_probability=1.0), device=device,
            seed=int(np.random.SeedSequence([seed, 1]).generate_state(1)[0] % 2**31),
        )
        try:
            model = begin(policy, env, task.horizon, settings)
            model.set_logger(configure(str(out / "tensorboard"), ["tensorboard"]))
            cb = _Callback(report, settings)
            model.learn(settings.updates * task.horizon * settings.cohort, callback=cb)
        finally:
            env.close()
        adapted = copy.deepcopy(policy)
        for own, learned in zip(linear_layers(adapted.network), actor_layers(model), strict=True):
            own.load_state_dict(learned.state_dict())
        adapted.save(out / POLICY_FILE)
    return adapted

def _check(policy,task): pass

def _linear(policy: ControlPolicy) -> list[nn.Linear]:
    return [layer for layer in policy.network if isinstance(layer, nn.Linear)]


def begin(policy: ControlPolicy, env: CohortVecEnv, horizon: int, settings: Adaptation) -> RolloutPPO:
    model = RolloutPPO(
        "MlpPolicy",
        env,
        n_steps=horizon,
        batch_size=horizon * env.num_envs,
        n_epochs=settings.steps,
        learning_rate=lambda remaining: remaining * settings.learning_rate,
        gamma=1.0,
        gae_lambda=1.0,
        clip_range=settings.clip,
        target_kl=settings.kl,
        vf_coef=0.0,
        policy_kwargs={"net_arch": list(policy.header.hidden), "log_std_init": float(np.log(settings.noise))},
        device="cpu",
        seed=None,
    )
    for own, learned in zip(linear_layers(policy.network), actor_layers(model), strict=True):
        learned.load_state_dict(own.state_dict())
    nn.init.zeros_(model.policy.value_net.weight)
    nn.init.zeros_(model.policy.value_net.bias)
    model.policy.log_std.requires_grad_(False)
    unseen = np.isin(policy.header.features, blind(policy))
    model.obs_rms = _Fixed(policy.mean.double().numpy(), np.where(unseen, np.inf, policy.std.double().numpy() ** 2))
    return model


@dataclass(frozen=True)
class _Fixed:
    """stable-baselines3's `RunningMeanStd`, at rest."""

    mean: Array
    var: Array

    def update(self, observations: Array) -> None:
        """Nothing."""


class _Callback(BaseCallback):
    def __init__(self, report: Any, settings: Adaptation) -> None:
        super().__init__()
        self._r, self.s = report, settings

    def _on_step(self) -> bool:
        record_runs(self.logger, self.locals["infos"])
        for info in self.locals["infos"]:
            if "episode" in info:
                self._r(self.num_timesteps, info["episode"]["r"])
        return True
