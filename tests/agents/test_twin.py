"""The one rule: a run inside the environment and the same run in a user's loop with the tuner are equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from agents import ControlPolicy, Tuner
from hpo_env import HPOEnv
from hpo_env.env import draw_episode
from inner_models.models import Dropout, build_model
from inner_models.tasks import OptimizerName, Task, prepare
from inner_models.training import Streams
from tests.tiny import random_policy


def environment_run(
    task: Task, policy: ControlPolicy, seed: int
) -> tuple[list[np.ndarray], list[dict[str, float]], int]:
    env = HPOEnv(task=task, dtype=torch.float64)
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


def user_run(task: Task, policy: ControlPolicy, seed: int) -> tuple[list[list[float]], list[dict[str, float]]]:
    """What a user would write, with the data, weights and random streams of the environment's run."""
    data = prepare(task)
    train, val = data.dataset.train, data.dataset.val
    streams = Streams(seed, sum(isinstance(m, Dropout) for m in build_model(task.model, data.dataset).modules()))
    model = build_model(task.model, data.dataset, streams.init).double()
    for module, stream in zip((m for m in model.modules() if isinstance(m, Dropout)), streams.masks, strict=True):
        module.stream = stream
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups) if task.optimizer == "adamw" else torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    )

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(inputs.double()), targets)

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            return loss_of(val.inputs, val.targets).item()

    tuner = Tuner(
        policy, optimizer, model=model, total_epochs=task.horizon, batch_size=32, initial_loss=validate(), guard=False
    )
    rows = len(train) // 16 * 16
    sampler = tuner.batch_sampler(len(train), seed=streams.order)
    sampler.examples = rows
    loader = DataLoader(TensorDataset(train.inputs, train.targets), batch_sampler=sampler)
    for _ in range(task.horizon):
        model.train()
        total = 0.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_of(inputs, targets)
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() * len(inputs)
        tuner.step(train_loss=total / rows, val_loss=validate())
    return [entry["observation"] for entry in tuner.history], [entry["hyperparameters"] for entry in tuner.history]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["digits/mlp", "digits/cnn", "waveforms/gru"])
def test_tuner_equals_environment(name: str, optimizer: OptimizerName) -> None:
    task = Task.named(name, horizon=5, train_rows=200, optimizer=optimizer, eval_rows=100)
    policy = random_policy(seed=2)
    observations, infos, inner_seed = environment_run(task, policy, seed=11)
    seen, chosen = user_run(task, policy, inner_seed)
    assert len(seen) == len(observations) - 1 == task.horizon
    for expected, found in zip(observations[:-1], seen, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for info, values in zip(infos, chosen, strict=True):
        for control, value in values.items():
            assert value == pytest.approx(info[control], rel=1e-5)
    # The seed is one whose decisions move every control, or the comparison would say little.
    assert all(len({values[control] for values in chosen}) > 1 for control in chosen[0])
