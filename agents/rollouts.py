"""Workers that each collect whole rollouts for stable-baselines3, so that none waits for another at every step."""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from hpo_env.hyperparameters import Array
from inner_models.workers import one_thread_each

from .policy import OBSERVATION_CLIP

Batch = NDArray[np.float32]
Step = tuple[Batch, Array, NDArray[np.bool_], list[dict[str, Any]]]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Env(Protocol):
    """A worker's environments: they reset themselves, with `infos` as stable-baselines3 has them."""

    def reset(self, seed: int) -> Batch: ...

    def step(self, actions: Batch) -> Step: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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


def _answers(env: Env, command: str, arguments: tuple[Any, ...]) -> Iterable[Any]:
    """What a worker answers to a command: a method of its environments, a `rollout`, or a function to `call`."""
    if command == "rollout":
        return rollout(env, *arguments)
    if command == "call":
        function, item = arguments
        return [function(item)]
    return [getattr(env, command)(*arguments)]


def _serve(connection: Connection, make: Callable[[], Env]) -> None:
    """A worker process's loop. One thread: at these sizes two processes beat two threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the first one decides
    atexit.register(os._exit, 0)  # last: the interpreter takes seconds to take down what it holds
    torch.set_num_threads(1)
    try:
        env = make()
        while True:
            for answer in _answers(env, *connection.recv()):
                connection.send(("ok", answer))
    except EOFError:
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
        share = self.num_envs // max(1, len(self._connections))
        seeds = [(self._seed_value + index * share,) for index in range(max(1, len(self._connections)))]
        return np.concatenate(self._all("reset", seeds))

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
            self._send(connection, ("rollout", (actor, part, n_steps, seed)))
        # All that arrives is read at once: a worker ahead of the others would wait if its pipe were full.
        arrived: dict[Any, deque[Transition]] = {connection: deque() for connection in self._connections}
        for _ in range(n_steps):
            while not all(arrived.values()):
                for ready in wait(self._connections):
                    arrived[ready].append(self._receive(ready))
            *arrays, infos = zip(*(queue.popleft() for queue in arrived.values()), strict=True)
            yield Transition._make([*map(np.concatenate, arrays), [info for part in infos for info in part]])

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function`, of a module as it travels to the workers, of every item, each by the next worker that is free."""
        if self._local is not None:
            return [function(item) for item in items]
        found: dict[int, Result] = {}
        left, free, busy = deque(enumerate(items)), list(self._connections), dict[Any, int]()
        while left or busy:
            while left and free:
                index, item = left.popleft()
                self._send(connection := free.pop(), ("call", (function, item)))
                busy[connection] = index
            for ready in wait(list(busy)):
                found[busy.pop(ready)] = self._receive(ready)
                free.append(ready)  # type: ignore[arg-type]
        return [found[index] for index in range(len(items))]

    def state_dict(self) -> dict[str, Any]:
        """State between two rollouts: each worker's own, and how many rollouts there were."""
        return {"rollouts": self._rollouts, "workers": self._all("state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state_dict()` of as many workers.

        Raises:
            ValueError: the state is that of another number of workers.
        """
        if len(state["workers"]) != max(1, len(self._connections)):
            raise ValueError(f"the state is of {len(state['workers'])} workers, not {max(1, len(self._connections))}")
        self._rollouts = state["rollouts"]
        self._all("load_state_dict", [(part,) for part in state["workers"]])

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=4)
            if process.is_alive():
                process.kill()
                process.join()
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

    def _all(self, command: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """One answer to a command from every worker, in order."""
        given = arguments or [()] * max(1, len(self._connections))
        if self._local is not None:
            return [*_answers(self._local, command, *given)]
        for connection, own in zip(self._connections, given, strict=True):
            self._send(connection, (command, own))
        return [self._receive(connection) for connection in self._connections]

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
