"""The meta-validation score."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from agents.application import train_cohort
from agents.controllers import WithPolicy
from agents.meta_validation import MetaValidation
from agents.policy import ControlPolicy
from agents.schedules import Cosine
from agents.vec_env import CohortVecEnv
from hpo_env.base_schedules import calibrated
from inner_models.tasks import Task
from tests.rules import flat
from tests.tiny import TINY, random_policy

TASK = Task.named("digits/mlp", horizon=4, interval_examples=64, train_rows=96, eval_rows=64)
OTHER = Task.named("wine/mlp", horizon=3, interval_examples=48, train_rows=64, optimizer="sgd")


def stay_policy() -> ControlPolicy:
    """One that stays at the calibrated schedule, whatever the run."""
    policy = random_policy()
    policy.header = replace(
        policy.header, base_rules={kind: flat(calibrated(kind)).to_dict() for kind in ("adamw", "sgd")}
    )
    for parameter in policy.network[-1].parameters():
        parameter.data.zero_()
    return policy


def test_staying_is_the_calibrated_schedule() -> None:
    validation = MetaValidation([TASK, OTHER], [0, 1, 2])
    score = validation(stay_policy())
    assert list(score.log_ratios.values()) == pytest.approx([0.0, 0.0], abs=1e-4)
    assert score.log_ratio_iqm == pytest.approx(0.0, abs=1e-4)
    assert score.mean_return == pytest.approx(validation.base_return, rel=1e-4)
    assert list(score.log_ratios) == list(score.returns) == ["0-digits-mlp", "1-wine-mlp"]


def test_by_hand() -> None:
    policy = random_policy(seed=1)
    score = MetaValidation([TASK, OTHER], [0, 1])(policy)
    ratios: list[float] = []
    for name, task in zip(score.log_ratios, (TASK, OTHER), strict=True):
        base = train_cohort(task, Cosine("calibrated"), [0, 1])
        runs = train_cohort(task, WithPolicy(policy), [0, 1])
        ratio = [float(np.log(b.val_loss[-1] / r.val_loss[-1])) for b, r in zip(base, runs, strict=True)]
        ratios += ratio
        assert score.log_ratios[name] == pytest.approx(np.mean(ratio))
        assert np.mean(ratio) != 0
        assert score.returns[name] == pytest.approx(np.mean([np.log(r.initial_loss / r.val_loss[-1]) for r in runs]))
    assert score.log_ratio_iqm == pytest.approx(sum(sorted(ratios)[1:3]) / 2)  # the middle half of four


def test_workers_change_nothing() -> None:
    policy = random_policy(seed=1)
    with closing(CohortVecEnv(TINY, cohorts=2, replicas=2, workers=2)) as env:
        shared = MetaValidation([TASK, OTHER], [0, 1], map=env.map)(policy)
    assert shared == MetaValidation([TASK, OTHER], [0, 1])(policy)
