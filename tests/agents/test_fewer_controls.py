"""A policy that was made when there were four controls decides as it did then, to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from agents import Augment, ControlPolicy, PolicyError, Tuner
from agents.application import train, train_cohort
from agents.controllers import WithPolicy, with_policy
from agents.inspection import blind
from agents.policy import OBSERVATION_CLIP, PolicyHeader
from agents.tuner import pretrained_path
from hpo_env.actions import RANGES
from hpo_env.base_schedules import REGULARIZERS
from hpo_env.control import ControlLoop
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES, features_of
from inner_models.tasks import Task
from tests.tiny import random_policy
from tests.user_runs import Loop

FOUR = ("lr", "batch_size", "weight_decay", "dropout")
RECORD: dict[str, Any] = json.loads(Path(__file__).with_name("decisions_of_four_controls.json").read_text())
"""Two runs of six decisions, recorded with the last version that had four controls."""


def old_policy() -> tuple[ControlPolicy, np.random.Generator]:
    """The policy of the record, and the generator that drew its weights and draws its signals."""
    header = PolicyHeader(
        hidden=(8,),
        base_rules=dict.fromkeys(("adamw", "sgd"), RECORD["rule"]),
        features=features_of(FOUR),
        controls=FOUR,
        ranges={name: vars(RANGES[name]) for name in FOUR},
    )
    policy, rng = ControlPolicy(header).eval(), np.random.default_rng(0)
    for parameter in policy.parameters():
        parameter.data = torch.from_numpy(rng.normal(0, 0.4, tuple(parameter.shape)).astype(np.float32))
    return policy, rng


def test_the_recorded_decisions(tmp_path: Path) -> None:
    made, rng = old_policy()
    made.save(tmp_path / "old.safetensors")
    policy = ControlPolicy.load(tmp_path / "old.safetensors")
    loop = ControlLoop(2, horizon=6, rule=policy.header.base_rule("adamw"), parameters=5000, momentum_sgd=False)
    lacking = dict.fromkeys(REGULARIZERS, 0.0)
    fixed = [lacking, {"dropout": 0.0, **lacking}]
    loop.restart([0, 1], {"val_loss": np.array([2.3, 1.1])}, examples=np.array([20_000.0, 3e5]), fixed=fixed)
    losses = np.array([2.3, 1.1])
    for told in RECORD["decisions"]:
        observation = loop.observe()
        action = policy.act(observation)[0]
        values = loop.decide(action)
        # Exact but for the roundings of logarithms and products, which differ by processor.
        np.testing.assert_allclose(observation[:, : len(told["observation"][0])], told["observation"], atol=2e-6)
        np.testing.assert_allclose(action[:, :4], told["action"], atol=2e-6)
        for name, value in told["values"].items():
            np.testing.assert_allclose(values[name], value, rtol=1e-5)
        assert not observation[:, len(told["observation"][0]) :].any()
        assert not action[:, 4:].any()
        assert [values[name].tolist() for name in REGULARIZERS] == [[0.0, 0.0]] * 2
        losses = losses * rng.uniform(0.6, 1.1, 2)
        norm = rng.uniform(0.1, 2, 2)
        signals = {"train_loss": losses * 0.9, "val_loss": losses, "grad_norm": norm, "grad_norm_std": norm * 0.3}
        signals["grad_cosine"], signals["update_ratio"] = rng.uniform(-0.2, 0.9, 2), rng.uniform(0.01, 0.5, 2)
        loop.record(signals)
    moved = [tuple(np.ravel(list(told["values"].values())).tolist()) for told in RECORD["decisions"]]
    assert len(set(moved)) == len(moved)  # the record is of decisions that do something


def test_the_shipped_policy_is_its_network_and_nothing_else() -> None:
    """Bit for bit what its tensors give on the features that it knows, whatever stands in the others; of later
    decisions, the share that its header says."""
    policy, tensors = ControlPolicy.load(pretrained_path()), load_file(pretrained_path())
    known = len(policy.header.features)
    assert policy.header.controls == FOUR
    assert policy.header.features == features_of(FOUR) == tuple(feature.name for feature in FEATURES[:known])
    rng = np.random.default_rng(0)
    observations = rng.uniform(-2, 2, (256, len(FEATURES))).astype(np.float32)
    x = ((torch.from_numpy(observations[:, :known].copy()) - tensors["mean"]) / tensors["std"]).clamp(
        -OBSERVATION_CLIP, OBSERVATION_CLIP
    )
    for index in (0, 2):
        x = torch.tanh(nn.functional.linear(x, tensors[f"network.{index}.weight"], tensors[f"network.{index}.bias"]))
    expected = nn.functional.linear(x, tensors["network.4.weight"], tensors["network.4.bias"]).clamp(-1, 1)
    actions = policy.act(observations)[0]
    first = observations[:, policy.header.features.index("first_decision")].clip(0, 1)
    share = policy.header.strength + (1 - policy.header.strength) * first
    np.testing.assert_array_equal(actions[:, :4], expected.numpy() * share[:, None])
    assert (np.abs(actions[:, :4]).max(axis=0) > 0.1).all()
    assert not actions[:, 4:].any()
    others = observations.copy()
    others[:, known:] = rng.uniform(-1, 1, others[:, known:].shape)
    np.testing.assert_array_equal(policy.act(others)[0], actions)
    np.testing.assert_array_equal(policy.out_of_depth(others), policy.out_of_depth(observations))
    assert {feature.name for feature in FEATURES[known:]} <= set(blind(policy))
    np.testing.assert_array_equal(policy.typical[:known], tensors["mean"].numpy())


def test_it_leaves_alone_what_it_does_not_know() -> None:
    """The values stay the user's, and asking for more is an error."""
    run = Loop()
    model = nn.Sequential(Augment("image", 0.07), run.model)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.03)
    policy, _ = old_policy()
    run_of: dict[str, Any] = {"model": model, "criterion": criterion, "total_epochs": 4}
    tuner = Tuner(policy, run.optimizer, **run_of)
    for _ in range(4):
        values = tuner.step(train_loss=1.0, val_loss=1.0)
        assert (values["augmentation"], values["label_smoothing"]) == (0.07, 0.03)
    assert all(entry["hyperparameters"].keys() == {"lr", "weight_decay", "dropout"} for entry in tuner.history)
    with pytest.raises(ValueError, match="unknown control 'augmentation'"):
        Tuner(policy, Loop().optimizer, controls=["augmentation"], **run_of)


