"""`HPOEnv`: the Gymnasium contract, determinism, divergence, and a test split that is out of reach."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import hpo_env
from hpo_env.actions import RANGES
from hpo_env.base_schedules import REGULARIZERS, BaseSchedule
from hpo_env.env import Episode, HPOEnv, Variation, draw_episode, resolve_tasks
from hpo_env.hyperparameters import CONTROLS, SCALES
from hpo_env.observations import FEATURES
from hpo_env.vector_env import HPOVectorEnv
from inner_models.datasets import load_dataset
from inner_models.replicated_layers import parameter_count
from inner_models.tasks import DEFAULT_SPECS, Task, TaskDistribution
from tests.conformance import EXPLOSIVE
from tests.rules import RULES

NAMES = [
    "digits/mlp",
    "digits/linear",
    "digits/cnn",
    "waveforms/gru",
    "markov-text-0/transformer",
    "diabetes/mlp",
    "digits/autoencoder",
]
DISTRIBUTION = TaskDistribution(
    entries=(("digits", ("linear", "mlp")), ("diabetes", ("mlp",))),
    horizons=(2, 4),
    examples=(192, 384),
    train_rows=(64, 128),
)
VARIATION = Variation(
    mask_probability=0.4,
    start_probability=0.5,
    blind_probability=0.5,
    untold_probability=0.5,
    unmeasured_probability=0.5,
)
GENTLE = BaseSchedule(lr=1e-3, batch_size=32, weight_decay=1e-3, dropout=0.1)  # loses no run, whatever the actions
STAY = np.zeros(len(CONTROLS), np.float32)

INDEX = {feature.name: index for index, feature in enumerate(FEATURES)}


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tests' own, in which every control depends on the run's length."""
    for module in ("env", "vector_env"):
        monkeypatch.setattr(f"hpo_env.{module}.calibrated_rule", RULES.__getitem__)


def make_task(name: str = "digits/mlp", **overrides: Any) -> Task:
    return Task.named(name, **{"horizon": 3, "interval_examples": 64, "eval_rows": 64, **overrides})


