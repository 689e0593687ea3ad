"""`HPOVectorEnv`: the same episodes as `HPOEnv` for every kind of model, and cohorts that move on together.

What every vector environment must do is in `tests/conformance.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from hpo_env.base_schedules import BaseSchedule
from hpo_env.env import INFO_KEYS, HPOEnv, Variation
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from hpo_env.vector_env import HPOVectorEnv
from inner_models.tasks import Task, TaskDistribution
from tests.conformance import EXPLOSIVE, assert_close
from tests.rules import RULES

HIDDEN = {"blind_probability": 0.3, "untold_probability": 0.5, "unmeasured_probability": 0.5}
VARIATION = Variation(mask_probability=0.3, start_probability=0.3, **HIDDEN)
MASKED = Variation(mask_probability=0.3, **HIDDEN)
DISTRIBUTION = TaskDistribution(
    entries=(("digits", ("linear", "mlp")), ("diabetes", ("mlp",))),
    horizons=(3, 6),
    examples=(192, 384),
    train_rows=(64, 128),
)
INDEX = {feature.name: index for index, feature in enumerate(FEATURES)}
PROGRESS = INDEX["progress"]
GENTLE = BaseSchedule(lr=1e-3, batch_size=32, weight_decay=1e-3, dropout=0.1)


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tests' own, in which every control depends on the run's length."""
    for module in ("env", "vector_env"):
        monkeypatch.setattr(f"hpo_env.{module}.calibrated_rule", RULES.__getitem__)


def make_task(name: str = "digits/mlp", **overrides: Any) -> Task:
    return Task.named(name, **{"horizon": 4, "interval_examples": 64, "eval_rows": 64, **overrides})


def random_actions(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    actions = rng.uniform(-1, 1, (count, 4)).astype(np.float32)
    return np.concatenate([actions, actions[:, : len(CONTROLS) - 4]], axis=1)


def stay(count: int) -> NDArray[np.float32]:
    return np.zeros((count, len(CONTROLS)), np.float32)


def calmed(actions: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same actions, with the learning rate moved down as far as it goes."""
    calm = actions.copy()
    calm[:, 0] = -1
    return calm


def gentle_actions(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    return calmed(random_actions(rng, count))


def reckless_actions(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Random actions, a third of which would start a run at the base learning rate itself."""
    actions = gentle_actions(rng, count)
    actions[rng.random(count) < 0.3, 0] = 0
    return actions


def assert_twins(
    count: int,
    steps: int,
    cohorts: int = 1,
    options: dict[str, Any] | None = None,
    draw: Callable[[np.random.Generator, int], NDArray[np.float32]] = random_actions,
    **kwargs: Any,
) -> int:
    """Hold the vector environment to Gymnasium's own over `HPOEnv`s. Returns the number of episodes that ended."""
    kwargs |= {"dtype": torch.float64}
    vector = HPOVectorEnv(num_envs=count, cohorts=cohorts, **kwargs)
    sync = SyncVectorEnv([lambda: HPOEnv(**kwargs)] * count, autoreset_mode=AutoresetMode.SAME_STEP)
    assert_close(vector.reset(seed=3, options=options), sync.reset(seed=3, options=options))
    rng, ended = np.random.default_rng(0), 0
    for _ in range(steps):
        actions = draw(rng, count)
        result = vector.step(actions)
        assert_close(result, sync.step(actions))
        ended += int((result[2] | result[3]).sum())
    return ended


# -- twins -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "digits/mlp",
        "digits/linear",
        "digits/cnn",
        "waveforms/gru",
        "markov-text-0/transformer",
        "diabetes/mlp",
        "digits/autoencoder",
    ],
)
def test_same_episodes_as_single_environments(name: str) -> None:
    assert assert_twins(3, steps=9, task=make_task(name), base=GENTLE, variation=VARIATION) == 6


@pytest.mark.parametrize("name", ["digits/cnn", "diabetes/mlp", "markov-text-0/gru"])
def test_same_episodes_with_all_controls(name: str) -> None:
    task = replace(make_task(name), regularizers=("augmentation", "label_smoothing"))
    assert assert_twins(3, steps=9, task=task, base=GENTLE, variation=VARIATION) == 6


