"""The controls that the policy must beat: without eyes, without sense, and its own trajectories replayed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from agents.application import train_cohort
from agents.controllers import (
    _KNOWN,
    GRID,
    MEASURED,
    Elsewhere,
    Replay,
    WithPolicy,
    mean_trajectory,
    resampled,
)
from agents.policy import ControlPolicy
from hpo_env.actions import RANGES
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from inner_models.tasks import Task
from tests.tiny import random_policy

TASK = Task.named("digits/mlp", horizon=5, interval_examples=96, train_rows=96, eval_rows=64)
SGD = replace(TASK, optimizer="sgd")
TASKS = [TASK, SGD, Task.named("diabetes/linear", horizon=4, interval_examples=96, eval_rows=64)]


class Spy(ControlPolicy):
    """Writes down what it is shown."""

    def __init__(self, seed: int = 2) -> None:
        policy = random_policy(seed)
        super().__init__(policy.header)
        self.load_state_dict(policy.state_dict())
        self.shown: list[NDArray[np.float32]] = []

    def act(self, observation: NDArray[np.float32], state: Any = None) -> tuple[NDArray[np.float64], Any]:
        self.shown.append(observation.copy())
        return super().act(observation, state)


# -- controls that must lose -------------------------------------------------------------------------------------------


def test_measured_features() -> None:
    names = [feature.name for feature in FEATURES]
    known = {"progress", "horizon", "parameters", "momentum_sgd", "first_decision", "val_missing", "gradients_missing"}
    known |= {"examples", "examples_known"}
    assert known == set(_KNOWN) < set(names)
    of_controls = {f"{name}{part}" for name in CONTROLS for part in ("", "_offset", "_action", "_available")}
    assert {name for name, measured in zip(names, MEASURED, strict=True) if not measured} == {*known, *of_controls}
    assert {
        "val_change_1",
        "val_change_third",
        "train_since_start",
        "grad_noise",
        "update_ratio",
        "non_finite",
        "since_best",
    } <= {name for name, measured in zip(names, MEASURED, strict=True) if measured}


def test_a_blanked_policy_sees_nothing_that_is_measured() -> None:
    policy = Spy()
    policy.mean.copy_(torch.linspace(-1, 1, len(FEATURES)))
    sighted, blanked = (
        train_cohort(TASK, WithPolicy(policy, sees=sees, guard=False), [0, 1]) for sees in ("own", "nothing")
    )
    shown = policy.shown[TASK.horizon :]
    np.testing.assert_array_equal(shown[0], policy.shown[0])  # nothing is measured yet
    for interval, rows in enumerate(shown):
        if interval:
            np.testing.assert_array_equal(rows[:, MEASURED], np.tile(policy.mean.numpy()[MEASURED], (2, 1)))
        assert rows[:, [f.name for f in FEATURES].index("progress")].tolist() == pytest.approx([interval / 5] * 2)
    assert sighted[0].controls != sighted[1].controls
    for name, values in blanked[0].controls.items():  # up to the rounding of a product of several rows
        np.testing.assert_allclose(blanked[1].controls[name], values, rtol=1e-5)
    assert blanked[0].val_loss != blanked[1].val_loss
    assert len(set(blanked[0].controls["weight_decay"])) > 2


def test_elsewhere_is_another_run_at_the_same_progress() -> None:
    """Each other run's rows say which run and which of its decisions they are."""
    lengths = (5, 10, 2)
    others = tuple(
        np.array([np.full(len(FEATURES), number + decision / 100) for decision in range(length)], np.float32)
        for number, length in enumerate(lengths)
    )
    at = [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 0, 0, 1, 1]]  # decision of each that is as far as ours of 5
    policy, column = Spy(), int(np.flatnonzero(MEASURED)[0])
    drawn = []
    for seed in (0, 0, 1):
        policy.shown.clear()
        train_cohort(TASK, WithPolicy(policy, sees=Elsewhere(others, seed)), [0, 1, 2, 3])
        assert len(policy.shown) == TASK.horizon
        assert (policy.shown[0][:, MEASURED] == 0).all()  # before training
        drawn.append(np.array([rows[:, column].astype(int) for rows in policy.shown[1:]]))
        for interval, rows in enumerate(policy.shown[1:], start=1):
            expected = [number + at[number][interval] / 100 for number in drawn[-1][interval - 1]]
            wanted = np.tile(np.array(expected)[:, None], int(MEASURED.sum()))
            np.testing.assert_allclose(rows[:, MEASURED], wanted, rtol=1e-6)
            assert rows[:, 0].tolist() == pytest.approx([interval / TASK.horizon] * 4)  # its own, as all that is known
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    assert set(drawn[0].flat) == {0, 1, 2}
    assert any(len(set(column)) > 1 for column in drawn[0].T)  # drawn anew at every decision


