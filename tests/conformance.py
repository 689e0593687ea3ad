"""What every vector environment of this package's control problem must do, whoever steps it.

A further kind is one entry in `KINDS`, and everything is checked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from agents.supervised_env import SupervisedVecEnv
from hpo_env.base_schedules import BaseSchedule
from hpo_env.env import INFO_KEYS, HPOEnv, Variation
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from hpo_env.vector_env import HPOVectorEnv
from inner_models.tasks import Task

Batch = NDArray[np.float32]

COUNT, HORIZON = 2, 3
WIDE = len(CONTROLS)
# Loses a run at once, unless the first action moves the learning rate: moved values lie in the control's own range.
EXPLOSIVE = BaseSchedule(lr=1e9, batch_size=16, weight_decay=1e-3, dropout=0.1, warmup=0.0)
ARGUMENTS: dict[str, Any] = {
    "task": Task.named("digits/mlp", horizon=HORIZON, interval_examples=64, train_rows=96, eval_rows=64),
    "variation": Variation(mask_probability=0.3, blind_probability=0.3, untold_probability=0.5),
    "base": EXPLOSIVE,
    "dtype": torch.float64,
}
PROGRESS = [feature.name for feature in FEATURES].index("progress")


class Step(NamedTuple):
    """A step of all environments. `last` and `infos` are of the episode that was stepped, also where it has ended;
    `observations` are then the next one's first."""

    observations: Batch
    rewards: NDArray[Any]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    last: Batch
    infos: list[dict[str, Any]]


class Adapter(Protocol):
    """A vector environment, as the checks use it."""

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]

    def reset(self, seed: int | None) -> tuple[Batch, list[dict[str, Any]]]: ...

    def step(self, actions: Any) -> Step: ...

    def close(self) -> None: ...


class OfGymnasium:
    """Gymnasium's `VectorEnv`, with autoreset in the same step."""

    def __init__(self, make: Callable[[int], VectorEnv[Any, Any, Any]], count: int) -> None:
        self._env = make(count)
        assert self._env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        self.observation_space, self.action_space = self._env.single_observation_space, self._env.single_action_space
        assert self._env.observation_space.shape == (count, *(self.observation_space.shape or ()))
        self.close = self._env.close

    def reset(self, seed: int | None) -> tuple[Batch, list[dict[str, Any]]]:
        observations, infos = self._env.reset(seed=seed)
        return observations, self._each(infos)

    def step(self, actions: Any) -> Step:
        observations, rewards, terminated, truncated, infos = self._env.step(actions)
        over, last, each = terminated | truncated, observations.copy(), self._each(infos)
        for index in np.flatnonzero(over):
            last[index] = infos["final_obs"][index]
            each[index] = self._each(infos["final_info"])[index]
        return Step(observations, rewards, terminated, truncated, last, each)

    def _each(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: infos[key][index].item() for key in INFO_KEYS} for index in range(self._env.num_envs)]


class OfStableBaselines:
    """stable-baselines3's `VecEnv`."""

    def __init__(self, make: Callable[[int], VecEnv], count: int) -> None:
        self._env = make(count)
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space
        self.close = self._env.close

    def reset(self, seed: int | None) -> tuple[Batch, list[dict[str, Any]]]:
        if seed is not None:
            self._env.seed(seed)
        observations: Any = self._env.reset()
        return observations, list(self._env.reset_infos)

    def step(self, actions: Any) -> Step:
        observations, rewards, dones, infos = self._env.step(actions)
        assert isinstance(observations, np.ndarray)
        truncated = np.array([info["TimeLimit.truncated"] for info in infos])
        last = np.stack([info.get("terminal_observation", row) for row, info in zip(observations, infos, strict=True)])
        assert [("terminal_observation" in info) for info in infos] == dones.tolist()
        each = [{key: info[key] for key in INFO_KEYS} for info in infos]
        return Step(observations, rewards, dones & ~truncated, truncated, last, each)


class Kind(NamedTuple):
    """A vector environment to check.

    Attributes:
        make: makes one of a given number of environments.
        lacks: checks that do not hold; only where the environment is not ours.
    """

    make: Callable[[int], Adapter]
    lacks: tuple[str, ...] = ()


def lone() -> HPOEnv:
    """What each of the environments must equal."""
    return HPOEnv(**ARGUMENTS)


