"""Reasons: true to the policy, found on policies whose reasons are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from agents.policy import ControlPolicy
from agents.reasons import CAUSE, GROUPS, MOVED, Group, occluded, reason
from hpo_env.actions import RANGES
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from tests.linear import INDEX, linear_policy

VALUES = {"lr": 0.01, "batch_size": 32.0, "weight_decay": 0.1, "dropout": 0.1, "augmentation": 0.1}
VALUES["label_smoothing"] = 0.1


def observed(**values: float) -> NDArray[np.float32]:
    """An observation in the middle of a run of 16 decisions, everything measured, nothing remarkable."""
    typical = {
        "progress": 0.5, "horizon": 0.5, "examples": np.log10(16_384) / 8, "examples_known": 1, "parameters": 0.5,
        "val_change_4": -0.1, "train_change_4": -0.2, "val_since_start": -0.5, "generalization_gap": 0.3,
        **dict.fromkeys(CONTROLS, 0.5), **{f"{name}_available": 1 for name in CONTROLS},
    }  # fmt: skip
    observation = np.zeros((1, len(FEATURES)), np.float32)
    for name, value in {**typical, **values}.items():
        observation[0, INDEX[name]] = value
    return observation


def moved(action: NDArray[np.float64], controls: tuple[str, ...] = tuple(CONTROLS)) -> dict[str, float]:
    """`VALUES` after the action, of these controls alone."""
    scaled = {
        name: float(control.from_scale(control.to_scale(np.asarray(VALUES[name])) + RANGES[name].step * act))
        for (name, control), act in zip(CONTROLS.items(), action[0], strict=True)
    }
    return {name: scaled[name] for name in controls}


def told(policy: ControlPolicy, observation: NDArray[np.float32], **options: Any) -> str:
    action = policy.act(observation)[0]
    return reason(policy, observation, action, VALUES, VALUES, moved(action), **options)


STATES: dict[str, tuple[dict[str, float], str]] = {
    "validation trend": ({"val_change_4": 0.04}, "validation loss up 4 % over 4 epochs"),
    "validation since start": ({"val_since_start": -1.0}, "validation loss down 67 % since the start"),
    "validation and its best": ({"val_above_best": 0.1, "since_best": 0.25},
                                "validation loss 11 % above its best of 4 epochs ago"),
    "validation roughness": ({"val_roughness": 0.2}, "validation loss varies by 20 % a decision"),
    "training trend": ({"train_change_4": -1.2}, "training loss down 75 % over 4 epochs"),
    "training since start": ({"train_since_start": -0.4}, "training loss down 33 % since the start"),
    "generalization gap": ({"generalization_gap": 1.0, "generalization_gap_change": 0.1},
                           "validation loss 3 times the training loss, rising against it"),
    "gradient norm": ({"grad_norm_since_start": 0.4}, "gradient norm up 50 % since the start"),
    "gradient noise": ({"grad_noise": 0.5}, "gradient noise 0.50 of its norm"),
    "gradient direction": ({"grad_cosine": -0.25}, "gradient at a cosine of -0.25 with its momentum"),
    "step length": ({"update_ratio": -1.0}, "weights moved by 1 % of their norm"),
    "a loss not finite": ({"non_finite": 1}, "a loss not finite"),
    "progress": ({"progress": 0.75}, "75 % of the run done"),
    "length of the run": ({"examples": np.log10(61_440) / 8}, "a run of 16 decisions and 61,000 examples"),
    "size of the model": ({"parameters": np.log10(84_700) / 8}, "a model of 85,000 parameters"),
    "optimizer": ({"momentum_sgd": 1}, "SGD"),
    "lr in use": ({"lr": 0.5}, "lr at 0.001"),
    "batch_size in use": ({"batch_size": 0.25}, "batch_size at 32"),
    "weight_decay in use": ({"weight_decay": 1.0}, "weight_decay at 3"),
    "dropout in use": ({"dropout": 1.0}, "dropout at 0.5"),
    "augmentation in use": ({"augmentation": 1.0}, "augmentation at 0.5"),
    "label_smoothing in use": ({"label_smoothing": 1.0}, "label_smoothing at 0.5"),
}  # fmt: skip
"""A state of each group, by its first or most telling feature, and its words."""


def test_every_feature_is_in_one_group() -> None:
    grouped = sorted(name for group in GROUPS for name in group.features)
    assert grouped == sorted(feature.name for feature in FEATURES)
    assert {group.name for group in GROUPS} == set(STATES)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_the_group_that_a_policy_reacts_to_is_named_and_no_other(group: Group) -> None:
    state, words = STATES[group.name]
    feature = next(iter(state))
    observation = observed(**state)
    policy = linear_policy({feature: {"weight_decay": 0.6 / float(observation[0, INDEX[feature]])}})
    assert told(policy, observation) == f"weight_decay x1.93: {words}"
    without = occluded(policy, observation)
    changed = [GROUPS[index].name for index in np.flatnonzero(np.abs(without[:, 2] - 0.6) > 1e-6)]
    assert changed == [group.name]


def test_a_cause_pushes_the_way_that_the_control_goes() -> None:
    """What holds a move back is no cause of it, however strong."""
    policy = linear_policy({"progress": {"lr": -1.2}, "val_roughness": {"lr": 1.0}})
    text = told(policy, observed(progress=0.5, val_roughness=0.3))
    assert text == "lr x0.76: 50 % of the run done"


@pytest.mark.parametrize(("share", "cause"), [(CAUSE + 0.02, True), (CAUSE - 0.02, False)])
def test_a_cause_is_a_share_of_the_move(share: float, cause: bool) -> None:
    policy = linear_policy({"val_roughness": {"lr": share}, "progress": {"lr": 1 - share}}, scale=0.5)
    text = told(policy, observed(val_roughness=1, progress=1))
    assert text.startswith("lr x1.58: 100 % of the run done")
    assert ("validation loss varies" in text) == cause


@pytest.mark.parametrize(
    ("size", "words"), [(MOVED + 0.01, "lr x1.11: SGD"), (MOVED - 0.01, "about as scheduled: lr x1.09")]
)
def test_small_actions_have_no_reasons(size: float, words: str) -> None:
    assert told(linear_policy({"momentum_sgd": {"lr": size}}), observed(momentum_sgd=1)) == words


def test_two_causes_at_most_the_stronger_first() -> None:
    weights = {"val_roughness": 0.2, "grad_noise": 0.24, "progress": 0.22}
    policy = linear_policy({name: {"lr": weight} for name, weight in weights.items()})
    text = told(policy, observed(val_roughness=1, grad_noise=1, progress=1))
    assert text == "lr x1.83: gradient noise 1.00 of its norm and 100 % of the run done"


def test_controls_with_the_same_cause_share_a_clause() -> None:
    policy = linear_policy({"momentum_sgd": {"lr": -0.5, "dropout": 0.6}, "progress": {"weight_decay": 0.5}})
    text = told(policy, observed(momentum_sgd=1, progress=1))
    assert text == "lr x0.63, dropout 0.1 -> 0.168: SGD; weight_decay x1.73: 100 % of the run done"


def test_a_move_without_a_cause_is_called_so() -> None:
    policy = linear_policy({})
    linear = policy.network[-1]
    assert isinstance(linear, nn.Linear)
    linear.bias.data[0] = 0.5
    assert told(policy, observed()) == "lr x1.58: no one cause stands out"


def test_the_schedules_part_is_told_apart() -> None:
    policy = linear_policy({"momentum_sgd": {"lr": 0.5}})
    observation = observed(momentum_sgd=1)
    action = policy.act(observation)[0]
    lr = {"before": 0.01, "stay": 0.008, "after": 0.008 * float(np.exp(RANGES["lr"].step * 0.5))}
    before, stay, after = ({**VALUES, "lr": value} for value in lr.values())
    assert reason(policy, observation, action, before, stay, after) == "lr x1.26 (schedule: x0.80): SGD"
    quiet = reason(policy, observation, 0 * action, before, stay, stay)
    assert quiet == "about as scheduled: lr x0.80"
    assert reason(policy, observation, 0 * action, before, before, before) == "about as scheduled: no change"
    guarded = reason(policy, observation, action, before, stay, after, guard="val_loss not finite")
    assert guarded == (
        "guard: val_loss not finite, so back to the best snapshot at a quarter of the lr; "
        "lr x1.26 (guard and schedule: x0.80): SGD"
    )


def test_what_does_not_move_at_its_limit_has_no_reason() -> None:
    policy = linear_policy({"momentum_sgd": {"lr": 1.0}})
    observation = observed(momentum_sgd=1)
    text = reason(policy, observation, policy.act(observation)[0], VALUES, VALUES, VALUES)
    assert text == "about as scheduled: no change"


def test_the_start_is_chosen_from_what_is_given() -> None:
    """Features that are not measured yet differ from their mean, too: they are no causes."""
    policy = linear_policy({"momentum_sgd": {"lr": 0.3}, "val_since_start": {"lr": -0.3}, "progress": {"dropout": 0.5}})
    policy.mean[INDEX["val_since_start"]] = 1.0
    policy.mean[INDEX["progress"]] = -1.0
    observation = observed(momentum_sgd=1, val_since_start=0, progress=0, first_decision=1)
    action = policy.act(observation)[0]
    text = reason(policy, observation, action, VALUES, VALUES, {**VALUES, "lr": 0.02, "dropout": 0.2}, first=True)
    assert text == (
        "start: lr 0.02 (schedule: 0.01): SGD; dropout 0.2 (schedule: 0.1): no one cause stands out; "
        "about as scheduled: batch_size 32, weight_decay 0.1, augmentation 0.1, label_smoothing 0.1"
    )


def test_out_of_its_depth_the_policy_has_no_part() -> None:
    policy = linear_policy({"momentum_sgd": {"lr": 1.0}})
    observation = observed(momentum_sgd=1)
    after = {**VALUES, "lr": 0.004}
    text = reason(policy, observation, policy.act(observation)[0], VALUES, VALUES, after, out_of_depth=True)
    assert text == "unlike any run of its training, so back to the schedule: lr x0.40"


def test_masked_controls_are_never_named() -> None:
    """Neither as moved nor as a cause, also where their absence is one."""
    features = [f"{name}{part}" for name in ("batch_size", "dropout") for part in ("", "_available")]
    policy = linear_policy({name: {"lr": -0.4, "dropout": 0.9} for name in features})
    policy.mean[[INDEX[name] for name in features]] = 0.5
    observation = observed(**dict.fromkeys(features, 0.0))
    action = policy.act(observation)[0]
    after = moved(action, ("lr", "weight_decay"))
    text = reason(policy, observation, action, VALUES, VALUES, after)
    assert text.startswith("lr x2.08: a control that the run lacks")
    assert "dropout" not in text
    assert "batch" not in text
    assert "dropout" in told(policy, observation)  # so the test can fail


@pytest.mark.parametrize(
    ("group", "state", "words"),
    [
        ("validation trend", {"val_change_4": 0.0, "val_change_1": 0.001}, "validation loss flat over 3 epochs"),
        ("validation trend", {"val_change_4": 0.0}, "no earlier validation loss to compare with"),
        ("validation trend", {"val_change_4": 2.0}, "validation loss far up over 12 epochs"),
        ("validation since start", {"val_since_start": 0.0}, "no first validation loss to compare with"),
        ("validation and its best", {}, "validation loss at its best"),
        ("validation and its best", {"val_missing": 1}, "validation loss not measured"),
        ("generalization gap", {"generalization_gap": 0.0}, "no losses to compare with one another"),
        ("generalization gap", {"generalization_gap": -0.5}, "validation loss 40 % below the training loss"),
        ("generalization gap", {"generalization_gap": 0.005, "generalization_gap_change": -0.1},
         "validation loss level with the training loss, falling against it"),
        ("gradient noise", {"gradients_missing": 1}, "gradients not measured"),
        ("step length", {"update_ratio": 0}, "step lengths not measured"),
        ("length of the run", {"examples_known": 0}, "a run of 16 decisions and unknown length"),
        ("optimizer", {}, "an adaptive optimizer"),
    ],
)  # fmt: skip
def test_words_for_known_situations(group: str, state: dict[str, float], words: str) -> None:
    """With three epochs between two decisions."""
    seen = dict(zip(INDEX, observed(**state)[0].tolist(), strict=True))
    assert next(found for found in GROUPS if found.name == group).words(seen, 3) == words


def test_nothing_about_a_reason_is_random() -> None:
    torch.manual_seed(0)
    policy = linear_policy({"momentum_sgd": {"lr": 0.5}})
    assert len({told(policy, observed(momentum_sgd=1)) for _ in range(3)}) == 1
