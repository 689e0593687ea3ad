"""Rollouts by workers: what reaches PPO's buffer, that they repeat, and that no worker waits for another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from agents.rollout_ppo import RolloutPPO
from agents.rollouts import Actor, Batch, RolloutWorkers, Step

RUNS, STEPS, GAMMA = 4, 5, 0.9


class Walks:
    """Random walks that actions push, three steps long; those of even rows are truncated, others end. All pay 1."""

    _at: Batch

    def __init__(self, runs: int = RUNS, size: int = 2) -> None:
        self._shape = (runs, size)
        self.ends: list[Batch] = []

    def reset(self, seed: int) -> Batch:
        self._rng, self._time = np.random.default_rng(seed), 0
        return self._begin()

    def step(self, actions: Batch) -> Step:
        assert np.abs(actions).max() <= 1
        self._time += 1
        self._at = self._at + np.float32(0.3) * actions
        over = self._time % 3 == 0
        infos: list[dict[str, Any]] = [{} for _ in self._at]
        if over:
            self.ends.append(self._at)
            infos = [
                {"terminal_observation": row, "TimeLimit.truncated": index % 2 == 0, "episode": {"r": 3.0, "l": 3}}
                for index, row in enumerate(self._at)
            ]
        return self._begin() if over else self._at, np.ones(len(infos)), np.full(len(infos), over), infos

    def state_dict(self) -> dict[str, Any]:
        return {"at": torch.from_numpy(self._at.copy()), "time": self._time, "rng": dict(self._rng.bit_generator.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._at, self._time = state["at"].numpy(), state["time"]
        self._rng = np.random.default_rng()
        self._rng.bit_generator.state = state["rng"]

    def _begin(self) -> Batch:
        self._at = self._rng.uniform(-1, 1, self._shape).astype(np.float32)
        return self._at


class Recorder(BaseCallback):
    """Keeps every rollout, with the actor that collected it and the model's own evaluation of it."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: list[Actor] = []
        self.buffers: list[RolloutBuffer] = []
        self.evaluated: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, RolloutPPO)
        self.actors.append(self.model.actor)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, RolloutPPO)
        buffer = self.model.rollout_buffer
        seen, actions = (torch.from_numpy(a).flatten(0, 1) for a in (buffer.observations, buffer.actions))
        with torch.no_grad():
            values, log_probs, _ = self.model.policy.evaluate_actions(seen, actions)
        self.evaluated.append((values.reshape(STEPS, RUNS), log_probs.reshape(STEPS, RUNS)))
        self.buffers.append(deepcopy(buffer))


def workers_of(make: Callable[[], Walks], workers: int = 0, size: int = 2) -> RolloutWorkers:
    boxes = [spaces.Box(-1.0, 1.0, (size,), np.float32) for _ in range(2)]
    return RolloutWorkers(make, RUNS, *boxes, workers=workers)


def build(env: RolloutWorkers) -> RolloutPPO:
    set_random_seed(0)
    model = RolloutPPO("MlpPolicy", env, n_steps=STEPS, batch_size=10, n_epochs=2, gamma=GAMMA, device="cpu")
    model.policy.value_net.bias.data += 7.0
    return model


