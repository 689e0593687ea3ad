"""Whole runs under a method: engine and plain PyTorch agree, the test split is judged on, and nobody can peek at it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from agents import application
from agents.application import (
    TEST_ROWS,
    Cohort,
    Controller,
    Run,
    RunController,
    Runs,
    following,
    held_out_rows,
    train,
    train_cohort,
)
from agents.schedules import DEFAULTS, Constant, Cosine, Listed, Plateau, WarmupStableDecay
from hpo_env.hyperparameters import CONTROLS, Array
from inner_models.batched_training import BatchedTraining
from inner_models.datasets import load_dataset
from inner_models.tasks import OptimizerName, Task
from inner_models.training import Training
from tests.hpo_env.test_env import holds

TASK = Task.named("digits/mlp", horizon=4, interval_examples=64, train_rows=96, eval_rows=64)
TASKS = [
    TASK,
    Task.named("wine/mlp", horizon=4, interval_examples=48, train_rows=64, optimizer="sgd"),
    Task.named("diabetes/linear", horizon=3, interval_examples=64),
    Task.named("digits/autoencoder", horizon=3, interval_examples=64, eval_rows=64, optimizer="sgd"),
]
RISING = (0.01, 0.02, 1.0, 1.0)
"""Learning rates of AdamW under which `TASK` is at its best after the second of four intervals."""


@dataclass(frozen=True)
class Table:
    """The default values, with learning rates of one's own."""

    rates: Sequence[float]

    def attach(self, runs: Runs) -> Controller:
        usual = {name: float(getattr(DEFAULTS["adamw"], name)) for name in CONTROLS}
        return Listed([usual | {"lr": rate} for rate in self.rates], runs.runs)


# -- engine and plain PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Cosine("calibrated"), Constant(), Plateau(), WarmupStableDecay()], ids=repr)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_cohort_equals_plain_runs(task: Task, method: Any) -> None:
    cohort = train_cohort(task, method, [3, 8])
    for run, seed in zip(cohort, (3, 8), strict=True):
        plain = train(task, following(method), seed)
        assert (run.seed, plain.seed) == (seed, seed)
        assert len(run.val_loss) == len(run.train_loss) == task.horizon
        for name in ("initial_loss", "train_loss", "val_loss", "test_loss", "final_test_loss"):
            np.testing.assert_allclose(getattr(run, name), getattr(plain, name), rtol=2e-4, err_msg=name)
        assert run.controls == plain.controls
        assert ("dropout" in run.controls) == (not task.name.endswith("linear"))
    assert cohort[0].val_loss != cohort[1].val_loss


def test_what_trains_beside_a_run_does_not_matter() -> None:
    alone, among = train_cohort(TASK, Cosine(), [5])[0], train_cohort(TASK, Cosine(), [4, 5, 6])[1]
    np.testing.assert_allclose(alone.val_loss, among.val_loss, rtol=1e-4)


def test_a_controller_is_told_each_interval_once() -> None:
    """What it sets before an interval is what the interval trains with; the signals it gets are those of the curve."""
    told: list[dict[str, Array]] = []

    class Told(Listed):
        def step(self, signals: Mapping[str, Array]) -> None:
            told.append(dict(signals))
            super().step(signals)

    @dataclass(frozen=True)
    class Telling:
        def attach(self, runs: Runs) -> Controller:
            return Told([dict.fromkeys(CONTROLS, 0.0) | {"lr": rate, "batch_size": 16.0} for rate in RISING], runs.runs)

    runs = train_cohort(TASK, Telling(), [0, 1])
    for index, run in enumerate(runs):
        assert run.controls["lr"] == list(RISING)
        assert run.val_loss == [float(signals["val_loss"][index]) for signals in told]
        assert run.train_loss == [float(signals["train_loss"][index]) for signals in told]


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))