def rollout(env: HPOEnv, seed: int | None, episodes: int = 1, action_seed: int = 0) -> list[Any]:
    """Everything that an environment returns over whole episodes of random actions."""
    rng = np.random.default_rng(action_seed)
    returned: list[Any] = []
    for episode in range(episodes):
        returned.append(env.reset(seed=seed if episode == 0 else None))
        over = False
        while not over:
            step = env.step(rng.uniform(-1, 1, len(CONTROLS)).astype(np.float32))
            returned.append(step)
            over = step[2] or step[3]
    return returned


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checker", [check_env, sb3_check_env])
@pytest.mark.parametrize("name", NAMES)
def test_checkers_find_nothing(name: str, checker: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("hyperpilot/HPO-v0", task=make_task(name))
        checker(env.unwrapped)


def test_registration() -> None:
    env = gymnasium.make("hyperpilot/HPO-v0", task="digits/linear").unwrapped
    vector = gymnasium.make_vec("hyperpilot/HPO-v0", num_envs=2, task="digits/linear")
    assert isinstance(env, HPOEnv)
    assert isinstance(vector, HPOVectorEnv)
    assert vector.single_observation_space == env.observation_space
    assert vector.single_action_space == env.action_space
    assert vector.num_envs == 2
    assert set(hpo_env.__all__) == {"HPOEnv", "HPOVectorEnv", "Variation"}


@pytest.mark.parametrize("arguments", [{"task": make_task()}, {"tasks": DISTRIBUTION, "variation": VARIATION}])
def test_equal_seeds_give_equal_episodes(arguments: dict[str, Any]) -> None:
    first, second = (rollout(HPOEnv(**arguments), seed=5, episodes=3) for _ in range(2))
    np.testing.assert_equal(first, second)  # nested, exact, and NaN equals NaN
    # The environment may be in the middle of something else.
    used = HPOEnv(**arguments)
    rollout(used, seed=1)
    used.reset(seed=3)
    used.step(STAY)
    np.testing.assert_equal(first, rollout(used, seed=5, episodes=3))
    other = rollout(HPOEnv(**arguments), seed=7, episodes=3)
    assert other[0][1]["val_loss"] != first[0][1]["val_loss"]


def test_episodes_without_a_seed_differ() -> None:
    env = HPOEnv(make_task())
    env.reset(seed=0)
    losses = {env.reset()[1]["val_loss"] for _ in range(3)}
    assert len(losses) == 3


def test_round_trip_by_spec() -> None:
    env = gymnasium.make("hyperpilot/HPO-v0", task=make_task("digits/linear"), variation=VARIATION)
    assert env.spec is not None
    again = gymnasium.make(pickle.loads(pickle.dumps(env.spec)))
    assert isinstance(env.unwrapped, HPOEnv)
    assert isinstance(again.unwrapped, HPOEnv)
    np.testing.assert_equal(rollout(env.unwrapped, seed=2), rollout(again.unwrapped, seed=2))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_made_before_reset(duplicate: Any) -> None:
    env = HPOEnv(tasks=DISTRIBUTION, variation=VARIATION)
    np.testing.assert_equal(rollout(duplicate(env), seed=2), rollout(env, seed=2))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_made_in_mid_episode(duplicate: Any) -> None:
    """They go on as the original does, gradient statistics included."""
    env = HPOEnv(make_task(horizon=4), base=GENTLE)
    env.reset(seed=3)
    env.step(STAY)
    twin = duplicate(env)
    for _ in range(2):
        np.testing.assert_equal(twin.step(STAY + 0.3), env.step(STAY + 0.3))
    assert observed(env.step(STAY)[0])["gradients_missing"] == 0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_running_engines_are_not_copied(duplicate: Any) -> None:
    envs = HPOVectorEnv(2, task=make_task())
    envs.reset(seed=0)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict"):
        duplicate(envs._cohorts[0].training)
    if duplicate is not copy.copy:
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(envs)


def surroundings() -> list[Any]:
    return [
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        float64_by_default(),
    ]


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("number", range(4), ids=["no_grad", "inference_mode", "autocast", "float64"])
@pytest.mark.parametrize("kind", [HPOEnv, HPOVectorEnv])
def test_the_callers_torch_state_does_not_matter(kind: Any, number: int) -> None:
    """Not even where an episode begins within it and goes on outside."""

    def episode(surrounding: Any) -> list[Any]:
        env = kind(task=make_task())
        stay = np.zeros(env.action_space.shape, np.float32)
        with surrounding:
            return [env.reset(seed=5), env.step(stay), env.step(stay)]

    expected = episode(nullcontext())
    np.testing.assert_equal(episode(surroundings()[number]), expected)

    env = kind(task=make_task())
    with surroundings()[number]:
        env.reset(seed=5)
    np.testing.assert_equal(env.step(np.zeros(env.action_space.shape, np.float32)), expected[1])
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("kind", [HPOEnv, HPOVectorEnv])
def test_after_a_reset_that_failed_or_close_no_episode_is_under_way(kind: Any) -> None:
    env = kind(task=make_task())
    stay = np.zeros(env.action_space.shape, np.float32)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="cnn"):
        env.reset(options={"task": "iris/cnn"})
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(stay)
    env.reset()
    env.step(stay)
    env.close()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(stay)


@pytest.mark.parametrize("kind", [HPOEnv, HPOVectorEnv])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": 5}, "a task must be a Task or the name of one, such as 'digits/mlp', not 5"),
        ({"task": ""}, "task '' is not of the form"),
        ({"tasks": (make_task(),)}, r"tasks must be a TaskDistribution, .* not \(Task"),
        ({"variation": {}}, "variation must be a Variation, not {}"),
        ({"base": {}}, "base must be a BaseSchedule, not {}"),
        ({"base": replace(GENTLE, batch_size=20)}, "the base's batch_size must be a multiple of 16, not 20"),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64, not torch.bfloat16"),
    ],
)
def test_bad_arguments_of_environments(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**arguments)


