"""The policy on the engine: the tuner's decisions, guard included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import nn

from agents.application import Cohort, MakeController, Run, train, train_cohort
from agents.controllers import (
    GRID,
    Replay,
    WithPolicy,
    with_policy,
)
from agents.policy import ControlPolicy
from agents.tuner import Tuner
from hpo_env.actions import BaseSchedule, calibrated
from hpo_env.hyperparameters import CONTROLS, Binding
from inner_models.batched_training import BatchedTraining
from inner_models.tasks import Task
from inner_models.training import Training
from tests.tiny import random_policy

TASK = Task.named("digits/mlp", horizon=5, interval_examples=96, train_rows=96, eval_rows=64)
SGD = replace(TASK, optimizer="sgd")
TASKS = [TASK, SGD, Task.named("diabetes/linear", horizon=4, interval_examples=96, eval_rows=64)]


def moving() -> ControlPolicy:
    """A policy that moves every control, the batch size up: the calibrated one is the least there is."""
    policy = random_policy(seed=1, scale=0.4)
    last = policy.network[-1]
    assert isinstance(last, nn.Linear)
    last.bias.data[list(CONTROLS).index("batch_size")] += 0.5
    return policy


def always(action: float) -> ControlPolicy:
    """A policy that moves every control alike, whatever it sees."""
    policy = random_policy()
    last = policy.network[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data.zero_()
    last.bias.data.fill_(action)
    return policy


def staying(optimizer: str = "adamw", **schedule: float) -> ControlPolicy:
    """A policy that always stays at a base schedule."""
    policy = always(0.0)
    base = replace(calibrated(optimizer), **schedule).to_dict()
    policy.header = replace(policy.header, base_schedules={**policy.header.base_schedules, optimizer: base})
    return policy


def given(task: Task, lr_factor: float = 1.0) -> dict[str, float]:
    """A user's own values: the calibrated ones, but for the learning rate."""
    base = calibrated(task.optimizer)
    return {name: getattr(base, name) for name in CONTROLS} | {"lr": base.lr * lr_factor}


def tuned(policy: ControlPolicy, seen: list[Tuner], *, values: Mapping[str, float], **arguments: Any) -> MakeController:
    """`Tuner` in a plain loop, on a run whose user has set `values`."""

    def attach(run: Training) -> Tuner:
        binding = Binding(run.optimizer, run.model, run.batch_sampler)
        binding.write({name: value for name, value in values.items() if name in binding.available})
        if arguments.get("initial_loss"):
            arguments["initial_loss"] = run.evaluate("val")
        size = run.batch_sampler.batch_size
        tuner = Tuner(
            policy, run.optimizer, model=run.model, total_epochs=run.task.horizon, batch_size=size, **arguments
        )
        tuner.follow(run.batch_sampler)
        seen.append(tuner)
        return tuner

    return attach


def same(run: Run, plain: Run, tuner: Tuner) -> None:
    """Equal decisions on equal observations, equal values, equal curves, and a guard that acts at the same times."""
    np.testing.assert_allclose(run.val_loss, plain.val_loss, rtol=1e-2)
    np.testing.assert_allclose(run.train_loss, plain.train_loss, rtol=1e-2)
    assert run.controls.keys() == plain.controls.keys()
    for name, values in run.controls.items():
        np.testing.assert_allclose(values, plain.controls[name], rtol=1e-2, err_msg=name)
    observations = [entry["observation"] for entry in tuner.history]
    np.testing.assert_allclose(run.notes["observations"], observations, rtol=0.02, atol=0.02)
    acted = [epoch for epoch in run.notes["guard"] if epoch < len(tuner.history)]  # the end is no decision
    assert acted == [entry["epoch"] for entry in tuner.history if entry["guard"]]


# -- the tuner's decisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.optimizer}")
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ({}, {}),
        ({"guard": False}, {"guard": False}),
        ({"initial_loss": True}, {"initial_loss": True}),
        ({"start": "given", "lr_factor": 0.1}, {"start": "given"}),
        ({"start": "given", "lr_factor": 3.0}, {"start": "given"}),
        ({"controls": ("lr",)}, {"controls": ["lr"]}),
        ({"controls": ("lr", "batch_size")}, {"controls": ["lr", "batch_size"]}),
    ],
    ids=str,
)
def test_the_tuner_decides_the_same(task: Task, method: dict[str, Any], arguments: dict[str, Any]) -> None:
    policy = moving()
    tuners: list[Tuner] = []
    values = given(task, method.get("lr_factor", 1.0))
    for seed, run in zip((0, 7), train_cohort(task, WithPolicy(policy, **method, record=True), [0, 7]), strict=True):
        plain = train(task, tuned(policy, tuners, values=values, **arguments), seed)
        same(run, plain, tuners[-1])
        moved = [name for name in run.controls if len(set(run.controls[name])) > 1]
        assert set(moved) == set(tuners[-1].history[0]["hyperparameters"])