def test_a_plain_run_writes_and_reports() -> None:
    writer, epochs = Writer(), list[int]()
    run = train(TASK, following(Cosine()), 0, writer=writer, report=epochs.append)
    assert epochs == [1, 2, 3, 4]
    found = {(tag, step): value for tag, value, step in writer.scalars}
    assert len(found) == len(writer.scalars)
    for step in epochs:
        assert found["inner/val_loss", step] == run.val_loss[step - 1]
        assert found["inner/train_loss", step] == run.train_loss[step - 1]
        for name in run.controls:
            assert found[f"control/{name}", step] == run.controls[name][step - 1]


def test_a_run_without_validation_losses_follows_too() -> None:
    run = Training(TASK, 0)
    controller = following(Plateau())(run)
    for train_loss in (1.0, 1.0, 1.0, 1.0):
        controller.step(train_loss=train_loss)
    assert controller.hyperparameters["lr"] == run.optimizer.param_groups[0]["lr"] == DEFAULTS["adamw"].lr / 2


# -- the test loss -----------------------------------------------------------------------------------------------------


def by_hand(optimizer: OptimizerName = "adamw") -> tuple[list[float], list[float]]:
    """Validation loss, and loss on the test rows, after each interval of `TASK` under `RISING`."""
    run = Training(TASK, 0)
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = DEFAULTS["adamw"].dropout
    run.batch_sampler.batch_size = int(DEFAULTS["adamw"].batch_size)
    run.optimizer.param_groups[0]["weight_decay"] = DEFAULTS["adamw"].weight_decay
    test = load_dataset("digits").test
    assert test is not None
    val_losses, test_losses = [], []
    for rate in RISING:
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        val_losses.append(run.advance()["val_loss"])
        restored = copy.deepcopy(run.model).eval()
        with torch.no_grad():
            outputs = restored(test.inputs[:TEST_ROWS])
        test_losses.append(functional.cross_entropy(outputs, test.targets[:TEST_ROWS]).item())
    return val_losses, test_losses


@pytest.mark.parametrize("engine", [True, False])
def test_the_test_loss_is_that_of_the_best_interval(engine: bool) -> None:
    val_losses, test_losses = by_hand()
    best = int(np.argmin(val_losses))
    assert best == 1
    run = train_cohort(TASK, Table(RISING), [0])[0] if engine else train(TASK, following(Table(RISING)), 0)
    np.testing.assert_allclose(run.val_loss, val_losses, rtol=1e-3)
    assert run.test_loss == pytest.approx(test_losses[best], rel=1e-3)
    assert run.final_test_loss == pytest.approx(test_losses[-1], rel=1e-3)
    assert run.final_test_loss > 1.1 * run.test_loss


def test_held_out_rows_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    test = load_dataset("digits").test
    assert test is not None
    rows = held_out_rows(TASK)
    assert torch.equal(rows.inputs, test.inputs[:TEST_ROWS])
    assert torch.equal(rows.targets, test.targets[:TEST_ROWS])
    monkeypatch.setattr(application, "TEST_ROWS", 7)
    assert torch.equal(held_out_rows(TASK).inputs, test.inputs[:7])
    rows = held_out_rows(Task.named("digits/autoencoder"))
    assert torch.equal(rows.targets, test.inputs[:7].flatten(1))


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_run_as_json() -> None:
    run = Run(
        seed=3,
        initial_loss=2.5,
        train_loss=[1.0, math.nan],
        val_loss=[math.inf, 0.25],
        controls={"lr": [1e-3, 2e-3]},
        test_loss=-math.inf,
        final_test_loss=0.5,
        seconds=1.5,
        notes={"guard": [1], "observations": [[0.0, 1.0]]},
    )
    text = json.dumps(run.to_dict(), allow_nan=False)
    assert text.count("null") == 3
    again = Run.from_dict(json.loads(text))
    assert [again.train_loss[0], again.val_loss[1], again.initial_loss, again.final_test_loss] == [1.0, 0.25, 2.5, 0.5]
    assert all(math.isnan(loss) for loss in (again.train_loss[1], again.val_loss[0], again.test_loss))
    assert (again.seed, again.controls, again.notes, again.seconds) == (3, run.controls, run.notes, 1.5)
    # Without holes, nothing is lost.
    whole = train_cohort(TASK, Cosine(), [0])[0]
    assert Run.from_dict(json.loads(json.dumps(whole.to_dict(), allow_nan=False))) == whole


