"""PPO for stable-baselines3 whose workers each collect whole rollouts, so that none waits for another at every step."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from hpo_env.hyperparameters import Array
from inner_models.workers import one_thread_each

from .policy import OBSERVATION_CLIP

Batch = NDArray[np.float32]
Step = tuple[Batch, Array, NDArray[np.bool_], list[dict[str, Any]]]

_EPSILON = 1e-8


class Env(Protocol):
    """A worker's environments: they reset themselves, with `infos` as stable-baselines3 has them."""

    def reset(self, seed: int) -> Batch: ...

    def step(self, actions: Batch) -> Step: ...


@dataclass(frozen=True)
class Actor:
    """All that a worker needs to act in one rollout.

    Attributes:
        policy: the actor-critic, as stable-baselines3 saves it.
        mean, std: of the observations, `[features]`.
        gamma: discount factor.
    """

    policy: bytes
    mean: Array
    std: Array
    gamma: float

    def normalize(self, observations: Batch) -> torch.Tensor:
        """What the policy sees of observations `[..., features]`."""
        scaled = np.clip((observations - self.mean) / self.std, -OBSERVATION_CLIP, OBSERVATION_CLIP)
        return torch.from_numpy(scaled.astype(np.float32))


class Transition(NamedTuple):
    """One step of several environments. Actions are as sampled, unclipped; observations are the next ones, raw."""

    actions: Batch
    values: Batch
    log_probs: Batch
    observations: Batch
    rewards: Array
    dones: NDArray[np.bool_]
    infos: list[dict[str, Any]]


def rollout(env: Env, actor: Actor, observations: Batch, n_steps: int, seed: int) -> Iterator[Transition]:
    """Act for `n_steps` steps. A truncated episode's last reward includes the value of what would have come.

    Args:
        observations: `[envs, features]`, where the last rollout (or the reset) left the environments.
        seed: of the actions.
    """
    policy = ActorCriticPolicy.load(io.BytesIO(actor.policy), device="cpu")  # type: ignore[arg-type]
    assert isinstance(policy.action_space, spaces.Box)
    torch.manual_seed(seed)
    for _ in range(n_steps):
        with torch.no_grad():
            actions, values, log_probs = (tensor.numpy() for tensor in policy(actor.normalize(observations)))
        clipped = np.clip(actions, policy.action_space.low, policy.action_space.high)
        observations, rewards, dones, infos = env.step(clipped)
        truncated = [index for index, info in enumerate(infos) if info.get("TimeLimit.truncated")]
        if truncated:
            last = np.stack([infos[index]["terminal_observation"] for index in truncated])
            with torch.no_grad():
                rewards[truncated] += actor.gamma * policy.predict_values(actor.normalize(last)).numpy()[:, 0]
        yield Transition(actions, values[:, 0], log_probs, observations, rewards, dones, infos)


def _serve(connection: Connection, make: Callable[[], Env]) -> None:
    """A worker process's loop. One thread: at these sizes two processes beat two threads."""
    torch.set_num_threads(1)
    try:
        env = make()
        while True:
            command, arguments = connection.recv()
            for answer in [env.reset(*arguments)] if command == "reset" else rollout(env, *arguments):
                connection.send(("ok", answer))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:
        with contextlib.suppress(OSError):  # closed from the other end, which is no longer interested
            connection.send(("error", traceback.format_exc()))


