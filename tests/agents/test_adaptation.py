"""Adaptation: it learns what there is to learn on its task, deterministically, and changes nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.adaptation import Cohort, Settings, adapt, improve, opposites, train_runs
from agents.application import train_cohort
from agents.controllers import WithPolicy
from agents.measures import log_ratio
from agents.policy import ControlPolicy, PolicyHeader
from agents.summary import losses
from agents.tuner import Tuner, pretrained_path
from hpo_env.base_schedules import calibrated_rule
from hpo_env.hyperparameters import CONTROLS
from hpo_env.vector_env import HPOVectorEnv
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from tests.tiny import random_policy

TASK = Task("wine", ModelSpec("mlp", 8, 1), horizon=4, interval_examples=64, train_rows=64)
FEW = Settings(episodes=16)


def calibrated(policy: ControlPolicy) -> ControlPolicy:
    """`policy`, over the base schedules that environments have."""
    rules = {kind: calibrated_rule(kind).to_dict() for kind in ("adamw", "sgd")}
    policy.header = replace(policy.header, base_rules=rules)
    return policy


@pytest.fixture
def policy() -> ControlPolicy:
    return calibrated(random_policy())


def timid() -> ControlPolicy:
    """It lowers the learning rate at every decision, whatever it sees."""
    policy = calibrated(ControlPolicy(PolicyHeader(hidden=(8,), base_rules={})))
    for parameter in policy.parameters():
        parameter.data.zero_()
    list(policy.parameters())[-1].data[0] = -0.7
    return policy.eval()


def tensors(policy: ControlPolicy) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in policy.state_dict().items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_bad_policy_becomes_better(tmp_path: Path, seed: int) -> None:
    settings = Settings(episodes=48, learning_rate=0.03, kl=0.5, noise=0.3)
    adapted = adapt(bad := timid(), TASK, tmp_path, settings, seed=seed)
    fresh = range(100, 108)
    before, after = (losses(train_cohort(TASK, WithPolicy(one), fresh), "val") for one in (bad, adapted))
    assert log_ratio(before, after).mean() > 0.3


def test_equal_seeds_give_equal_policies(policy: ControlPolicy, tmp_path: Path) -> None:
    first, again, other = (adapt(policy, TASK, tmp_path / name, FEW, seed=int(name[0])) for name in ("3", "3b", "4"))
    assert tensors(first) == tensors(again)
    assert first.digest == again.digest != other.digest
    assert tensors(first) != tensors(policy)


def test_without_a_step_it_is_the_same_policy(policy: ControlPolicy, tmp_path: Path) -> None:
    before = tensors(policy)
    adapted = adapt(policy, TASK, tmp_path, replace(FEW, learning_rate=0.0))
    assert tensors(adapted) == tensors(policy) == before
    assert adapted.digest == policy.digest


def test_what_it_leaves(tmp_path: Path) -> None:
    policy = ControlPolicy.load(pretrained_path())
    reports: list[int] = []
    adapted = adapt(
        policy, TASK, tmp_path, replace(FEW, episodes=20), seed=5, provenance={"command": "this"},
        report=lambda runs, fall: reports.append(runs),
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "policy.safetensors", "config.json", "tensorboard", "writer.lock"
    }  # fmt: skip
    assert reports == [8, 16, 24]  # whole cohorts
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["seed"], config["task"]["dataset"], config["policy"]) == (5, "wine", policy.digest)
    loaded = ControlPolicy.load(tmp_path / "policy.safetensors")
    assert tensors(loaded) == tensors(adapted)
    assert loaded.header == adapted.header
    record = loaded.header.training["adaptations"][0]
    expected = {"from": policy.digest, "task": "wine/mlp", "episodes": 24, "seed": 5, "command": "this"}
    assert expected.items() <= record.items()
    assert loaded.header.training["timesteps"] == policy.header.training["timesteps"]
    assert loaded.header.scores == {}

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag in ("rollout/ep_rew_mean", "inner/final_val_loss", "control/lr_mean", "train/approx_kl"):
        assert [event.step for event in events.Scalars(tag)] == [32, 64, 96], tag

    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == pytest.approx([FEW.learning_rate * share for share in (1, 2 / 3, 1 / 3)])

    model = torch.nn.Linear(4, 2)
    path = tmp_path / "policy.safetensors"
    assert (
        Tuner.load(path, torch.optim.AdamW(model.parameters()), model=model, total_epochs=4).hyperparameters["lr"] > 0
    )


def test_adapted_again_it_knows_both(policy: ControlPolicy, tmp_path: Path) -> None:
    once = adapt(policy, TASK, tmp_path / "a", FEW)
    twice = adapt(once, replace(TASK, dataset="digits"), tmp_path / "b", FEW)
    assert [record["task"] for record in twice.header.training["adaptations"]] == ["wine/mlp", "digits/mlp"]
    assert twice.header.training["adaptations"][1]["from"] == once.digest
    assert twice.header.training["datasets"] == ["digits", "wine"]


def test_ranges_grow_but_what_it_is_blind_to_stays(policy: ControlPolicy, tmp_path: Path) -> None:
    features = policy.header.features
    ranges = dict.fromkeys(features, (-0.01, 0.01)) | {"progress": (0.5, 0.5), "horizons": (8.0, 64.0)}
    policy.header = replace(policy.header, trained_ranges=ranges)
    adapted = adapt(policy, TASK, tmp_path, FEW)
    grown = adapted.header.trained_ranges
    assert grown["horizons"] == (4, 64)
    assert grown["val_missing"] == (-0.01, 1.0)  # no loss before training is told, as by the tuner
    assert grown["progress"] == (0.5, 0.5)
    assert any(grown[name] != ranges[name] for name in features)
    assert all(grown[name][0] <= ranges[name][0] and grown[name][1] >= ranges[name][1] for name in grown)
    column, other = features.index("progress"), features.index("first_decision")
    before, after = (one.state_dict()["network.0.weight"] for one in (policy, adapted))
    assert torch.equal(after[:, column], before[:, column])
    assert not torch.equal(after[:, other], before[:, other])
    assert torch.equal(adapted.mean, policy.mean)
    assert torch.equal(adapted.std, policy.std)


def test_runs_of_a_cohort_differ_in_nothing_but_the_exploration(policy: ControlPolicy) -> None:
    env = HPOVectorEnv(6, task=TASK)
    seed = int(np.random.default_rng(0).integers(2**31))
    start = env.reset(seed=[seed] * 6)[1]["val_loss"]
    silent = train_runs(policy, env, 0.0, np.random.default_rng(0))
    end = silent.scalars["inner/final_val_loss"]
    np.testing.assert_allclose(silent.falls, np.log(start / end), rtol=0.02)
    np.testing.assert_allclose(silent.falls, silent.falls[0], rtol=1e-5)
    loud = train_runs(policy, env, 0.3, np.random.default_rng(0))
    assert len(set(loud.falls)) == 6
    assert loud.noise.shape == (4, 6, len(CONTROLS))
    assert (loud.noise[1:] == loud.noise[1]).all()
    assert not np.isclose(loud.noise[0], loud.noise[1]).any()
    assert loud.under_way.all()


def test_runs_that_diverge_end_there() -> None:
    """A policy that raises the learning rate of plain SGD as far as it goes."""
    wild = timid()
    list(wild.parameters())[-1].data[0] = 1.0
    task = replace(TASK, dataset="diabetes", optimizer="sgd", horizon=12)
    found = train_runs(wild, HPOVectorEnv(4, task=task), 0.3, np.random.default_rng(0))
    ended = found.under_way.sum(axis=0)
    assert 1 <= ended.min() < 12
    assert found.scalars["inner/diverged_share"] == (ended < 12).mean()
    assert found.scalars["rollout/ep_len_mean"] == ended.mean()
    assert (np.diff(found.under_way.astype(int), axis=0) <= 0).all()
    assert found.falls[ended < 12] == pytest.approx(np.log(1.001 / 10.001))  # the capped loss, and nothing after it


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_runs_are_trained_at_the_policys_strength(strength: float) -> None:
    policy = calibrated(random_policy())
    policy.header = replace(policy.header, strength=strength)
    found = train_runs(policy, HPOVectorEnv(4, task=TASK), 0.3, np.random.default_rng(0))
    offsets = found.observations[:, :, policy.header.features.index("lr_offset")]
    assert not offsets[0].any()
    assert offsets[1].any()  # the first decision is taken whole
    assert (offsets[2:] == offsets[1]).all() == (strength == 0)


def test_opposites() -> None:
    size = len(CONTROLS)
    drawn = opposites(2 * size, size, np.random.default_rng(0)).astype(float)
    np.testing.assert_allclose(drawn[:size] @ drawn[:size].T, size * np.eye(size), atol=1e-5)
    np.testing.assert_array_equal(drawn[:size], -drawn[size:])
    assert opposites(3, size, np.random.default_rng(0)).shape == (3, size)
    assert opposites(21, size, np.random.default_rng(0)).shape == (21, size)


def cohort(policy: ControlPolicy, falls: list[float], under_way: list[bool]) -> Cohort:
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((1, len(falls), len(policy.header.features))).astype(np.float32)
    noise = np.eye(len(falls), len(CONTROLS), dtype=np.float32)[None]
    return Cohort(observations, noise, np.array([under_way]), np.array(falls), {})


def test_improve_moves_towards_what_was_better(policy: ControlPolicy) -> None:
    settings = Settings(learning_rate=1e-3)
    runs = cohort(policy, [2.0, 1.0, 1.0], [True, True, True])
    seen = torch.from_numpy(runs.observations[0])
    before = policy.means(seen).detach()
    found = improve(policy, torch.optim.Adam(policy.parameters(), 1e-3), runs, settings)
    moved = (policy.means(seen) - before).detach()
    assert moved[0, 0] > 0  # it explored this control, and fell further than the others
    assert moved[1, 1] < 0
    assert moved[2, 2] < 0
    assert found["train/approx_kl"] > 0


def test_an_update_stays_near() -> None:
    def divergence(limit: float) -> float:
        own = calibrated(random_policy())
        settings = Settings(kl=limit, clip=10.0, steps=50)
        runs = cohort(own, [2.0, 1.0, 1.0], [True, True, True])
        return improve(own, torch.optim.Adam(own.parameters(), 5e-4), runs, settings)["train/approx_kl"]

    assert 0.02 < divergence(0.02) < 0.1 < 1.0 < divergence(50.0)


def test_what_came_after_a_divergence_does_not_count(policy: ControlPolicy) -> None:
    def learned(last: float) -> dict[str, list[Any]]:
        own = calibrated(random_policy())
        runs = cohort(own, [2.0, 1.0, 1.5], [True, True, False])
        runs.observations[0, 2] = last
        improve(own, torch.optim.Adam(own.parameters(), 1e-3), runs, Settings())
        return tensors(own)

    assert learned(0.0) == learned(5.0)


def test_runs_that_are_alike_teach_nothing(policy: ControlPolicy) -> None:
    before = tensors(policy)
    assert not improve(policy, torch.optim.Adam(policy.parameters()), cohort(policy, [1.0, 1.0], [True] * 2), FEW)
    assert tensors(policy) == before


@pytest.mark.parametrize("name", ["episodes", "replicas"])
@pytest.mark.parametrize("value", [1, 0, -3])
def test_one_run_has_nothing_to_be_compared_with(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 2, not {value}"):
        Settings(**{name: value})


def test_what_cannot_be_adapted(policy: ControlPolicy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 64 epochs, not 65"):
        adapt(policy, replace(TASK, horizon=65), tmp_path / "a")
    with pytest.raises(ValueError, match="another base schedule"):
        adapt(random_policy(), TASK, tmp_path / "a")
    with pytest.raises(ValueError, match="cnn"):
        adapt(policy, Task.named("wine/cnn"), tmp_path / "b")
    assert not (tmp_path / "b" / "config.json").exists()
    adapt(policy, TASK, tmp_path / "c", FEW)
    with pytest.raises(FileExistsError, match="already holds"):
        adapt(policy, TASK, tmp_path / "c", FEW)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("learning_rate", -1.0), ("clip", 0.0), ("kl", 0.0), ("noise", 0.0)]
)
def test_settings_of_no_use(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        Settings(**{name: value})  # type: ignore[arg-type]
