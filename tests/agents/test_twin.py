"""The one rule: a run inside the environment and the same run in a user's loop with the tuner are equal."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from agents import ControlPolicy, Tuner
from hpo_env import HPOEnv, Variation
from hpo_env.base_schedules import BaseRule
from hpo_env.env import draw_episode
from hpo_env.hyperparameters import CONTROLS
from inner_models.models import build_model, random_layers
from inner_models.sampling import BatchSampler
from inner_models.tasks import OptimizerName, Regularizer, Task, prepare
from inner_models.training import Streams
from tests.rules import RULES
from tests.tiny import random_policy
from tests.user_runs import Unsized


def environment_run(
    task: Task, policy: ControlPolicy, seed: int, variation: Variation | None = None
) -> tuple[list[np.ndarray], list[dict[str, float]], int]:
    env = HPOEnv(task=task, dtype=torch.float64, variation=variation)
    observation, info = env.reset(seed=seed)
    inner_seed = draw_episode(np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))), env._variation).seed
    observations, infos = [observation], []
    terminated = False
    while not terminated:
        action = policy.act(observation[None])[0][0]
        observation, _, terminated, _, info = env.step(action.astype(np.float32))
        observations.append(observation)
        infos.append(info)
    return observations, infos, inner_seed


def user_run(
    task: Task, policy: ControlPolicy, seed: int, told: bool = True
) -> tuple[list[list[float]], list[dict[str, float]]]:
    """What a user would write, with the data, weights and random streams of the environment's run."""
    data = prepare(task)
    train, val = data.dataset.train, data.dataset.val
    build = partial(build_model, task.model, data.dataset, augmented="augmentation" in data.regularizers)
    streams = Streams(seed, len(random_layers(build())))
    model = build(streams.init).double()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.3 if "label_smoothing" in data.regularizers else 0.0)
    for layer, stream in zip(random_layers(model), streams.layers, strict=True):
        layer.stream = stream
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups) if task.optimizer == "adamw" else torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    )

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            return functional.cross_entropy(model(val.inputs.double()), val.targets).item()

    rows = len(train) // 16 * 16
    tuner = Tuner(
        policy,
        optimizer,
        model=model,
        criterion=criterion,
        total_epochs=task.horizon,
        examples_per_epoch=rows if told else None,
        batch_size=32,
        initial_loss=validate(),
        guard=False,
    )
    sampler = BatchSampler(len(train), 1, streams.order)
    tuner.follow(Unsized(sampler))
    sampler.examples = rows
    loader = DataLoader(TensorDataset(train.inputs, train.targets), batch_sampler=sampler)
    for _ in range(task.horizon):
        model.train()
        total = 0.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs.double()), targets)
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() * len(inputs)
        tuner.step(train_loss=total / rows, val_loss=validate())
    return [entry["observation"] for entry in tuner.history], [entry["hyperparameters"] for entry in tuner.history]


def assert_equal_runs(
    environment: tuple[list[np.ndarray], list[dict[str, float]]],
    user: tuple[list[list[float]], list[dict[str, float]]],
    moved: tuple[str, ...],
) -> None:
    (observations, infos), (seen, chosen) = environment, user
    for expected, found in zip(observations[:-1], seen, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for info, values in zip(infos, chosen, strict=True):
        for control, value in values.items():
            assert value == pytest.approx(info[control], rel=1e-5)
    # The seed is one whose decisions move every control, or the comparison would say little.
    assert {name for name in chosen[0] if len({values[name] for values in chosen}) > 1} == set(moved)


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseRule]:
    """The environment's, as the policies here have them."""
    found = dict(RULES)
    monkeypatch.setattr("hpo_env.env.calibrated_rule", found.__getitem__)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["digits/mlp", "digits/cnn", "waveforms/gru"])
def test_tuner_equals_environment(name: str, optimizer: OptimizerName) -> None:
    task = Task.named(name, horizon=5, train_rows=200, optimizer=optimizer, eval_rows=100)
    policy = random_policy(seed=3, scale=0.4)
    observations, infos, inner_seed = environment_run(task, policy, seed=11)
    assert len(infos) == task.horizon
    assert_equal_runs((observations, infos), user_run(task, policy, inner_seed), tuple(CONTROLS)[:4])


@pytest.mark.parametrize("name", ["digits/mlp", "digits/cnn", "waveforms/gru"])
def test_tuner_equals_environment_with_all_controls(name: str) -> None:
    both: tuple[Regularizer, ...] = ("augmentation", "label_smoothing")
    task = Task.named(name, horizon=5, train_rows=200, eval_rows=100, regularizers=both)
    policy = random_policy(seed=3, scale=0.4)
    observations, infos, inner_seed = environment_run(task, policy, seed=11)
    assert_equal_runs((observations, infos), user_run(task, policy, inner_seed), tuple(CONTROLS))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_tuner_equals_environment_where_the_length_is_learnt(
    optimizer: OptimizerName, rules: dict[str, BaseRule]
) -> None:
    """In batches that divide the epoch: from those in which it is learnt, it is known exactly."""
    policy = random_policy(seed=3, scale=0.4)
    for kind, rule in RULES.items():
        rules[kind] = replace(rule, coefficients={**rule.coefficients, "batch_size": (math.log(32), 0.0, 0.0)})
    policy.header = replace(policy.header, base_rules={kind: rule.to_dict() for kind, rule in rules.items()})
    last = policy.network[-1]
    assert isinstance(last, nn.Linear)
    for tensor in (last.weight.data, last.bias.data):
        tensor[list(CONTROLS).index("batch_size")] = 0
    task = Task.named("digits/mlp", horizon=5, train_rows=200, optimizer=optimizer, eval_rows=100)
    observations, infos, inner_seed = environment_run(task, policy, 11, Variation(untold_probability=1.0))
    known = policy.header.features.index("examples_known")
    assert [observation[known] for observation in observations] == [0, *[1] * task.horizon]
    user = user_run(task, policy, inner_seed, told=False)
    assert_equal_runs((observations, infos), user, ("lr", "weight_decay", "dropout"))