# -- the test split ----------------------------------------------------------------------------------------------------

WHOLE = Task.named("digits/mlp", horizon=3, interval_examples=64)
"""All rows, so that the walk may look for any of them."""


@dataclass
class Spy:
    """A method on either side, that walks all it is given at every chance."""

    found: list[bool] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)

    def look(self, *things: Any) -> None:
        test = load_dataset(WHOLE.dataset).test
        assert test is not None
        self.given += things
        self.found.append(holds(self.given, test.inputs))

    def attach(self, cohort: Cohort) -> Controller:
        assert isinstance(cohort, Cohort)
        self.look(cohort)
        return self

    @property
    def values(self) -> dict[str, Array]:
        return {name: np.full(2, getattr(DEFAULTS["adamw"], name)) for name in CONTROLS}

    def __call__(self, run: Training) -> Spy:
        self.look(run)
        return self

    @property
    def hyperparameters(self) -> dict[str, float]:
        return {}

    def step(self, *signals: Any, **losses: Any) -> None:
        self.look(signals, losses)


@pytest.mark.parametrize("engine", [True, False])
def test_nobody_can_peek_at_the_test_split(engine: bool) -> None:
    spy = Spy()
    if engine:
        train_cohort(WHOLE, spy, [0, 1])
    else:
        train(WHOLE, spy, 0)
    assert spy.found == [False] * (1 + WHOLE.horizon)
    # The walk does find what is there.
    dataset = load_dataset(WHOLE.dataset)
    assert dataset.test is not None
    assert holds(spy.given, dataset.train.inputs)
    assert holds(spy.given, dataset.val.inputs)
    given = spy.given[0]
    rows = dataset.test.inputs[5:6].clone()
    given.hidden = lambda: rows
    assert holds(spy.given, dataset.test.inputs)
    del given.hidden
    training = given._training if engine else given
    assert isinstance(training, BatchedTraining if engine else Training)
    with pytest.raises(LookupError, match="made without the test split"):
        training.evaluate("test")


def test_a_cohort_offers_nothing_to_evaluate_with() -> None:
    cohort = Cohort(BatchedTraining(TASK, [0, 1]))
    public = {name for name in dir(cohort) if not name.startswith("_")}
    assert public == {
        "task",
        "runs",
        "parameters",
        "examples",
        "hyperparameters",
        "initial_loss",
        "snapshot",
        "restore",
    }
    assert cohort.examples == 4 * 64
    np.testing.assert_allclose(
        cohort.initial_loss, [Training(TASK, seed).evaluate("val") for seed in (0, 1)], rtol=1e-5
    )


def test_a_run_that_was_lost_at_once_has_no_test_loss() -> None:
    task = Task.named("diabetes/mlp", horizon=3, interval_examples=64, train_rows=96, eval_rows=64, optimizer="sgd")
    lost = Cosine("default", 1e12)
    for run in (*train_cohort(task, lost, [0, 1]), train(task, following(lost), 0)):
        assert not any(math.isfinite(loss) for loss in run.val_loss)
        assert run.test_loss == math.inf


def test_no_controller_sees_a_test_row_go_through_its_model() -> None:
    seen: list[torch.Tensor] = []

    def spying(run: Training) -> RunController:
        run.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        return following(Constant())(run)

    train(TASK, spying, 0)
    rows = held_out_rows(TASK).inputs
    assert len(seen) > 3
    assert not any((inputs[:, None] == rows[None]).flatten(2).all(2).any() for inputs in seen)