@pytest.mark.parametrize("kind", [HPOEnv, HPOVectorEnv])
def test_bad_options(kind: Any) -> None:
    env = kind(task=make_task())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="the only option of reset is 'task', not 'reset_mask', 'tsak'"):
        env.reset(options={"tsak": 1, "reset_mask": [True]})
    with pytest.raises(TypeError, match=r"a task must be a Task or the name of one, .* not 7"):
        env.reset(options={"task": 7})
    env.step(np.zeros(env.action_space.shape, np.float32))  # the episode is still under way
    env.reset(options={"task": "iris/mlp"})


@pytest.mark.parametrize("kind", [HPOEnv, HPOVectorEnv])
def test_a_loss_that_is_not_a_number_shows(kind: Any) -> None:
    env = kind(task=make_task(), base=EXPLOSIVE)
    env.reset(seed=0)
    stay = np.zeros(env.action_space.shape, np.float32)
    observation, _, terminated, _, info = env.step(stay)
    assert np.all(terminated)
    final, losses = (observation, info) if kind is HPOEnv else (info["final_obs"][0], info["final_info"])
    assert np.isnan(losses["val_loss"]).all()
    assert observed(final)["non_finite"] == 1
    assert observed(final)["val_missing"] == 0


def test_step_needs_an_episode() -> None:
    env = HPOEnv(make_task())
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"call reset\(\) before step\(\)"):
        env.step(STAY)
    rollout(env, seed=0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(STAY)
    env.reset()
    env.step(STAY)


def test_episode() -> None:
    """Length, information and rewards of an episode, and that rewards are the fall of the log loss."""
    env = HPOEnv(make_task(horizon=5), base=GENTLE)
    (_, info), *steps = rollout(env, seed=0)
    assert len(steps) == 5
    assert [step[2] for step in steps] == [False] * 4 + [True]
    assert not any(step[3] for step in steps)
    assert np.isnan(info["train_loss"])
    losses = [info["val_loss"], *(step[4]["val_loss"] for step in steps)]
    floor = 1e-3 * losses[0]
    for step, before, after in zip(steps, losses[:-1], losses[1:], strict=True):
        assert step[1] == pytest.approx(np.log((before + floor) / (after + floor)))
        assert not step[4]["diverged"]
        assert set(step[4]) == {"train_loss", "val_loss", "diverged", *CONTROLS}


def test_hyperparameters_reach_the_training() -> None:
    """The values in the information are the ones that the optimizer, the batches and the dropout layers have."""
    env = HPOEnv(make_task(), base=GENTLE)
    env.reset(seed=0)
    assert env._training is not None
    for action in (-1.0, 1.0, 0.3):
        info = env.step(np.full(len(CONTROLS), action, np.float32))[4]
        decayed, others = env._training.optimizer.param_groups
        assert decayed["lr"] == others["lr"] == info["lr"]
        assert (decayed["weight_decay"], others["weight_decay"]) == (info["weight_decay"], 0)
        assert env._training.batch_sampler.batch_size == info["batch_size"]
        rates = {m.p for m in env._training.model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == {info["dropout"]}


def test_task_of_one_episode() -> None:
    env = HPOEnv(make_task())
    other = make_task("diabetes/mlp", horizon=2)
    env.reset(seed=0, options={"task": other})
    assert env.task == other
    assert [env.step(STAY)[2] for _ in range(2)] == [False, True]
    env.reset()
    assert env.task == make_task()


def test_distribution_gives_several_tasks() -> None:
    env = HPOEnv(tasks=DISTRIBUTION)
    env.reset(seed=0)
    seen = {env.task}
    for _ in range(5):
        env.reset()
        seen.add(env.task)
    assert len(seen) == 6


# -- divergence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits/mlp", "diabetes/mlp", "digits/autoencoder", "waveforms/gru"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_divergence_ends_the_episode(name: str, optimizer: str) -> None:
    env = HPOEnv(make_task(name, optimizer=optimizer, horizon=10), base=EXPLOSIVE)
    env.reset(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observation, reward, terminated, truncated, info = env.step(STAY)
    assert info["lr"] > 1e8
    assert (terminated, truncated, info["diverged"]) == (True, False, True)
    assert env.observation_space.contains(observation)
    assert np.isfinite(reward)
    assert reward == pytest.approx(np.log(1.001 / 10.001))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(STAY)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_tasks_are_given_once() -> None:
    assert resolve_tasks(None, None) == Task.named("digits/mlp")
    assert resolve_tasks("digits/cnn", None) == Task.named("digits/cnn")
    assert resolve_tasks(None, DISTRIBUTION) is DISTRIBUTION
    with pytest.raises(ValueError, match="give either task or tasks, not both"):
        HPOEnv("digits/mlp", DISTRIBUTION)


PROBABILITIES = tuple(f"{name}_probability" for name in ("mask", "start", "blind", "untold", "unmeasured"))


@pytest.mark.parametrize(
    ("field", "value"),
    [*((name, value) for name in PROBABILITIES for value in (1.5, -0.1, np.nan)), ("start_factor", 0.5)],
)
def test_variation_names_the_bad_value(field: str, value: float) -> None:
    arguments: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Variation(**arguments)


def draws(variation: Variation, count: int = 200) -> list[Episode]:
    return [draw_episode(np.random.default_rng(seed), variation) for seed in range(count)]


def test_draws_of_an_episode() -> None:
    plain = draw_episode(np.random.default_rng(0), Variation())
    assert plain == Episode(plain.seed, {}, (0.0,) * len(CONTROLS), blind=False, untold=False, unmeasured=False)
    episodes = draws(Variation(*[0.5, 0.5, 10.0, 0.5, 0.5, 0.5]))
    assert len({episode.seed for episode in episodes}) == 200
    for name, control in CONTROLS.items():
        fixed = [episode.fixed[name] for episode in episodes if name in episode.fixed]
        assert len(fixed) == 0 if name == "lr" else 60 < len(fixed) < 140
        assert all(control.low <= value <= control.high for value in fixed)
    hidden = np.array([[episode.blind, episode.untold, episode.unmeasured] for episode in episodes])
    assert (np.abs(hidden.mean(axis=0) - 0.5) < 0.2).all()
    for first, second in ((0, 1), (0, 2), (1, 2)):  # each by itself
        assert 0.3 < (hidden[:, first] == hidden[:, second]).mean() < 0.7


def test_draws_of_a_base_that_is_off() -> None:
    """The learning rate always, by up to `start_factor`; each other control in half of the episodes."""
    shifts = np.array([episode.shifts for episode in draws(Variation(start_probability=0.5, start_factor=10.0), 400)])
    off = shifts[:, 0] != 0
    assert 140 < off.sum() < 260
    assert (shifts[~off] == 0).all()
    for column, name in enumerate(CONTROLS):
        reach = np.log(10) if name == "lr" else RANGES[name].first
        drawn = shifts[off, column][shifts[off, column] != 0]
        share = len(drawn) / off.sum()
        assert share == 1 if name == "lr" else 0.35 < share < 0.65
        assert -reach <= drawn.min() < -0.8 * reach
        assert 0.8 * reach < drawn.max() <= reach
        assert abs(drawn.mean()) < 0.2 * reach
    assert all(np.unique(shifts[off, 1:] != 0, axis=0).sum(axis=0) == 2 ** (len(CONTROLS) - 2))  # in every combination


def test_equal_generators_give_equal_episodes_whatever_the_probabilities() -> None:
    """Every draw is made, used or not, so that what one thing's probability is does not move another."""
    everything, nothing = draws(Variation(1, 1, 100, 1, 1, 1)), draws(Variation())
    assert [episode.seed for episode in everything] == [episode.seed for episode in nothing]
    blind = draws(Variation(blind_probability=0.3))
    assert [episode.blind for episode in blind] == [
        episode.blind for episode in draws(Variation(0.5, 0.5, 10, 0.3, 1, 0.5))
    ]


def observed(observation: NDArray[np.float32]) -> dict[str, float]:
    return {name: float(observation[index]) for name, index in INDEX.items()}


def test_variation_shows_in_an_episode() -> None:
    variation = Variation(mask_probability=1, start_probability=1, blind_probability=1)
    env = HPOEnv(make_task(), variation=variation, base=BaseSchedule(0.01, 32, 0.1, 0.1))
    _, info = env.reset(seed=0)
    features = observed(env.reset(seed=0)[0])
    assert [features[f"{name}_available"] for name in CONTROLS] == [1, 0, 0, 0, 0, 0]
    assert features["val_missing"] == 1
    after = env.step(-np.ones(len(CONTROLS), np.float32))[4]
    assert after["lr"] == pytest.approx(info["lr"] / 30)
    assert {name: after[name] for name in ("batch_size", "weight_decay", "dropout")} == {
        name: info[name] for name in ("batch_size", "weight_decay", "dropout")
    }


def parameters_of(env: HPOEnv) -> int:
    assert env._training is not None
    return parameter_count(env._training.model)


def base_of(env: HPOEnv, examples: float, interval: int = 0) -> dict[str, float]:
    """The values that the rule has for a run of that length."""
    schedule = RULES[env.task.optimizer].schedule(examples, parameters_of(env))
    values = schedule.values(np.array([(interval + 0.5) / env.task.horizon]))
    return {name: 0.0 if name in REGULARIZERS else value.item() for name, value in values.items()}


def values_in(info: dict[str, Any]) -> dict[str, float]:
    return {name: info[name] for name in CONTROLS}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_that_is_left_alone_follows_the_rule(optimizer: str) -> None:
    """That of its optimizer, for its length and size."""
    env = HPOEnv(make_task(optimizer=optimizer))
    observation, info = env.reset(seed=0)
    assert observed(observation)["examples"] == pytest.approx(np.log10(3 * 64) / 8)
    assert values_in(info) == pytest.approx(base_of(env, 3 * 64))
    for interval in range(3):
        observation, _, _, _, info = env.step(STAY)
        assert values_in(info) == pytest.approx(base_of(env, 3 * 64, interval))
        assert [observed(observation)[f"{name}_offset"] for name in CONTROLS] == [0] * len(CONTROLS)


def test_the_length_is_told_after_the_first_interval() -> None:
    """What it begins with is for a typical run; what the information says is what the interval was trained with."""
    env = HPOEnv(make_task(), variation=Variation(untold_probability=1))
    observation, info = env.reset(seed=0)
    features = observed(observation)
    assert (features["examples"], features["examples_known"]) == (0, 0)
    assert values_in(info) == pytest.approx(base_of(env, np.nan))
    assert env._training is not None
    for interval in range(3):
        observation, _, _, _, info = env.step(STAY)
        expected = base_of(env, 3 * 64 if interval else np.nan, interval)
        assert values_in(info) == pytest.approx(expected), interval
        assert env._training.optimizer.param_groups[0]["lr"] == pytest.approx(expected["lr"])
        features = observed(observation)
        assert features["examples_known"] == 1
        assert features["examples"] == pytest.approx(np.log10(3 * 64) / 8)


def test_gradients_are_never_measured() -> None:
    env, measured = (HPOEnv(make_task(), variation=Variation(unmeasured_probability=share)) for share in (1, 0))
    of_gradients = [name for name in INDEX if name.startswith(("grad", "update_ratio"))]
    for each in (env, measured):
        each.reset(seed=0)
    for _ in range(3):
        (hidden, *rest), (shown, *others) = env.step(STAY), measured.step(STAY)
        assert rest == others  # the run is the same
        features, full = observed(hidden), observed(shown)
        assert {name: value for name, value in features.items() if name not in of_gradients} == {
            name: value for name, value in full.items() if name not in of_gradients
        }
        assert {name: features[name] for name in of_gradients} == {
            name: float(name == "gradients_missing") for name in of_gradients
        }
        assert full["gradients_missing"] == 0
    assert full["update_ratio"] != 0


def test_a_base_that_is_off_shows_in_an_episode() -> None:
    env = HPOEnv(make_task(regularizers=tuple(REGULARIZERS)), variation=Variation(start_probability=1))
    moved = set()
    for seed in range(6):
        observation, info = env.reset(seed=seed)
        shifts = draw_episode(np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))), env._variation).shifts
        features, base = observed(observation), base_of(env, 3 * 64)
        rule = RULES["adamw"].schedule(3 * 64, parameters_of(env)).to_dict()
        ways = zip(*SCALES.room(np.array([rule[name] for name in CONTROLS])), strict=True)
        for name, shift, (down, up) in zip(CONTROLS, shifts, ways, strict=True):
            if name != "batch_size":  # that one is rounded
                expected = np.clip(shift, down, up) / RANGES[name].limit
                assert features[f"{name}_offset"] == pytest.approx(expected, abs=1e-6)
            assert name in ("batch_size", *REGULARIZERS) or (info[name] != pytest.approx(base[name])) == (shift != 0)
            moved |= {name} if features[f"{name}_offset"] else set()
    assert moved == set(CONTROLS)