def test_on_a_cohort_they_stand_at_the_base() -> None:
    task = Task.named("digits/mlp", horizon=3, interval_examples=128, regularizers=("augmentation", "label_smoothing"))
    policy, _ = old_policy()
    (run,) = train_cohort(task, WithPolicy(policy), [0])
    for name, value in REGULARIZERS.items():
        assert run.controls[name] == pytest.approx([value] * 3)
    plain = train(task, with_policy(policy), 0)
    assert plain.controls["augmentation"] == [0.1] * 3  # as the training had it


@pytest.mark.parametrize("controls", [FOUR, (*FOUR, "augmentation"), (*FOUR, "label_smoothing"), tuple(CONTROLS)])
def test_files_of_policies_with_any_of_the_later_controls(tmp_path: Path, controls: tuple[str, ...]) -> None:
    ranges = {name: vars(RANGES[name]) for name in controls}
    header = replace(random_policy().header, controls=controls, features=features_of(controls), ranges=ranges)
    made = ControlPolicy(header)
    made.save(tmp_path / "policy.safetensors")
    policy = ControlPolicy.load(tmp_path / "policy.safetensors")
    assert policy.header == header
    observations = np.random.default_rng(0).uniform(-1, 1, (3, len(FEATURES))).astype(np.float32)
    actions = policy.act(observations)[0]
    np.testing.assert_array_equal(actions, made.act(observations)[0])
    assert actions.shape == (3, len(CONTROLS))
    assert [name for name, column in zip(CONTROLS, actions.T, strict=True) if column.any()] == list(controls)


@pytest.mark.parametrize("controls", [FOUR[1:], (*FOUR, "label_smoothing", "augmentation"), (*FOUR, "momentum")])
def test_no_other_controls_may_be_missing(tmp_path: Path, controls: tuple[str, ...]) -> None:
    policy, _ = old_policy()
    policy.header = replace(policy.header, controls=controls)
    with pytest.raises(PolicyError, match=r"other (features|controls)"):
        policy.save(tmp_path / "policy.safetensors")