KINDS: dict[str, Kind] = {
    "engine": Kind(partial(OfGymnasium, lambda count: HPOVectorEnv(count, **ARGUMENTS))),
    "engine, cohorts": Kind(partial(OfGymnasium, lambda count: HPOVectorEnv(count, cohorts=count, **ARGUMENTS))),
    "SyncVectorEnv": Kind(
        partial(OfGymnasium, lambda count: SyncVectorEnv([lone] * count, autoreset_mode=AutoresetMode.SAME_STEP)),
        lacks=("actions_of_another_shape",),
    ),
    "DummyVecEnv": Kind(
        partial(OfStableBaselines, lambda count: DummyVecEnv([lone] * count)), lacks=("actions_of_another_shape",)
    ),
    "SubprocVecEnv": Kind(
        partial(OfStableBaselines, lambda count: SubprocVecEnv([lone] * count, start_method="spawn")),
        lacks=("actions_of_another_shape", "bad_seeds", "life"),  # its workers end for good when they raise
    ),
    "SupervisedVecEnv": Kind(
        partial(OfStableBaselines, lambda count: SupervisedVecEnv([lone] * count, max_restarts=0))
    ),
}


def drawn_actions(seed: int, steps: int, lost: float = 0.0) -> list[Batch]:
    """Actions for some steps. The learning rate is moved down as far as it goes, which keeps a run, but for a share
    `lost`, which may begin (and thus end) one at the base schedule's."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1.2, 1.2, (steps, COUNT, WIDE)).astype(np.float32)
    actions[:, :, 0] = np.where(rng.random((steps, COUNT)) < lost, 0, -1)
    return list(actions)


def trajectory(env: Adapter, seed: int, actions: list[Batch]) -> list[Any]:
    return [env.reset(seed), *(env.step(each) for each in actions)]


def assert_close(first: Any, second: Any, tolerance: float = 1e-5) -> None:
    """Nested results are equal; by default up to rounding, for the float32 observations of float64 runs."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_close(value, second[key], tolerance)
    elif isinstance(first, tuple | list) or (isinstance(first, np.ndarray) and first.dtype == object):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_close(one, other, tolerance)
    elif first is None or np.asarray(first).dtype == bool:
        np.testing.assert_equal(first, second)
    else:
        np.testing.assert_allclose(first, second, rtol=tolerance, atol=tolerance)


# -- checks ------------------------------------------------------------------------------------------------------------


def spaces_and_types(env: Adapter) -> None:
    assert env.observation_space == lone().observation_space
    assert env.action_space == lone().action_space
    observations, infos = env.reset(0)
    shape, dtype = (COUNT, len(FEATURES)), np.dtype(np.float32)
    assert (observations.shape, observations.dtype, len(infos)) == (shape, dtype, COUNT)
    for actions in drawn_actions(0, HORIZON + 1):
        step = env.step(actions)
        assert (step.observations.shape, step.observations.dtype, step.last.shape) == (shape, dtype, shape)
        assert step.rewards.shape == step.terminated.shape == step.truncated.shape == (COUNT,)
        assert [part.dtype.kind for part in step[1:4]] == ["f", "b", "b"]
        assert all(info.keys() >= set(INFO_KEYS) for info in step.infos)
        assert all(isinstance(info["diverged"], bool) for info in step.infos)


def bounds(env: Adapter) -> None:
    """What is observed lies in the space (so it is finite) and rewards are finite, whatever the actions and losses."""
    rng = np.random.default_rng(1)
    observations, _ = env.reset(1)
    assert all(env.observation_space.contains(row) for row in observations)
    extreme = rng.choice(np.array([-np.inf, -1e30, -1, 0, np.nan, 1, 1e30, np.inf], np.float32), (9, COUNT, WIDE))
    lost = 0
    for actions in [*extreme, *drawn_actions(1, 9, lost=0.5)]:
        step = env.step(actions)
        assert all(env.observation_space.contains(row) for row in (*step.observations, *step.last))
        assert np.isfinite(step.rewards).all()
        lost += sum(info["diverged"] for info in step.infos)
    assert lost > 0


def seeds(env: Adapter) -> None:
    """Equal seeds give equal trajectories, also in the middle of something else; others do not."""
    actions = drawn_actions(2, 2 * HORIZON + 1, lost=0.3)
    first = trajectory(env, 2, actions)
    np.testing.assert_equal(trajectory(env, 2, actions), first)
    other, unseeded = env.reset(9)[1], env.reset(None)[1]
    losses = {info["val_loss"] for _, infos in (first[0], (0, other), (0, unseeded)) for info in infos}
    assert len(losses) == 3 * COUNT