def test_random_actions() -> None:
    class Unasked(ControlPolicy):
        def act(self, observation: Any, state: Any = None) -> Any:
            raise AssertionError("a random policy asked")

    policy = Unasked(random_policy().header)
    runs = train_cohort(replace(TASK, horizon=12), WithPolicy(policy, acts="random", record=True), [0, 1, 2])
    offsets = np.array([run.notes["offsets"] for run in runs])
    assert len({tuple(run.controls["dropout"]) for run in runs}) == 3
    for column, (name, control) in enumerate(list(CONTROLS.items())[:4]):
        moves = np.abs(np.diff(offsets[:, :, column], axis=1, prepend=0.0))
        assert (moves[:, 0] <= RANGES[name].first).all()
        assert moves[:, 0].max() > 0.3 * RANGES[name].first
        assert 0.3 * RANGES[name].step < moves[:, 1:].max() <= RANGES[name].step * (1 + 1e-9) or name == "lr"
        values = np.array([run.controls[name] for run in runs])
        assert ((values >= control.low) & (values <= control.high)).all()


# -- replays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.optimizer}")
def test_a_replayed_run_is_the_run(task: Task) -> None:
    policy = random_policy(seed=1)
    runs = train_cohort(task, WithPolicy(policy, record=True), [0, 3])
    offsets = np.array([run.notes["offsets"] for run in runs])
    assert offsets.shape == (2, task.horizon, len(CONTROLS))
    again = train_cohort(task, Replay(policy.header.base_rules, offsets), [0, 3])
    for run, replayed in zip(runs, again, strict=True):
        assert not run.notes["guard"]
        for name, values in run.controls.items():
            np.testing.assert_allclose(replayed.controls[name], values, rtol=1e-9)
        np.testing.assert_allclose(replayed.val_loss, run.val_loss, rtol=1e-4)
    one_for_all = train_cohort(task, Replay(policy.header.base_rules, offsets[:1]), [0, 3])
    assert one_for_all[0].controls == one_for_all[1].controls == again[0].controls


def test_resampled_by_hand() -> None:
    trajectory = np.array([[0.0, 10.0], [1.0, 30.0]])  # at 1/4 and 3/4 of the run
    found = resampled(trajectory, np.array([0.0, 0.25, 0.375, 0.5, 0.75, 1.0]))
    assert found.tolist() == [[0, 10], [0, 10], [0.25, 15], [0.5, 20], [1, 30], [1, 30]]


def test_mean_trajectory_by_hand() -> None:
    found = mean_trajectory([np.array([[0.0], [1.0]]), np.array([[3.0]]), np.linspace(0, 3, GRID)[:, None]])
    assert found.shape == (GRID, 1)
    middles = (np.arange(GRID) + 0.5) / GRID
    ramp = np.clip(2 * middles - 0.5, 0, 1)
    np.testing.assert_allclose(found[:, 0], (ramp + 3 + np.linspace(0, 3, GRID)) / 3)
