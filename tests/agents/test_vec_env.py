"""The environment for stable-baselines3: relative rewards, and worker processes that change nothing but the speed."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import set_random_seed

from agents.ppo import build
from agents.rollouts import Actor, Transition
from agents.vec_env import CohortEnv, CohortVecEnv, RelativeRewards
from hpo_env.env import Variation
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from inner_models.tasks import TaskDistribution
from tests.tiny import TINY, TINY_CONFIG


def make_env(tasks: TaskDistribution = TINY, **arguments: Any) -> CohortVecEnv:
    return CohortVecEnv(tasks, **{"cohorts": 2, "replicas": 3, "seed": 7, **arguments})


def actor(log_std: float = -40.0) -> Actor:
    """Moves each control by an amount of its own whatever it sees, with noise of exp(log_std)."""
    set_random_seed(0)
    model = build(replace(TINY_CONFIG, log_std=log_std, minibatch=24), make_env())
    last = model.policy.action_net
    assert isinstance(last, torch.nn.Linear)
    last.weight.data.zero_()
    last.bias.data = torch.linspace(-0.5, 0.9, len(CONTROLS))
    return model.actor


def steps(env: CohortVecEnv, count: int, log_std: float = -40.0) -> list[Transition]:
    """Reset, then a rollout."""
    return list(env.collect(actor(log_std), env.reset(), count))


# -- relative rewards --------------------------------------------------------------------------------------------------


def scores(relative: RelativeRewards, cohort: int, intervals: list[int], rewards: list[float]) -> list[float]:
    found: list[float] = relative(cohort, np.array(intervals), np.array(rewards)).tolist()
    return found


def test_relative_rewards_by_hand() -> None:
    relative = RelativeRewards(2)
    relative.begin(0, "a")
    # Each less the mean of the others, in units of the first guess at a spread, 0.1.
    assert scores(relative, 0, [0, 0, 0], [0.1, 0.2, 0.3]) == pytest.approx([-1.5, 0.0, 1.5])
    assert scores(relative, 0, [1, 1, 1], [0.1, 0.1, 0.1]) == pytest.approx([0.0, 0.0, 0.0])
    # Clipped at 5.
    assert scores(relative, 0, [2, 2, 2], [1.0, 0.0, -1.0]) == pytest.approx([5.0, 0.0, -5.0])


def test_the_spread_is_learned_at_the_end_and_constant_over_an_episode() -> None:
    relative = RelativeRewards(2)
    relative.begin(0, "a")
    scores(relative, 0, [0, 0], [0.0, 0.3])
    scores(relative, 0, [1, 1], [0.2, 0.9])  # returns 0.2 and 1.2: a spread of 0.5
    relative.begin(1, "a")
    assert scores(relative, 1, [0, 0], [0.0, 0.1]) == pytest.approx([-1.0, 1.0])
    relative.end(0, "a")
    assert scores(relative, 1, [1, 1], [0.0, 0.1]) == pytest.approx([-1.0, 1.0])  # its episode began with 0.1
    relative.begin(0, "a")
    assert scores(relative, 0, [0, 0], [0.0, 0.1]) == pytest.approx([-0.2, 0.2])
    relative.end(1, "a")  # returns 0 and 0.2: a spread of 0.1, with a weight of 0.3
    relative.begin(1, "a")
    spread = 0.5**0.7 * 0.1**0.3
    assert scores(relative, 1, [0, 0], [0.0, 0.1]) == pytest.approx([-0.1 / spread, 0.1 / spread])


def test_spreads_by_task() -> None:
    """Each key has its own; a key that has not been seen gets the geometric mean over all."""
    relative = RelativeRewards(1)
    for key, spread in (("easy", 2.0), ("hard", 0.1)):
        relative.begin(0, key)
        scores(relative, 0, [0, 0], [0.0, 2 * spread])
        relative.end(0, key)
    for key, spread in (("easy", 2.0), ("hard", 0.1), ("new", 2.0**0.7 * 0.1**0.3)):
        relative.begin(0, key)
        assert scores(relative, 0, [0, 0], [0.0, 0.2])[1] == pytest.approx(0.2 / spread), key


def test_a_spread_has_a_floor() -> None:
    relative = RelativeRewards(1)
    relative.begin(0, "flat")
    scores(relative, 0, [0, 0], [0.3, 0.3])
    relative.end(0, "flat")
    relative.begin(0, "flat")
    assert scores(relative, 0, [0, 0], [0.0, 0.01]) == pytest.approx([-0.5, 0.5])


def test_a_replica_that_restarted_is_compared_with_its_cohort_at_its_age() -> None:
    relative = RelativeRewards(1)
    relative.begin(0, "a")
    scores(relative, 0, [0, 0, 0], [0.1, 0.2, 0.6])  # mean 0.3
    scores(relative, 0, [1, 1, 1], [0.1, 0.1, -0.1])
    # The third diverged and is back at interval 0; the others are compared with each other only.
    assert scores(relative, 0, [2, 2, 0], [0.05, 0.1, 0.4]) == pytest.approx([-0.5, 0.5, 1.0])
    assert scores(relative, 0, [3, 3, 1], [0.0, 0.0, 0.1]) == pytest.approx([0.0, 0.0, (0.1 - 0.1 / 3) / 0.1])
    relative.end(0, "a")  # of the returns 0.25 and 0.4 alone
    relative.begin(0, "a")
    spread = float(np.std([0.25, 0.4]))
    assert scores(relative, 0, [0, 0, 0], [0.0, 0.0, 0.1])[2] == pytest.approx(0.1 / spread)


def test_nobody_left_of_the_cohort() -> None:
    relative = RelativeRewards(1)
    relative.begin(0, "a")
    scores(relative, 0, [0, 0], [0.2, 0.4])
    assert scores(relative, 0, [0, 0], [0.3, 0.4]) == pytest.approx([0.0, 1.0])
    relative.end(0, "a")
    relative.begin(0, "a")
    assert scores(relative, 0, [0, 0], [0.0, 0.1]) == pytest.approx([-1.0, 1.0])  # nothing was learned


# -- the environment ---------------------------------------------------------------------------------------------------


VARIED = Variation(0.2, 0.5, 10.0, 0.5)


def test_workers_change_nothing() -> None:
    local = steps(make_env(variation=VARIED), 30)
    with closing(make_env(variation=VARIED, workers=2)) as env:
        shared = steps(env, 30)
    first_end = next(index for index, step in enumerate(local) if step.dones.any())
    for index, (one, other) in enumerate(zip(local, shared, strict=True)):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.observations, other.observations)
        np.testing.assert_allclose(one.values, other.values, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(one.dones, other.dones)
        for left, right in zip(one.infos, other.infos, strict=True):
            assert left.get("final") == right.get("final")
            assert left.get("episode", {}).get("r") == right.get("episode", {}).get("r")
        if index <= first_end:  # from then on, each worker has learned the spreads of its own cohorts
            np.testing.assert_array_equal(one.rewards, other.rewards)
    assert sum(step.dones.sum() for step in local) >= 30


def test_seeds() -> None:
    env = make_env()
    first, again = steps(env, 8, log_std=0.0), steps(env, 8, log_std=0.0)
    np.testing.assert_array_equal([step.observations for step in first], [step.observations for step in again])
    np.testing.assert_array_equal([step.actions for step in first], [step.actions for step in again])
    before = env.reset()
    assert env.seed(8) == list(range(8, 14))
    assert not np.array_equal(env.reset(), before)


def test_ends_of_episodes() -> None:
    env = make_env(variation=VARIED)
    lengths, space = np.zeros(6, int), env.observation_space
    for step in steps(env, 30, log_std=-0.5):
        assert len(step.infos) == len(step.dones) == len(step.rewards) == 6
        assert np.isfinite(step.rewards).all()
        assert np.abs(step.rewards).max() <= 5
        lengths += 1
        for index, info in enumerate(step.infos):
            assert ("terminal_observation" in info) == ("episode" in info) == ("final" in info) == step.dones[index]
            if not step.dones[index]:
                continue
            assert space.contains(info["terminal_observation"])
            assert not np.array_equal(info["terminal_observation"], step.observations[index])
            assert info["episode"]["l"] == lengths[index]
            assert info["final"]["val_loss"] > 0
            assert not info["TimeLimit.truncated"]
            # Progress: all of the run at its end, nothing of it at the start of the next.
            assert info["terminal_observation"][0] == 1.0
            assert step.observations[index, 0] == 0.0
            lengths[index] = 0
        assert list(step.infos[0]["controls"]) == ["lr", "batch_size", "weight_decay", "dropout"]


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 9])
def test_a_state_goes_on_with_the_same_episodes(at: int) -> None:
    """At the start of an episode, in it, and past its end; with spreads learned, and into the next episodes."""
    rng = np.random.default_rng(at)
    actions = rng.uniform(-1, 1, (25, 6, len(CONTROLS))).astype(np.float32)
    whole, other = (CohortEnv(TINY, 2, 3, VARIED, "cpu") for _ in range(2))
    whole.reset(11)
    for action in actions[:at]:
        whole.step(action)
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    for action in actions[at:]:
        (seen, rewards, done, infos), (seen_too, rewards_too, done_too, infos_too) = (
            whole.step(action),
            other.step(action),
        )
        np.testing.assert_array_equal(seen, seen_too)
        np.testing.assert_array_equal(rewards, rewards_too)
        np.testing.assert_array_equal(done, done_too)
        assert [i.get("final") for i in infos] == [i.get("final") for i in infos_too]
        assert [i.get("episode", {}).get("r") for i in infos] == [i.get("episode", {}).get("r") for i in infos_too]


def test_bad_numbers_of_workers() -> None:
    with pytest.raises(ValueError, match="multiple of workers, not 2 for 3"):
        make_env(workers=3)


# -- worker processes --------------------------------------------------------------------------------------------------

UNKNOWN = TaskDistribution(entries=(("no-such-data-set", ("mlp",)),))


def step_once(env: CohortVecEnv) -> None:
    next(env.collect(actor(), np.zeros((env.num_envs, len(FEATURES)), np.float32), 1))


@pytest.fixture
def worker() -> Iterator[CohortVecEnv]:
    """An environment with one worker, under way."""
    env = make_env(workers=1)
    env.reset()
    yield env
    env.close()


def test_a_worker_that_fails() -> None:
    expected = pytest.raises(RuntimeError, match=r"(?s)Traceback.*DatasetError.*no-such-data-set")
    with closing(make_env(UNKNOWN, workers=1)) as env, expected:
        env.reset()


def test_a_worker_that_cannot_start() -> None:
    """It has said why and is gone before anything is asked of it."""
    with closing(make_env(device="no-such-device", workers=1)) as env:
        env._processes[0].join(60)
        with pytest.raises(RuntimeError, match=r"(?s)Traceback.*no-such-device"):
            env.reset()


def test_a_worker_that_was_killed(worker: CohortVecEnv) -> None:
    worker._processes[0].kill()
    worker._processes[0].join(60)
    for call in (step_once, CohortVecEnv.reset):
        with pytest.raises(RuntimeError, match="a worker process ended unexpectedly"):
            call(worker)


def test_a_worker_that_is_killed_at_work(worker: CohortVecEnv) -> None:
    os.kill(worker._processes[0].pid, signal.SIGSTOP)  # so that it is still waited for when it is killed
    threading.Timer(1.0, worker._processes[0].kill).start()
    with pytest.raises(RuntimeError, match="a worker process ended unexpectedly"):
        step_once(worker)


def test_a_worker_is_closed_at_work(worker: CohortVecEnv) -> None:
    """What it goes on to send has no receiver any more; it ends, quietly and soon."""
    transitions = worker.collect(actor(), np.zeros((worker.num_envs, len(FEATURES)), np.float32), 10**6)
    next(transitions)
    process = worker._processes[0]
    worker.close()
    assert process.exitcode == 0


def test_close_leaves_no_children(worker: CohortVecEnv) -> None:
    processes = list(worker._processes)
    assert set(processes) <= set(multiprocessing.active_children())
    worker.close()
    worker.close()
    assert not set(processes) & set(multiprocessing.active_children())
    assert [process.exitcode for process in processes] == [0]


def test_no_attributes_of_replicas() -> None:
    env = make_env()
    for call in (lambda: env.get_attr("task"), lambda: env.set_attr("task", 1), lambda: env.env_method("task")):
        with pytest.raises(AttributeError, match="'task'"):
            call()
    assert env.env_is_wrapped(object) == [False] * 6
    with pytest.raises(NotImplementedError, match="workers step on their own"):
        env.step(np.zeros((6, len(CONTROLS))))