def test_same_episodes_under_sgd_in_cohorts() -> None:
    assert assert_twins(4, steps=6, cohorts=2, task=make_task(optimizer="sgd"), base=GENTLE, variation=VARIATION) == 4


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_same_episodes_where_the_base_is_the_rules(optimizer: str) -> None:
    """Where it is for a typical run until the length is known, and off in some of them."""
    task = make_task(optimizer=optimizer, horizon=3)
    everything = Variation(mask_probability=0.3, start_probability=0.3, start_factor=3.0, **HIDDEN)
    assert assert_twins(6, 7, cohorts=2, draw=gentle_actions, task=task, variation=everything) == 12


def test_same_episodes_when_some_diverge() -> None:
    """Replicas end at different times; each goes on with its own next episode."""
    ended = assert_twins(4, steps=10, draw=reckless_actions, task=make_task(), base=EXPLOSIVE)
    assert 8 < ended < 40  # more than the horizon alone ends, but not all at once


def test_a_task_of_one_episode() -> None:
    """The task in `options` holds for one episode; the environment's own follows."""
    task, other = make_task(horizon=3), make_task("digits/linear", horizon=2)
    assert assert_twins(3, steps=6, task=task, base=GENTLE, options={"task": other}) == 6


@pytest.mark.parametrize("cohorts", [1, 3])
def test_one_replica_cohorts_equal_single_environments(cohorts: int) -> None:
    """Also where tasks are sampled: a cohort of one draws what `HPOEnv` draws (as long as no run is lost)."""
    ended = assert_twins(cohorts, 12, cohorts, draw=gentle_actions, tasks=DISTRIBUTION, base=GENTLE, variation=MASKED)
    assert ended >= 2 * cohorts


@pytest.mark.parametrize("share", [0, 1])
def test_what_is_hidden_from_each_run(share: int) -> None:
    hidden = Variation(untold_probability=share, unmeasured_probability=share)
    env = HPOVectorEnv(num_envs=3, task=make_task(horizon=2), base=GENTLE, variation=hidden)
    columns = [INDEX["examples_known"], INDEX["gradients_missing"], INDEX["grad_norm_change"]]
    first = env.reset(seed=0)[0]
    for _ in range(2):  # again after a reset of its own
        assert first[:, INDEX["examples_known"]].tolist() == [1 - share] * 3
        assert (first[:, INDEX["examples"]] == 0).all() == bool(share)
        then = env.step(stay(3))[0]
        assert then[:, columns[:2]].tolist() == [[1, share]] * 3
        first, *_, infos = env.step(stay(3))
        last = np.stack(list(infos["final_obs"]))
        assert last[:, columns[:2]].tolist() == [[1, share]] * 3
        assert (last[:, columns[2]] == 0).all() == bool(share)


def test_each_run_is_hidden_from_by_itself() -> None:
    """As its own episode says, also after a restart on its own while the others go on."""
    env = HPOVectorEnv(6, task=make_task(horizon=6), base=EXPLOSIVE, variation=Variation(**HIDDEN))
    known = env.reset(seed=0)[0][:, INDEX["examples_known"]]
    assert set(known.tolist()) == {0, 1}
    rng = np.random.default_rng(0)
    restarted = set()
    for _ in range(12):
        hidden = env._cohorts[0]._unmeasured.copy()
        observations, _, terminated, _, infos = env.step(reckless_actions(rng, 6))
        for run in range(6):
            if not terminated[run]:
                assert observations[run, INDEX["examples_known"]] == 1
                assert observations[run, INDEX["gradients_missing"]] == hidden[run]
            else:
                assert infos["final_obs"][run][INDEX["examples_known"]] == 1
                restarted.add(float(observations[run, INDEX["examples_known"]]))
    assert restarted == {0, 1}


# -- cohorts -----------------------------------------------------------------------------------------------------------