def learn(workers: int) -> tuple[RolloutPPO, Recorder]:
    """Three rollouts and updates."""
    recorder = Recorder()
    with closing(workers_of(partial(Walks, RUNS // max(1, workers)), workers)) as env:
        model = build(env)
        model.learn(3 * STEPS * RUNS, callback=recorder)
    return model, recorder


@pytest.fixture(scope="module")
def two() -> tuple[RolloutPPO, Recorder]:
    return learn(workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_buffer_holds_what_the_model_computes(workers: int, two: tuple[RolloutPPO, Recorder]) -> None:
    model, recorder = two if workers else learn(0)
    assert model.num_timesteps == 3 * STEPS * RUNS
    assert len(recorder.buffers) == 3
    for number, (buffer, (values, log_probs)) in enumerate(zip(recorder.buffers, recorder.evaluated, strict=True)):
        np.testing.assert_allclose(buffer.values, values, rtol=1e-5)
        np.testing.assert_allclose(buffer.log_probs, log_probs, rtol=1e-4, atol=1e-5)
        assert np.abs(buffer.actions).max() > 1  # as sampled: unclipped
        times = number * STEPS + np.arange(STEPS)
        np.testing.assert_array_equal(buffer.episode_starts, np.repeat(times[:, None] % 3 == 0, RUNS, axis=1))
    assert model.ep_info_buffer is not None
    assert len(model.ep_info_buffer) == 3 * STEPS // 3 * RUNS


def test_normalization_is_of_the_rollouts_before(two: tuple[RolloutPPO, Recorder]) -> None:
    model, recorder = two
    np.testing.assert_array_equal(recorder.actors[0].mean, 0)
    raw = [
        buffer.observations.reshape(-1, 2) * actor.std + actor.mean
        for actor, buffer in zip(recorder.actors, recorder.buffers, strict=True)
    ]
    for number in (1, 2):
        before = np.concatenate(raw[:number])
        np.testing.assert_allclose(recorder.actors[number].mean, before.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(recorder.actors[number].std, before.std(axis=0), atol=1e-4)
    np.testing.assert_allclose(model.observation_low, np.concatenate(raw).min(axis=0), atol=1e-5)
    np.testing.assert_allclose(model.observation_high, np.concatenate(raw).max(axis=0), atol=1e-5)


def test_extremes_are_of_what_counts() -> None:
    with closing(workers_of(partial(Walks, RUNS))) as env:
        model = build(env)
        model.counted = lambda raw: np.stack([raw[:, 0] > 0, np.zeros(len(raw), bool)], axis=1)
        model.learn(STEPS * RUNS)
    assert 0 < model.observation_low[0] < model.observation_high[0]
    assert (model.observation_low[1], model.observation_high[1]) == (np.inf, -np.inf)


def test_truncation_bootstraps() -> None:
    walks, recorder = Walks(), Recorder()
    model = build(workers_of(lambda: walks))
    model.learn(STEPS * RUNS, callback=recorder)
    (buffer,), (actor,) = recorder.buffers, recorder.actors
    set_random_seed(0)
    fresh = build(workers_of(Walks))  # as it was before the update
    with torch.no_grad():
        beyond = fresh.policy.predict_values(actor.normalize(walks.ends[0]))[:, 0].numpy()
    assert (beyond > 5).all()
    expected = np.ones((STEPS, RUNS))
    expected[2] += GAMMA * beyond * [1, 0, 1, 0]
    np.testing.assert_allclose(buffer.rewards, expected, rtol=1e-5)


def weights(model: RolloutPPO) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters())


def test_repeated(two: tuple[RolloutPPO, Recorder]) -> None:
    (model, recorder), (again, _) = two, learn(workers=2)
    assert torch.equal(weights(again), weights(model))
    # The first policies decide almost nothing: their actions are noise, each worker's and each rollout's its own.
    one, other = np.split(recorder.buffers[0].actions, 2, axis=1)
    assert not np.allclose(one, other, atol=0.5)
    assert not np.allclose(recorder.buffers[0].actions, recorder.buffers[1].actions, atol=0.5)


def test_one_process_is_as_good_as_none() -> None:
    (here, _), (there, _) = learn(workers=0), learn(workers=1)
    torch.testing.assert_close(weights(there), weights(here), rtol=1e-4, atol=1e-5)


class Relay(Walks):
    """The first worker takes its first step only when the second has taken its last."""

    WIDE = 4096

    def __init__(self, flag: Path) -> None:
        super().__init__(RUNS // 2, self.WIDE)
        self._flag = flag

    def reset(self, seed: int) -> Batch:
        self._first = seed == 0
        return super().reset(seed)

    def step(self, actions: Batch) -> Step:
        deadline = time.monotonic() + 60
        while self._first and not self._flag.exists():
            assert time.monotonic() < deadline, "the other worker does not come to its end"
            time.sleep(0.01)
        step = super().step(actions)
        if self._time == 20 and not self._first:
            self._flag.touch()
        return step


def test_no_worker_waits_for_another(tmp_path: Path) -> None:
    """Not even with more under way (20 steps of over 64 kB) than a pipe takes."""
    with closing(workers_of(partial(Relay, tmp_path / "flag"), workers=2, size=Relay.WIDE)) as env:
        steps = list(env.collect(build(env).actor, env.reset(), 20))
    assert len(steps) == 20
    assert {step.observations.shape for step in steps} == {(RUNS, Relay.WIDE)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_goes_on_as_if_nothing_had_been(workers: int) -> None:
    """Two rollouts and updates by one model, or one each by two models, in other processes."""

    def collected(model: RolloutPPO, rollouts: int) -> list[RolloutBuffer]:
        recorder, fresh = Recorder(), not model.num_timesteps
        model.learn(rollouts * STEPS * RUNS, callback=recorder, reset_num_timesteps=fresh)
        return recorder.buffers

    share = partial(Walks, RUNS // max(1, workers))
    with closing(workers_of(share, workers)) as env:
        whole = build(env)
        buffers = [*collected(whole, 1), *collected(whole, 1)]
    with closing(workers_of(share, workers)) as env:
        first = build(env)
        collected(first, 1)
        state = deepcopy(first.state_dict())
    torch.manual_seed(5)
    with closing(workers_of(share, workers)) as env:
        second = build(env)
        second.load_state_dict(state)
        (buffer,) = collected(second, 1)
    assert torch.equal(weights(second), weights(whole))
    np.testing.assert_array_equal(buffer.actions, buffers[1].actions)
    np.testing.assert_array_equal(second.obs_rms.var, whole.obs_rms.var)
    np.testing.assert_array_equal(second.observation_high, whole.observation_high)
    with closing(workers_of(share, 1)) as env, pytest.raises(ValueError, match="state is of"):
        env.load_state_dict({**state["env"], "workers": [{}] * 3})


def test_map_keeps_the_order() -> None:
    items = list(range(-7, 7))
    for workers in (0, 2):
        with closing(workers_of(partial(Walks, RUNS // max(1, workers)), workers)) as env:
            assert env.map(abs, items) == [abs(item) for item in items]
            assert env.map(abs, []) == []
            with pytest.raises((RuntimeError, ValueError), match="invalid literal"):
                env.map(int, ["x"])


def test_workers_leave_ctrl_c_to_the_first_process() -> None:
    with closing(workers_of(partial(Walks, RUNS // 2), workers=2)) as env:
        before = env.reset()
        for process in env._processes:
            os.kill(process.pid, signal.SIGINT)
        np.testing.assert_array_equal(env.reset(), before)
