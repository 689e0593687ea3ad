"""The random search behind the base schedule."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest

from agents.calibration import (
    REGRET_CAP,
    RULE_RANGES,
    SEARCH_RANGES,
    Trials,
    calibrate,
    final_losses,
    fit_rule,
    linear_fit,
    regrets,
    sample_schedules,
)
from hpo_env.base_schedules import TYPICAL, BaseSchedule
from hpo_env.hyperparameters import CONTROLS
from inner_models.tasks import OptimizerName, Task
from inner_models.training import Training
from tests.tiny import TINY

TASK = Task.named("digits/mlp", horizon=3, interval_examples=64, train_rows=96, eval_rows=64)


def search(optimizer: OptimizerName = "adamw", **arguments: Any) -> tuple[BaseSchedule, dict[str, float]]:
    sizes = {"configurations": 6, "finalists": 2, "tasks": 2, "workers": 1, "report": lambda line: None}
    return calibrate(optimizer, TINY, **{**sizes, **arguments})


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_schedules_lie_in_the_search_ranges(optimizer: OptimizerName) -> None:
    schedules = sample_schedules(optimizer, 200, np.random.default_rng(0))
    for name, (low, high) in SEARCH_RANGES[optimizer].items():
        values = np.array([getattr(schedule, name) for schedule in schedules])
        assert values.min() >= low * (1 - 1e-9)
        assert values.max() <= high * (1 + 1e-9)
        assert CONTROLS[name].low <= low < high <= CONTROLS[name].high
        middle = (low + high) / 2 if name == "dropout" else math.sqrt(low * high)
        assert 0.3 < (values < middle).mean() < 0.7, name
        assert not CONTROLS[name].multiple or not (values % CONTROLS[name].multiple).any()


def test_regrets_by_hand() -> None:
    losses = np.array([[1.0, 2.0, math.nan], [math.inf, 0.5, 0.5 * math.e**0.25], [1.0, 100.0, -math.inf]])
    expected = [[0, math.log(2), REGRET_CAP], [REGRET_CAP, 0, 0.25], [0, REGRET_CAP, REGRET_CAP]]
    np.testing.assert_allclose(regrets(losses), expected, atol=1e-9)


def test_regrets_of_a_task_on_which_nothing_converged() -> None:
    with np.errstate(invalid="ignore"):
        found = regrets(np.array([[math.nan, math.inf], [1.0, 1.0]]))
    np.testing.assert_array_equal(found, [[REGRET_CAP, REGRET_CAP], [0, 0]])


def test_final_losses_are_those_of_runs_under_the_schedule() -> None:
    schedules = sample_schedules("adamw", 3, np.random.default_rng(1))
    losses = final_losses(TASK, schedules, seed=0)
    assert losses.shape == (3,)
    assert len(set(losses)) == 3
    np.testing.assert_array_equal(losses, final_losses(TASK, schedules, seed=0))
    np.testing.assert_allclose(losses[:2], final_losses(TASK, schedules[:2], seed=0), rtol=1e-4)
    assert np.isfinite(losses).all()
    assert (losses < 3 * Training(TASK, 0).evaluate("val")).all()


def test_calibrate_is_deterministic() -> None:
    lines: list[str] = []
    schedule, figures = search(report=lines.append)
    assert search() == (schedule, figures)
    assert search(seed=1)[0] != schedule
    assert schedule in sample_schedules("adamw", 6, np.random.default_rng(0))
    assert 0 <= figures["mean_regret"] <= REGRET_CAP
    assert figures["configurations"] == 6
    assert figures["tasks"] == 6
    assert len(lines) == 2 + 4
    assert lines[-1].startswith("adamw: round 2, task 4 of 4 (")


def test_calibrate_trains_with_the_optimizer_that_was_asked_for() -> None:
    schedule, _ = search("sgd")
    assert schedule in sample_schedules("sgd", 6, np.random.default_rng(0))


def test_calibrate_prefers_what_learns() -> None:
    """The winner of many beats the median of the first round."""
    _, figures = search(configurations=24, finalists=4, tasks=3)
    assert figures["mean_regret"] < figures["median_configuration_regret"] < REGRET_CAP


def test_the_fit_follows_the_good_trials() -> None:
    """Regrets are least on a known line: intercept and slopes are found; slopes that nothing speaks for are not."""
    rng = np.random.default_rng(0)
    line = np.array([[-5.0, -0.4, -0.2], [3.0, 0.0, 0.0], [-2.0, 0.3, 0.0], [-2.0, 0.0, 0.1]])
    found = []
    for _ in range(400):
        sizes = np.exp(rng.normal(0, 1.5, 2))
        best = line @ [1, *np.log(sizes)]
        settings = best + rng.normal(0, 1, (32, 4))
        near = np.square(settings - best).sum(axis=1)
        examples, parameters = sizes * list(TYPICAL.values())
        found.append(Trials(examples, parameters, settings, np.minimum(0.05 * (near - near.min()), REGRET_CAP)))
    rule, spread = linear_fit(found)
    np.testing.assert_allclose(np.array([rule.coefficients[name] for name in RULE_RANGES["adamw"]]), line, atol=0.1)
    assert (spread < 0.8).all()
    worthless = [Trials(task.examples, task.parameters, rng.normal(0, 1, (32, 4)), task.regrets) for task in found]
    flat, _ = linear_fit(worthless)
    assert np.abs(np.array([flat.coefficients[name] for name in RULE_RANGES["adamw"]])).max() < 0.1


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_a_rule_is_fitted_round_after_round(optimizer: OptimizerName) -> None:
    lines: list[str] = []
    fit = {"trials": 4, "tasks": (3, 2), "workers": 1}
    rule, figures = fit_rule(optimizer, TINY, report=lines.append, **fit)  # type: ignore[arg-type]
    assert fit_rule(optimizer, TINY, report=lambda line: None, **fit) == (rule, figures)  # type: ignore[arg-type]
    low, high = RULE_RANGES[optimizer]["lr"]
    assert low / 10 < rule.schedule(200, 1000).lr < high * 10
    assert figures["tasks"] == 5
    assert 0 <= figures["mean_regret"] <= REGRET_CAP
    assert [line.split(" (")[0] for line in lines[-2:]] == [
        f"{optimizer}: round 2, task 1 of 2", f"{optimizer}: round 2, task 2 of 2"
    ]  # fmt: skip