def test_cohorts_share_a_task_and_move_on_together() -> None:
    env = HPOVectorEnv(num_envs=6, tasks=DISTRIBUTION, cohorts=3, base=GENTLE)
    env.reset(seed=0)
    assert env.cohort_of.tolist() == [0, 0, 1, 1, 2, 2]
    ages, seen = np.zeros(3, int), [{task} for task in env.tasks]
    for _ in range(16):
        before = env.tasks
        _, _, terminated, truncated, _ = env.step(stay(6))
        ages += 1
        over = np.array([age == task.horizon for age, task in zip(ages, before, strict=True)])
        assert (terminated | truncated).tolist() == np.repeat(over, 2).tolist()
        assert not truncated.any()
        ages[over] = 0
        for index, (old, new) in enumerate(zip(before, env.tasks, strict=True)):
            assert (new is not old) == over[index]
            seen[index].add(new)
        assert env.intervals.tolist() == np.repeat(ages, 2).tolist()
    assert all(len(tasks) > 2 for tasks in seen)
    assert not seen[0] & seen[1]


def test_replicas_of_a_drawn_task_share_the_episode() -> None:
    """Equal actions, equal runs: what replicas differ in is what they do."""
    env = HPOVectorEnv(6, tasks=DISTRIBUTION, cohorts=2, variation=Variation(**HIDDEN), base=GENTLE)
    observations, infos = env.reset(seed=3)
    for _ in range(8):
        for row in (0, 3):
            np.testing.assert_array_equal(observations[row : row + 3], observations[[row] * 3])
            np.testing.assert_allclose(infos["val_loss"][row : row + 3], infos["val_loss"][row], rtol=1e-5)
        assert not np.array_equal(observations[0], observations[3])
        observations, _, _, _, infos = env.step(np.zeros((6, len(CONTROLS)), np.float32))
    assert env.tasks[0].seed is not None
    moved = np.zeros((6, len(CONTROLS)), np.float32)
    moved[1] = 0.5
    observations, _ = env.reset(seed=4)
    observations, _, _, _, infos = env.step(moved)
    assert infos["val_loss"][0] == pytest.approx(infos["val_loss"][2], rel=1e-5)
    assert infos["val_loss"][1] != pytest.approx(infos["val_loss"][2], rel=1e-5)


def test_a_cohort_whose_replicas_have_all_diverged_moves_on() -> None:
    """As `HPOEnv` does, which samples a task at every reset."""
    env = HPOVectorEnv(num_envs=3, tasks=DISTRIBUTION, base=EXPLOSIVE)
    env.reset(seed=0)
    for _ in range(4):
        (task,) = env.tasks
        _, rewards, terminated, truncated, infos = env.step(stay(3))
        assert np.isfinite(rewards).all()
        assert terminated.all()
        assert infos["final_info"]["diverged"].all()
        assert not truncated.any()
        assert env.intervals.tolist() == [0, 0, 0]
        assert env.tasks[0] is not task