@pytest.mark.parametrize("action", [-1.0, 1.0])
def test_given_values_are_left_by_a_factor_of_ten_at_most(action: float) -> None:
    tuners: list[Tuner] = []
    run = train_cohort(TASK, WithPolicy(always(action), start="given", lr_factor=0.1, record=True), [0])[0]
    same(run, train(TASK, tuned(always(action), tuners, values=given(TASK, 0.1), start="given"), 0), tuners[-1])
    base = replace(calibrated("adamw"), lr=0.1 * calibrated("adamw").lr)
    lr = base.values((np.arange(TASK.horizon) + 0.5) / TASK.horizon)["lr"]
    np.testing.assert_allclose(run.controls["lr"], lr * 10**action, rtol=1e-9)
    np.testing.assert_allclose(run.controls["weight_decay"], base.weight_decay * 10**action, rtol=1e-9)


RISING = replace(SGD, horizon=12, interval_examples=64), {"lr": 5.0, "warmup": 1.0}
"""A rate that rises until the run breaks, after it has learned something."""


@pytest.mark.parametrize(
    ("task", "schedule", "initial_loss", "acts"),
    [
        (*RISING, False, [4]),
        # Hopeless from the start, and lowered until it works.
        (replace(SGD, horizon=9), {"lr": 1e3, "warmup": 0.0}, True, [1, 2, 3, 4]),
        (replace(TASKS[2], horizon=9, optimizer="sgd"), {"lr": 1e3, "warmup": 0.0}, True, [1, 2, 3, 4, 5]),
        # To the end.
        (replace(SGD, horizon=3), {"lr": 1e30, "warmup": 0.0}, False, [1, 2, 3]),
    ],
    ids=["rising", "falling", "falling-linear", "hopeless"],
)
def test_the_guard_acts_the_same(task: Task, schedule: dict[str, float], initial_loss: bool, acts: list[int]) -> None:
    policy, tuners = staying("sgd", **schedule), list[Tuner]()
    run = train_cohort(task, WithPolicy(policy, initial_loss=initial_loss, record=True), [0])[0]
    plain = train(task, tuned(policy, tuners, values=given(task), initial_loss=initial_loss or None), 0)
    assert run.notes["guard"] == acts
    same(run, plain, tuners[-1])
    base = policy.header.base_schedule("sgd").values((np.arange(task.horizon) + 0.5) / task.horizon)["lr"]
    lowered = np.array([0.25 ** sum(act <= interval for act in acts) for interval in range(task.horizon)])
    np.testing.assert_allclose(run.controls["lr"], base * lowered, rtol=1e-9)
    np.testing.assert_allclose(np.exp(np.array(run.notes["offsets"])[:, 0]), lowered, rtol=1e-9)


def test_the_guard_brings_back_the_best_weights() -> None:
    """After divergence a run stands where its best interval had left it, not where it began."""
    task, schedule = RISING
    policy = staying("sgd", **schedule)
    guarded, loose = (train_cohort(task, WithPolicy(policy, guard=guard), [0])[0] for guard in (True, False))
    assert guarded.val_loss[:4] == loose.val_loss[:4]
    assert guarded.val_loss[3] > 10
    assert loose.val_loss[4] > 10
    assert guarded.val_loss[4] < min(guarded.val_loss[:4])
    assert loose.notes == {"guard": []}
    assert "observations" not in guarded.notes


def test_what_the_tuner_starts_from_does_not_matter_where_the_policy_chooses() -> None:
    policy = random_policy(seed=1)
    runs = [train(TASK, tuned(policy, [], values=given(TASK, factor)), 0) for factor in (1e-3, 1.0, 1e3)]
    assert runs[0].val_loss == runs[1].val_loss == runs[2].val_loss
    assert runs[0].controls == runs[1].controls == runs[2].controls
    assert train(TASK, with_policy(policy), 0).val_loss == runs[0].val_loss
    # Given values do matter.
    others = [train(TASK, tuned(policy, [], values=given(TASK, f), start="given"), 0) for f in (0.1, 1.0)]
    assert others[0].val_loss != others[1].val_loss


def test_controls_that_are_left_alone_follow_the_base_schedule() -> None:
    base = calibrated("adamw").values((np.arange(TASK.horizon) + 0.5) / TASK.horizon)
    for moved in CONTROLS:
        run = train_cohort(TASK, WithPolicy(moving(), controls=(moved,)), [0])[0]
        for name, values in run.controls.items():
            assert (values == base[name].tolist()) == (name != moved), (moved, name)


def test_values_do_not_outlast_a_run() -> None:
    """A controller that is asked once more, after the last interval, still answers."""
    cohort = Cohort(BatchedTraining(TASK, [0, 1]))
    signals = {name: np.ones(2) for name in ("train_loss", "val_loss")}
    base = {kind: BaseSchedule(1e-3, 32, 0.1, 0.1).to_dict() for kind in ("adamw", "sgd")}
    methods: Sequence[Any] = (WithPolicy(random_policy()), Replay(base, np.zeros((1, GRID, 4))))
    for method in methods:
        controller = method.attach(cohort)
        for _ in range(TASK.horizon):
            last = {name: values.copy() for name, values in controller.values.items()}
            controller.step(signals)
        for name, values in controller.values.items():
            np.testing.assert_array_equal(values, last[name])
    assert last["lr"][0] == pytest.approx(1e-3 * (1 + math.cos(0.9 * math.pi)) / 2)