def lone_environments(env: Adapter) -> None:
    """Environment i of seed s is `HPOEnv` of seed s + i, step by step: first and last observations, rewards, ends and
    information, where episodes end with the budget and where they end by divergence."""
    alone = [lone() for _ in range(COUNT)]
    observations, infos = env.reset(3)
    for index, each in enumerate(alone):
        assert_close(each.reset(seed=3 + index), (observations[index], pick(infos[index])))
    ends = set()
    for actions in drawn_actions(3, 6 * HORIZON, lost=0.3):
        step = env.step(actions)
        for index, each in enumerate(alone):
            one = each.step(actions[index])
            assert_close(one, (step.last[index], *(part[index] for part in step[1:4]), step.infos[index]))
            following = each.reset()[0] if one[2] else one[0]
            assert_close(following, step.observations[index])
            ends |= {one[4]["diverged"]} if one[2] else set()
    assert ends == {False, True}


def pick(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info[key] for key in INFO_KEYS}


def episodes(env: Adapter) -> None:
    """An episode ends, terminated, when the budget is spent; the next begins in the same step."""
    observations, _ = env.reset(4)
    assert observations[:, PROGRESS].tolist() == [0] * COUNT
    for number, actions in enumerate(drawn_actions(4, 3 * HORIZON), start=1):
        step, over = env.step(actions), number % HORIZON == 0
        assert step.terminated.tolist() == [over] * COUNT
        assert not step.truncated.any()
        assert not any(info["diverged"] for info in step.infos)
        done = number % HORIZON / HORIZON
        assert step.observations[:, PROGRESS] == pytest.approx(done)
        assert step.last[:, PROGRESS] == pytest.approx(done or 1)


def missing_actions(env: Adapter) -> None:
    """NaN stays, as 0 does, and so does what is beyond the bounds at the bound."""
    calm = drawn_actions(5, 1)
    holes = np.array([[np.nan, 0.5, 0, 7, np.nan, -7], [np.inf, np.nan, -0.2, -np.inf, 0.1, np.nan]], np.float32)
    filled = np.array([[0, 0.5, 0, 1, 0, -1], [1, 0, -0.2, -1, 0.1, 0]], np.float32)
    np.testing.assert_equal(trajectory(env, 5, [*calm, holes]), trajectory(env, 5, [*calm, filled]))


def arrays_of_the_past(env: Adapter) -> None:
    """What was returned does not change later."""
    actions = drawn_actions(6, HORIZON + 1)
    observations, _ = env.reset(6)
    seen: list[NDArray[Any]] = [observations]
    then: list[NDArray[Any]] = [observations.copy()]
    for each in actions:
        step = env.step(each)
        seen += step[:5]
        then += [part.copy() for part in step[:5]]
    np.testing.assert_equal(seen, then)
    np.testing.assert_equal(actions, drawn_actions(6, HORIZON + 1))


def actions_of_another_shape(env: Adapter) -> None:
    """They are refused, and the episode under way is not touched."""
    first, second = drawn_actions(7, 2)
    expected = trajectory(env, 7, [first, second])
    env.reset(7)
    env.step(first)
    for shape in (
        (COUNT, WIDE - 1),
        (COUNT, WIDE + 1),
        (COUNT - 1, WIDE),
        (COUNT + 1, WIDE),
        (WIDE,),
        (),
        (COUNT, WIDE, 1),
    ):
        with pytest.raises(ValueError, match="actions must have shape"):
            env.step(np.zeros(shape, np.float32))
    np.testing.assert_equal(env.step(second), expected[-1])


def bad_seeds(env: Adapter) -> None:
    """They are refused, and good ones are then as good as before."""
    with pytest.raises((ValueError, gymnasium.error.Error), match="-7"):
        env.reset(-7)
    np.testing.assert_equal(env.reset(8), env.reset(8))


CHECKS: tuple[Callable[[Adapter], None], ...] = (
    spaces_and_types,
    bounds,
    seeds,
    lone_environments,
    episodes,
    missing_actions,
    arrays_of_the_past,
    actions_of_another_shape,
    bad_seeds,
)
"""What is checked of an environment; each begins with a reset."""


def life(make: Callable[[int], Adapter]) -> None:
    """No step before a reset, and none is needed to close; closing twice is once."""
    env = make(1)
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"call reset\(\) before step\(\)"):
        env.step(np.zeros((1, WIDE), np.float32))
    env.close()
    env.close()