def test_replicas_that_lag_are_truncated_when_the_cohort_moves_on() -> None:
    env = HPOVectorEnv(num_envs=3, tasks=DISTRIBUTION, base=EXPLOSIVE)
    env.reset(seed=0)
    (task,) = env.tasks
    assert task.horizon >= 3
    calm = calmed(stay(3))
    first = calm.copy()
    first[1, 0] = 0  # the middle replica is lost in the first interval
    observations, _, terminated, truncated, infos = env.step(first)
    assert terminated.tolist() == [False, True, False]
    assert env.intervals.tolist() == [1, 0, 1]
    for _ in range(task.horizon - 1):
        assert not truncated.any()
        assert env.tasks[0] is task
        observations, _, terminated, truncated, infos = env.step(calm)
    assert (terminated.tolist(), truncated.tolist()) == ([True, False, True], [False, True, False])
    assert not infos["final_info"]["diverged"].any()
    assert env.tasks[0] is not task
    assert env.intervals.tolist() == [0, 0, 0]
    # The end of the old episode is kept; what is returned belongs to the new one.
    ends = np.stack(list(infos["final_obs"]))[:, PROGRESS]
    assert ends == pytest.approx([1, (task.horizon - 1) / task.horizon, 1])
    assert observations[:, PROGRESS].tolist() == [0, 0, 0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_diverging_replica_leaves_the_others_alone(optimizer: str) -> None:
    task = make_task(optimizer=optimizer, horizon=6)
    rng = np.random.default_rng(0)
    envs = [HPOVectorEnv(num_envs=3, task=task, base=EXPLOSIVE, dtype=torch.float64) for _ in range(2)]
    for env in envs:
        env.reset(seed=0)
    for step in range(7):
        actions = calmed(random_actions(rng, 3))
        thrown = actions.copy()
        if step == 0:
            thrown[1, 0] = 0
        sound: Any = envs[0].step(actions)
        broken: Any = envs[1].step(thrown)
        assert broken[2][1] == (step in (0, 6))
        for one, other in zip(sound[:4], broken[:4], strict=True):
            np.testing.assert_allclose(one[[0, 2]], other[[0, 2]], rtol=1e-6)
        for key in INFO_KEYS:
            np.testing.assert_allclose(sound[4][key][[0, 2]], broken[4][key][[0, 2]], rtol=1e-9)
        assert all(np.isfinite(part).all() for part in broken[:2])
        assert env.observation_space.contains(broken[0])


# -- the contract ------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_episodes() -> None:
    def rollout(env: HPOVectorEnv, seed: int) -> list[Any]:
        rng = np.random.default_rng(0)
        return [env.reset(seed=seed), *(env.step(random_actions(rng, 4)) for _ in range(8))]

    first, used = (HPOVectorEnv(4, tasks=DISTRIBUTION, cohorts=2, variation=VARIATION) for _ in range(2))
    expected = rollout(first, seed=7)
    rollout(used, seed=1)
    assert_close(rollout(used, seed=7), expected, tolerance=0)
    assert rollout(used, seed=8)[0][1]["val_loss"][0] != expected[0][1]["val_loss"][0]


def test_seeds_may_be_given_one_by_one() -> None:
    env = HPOVectorEnv(3, task=make_task())
    together, one_by_one = env.reset(seed=5), env.reset(seed=[5, 6, 7])
    assert_close(together, one_by_one, tolerance=0)
    mixed = env.reset(seed=[5, None, 7])
    np.testing.assert_equal(mixed[0][[0, 2]], together[0][[0, 2]])
    losses = together[1]["val_loss"]
    assert mixed[1]["val_loss"][[0, 2]].tolist() == losses[[0, 2]].tolist()
    assert mixed[1]["val_loss"][1] != losses[1]


def test_information_is_of_gymnasiums_form() -> None:
    env = HPOVectorEnv(4, tasks=DISTRIBUTION, cohorts=2, variation=VARIATION)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(8):
        observations, _, terminated, truncated, infos = env.step(random_actions(rng, 4))
        assert env.observation_space.contains(observations)
        assert {key for key in infos if not key.startswith(("_", "final"))} == set(INFO_KEYS)
        over = terminated | truncated
        if over.any():
            assert infos["_final_obs"].tolist() == infos["_final_info"].tolist() == over.tolist()
            assert [item is not None for item in infos["final_obs"]] == over.tolist()


def test_returned_arrays_do_not_change_later() -> None:
    env = HPOVectorEnv(2, task=make_task(horizon=2), dtype=torch.float64)
    rng = np.random.default_rng(0)
    returned: list[Any] = [env.reset(seed=0)]
    then = [copy.deepcopy(returned[0])]
    for _ in range(5):
        returned.append(env.step(random_actions(rng, 2)))
        then.append(copy.deepcopy(returned[-1]))
    assert_close(returned, then, tolerance=0)


@pytest.mark.parametrize(("num_envs", "cohorts"), [(0, 1), (4, 3), (2, 0), (2, 4), (-2, 1)])
def test_cohorts_divide_the_environments(num_envs: int, cohorts: int) -> None:
    with pytest.raises(ValueError, match=f"positive multiple of cohorts, not {num_envs} for {cohorts} cohorts"):
        HPOVectorEnv(num_envs, cohorts=cohorts)
