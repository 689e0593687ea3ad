"""stable-baselines3's PPO over workers that collect whole rollouts, with a state that it goes on from exactly."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from .rollouts import Actor, Batch, RolloutWorkers

_EPSILON = 1e-8
_MOMENTS, _EXTREMES = ("mean", "var", "count"), ("observation_low", "observation_high")


class RolloutPPO(PPO):
    """PPO over `RolloutWorkers`, with observations normalized by statistics that stay as they are during a rollout.

    Attributes:
        obs_rms: running mean and variance of the raw observations, `[features]` each.
        observation_low, observation_high: smallest and largest raw observation, `[features]` each.
        counted: which entries of raw observations `[runs, features]` these two are of; all, unless it is replaced.
    """

    counted: Callable[[Batch], NDArray[np.bool_]]

    def _setup_model(self) -> None:
        super()._setup_model()
        self.obs_rms = RunningMeanStd(shape=self.observation_space.shape or ())
        self.observation_low = np.full(self.observation_space.shape or (), np.inf, np.float32)
        self.observation_high = -self.observation_low
        self.counted = lambda raw: np.ones(raw.shape, bool)

    @property
    def actor(self) -> Actor:
        """The present policy and normalization."""
        buffer = io.BytesIO()
        self.policy.save(buffer)  # type: ignore[arg-type]
        return Actor(buffer.getvalue(), self.obs_rms.mean, np.sqrt(self.obs_rms.var + _EPSILON), self.gamma)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        assert isinstance(env, RolloutWorkers)
        callback.on_rollout_start()
        rollout_buffer.reset()
        actor, seen = self.actor, []
        observations, starts = self._last_obs, self._last_episode_starts
        assert isinstance(observations, np.ndarray)
        assert starts is not None
        for step in env.collect(actor, observations, n_rollout_steps):
            self.num_timesteps += env.num_envs
            callback.update_locals({"infos": step.infos})
            if not callback.on_step():
                return False
            self._update_info_buffer(step.infos)
            values, log_probs = torch.from_numpy(step.values), torch.from_numpy(step.log_probs)
            rollout_buffer.add(
                actor.normalize(observations).numpy(), step.actions, step.rewards, starts, values, log_probs
            )
            seen.append(observations)
            observations, starts = step.observations, step.dones
        self._last_obs, self._last_episode_starts = observations, starts
        with torch.no_grad():
            last_values = self.policy.predict_values(actor.normalize(observations))
        rollout_buffer.compute_returns_and_advantage(last_values, starts)
        raw = np.concatenate(seen)
        self.obs_rms.update(raw.astype(np.float64))
        counted = self.counted(raw)
        self.observation_low = np.minimum(self.observation_low, raw.min(axis=0, where=counted, initial=np.inf))
        self.observation_high = np.maximum(self.observation_high, raw.max(axis=0, where=counted, initial=-np.inf))
        callback.on_rollout_end()
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that a run goes on from between two rollouts, as tensors and plain values: networks, optimizer,
        normalization, environments, and the generators of numpy and torch, which stable-baselines3 draws from."""
        assert isinstance(self.env, RolloutWorkers)
        assert isinstance(self._last_obs, np.ndarray)
        assert self._last_episode_starts is not None
        assert self.ep_info_buffer is not None
        kind, keys, *position = np.random.get_state()  # noqa: NPY002  (stable-baselines3's)
        return {
            "timesteps": self.num_timesteps,
            "updates": self._n_updates,
            "policy": dict(self.policy.state_dict()),
            "optimizer": list(self.policy.optimizer.state_dict()["state"].values()),
            "normalizer": {
                **{name: torch.from_numpy(np.array(getattr(self.obs_rms, name))) for name in _MOMENTS},
                **{name: torch.from_numpy(getattr(self, name)) for name in _EXTREMES},
            },
            "env": self.env.state_dict(),
            "observations": torch.from_numpy(self._last_obs),
            "episode_starts": torch.from_numpy(self._last_episode_starts),
            "episodes": list(self.ep_info_buffer),
            "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position],
            "torch": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, episodes: bool = True) -> None:
        """Go on from `state_dict()` of a model made with the same arguments.

        Args:
            episodes: go on with the episodes that were under way, too, and draw what would have been drawn.
        """
        assert isinstance(self.env, RolloutWorkers)
        self.num_timesteps, self._n_updates = state["timesteps"], state["updates"]
        self.policy.load_state_dict(state["policy"])
        optimizer = self.policy.optimizer
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(enumerate(state["optimizer"])), "param_groups": groups})
        for name in _MOMENTS:
            setattr(self.obs_rms, name, state["normalizer"][name].numpy()[()])
        for name in _EXTREMES:
            setattr(self, name, state["normalizer"][name].numpy())
        if not episodes:
            return
        self._last_obs = state["observations"].numpy()
        self._last_episode_starts = state["episode_starts"].numpy()
        self.ep_info_buffer = deque(state["episodes"], maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        self.env.load_state_dict(state["env"])
        kind, keys, *position = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))  # noqa: NPY002
        torch.set_rng_state(state["torch"])