class RolloutWorkers(VecEnv):
    """stable-baselines3's `VecEnv` over processes that each step a share of the environments by themselves.

    Args:
        make: makes a worker's share of the environments.
        num_envs: of all workers together.
        workers: processes; 0 works in this one (as on a GPU).
        seed: fixes the environments' draws and the actions sampled.
    """

    def __init__(
        self,
        make: Callable[[], Env],
        num_envs: int,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        *,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_envs, observation_space, action_space)
        self._seed_value = seed
        self._rollouts = 0
        self._local = None if workers else make()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("spawn")
        with one_thread_each():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, make), daemon=True)
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    def reset(self) -> Batch:
        self._rollouts = 0
        if self._local is not None:
            return self._local.reset(self._seed_value)
        share = self.num_envs // len(self._connections)
        for index, connection in enumerate(self._connections):
            self._send(connection, ("reset", (self._seed_value + index * share,)))
        return np.concatenate([self._receive(connection) for connection in self._connections])

    def collect(self, actor: Actor, observations: Batch, n_steps: int) -> Iterator[Transition]:
        """A rollout of all environments, each step as soon as every worker has taken it; see `rollout`.

        To be taken to its end: else the next call would be answered with what is left.
        """
        workers = max(1, len(self._connections))
        seeds = np.random.SeedSequence([self._seed_value, self._rollouts]).generate_state(workers).tolist()
        self._rollouts += 1
        if self._local is not None:
            yield from rollout(self._local, actor, observations, n_steps, *seeds)
            return
        for connection, part, seed in zip(self._connections, np.split(observations, workers), seeds, strict=True):
            self._send(connection, ("collect", (actor, part, n_steps, seed)))
        # All that arrives is read at once: a worker ahead of the others would wait if its pipe were full.
        arrived: dict[Any, deque[Transition]] = {connection: deque() for connection in self._connections}
        for _ in range(n_steps):
            while not all(arrived.values()):
                for ready in wait(self._connections):
                    arrived[ready].append(self._receive(ready))
            *arrays, infos = zip(*(queue.popleft() for queue in arrived.values()), strict=True)
            yield Transition._make([*map(np.concatenate, arrays), [info for part in infos for info in part]])

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
        self._connections, self._processes = [], []

    def seed(self, seed: int | None = None) -> list[int | None]:
        if seed is not None:
            self._seed_value = seed
        return [self._seed_value + index for index in range(self.num_envs)]

    def step_async(self, actions: NDArray[Any]) -> None:
        raise NotImplementedError("workers step on their own: see `collect`")

    def step_wait(self) -> Any:
        raise NotImplementedError("workers step on their own: see `collect`")

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(f"workers' environments have no attributes of their own, such as {attr_name!r}")

    def set_attr(self, attr_name: str, *arguments: Any, **named: Any) -> None:
        raise AttributeError(f"workers' environments have no attributes of their own, such as {attr_name!r}")

    def env_method(self, method_name: str, *arguments: Any, **named: Any) -> list[Any]:
        raise AttributeError(f"workers' environments have no methods of their own, such as {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: int | Iterable[int] | None = None) -> list[bool]:
        return [False] * self.num_envs

    @staticmethod
    def _send(connection: Connection, message: tuple[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a worker that is gone: `_receive` says what it died of
            connection.send(message)

    @staticmethod
    def _receive(connection: Any) -> Any:
        try:
            status, result = connection.recv()
        except (EOFError, OSError):
            raise RuntimeError("a worker process ended unexpectedly; was it killed for memory?") from None
        if status == "error":
            raise RuntimeError(f"a worker process failed:\n{result}")
        return result


class RolloutPPO(PPO):
    """PPO over `RolloutWorkers`, with observations normalized by statistics that stay as they are during a rollout.

    Attributes:
        obs_rms: running mean and variance of the raw observations, `[features]` each.
        observation_low, observation_high: smallest and largest raw observation, `[features]` each.
    """

    def _setup_model(self) -> None:
        super()._setup_model()
        self.obs_rms = RunningMeanStd(shape=self.observation_space.shape or ())
        self.observation_low = np.full(self.observation_space.shape or (), np.inf, np.float32)
        self.observation_high = -self.observation_low

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
        self.observation_low = np.minimum(self.observation_low, raw.min(axis=0))
        self.observation_high = np.maximum(self.observation_high, raw.max(axis=0))
        callback.on_rollout_end()
        return True