# -- the test split ----------------------------------------------------------------------------------------------------


def reachable(root: object) -> Iterator[object]:
    """All that an object holds, directly or not: attributes, closures, defaults, bound objects, storages' owners.

    Classes, modules and the globals of functions are the program, not the object: through them everything that is in
    memory could be reached.
    """
    seen: set[int] = set()
    pending = [root]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, type | ModuleType):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, FunctionType):
            pending += [item.__closure__, item.__defaults__, item.__kwdefaults__, item.__dict__]
        else:
            pending += gc.get_referents(item)
        if isinstance(item, torch.Tensor):
            pending.append(item._base)
        elif isinstance(item, np.ndarray):
            pending.append(item.base)


def holds(root: object, rows: torch.Tensor) -> bool:
    """Whether any tensor or array within reach shares memory with `rows`, or has one of them among its own."""
    wanted = {row.numpy().tobytes() for row in rows}
    storage = rows.untyped_storage().data_ptr()
    keep = []  # so that no identity is used twice
    for item in reachable(root):
        keep.append(item)
        tensor = torch.from_numpy(item) if isinstance(item, np.ndarray) and item.dtype.kind in "fi" else item
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.untyped_storage().data_ptr() == storage:
            return True
        if tensor.shape[1:] == rows.shape[1:] and tensor.dtype == rows.dtype:
            found = {row.numpy().tobytes() for row in tensor.detach()}
            if found & wanted:
                return True
    return False


