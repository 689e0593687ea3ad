"""Whole runs under a controller, and the meta-validation score."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agents.policy import ControlPolicy
from agents.rollouts import MetaValidation, roll_out, stay
from hpo_env.actions import BaseSchedule, calibrated
from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.rewards import FLOOR
from inner_models.tasks import Task
from tests.tiny import random_policy

TASK = Task.named("digits/mlp", horizon=4, interval_examples=64, train_rows=96, eval_rows=64)
OTHER = Task.named("wine/mlp", horizon=3, interval_examples=48, train_rows=64, optimizer="sgd")
EXPLOSIVE = BaseSchedule(lr=1e9, batch_size=16, weight_decay=1e-3, dropout=0.1, warmup=0.0)


def stay_policy() -> ControlPolicy:
    policy = random_policy()
    for parameter in policy.network[-1].parameters():
        parameter.data.zero_()
    return policy


class Calming:
    """Turns the learning rate far down: the first run's at once, the others' only once they have diverged."""

    calls = 0

    def __call__(self, observations: np.ndarray) -> Array:
        actions = stay(observations)
        actions[: None if self.calls else 1, 0] = -1.0
        self.calls += 1
        return actions


@pytest.mark.parametrize("task", [TASK, OTHER])
def test_staying_is_the_base_schedule(task: Task) -> None:
    run = roll_out(task, stay, [0, 1, 2])
    base = calibrated(task.optimizer)
    progress = (np.arange(task.horizon) + 0.5) / task.horizon
    for name, values in base.values(progress).items():
        assert run.controls[name].shape == (3, task.horizon)
        np.testing.assert_allclose(run.controls[name], np.tile(values, (3, 1)), rtol=1e-12)
    assert run.val_loss.shape == (3, task.horizon + 1)


def test_returns_are_the_fall_of_the_log_loss() -> None:
    run = roll_out(TASK, stay, [0, 1, 2])
    first, last = run.val_loss[:, 0], run.val_loss[:, -1]
    np.testing.assert_allclose(run.returns, np.log(first + FLOOR * first) - np.log(last + FLOOR * first), rtol=1e-9)
    assert (run.returns != 0).all()


def test_seeds_decide() -> None:
    one, other = roll_out(TASK, stay, [5, 6, 7]), roll_out(TASK, stay, [5, 7, 8])
    np.testing.assert_array_equal(one.val_loss[0], other.val_loss[0])
    np.testing.assert_allclose(one.val_loss[2], other.val_loss[1], rtol=1e-5)
    assert not np.allclose(one.val_loss[1], other.val_loss[1])


def test_a_run_that_diverged_keeps_its_last_value() -> None:
    run = roll_out(TASK, Calming(), [0, 1, 2], base=EXPLOSIVE)
    assert np.isfinite(run.val_loss[0]).all()
    assert len(set(run.val_loss[0])) == TASK.horizon + 1
    for row in (1, 2):
        np.testing.assert_array_equal(run.val_loss[row, 2:], run.val_loss[row, 1])
        assert not run.val_loss[row, 1] < 100 * run.val_loss[row, 0]
        # What it lost in its one interval, a rise to the cap of 10 times the initial loss; nothing from its successors.
        assert run.returns[row] == pytest.approx(math.log((1 + FLOOR) / (10 + FLOOR)))
        assert run.controls["lr"][row, 0] > 1e8
        assert np.isnan(run.controls["lr"][row, 1:]).all()
    assert np.isfinite(run.controls["lr"][0]).all()


def test_meta_validation_of_staying() -> None:
    validation = MetaValidation([TASK, OTHER], [0, 1, 2])
    score = validation(stay_policy())
    assert list(score.log_ratios.values()) == [0.0, 0.0]
    assert score.log_ratio_iqm == 0.0
    assert score.mean_return == validation.base_return
    assert list(score.log_ratios) == list(score.returns) == ["0-digits-mlp", "1-wine-mlp"]
    assert score.returns["0-digits-mlp"] == pytest.approx(roll_out(TASK, stay, [0, 1, 2]).returns.mean())


def test_meta_validation_by_hand() -> None:
    policy = random_policy(seed=1)
    score = MetaValidation([TASK, OTHER], [0, 1])(policy)
    ratios: list[float] = []
    for name, task in zip(score.log_ratios, (TASK, OTHER), strict=True):
        base = roll_out(task, stay, [0, 1])
        run = roll_out(task, lambda observations: policy.act(observations)[0], [0, 1])
        ratio = np.log(base.val_loss[:, -1] / run.val_loss[:, -1])
        ratios += ratio.tolist()
        assert score.log_ratios[name] == pytest.approx(ratio.mean())
        assert ratio.mean() != 0
        assert score.returns[name] == pytest.approx(run.returns.mean())
    assert score.log_ratio_iqm == pytest.approx(sum(sorted(ratios)[1:3]) / 2)  # the middle half of four
    assert len(CONTROLS) == policy.act(np.zeros((1, len(policy.mean)), np.float32))[0].shape[1]
