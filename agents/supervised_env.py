"""Environments in processes of their own, which may die, hang or raise without ending the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from inner_models.remote import Patience, Remote, WorkerFault, end

_PER = 1_000
"""Steps within which restarts are counted."""

_START = 300.0
"""Seconds that a process may take to start: imports alone take long on a busy machine or from a distant disk."""

_GRACE = 2.0
"""Seconds that environments have to close."""

_log = logging.getLogger("hyperpilot")


class SupervisedVecEnv(VecEnv):
    """stable-baselines3's `VecEnv` over supervised processes, one for each environment.

    For inner models that cannot be batched and for environments that are not this package's own; it is used as
    stable-baselines3's `SubprocVecEnv` is, whose workers must not fail. Here a worker that dies (killed for memory,
    say), that does not answer in time (it is killed) or whose environment raises is replaced. The step that it broke is
    not tried again: it ends the episode, truncated, with the observation before it as `terminal_observation`, a reward
    of 0 and what happened, in one line, as `info["fault"]`; the traceback is logged. The new environment is reset with
    a seed that follows from the old one's and the number of its restarts. What `set_attr` and `env_method` changed is
    lost; where those calls fail themselves, they raise.

    Args:
        env_fns: make one environment each, in its process, to which cloudpickle brings them.
        timeout: seconds within which a step or a reset is over in all environments. A process may take longer to start.
        max_restarts: in any 1,000 steps, of all workers together; with 0, the first fault ends the run.

    Raises:
        RuntimeError: an environment could not be made or, when stepping or resetting, there were more faults than
            `max_restarts`; with the worker's traceback. All processes are then ended.
    """

    def __init__(
        self, env_fns: Sequence[Callable[[], gymnasium.Env[Any, Any]]], timeout: float = 60.0, max_restarts: int = 10
    ) -> None:
        if not env_fns or not timeout > 0 or max_restarts < 0:
            given = f"{len(env_fns)}, {timeout} and {max_restarts}"
            raise ValueError(f"there must be environments, a timeout above 0 and max_restarts from 0 on, not {given}")
        self._timeout, self._max_restarts = timeout, max_restarts
        self._makes = [cloudpickle.dumps(make) for make in env_fns]
        self._restarts = [0] * len(env_fns)  # of each worker
        self._steps, self._recent = 0, list[int]()  # steps taken; at which of them a worker was restarted
        self._roots: list[int | None] = [None] * len(env_fns)  # the last seeds given
        self._observations: list[Any] = [None] * len(env_fns)  # the last ones; None before a reset
        self._workers = [Remote(make) for make in self._makes]
        try:
            for worker in self._workers:
                worker.receive(Patience(max(_START, timeout)))
            self.num_envs = len(env_fns)
            first, *others = self._call(attrgetter("observation_space", "action_space"))
            for index, spaces in enumerate(others, start=1):
                if spaces != first:
                    raise ValueError(f"environment {index} has other spaces than environment 0: {spaces}, not {first}")
            super().__init__(len(env_fns), *first)
        except BaseException as error:
            self.close()
            if isinstance(error, WorkerFault):
                raise RuntimeError(f"an environment could not be made: {error}\n{error.details}") from None
            raise

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        if seed is not None and seed < 0:
            raise ValueError(f"a seed must be 0 or above, not {seed}")
        return super().seed(seed)

    def reset(self) -> Any:
        """Begin an episode everywhere: observations, an array or a dict or tuple of arrays, `[envs, ...]` each."""
        self._check_open()
        self._roots = [root if seed is None else seed for seed, root in zip(self._seeds, self._roots, strict=True)]
        for worker, seed, options in zip(self._workers, self._seeds, self._options, strict=True):
            worker.send(_reset(seed, options))
        self._observations = [None] * self.num_envs
        self._receive_resets(range(self.num_envs), self._options)
        self._reset_seeds()
        self._reset_options()
        return self._stacked()

    def step_async(self, actions: NDArray[Any]) -> None:
        self._check_open()
        if any(observation is None for observation in self._observations):
            raise gymnasium.error.ResetNeeded("call reset() before step(): there is no episode under way")
        actions = np.asarray(actions)
        expected = (self.num_envs, *(self.action_space.shape or ()))
        if actions.shape != expected:
            raise ValueError(f"actions must have shape {expected}, not {actions.shape}")
        self._steps += 1
        for worker, action in zip(self._workers, actions, strict=True):
            worker.send(methodcaller("step", action))

    def step_wait(self) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], list[dict[str, Any]]]:
        rewards, dones = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        infos: list[dict[str, Any]] = []
        ended, patience = [], Patience(self._timeout)
        for index, worker in enumerate(self._workers):
            before = self._observations[index]
            try:
                step = worker.receive(patience)
            except WorkerFault as fault:
                self._recover(index, fault, {})
                dones[index] = True
                infos.append({"TimeLimit.truncated": True, "terminal_observation": before, "fault": str(fault)})
                continue
            self._observations[index], rewards[index], terminated, truncated, info = step
            dones[index] = terminated or truncated
            infos.append({**info, "TimeLimit.truncated": bool(truncated and not terminated)})
            if dones[index]:
                infos[index]["terminal_observation"] = self._observations[index]
                worker.send(_reset(None, {}))
                ended.append(index)
        self._receive_resets(ended, [{}] * self.num_envs)
        return self._stacked(), rewards, dones, infos

    def close(self) -> None:
        """End all processes, within 5 seconds whatever they do. Environments that are not busy are closed first."""
        end(self._workers, _GRACE)
        self._workers = []

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        try:
            return self._call(methodcaller("get_wrapper_attr", attr_name), indices)
        except WorkerFault as fault:
            if str(fault).startswith("AttributeError"):
                raise AttributeError(str(fault)) from fault
            raise

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        self._call(methodcaller("__setattr__", attr_name, value), indices)

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        return self._call(partial(_call_method, method_name, method_args, method_kwargs), indices)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: int | Iterable[int] | None = None) -> list[bool]:
        return self._call(partial(_is_wrapped, wrapper_class), indices)

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        return self._call(methodcaller("render"))

    def _check_open(self) -> None:
        if not self._workers:
            raise RuntimeError("the environment is closed")

    def _call(self, function: Callable[[Any], Any], indices: int | Iterable[int] | None = None) -> list[Any]:
        self._check_open()
        workers = [self._workers[index] for index in self._get_indices(indices)]
        for worker in workers:
            worker.send(function)
        patience = Patience(self._timeout)
        return [worker.receive(patience) for worker in workers]

    def _receive_resets(self, indices: Iterable[int], options: Sequence[dict[str, Any]]) -> None:
        """Take the answers to resets that were begun, with each environment's `options`."""
        patience = Patience(self._timeout)
        for index in indices:
            try:
                self._observations[index], self.reset_infos[index] = self._workers[index].receive(patience)
            except WorkerFault as fault:
                self._recover(index, fault, options[index])

    def _recover(self, index: int, fault: WorkerFault, options: dict[str, Any]) -> None:
        """Replace a worker until its environment is reset; those that fail in doing so count like any other."""
        while True:
            self._recent = [step for step in self._recent if step > self._steps - _PER]
            if len(self._recent) >= self._max_restarts:
                self.close()
                often = f"worker {index} failed, after {len(self._recent)} restarts within {_PER:,} steps"
                raise RuntimeError(f"{often}: {fault}\n{fault.details}") from None
            self._recent.append(self._steps)
            self._restarts[index] += 1
            _log.warning("worker %d is restarted: %s\n%s", index, str(fault), fault.details)
            end([self._workers[index]])
            self._workers[index] = worker = Remote(self._makes[index])
            try:
                worker.receive(Patience(max(_START, self._timeout)))
                worker.send(_reset(self._fresh_seed(index), options))
                self._observations[index], self.reset_infos[index] = worker.receive(Patience(self._timeout))
            except WorkerFault as another:
                fault = another
            else:
                self.reset_infos[index]["fault"] = str(fault)
                return

    def _fresh_seed(self, index: int) -> int | None:
        root = self._roots[index]
        if root is None:
            return None
        return int(np.random.SeedSequence([root, self._restarts[index]]).generate_state(1)[0])

    def _stacked(self) -> Any:
        batch: Any = create_empty_array(self.observation_space, self.num_envs)
        return concatenate(self.observation_space, self._observations, batch)


def _reset(seed: int | None, options: dict[str, Any]) -> Callable[[Any], Any]:
    return methodcaller("reset", seed=seed, **({"options": options} if options else {}))


def _call_method(name: str, arguments: tuple[Any, ...], named: dict[str, Any], env: gymnasium.Env[Any, Any]) -> Any:
    return env.get_wrapper_attr(name)(*arguments, **named)


def _is_wrapped(wrapper: type[Any], env: gymnasium.Env[Any, Any]) -> bool:
    while isinstance(env, gymnasium.Wrapper) and not isinstance(env, wrapper):
        env = env.env
    return isinstance(env, wrapper)
