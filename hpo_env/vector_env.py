"""`HPOVectorEnv`: many inner training runs, trained together by the batched engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from hpo_env.base_schedules import BaseSchedule, calibrated_rule
from hpo_env.control import ControlLoop
from hpo_env.env import (
    INFO_KEYS,
    Episode,
    Variation,
    action_space,
    check_settings,
    draw_episode,
    observation_space,
    observed,
    resolve_tasks,
    task_of,
)
from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.rewards import diverged, log_fall
from inner_models.batched_training import BatchedTraining
from inner_models.tasks import Task, TaskDistribution, prepare
from inner_models.torch_state import as_by_default
from inner_models.workers import give_back_memory

Batch = NDArray[np.float32]


class HPOVectorEnv(VectorEnv[Batch, Batch, NDArray[Any]]):
    """`HPOEnv` over the batched engine: the same episodes, step by step, for equal seeds (with `tasks`, in cohorts of
    one).

    The sub-environments are divided into cohorts of equal size. The replicas of a cohort share a task and train as one
    batch. With a task distribution, a cohort draws a new task once the task's horizon is over, and with it one episode
    for all its replicas (the seed of the inner training included: what they differ in is what they do); a replica that
    ends early (diverged) starts that episode again, and is truncated if its cohort moves on before it is done.

    Autoreset happens in the same step (`AutoresetMode.SAME_STEP`): `infos["final_obs"]` and `infos["final_info"]` hold
    the end of the old episode. `reset(seed=s)` gives sub-environment i the seed s + i, as Gymnasium's own do; of a
    cohort that draws its tasks, the first one's counts.

    Gymnasium's `RecordEpisodeStatistics`, `NormalizeReward` and `RescaleAction` for vector environments take it; those
    that change observations, and stable-baselines3, want another autoreset, or single environments: give `make_vec`
    `vectorization_mode="sync"`, which trains each run by itself. A copy of it, once it has been reset, is refused:
    `state_dict` is for that.

    Args:
        num_envs: sub-environments, a multiple of `cohorts`.
        cohorts: number of tasks under way at a time.
        task, tasks, variation, base, device, dtype: as for `HPOEnv`.

    Attributes:
        cohort_of: `[num_envs]`, each sub-environment's cohort.
        intervals: `[num_envs]`, intervals finished in the current episode (0 right after a reset).
        tasks: the task of each cohort.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # type: ignore[misc]

    def __init__(
        self,
        num_envs: int = 1,
        task: Task | str | None = None,
        tasks: TaskDistribution | None = None,
        cohorts: int = 1,
        variation: Variation | None = None,
        base: BaseSchedule | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        render_mode: None = None,
    ) -> None:
        if num_envs < 1 or cohorts < 1 or num_envs % cohorts:
            raise ValueError(f"num_envs must be a positive multiple of cohorts, not {num_envs} for {cohorts} cohorts")
        self.num_envs = num_envs
        source = resolve_tasks(task, tasks)
        check_settings(variation, base, dtype)
        self._device = torch.device(device)
        size = num_envs // cohorts
        self._cohorts = [
            _Cohort(size, source, variation or Variation(), base, self._device, dtype) for _ in range(cohorts)
        ]
        self.single_observation_space = observation_space()
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.cohort_of = np.repeat(np.arange(cohorts), size)

    @property
    def tasks(self) -> list[Task]:
        return [cohort.task for cohort in self._under_way()]

    @property
    def intervals(self) -> NDArray[np.int64]:
        return np.concatenate([cohort.loop.state.telemetry.interval for cohort in self._under_way()])

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Batch, dict[str, Any]]:
        """Begin an episode everywhere. `options={"task": ...}` chooses the task of all cohorts for this episode."""
        task = task_of(options)
        super().reset(seed=seed if isinstance(seed, int) else None)
        if seed is None or isinstance(seed, int | np.integer):
            seeds: list[int | None] = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            if not isinstance(seed, Sequence | np.ndarray):
                raise TypeError(f"seed must be an integer, one for each sub-environment, or None, not {seed!r}")
            seeds = list(seed)
            if len(seeds) != self.num_envs:
                raise ValueError(f"{len(seeds)} seeds for {self.num_envs} sub-environments")
        size = self.num_envs // len(self._cohorts)
        self.close_extras()  # whatever fails from here on, no episode is under way
        with as_by_default(self._device):
            for index, cohort in enumerate(self._cohorts):
                cohort.reset(seeds[index * size : (index + 1) * size], task)
        return self._observations(), self._infos([cohort.info for cohort in self._cohorts])

    def step(
        self, actions: Batch
    ) -> tuple[Batch, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions must have shape {self.action_space.shape}, not {actions.shape}")
        parts = np.split(actions.astype(np.float64), len(self._cohorts))
        with as_by_default(self._device):
            for cohort, part in zip(self._under_way(), parts, strict=True):
                cohort.step(part)
        terminated = np.concatenate([cohort.terminated for cohort in self._cohorts])
        truncated = np.concatenate([cohort.truncated for cohort in self._cohorts])
        over = terminated | truncated
        infos: dict[str, Any] = {}
        if over.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            ended = np.concatenate([cohort.final_obs for cohort in self._cohorts])
            for index in np.flatnonzero(over):
                final_obs[index] = ended[index]
            final = self._infos([cohort.final_info for cohort in self._cohorts], over)
            infos = {"final_obs": final_obs, "_final_obs": over, "final_info": final, "_final_info": over.copy()}
        infos |= self._infos([cohort.info for cohort in self._cohorts])
        rewards = np.concatenate([cohort.rewards for cohort in self._cohorts])
        return self._observations(), rewards, terminated, truncated, infos

    def state_dict(self) -> dict[str, Any]:
        """The episodes under way, as plain values and tensors: what they drew and the actions taken since.

        Raises:
            ValueError: the environment has one task for good, or one chosen by `options`: its episodes have no common
                beginning, or one that is not drawn.
        """
        return {"cohorts": [cohort.state_dict() for cohort in self._under_way()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> Batch:
        """Go on from `state_dict()` of an environment made with the same arguments, by training its episodes again as
        far as they were: on the same CPU bit for bit.

        Returns:
            The observations, `[num_envs, features]`.

        Raises:
            ValueError: the state is that of another number of cohorts or replicas.
        """
        found = [(len(cohort["rngs"]), cohort["actions"].shape[1]) for cohort in state["cohorts"]]
        if found != (own := [(len(self._cohorts[0].rngs),) * 2] * len(self._cohorts)):
            raise ValueError(f"the state is of cohorts of {found} replicas, not {own}")
        with as_by_default(self._device):
            for cohort, part in zip(self._cohorts, state["cohorts"], strict=True):
                cohort.load_state_dict(part)
        return self._observations()

    def close_extras(self, **kwargs: Any) -> None:
        """Let go of the trainings; `reset` begins others."""
        for cohort in self._cohorts:
            cohort.training = None

    def _under_way(self) -> list[_Cohort]:
        """
        Raises:
            gymnasium.error.ResetNeeded: there is no episode under way.
        """
        if any(cohort.training is None for cohort in self._cohorts):
            raise gymnasium.error.ResetNeeded("call reset() before step(): there is no episode under way")
        return self._cohorts

    def _observations(self) -> Batch:
        return np.concatenate([cohort.loop.observe() for cohort in self._cohorts])

    def _infos(self, infos: list[dict[str, NDArray[Any]]], mask: NDArray[np.bool_] | None = None) -> dict[str, Any]:
        """Gymnasium's form: an array a key, and under `_key` where it holds."""
        present = np.ones(self.num_envs, bool) if mask is None else mask
        result: dict[str, Any] = {}
        for key in INFO_KEYS:
            values = np.concatenate([info[key] for info in infos])
            result[key] = np.where(present, values, np.zeros_like(values))
            result[f"_{key}"] = present.copy()
        return result


def _state(rng: np.random.Generator) -> dict[str, Any]:
    return dict(rng.bit_generator.state)


class _Cohort:
    """Replicas that share a task."""

    def __init__(
        self,
        size: int,
        source: Task | TaskDistribution,
        variation: Variation,
        base: BaseSchedule | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._size, self._source, self._variation = size, source, variation
        self._base, self._device, self._dtype = base, device, dtype
        self.rngs: list[np.random.Generator] = [seeding.np_random(None)[0] for _ in range(size)]
        self.final_info: dict[str, NDArray[Any]] = {}
        self.training: BatchedTraining | None = None

    def reset(self, seeds: Sequence[int | None], task: Task | None) -> None:
        for index, seed in enumerate(seeds):
            if seed is not None:
                self.rngs[index], _ = seeding.np_random(seed)
        self._begin(task)

    def _begin(self, task: Task | None = None) -> None:
        """Start all replicas on one task: `task`, or the next one."""
        self.training = None
        give_back_memory()
        self._drawn_from = None if task or isinstance(self._source, Task) else [_state(rng) for rng in self.rngs]
        self._actions: list[Array] = []
        if task is None:
            # One draw a cohort; a single replica's episode then equals HPOEnv's with the same seed.
            task = self._source if isinstance(self._source, Task) else self._source.sample(self.rngs[0])
        self.task = task
        self._drawn: Episode | None = None
        episodes = self._draw(range(self._size))
        data = prepare(task)
        training = BatchedTraining(task, [e.seed for e in episodes], data=data, device=self._device, dtype=self._dtype)
        self.loop = ControlLoop(
            self._size,
            horizon=task.horizon,
            rule=calibrated_rule(task.optimizer),
            given=self._base,
            parameters=training.parameters,
            momentum_sgd=task.optimizer == "sgd",
        )
        self.training = training
        self._examples = float(data.interval_examples * task.horizon)
        self._unmeasured = np.zeros(self._size, bool)
        self._age = 0
        self._initial = np.zeros(self._size)
        self._previous = np.zeros(self._size)
        self.info: dict[str, NDArray[Any]] = {
            key: np.zeros(self._size, bool if key == "diverged" else float) for key in INFO_KEYS
        }
        self._restart(list(range(self._size)), episodes)

    def state_dict(self) -> dict[str, Any]:
        if not self._drawn_from:
            raise ValueError("only environments that draw their tasks (`tasks=`) have a state that can be kept")
        actions = np.reshape(self._actions, (-1, self._size, len(CONTROLS)))
        return {"rngs": copy.deepcopy(self._drawn_from), "actions": torch.from_numpy(actions.copy())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for rng, at in zip(self.rngs, state["rngs"], strict=True):
            rng.bit_generator.state = at
        self._begin()
        for actions in state["actions"].numpy():
            self.step(actions)

    def _draw(self, rows: Sequence[int]) -> list[Episode]:
        """An episode for each of `rows`: one of its own, or the cohort's, where that shares a drawn task."""
        if isinstance(self._source, Task):
            return [draw_episode(self.rngs[row], self._variation) for row in rows]
        self._drawn = self._drawn or draw_episode(self.rngs[0], self._variation)
        return [self._drawn] * len(rows)

    def _restart(self, rows: list[int], episodes: Sequence[Episode]) -> None:
        assert self.training is not None
        losses = self.training.evaluate("val")[rows]
        self._initial[rows] = self._previous[rows] = losses
        lacking = {name: 0.0 for name in CONTROLS if name not in self.training.hyperparameters}
        self.loop.restart(
            rows,
            {"val_loss": np.where([e.blind for e in episodes], np.nan, losses)},
            examples=np.where([e.untold for e in episodes], np.nan, self._examples),
            fixed=[{**e.fixed, **lacking} for e in episodes],
            shifts=np.array([e.shifts for e in episodes]),
        )
        self._unmeasured[rows] = [e.unmeasured for e in episodes]
        self.info["train_loss"][rows], self.info["val_loss"][rows] = np.nan, losses
        self.info["diverged"][rows] = False
        for name, values in self.loop.values().items():
            self.info[name][rows] = values[rows]

    def step(self, actions: Array) -> None:
        assert self.training is not None
        if self._drawn_from:
            self._actions.append(actions)
        values = self.loop.decide(actions)
        signals = self.training.advance(values)
        self.loop.tell_examples(self._examples)
        self.loop.record(observed(signals, self._unmeasured))
        self.rewards = log_fall(self._previous, signals["val_loss"], self._initial)
        lost = diverged(signals["train_loss"], signals["val_loss"], self._initial)
        self._previous = signals["val_loss"]
        self.terminated = lost | (self.loop.state.telemetry.interval >= self.task.horizon)
        self.truncated = np.zeros(self._size, bool)
        self.info = {name: signals[name] for name in ("train_loss", "val_loss")} | {"diverged": lost} | values
        self._age += 1
        # Only the environment's own fixed task is gone on with; one from `options` is for one episode.
        moves_on = self.task is not self._source and (self._age >= self.task.horizon or bool(self.terminated.all()))
        if moves_on:
            self.truncated = ~self.terminated
        over = self.terminated | self.truncated
        self.final_obs = self.loop.observe()
        self.final_info = {key: value.copy() for key, value in self.info.items()}
        if moves_on:
            self._begin()
        elif over.any():
            rows = np.flatnonzero(over).tolist()
            episodes = self._draw(rows)
            for row, episode in zip(rows, episodes, strict=True):
                self.training.restart(row, episode.seed)
            self._restart(rows, episodes)