@pytest.mark.parametrize("name", ["digits/mlp", "diabetes/mlp", "digits/autoencoder"])
@pytest.mark.parametrize("kind", [HPOEnv, HPOVectorEnv])
def test_the_test_split_is_out_of_reach(name: str, kind: type[HPOEnv] | type[HPOVectorEnv]) -> None:
    task = make_task(name, train_rows=None, eval_rows=None)
    dataset = load_dataset(task.dataset)
    assert dataset.test is not None
    env: Any = kind(task=task)
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(2):
        env.step(env.action_space.sample())
    # The walk does find what is there.
    assert holds(env, dataset.train.inputs)
    assert holds(env, dataset.val.inputs)
    assert not holds(env, dataset.test.inputs)
    training = env._training if kind is HPOEnv else env._cohorts[0].training
    with pytest.raises(LookupError, match="made without the test split"):
        training.evaluate("test")


def test_the_walk_would_find_a_test_split() -> None:
    dataset = load_dataset("digits")
    assert dataset.test is not None
    env = HPOEnv(make_task())
    env.reset(seed=0)
    inputs = dataset.test.inputs
    hidden: list[Any] = [inputs, inputs[3:5].clone(), inputs.numpy()[7:], lambda: inputs, dataset]
    for item in hidden:
        env.hidden = item  # type: ignore[attr-defined]
        assert holds(env, inputs)
    del env.hidden  # type: ignore[attr-defined]
    assert not holds(env, inputs)


def test_every_model_kind_has_an_environment() -> None:
    assert {name.split("/")[1] for name in NAMES} == set(DEFAULT_SPECS)
