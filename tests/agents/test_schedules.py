"""What a user would do in one trial: every schedule by hand, or against torch's own stepped in a loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from agents.application import Controller
from agents.schedules import (
    DEFAULTS,
    Constant,
    Cosine,
    Listed,
    Plateau,
    WarmupStableDecay,
)
from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import CONTROLS, Array
from inner_models.tasks import OptimizerName, Task

OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "sgd")
OTHERS = [name for name in CONTROLS if name != "lr"]


def task_of(optimizer: OptimizerName, horizon: int = 4, examples: int = 64) -> Task:
    sizes = {"horizon": horizon, "interval_examples": examples, "train_rows": 96, "eval_rows": 64}
    return Task.named("digits/mlp", **sizes, optimizer=optimizer)


@dataclass(frozen=True)
class Stub:
    """Runs that nobody trains."""

    task: Task
    runs: int = 2


def path(controller: Controller, losses: Array) -> dict[str, Array]:
    """Values over `[intervals, runs]` of validation losses."""
    rows: list[dict[str, Array]] = []
    for row in losses:
        rows.append({name: np.array(controller.values[name]) for name in CONTROLS})
        controller.step({"val_loss": row, "train_loss": 10 * row})
    return {name: np.array([values[name] for values in rows]) for name in CONTROLS}


def rates(method: Any, horizon: int, optimizer: OptimizerName = "adamw", values: str = "default") -> Array:
    """Learning rates of one run; the other run's are checked to be the same, and the other controls to rest."""
    base = DEFAULTS[optimizer] if values == "default" else calibrated(optimizer)
    found = path(method.attach(Stub(task_of(optimizer, horizon))), np.ones((horizon, 2)))
    np.testing.assert_array_equal(found["lr"][:, 0], found["lr"][:, 1])
    for name in OTHERS:
        np.testing.assert_array_equal(found[name], np.full((horizon, 2), getattr(base, name)))
    return found["lr"][:, 0]


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_constant() -> None:
    assert rates(Constant(), 3).tolist() == [1e-3] * 3
    assert rates(Constant(), 3, "sgd").tolist() == [0.1] * 3
    assert rates(Constant("calibrated"), 3, "sgd", "calibrated").tolist() == [calibrated("sgd").lr] * 3


@pytest.mark.parametrize("values", ["default", "calibrated"])
def test_cosine_by_hand(values: Any) -> None:
    base = DEFAULTS["adamw"] if values == "default" else calibrated("adamw")
    assert base.warmup == 0.05
    found = rates(Cosine(values, lr_factor=2.0), 50, values=values)
    # Middles of intervals: 0.01, 0.03 | 0.05, of which two lie in the warm-up; half-way; the last at 0.99.
    rises = {0: 0.2, 1: 0.6, 2: 1.0, 24: 1.0, 49: 1.0}
    for interval, rise in rises.items():
        middle = 0.01 + 0.02 * interval
        assert found[interval] == pytest.approx(2 * base.lr * rise * (1 + math.cos(math.pi * middle)) / 2, rel=1e-12)
    assert found[24] + found[25] == pytest.approx(2 * base.lr)  # the cosine is odd about the middle
    assert found[49] < 1e-3 * base.lr


def test_warmup_stable_decay_by_hand() -> None:
    found = rates(WarmupStableDecay(), 100, values="calibrated") / calibrated("adamw").lr
    assert found[:6] == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.45, 0.5])
    assert found[5:80] == pytest.approx([0.5] * 75)
    assert found[80] == pytest.approx(0.5 * (1 - math.sqrt(0.025)))  # 0.005 into a fall of 0.2
    assert found[90] == pytest.approx(0.5 * (1 - math.sqrt(0.525)))
    assert found[99] == pytest.approx(0.5 * (1 - math.sqrt(0.975)))
    assert rates(WarmupStableDecay("default", lr_factor=1.0), 10)[5] == pytest.approx(1e-3)


def test_plateau_by_hand() -> None:
    # The first loss is the best; the third bad one after it is more than the patience of 2, then counting starts anew.
    assert (rates(Plateau(), 10) / 1e-3).tolist() == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert (rates(Plateau(factor=0.1), 5) / 1e-3).tolist() == pytest.approx([1, 1, 1, 1, 0.1])
    assert (rates(Plateau(), 40) / 1e-3).tolist()[:11] == [1] * 6 + [0.5] * 5  # a tenth of the run: 4
    assert rates(Plateau("calibrated"), 5, values="calibrated")[0] == calibrated("adamw").lr


def test_plateau_is_torchs_own_for_each_run() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(2.0, 0.5, (60, 3)) - np.linspace(0, 1, 60)[:, None]
    losses[20:30, 1] = np.nan  # missing: the training loss counts, which is ten times as high
    found = path(Plateau(patience=0.05).attach(Stub(task_of("sgd", 60), 3)), losses)["lr"]
    for run in range(3):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=DEFAULTS["sgd"].lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
        expected = []
        for loss in losses[:, run]:
            expected.append(optimizer.param_groups[0]["lr"])
            scheduler.step(float(loss))
        np.testing.assert_array_equal(found[:, run], expected)
    assert len({tuple(column) for column in found.T}) == 3


def test_plateau_without_validation_losses() -> None:
    controller = Plateau().attach(Stub(task_of("adamw", 10), 1))
    for train_loss in (4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0):
        assert controller.values["lr"].tolist() == [1e-3]
        controller.step({"val_loss": np.array([np.nan]), "train_loss": np.array([train_loss])})
    assert controller.values["lr"].tolist() == [5e-4]


def test_a_table_holds_its_end() -> None:
    rows = [{name: float(interval) for name in CONTROLS} for interval in range(3)]
    assert path(Listed(rows, 1), np.ones((5, 1)))["lr"][:, 0].tolist() == [0, 1, 2, 2, 2]
