"""Methods that act at every step of the optimizer: by hand, or against torch's own stepped in a loop."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.application import following, train
from agents.evaluation import BASELINES
from agents.optional import MissingPackage, require
from agents.schedules import (
    DEFAULTS,
    Hypergradient,
    OneCycle,
    Prodigy,
    ScheduleFree,
    _Descent,
)
from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import Array
from inner_models.tasks import OptimizerName, Task
from inner_models.training import Training

OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "sgd")


def task_of(optimizer: OptimizerName, horizon: int = 4, examples: int = 64) -> Task:
    sizes = {"horizon": horizon, "interval_examples": examples, "train_rows": 96, "eval_rows": 64}
    return Task.named("digits/mlp", **sizes, optimizer=optimizer)


# -- optimizers that set the rate themselves ---------------------------------------------------------------------------


def every_step(run: Training, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """What `read` says of the first parameter group at each step of the optimizer, once they are made."""
    seen: list[Any] = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(read(optimizer.param_groups[0])))
    return seen


def advance(run: Training) -> None:
    for _ in range(run.task.horizon):
        run.advance()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_cycle_is_torchs_own(optimizer: OptimizerName) -> None:
    run, base = Training(task_of(optimizer), 0), calibrated(optimizer)

    def read(group: dict[str, Any]) -> tuple[float, float]:
        return group["lr"], group["momentum"] if optimizer == "sgd" else group["betas"][0]

    OneCycle()(run)
    seen = every_step(run, read)
    advance(run)
    steps = 4 * 64 // 16
    twin: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    lone = twin([torch.zeros(1)], **({"lr": 0.1, "momentum": 0.9} if optimizer == "sgd" else {}))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(lone, base.lr, total_steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(read(lone.param_groups[0]))
        lone.step()
        scheduler.step()
    assert seen == expected
    lrs, momenta = np.array(seen).T
    assert lrs.max() == pytest.approx(base.lr, rel=0.1)
    assert lrs[0] == pytest.approx(base.lr / 25)
    assert lrs[-1] < base.lr / 1e4
    assert [momenta[0], momenta[-1]] == pytest.approx([0.95, 0.95])
    assert momenta.argmin() == lrs.argmax() > 0
    assert run.optimizer.param_groups[0]["weight_decay"] == base.weight_decay


def test_schedule_free_evaluates_at_the_averaged_point() -> None:
    pytest.importorskip("schedulefree")
    run = Training(task_of("adamw"), 0)
    ScheduleFree()(run)
    run.advance()
    val_loss = run.advance()["val_loss"]
    optimizer: Any = run.optimizer
    optimizer.train()
    trained = [p.detach().clone() for p in run.model.parameters()]
    # The gradient is taken at y = 0.9 x + 0.1 z; x is the average of the iterates z.
    averages = [(y - 0.1 * optimizer.state[p]["z"]) / 0.9 for p, y in zip(run.model.parameters(), trained, strict=True)]
    model = copy.deepcopy(run.model).eval()
    for parameter, average in zip(model.parameters(), averages, strict=True):
        parameter.data = average
    val = run.data.dataset.val
    with torch.no_grad():
        by_hand = torch.nn.functional.cross_entropy(model(val.inputs), val.targets).item()
    assert val_loss == pytest.approx(by_hand, rel=1e-4)
    assert run.evaluate("val") == val_loss
    evaluated = [p.detach() for p in run.model.parameters()]
    for before, now, average in zip(trained, evaluated, averages, strict=True):
        assert not torch.equal(before, now)
        torch.testing.assert_close(now, average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schedule_free_settings(optimizer: OptimizerName) -> None:
    package = pytest.importorskip("schedulefree")
    run, base = Training(task_of(optimizer, 40), 0), calibrated(optimizer)
    controller = ScheduleFree()(run)
    decayed, others = run.optimizer.param_groups
    assert type(run.optimizer) is (package.AdamWScheduleFree if optimizer == "adamw" else package.SGDScheduleFree)
    assert decayed["lr"] == others["lr"] == base.lr * (1 if optimizer == "adamw" else 10)
    assert (decayed["weight_decay"], others["weight_decay"]) == (base.weight_decay, 0)
    assert decayed["warmup_steps"] == others["warmup_steps"] == 8  # of 40 intervals of 4 steps
    assert controller.hyperparameters["batch_size"] == base.batch_size
    assert controller.hyperparameters["dropout"] == base.dropout


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", ["default", "calibrated"])
def test_prodigy_anneals_and_finds_its_own_scale(values: Any) -> None:
    package = pytest.importorskip("prodigyopt")
    run = Training(task_of("adamw", 12, 512), 0)
    base = calibrated("adamw") if values == "calibrated" else DEFAULTS["adamw"]
    Prodigy(values)(run)
    assert isinstance(run.optimizer, package.Prodigy)
    seen = every_step(run, lambda group: (group["lr"], group["d"]))
    advance(run)
    lrs, scales = np.array(seen).T
    steps = round(12 * 512 / base.batch_size)
    np.testing.assert_allclose(lrs, (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2, rtol=1e-9)
    assert (np.diff(scales) >= 0).all()
    assert scales[-1] > 10 * scales[0] > 0
    decayed, others = run.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (base.weight_decay, 0)


# -- hypergradient descent ---------------------------------------------------------------------------------------------

CURVATURE = np.array([1.0, 3.0, 0.5])
START = np.array([1.0, -2.0, 0.5])


def hand_rolled(kind: str, lr: float, beta: float, steps: int, decay: float) -> tuple[list[float], Array]:
    """Rates at each step, and the weights at the end, of loss = sum(curvature x^2) / 2, by the paper's formulas.

    After a step at rate 0, which moves nothing, the direction is still that of the step before.
    """
    x, first, second = START.copy(), np.zeros(3), np.zeros(3)
    direction, lrs = np.zeros(3), []
    for step in range(1, steps + 1):
        gradient = CURVATURE * x
        lr = max(0.0, lr + beta * float(gradient @ direction))
        lrs.append(lr)
        if kind == "sgd":
            first = 0.9 * first + gradient + decay * x
            taken = first.copy()
        else:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            taken = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8) + decay * x
        x = x - lr * taken
        direction = taken if lr > 0 else direction
    return lrs, x


@pytest.mark.parametrize(("kind", "lr", "beta"), [("sgd", 0.01, 1e-3), ("adamw", 0.5, 0.01)])
def test_hypergradient_by_hand(kind: str, lr: float, beta: float) -> None:
    x = torch.tensor(START, requires_grad=True)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD([x], lr=lr, momentum=0.9, weight_decay=0.1)
        if kind == "sgd"
        else torch.optim.AdamW([x], lr=lr, weight_decay=0.1)
    )
    _Descent(optimizer, beta)
    lrs = []
    for _ in range(12):
        x.grad = torch.tensor(CURVATURE) * x.detach()
        optimizer.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    expected, end = hand_rolled(kind, lr, beta, 12, 0.1)
    np.testing.assert_allclose(lrs, expected, rtol=1e-9)
    np.testing.assert_allclose(x.detach().numpy(), end, rtol=1e-9)
    assert min(np.diff(lrs)) < 0 < max(np.diff(lrs))
    assert (min(lrs) == 0) == (kind == "sgd")  # a rate that would turn negative stops at 0


def test_hypergradient_keeps_the_rate_where_a_gradient_is_not_finite() -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    _Descent(optimizer, 1e-3)
    for gradient in (1.0, math.inf, math.nan):
        x.grad = torch.full((2,), gradient)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hypergradient_on_a_run(optimizer: OptimizerName) -> None:
    """Each optimizer has its beta; both parameter groups follow; over one step the rate moves by beta g . d."""
    run = Training(task_of(optimizer), 0)
    own, other = f"beta_{optimizer}", f"beta_{'sgd' if optimizer == 'adamw' else 'adamw'}"
    betas: dict[str, Any] = {own: 1e-6, other: 1e3}
    Hypergradient(**betas)(run)
    weights: list[list[Tensor]] = []
    gradients: list[list[Tensor]] = []
    seen = every_step(run, lambda group: group["lr"])

    def remember(*_: Any) -> None:
        weights.append([p.detach().clone() for p in run.model.parameters()])
        gradients.append([p.grad.clone() for p in run.model.parameters() if p.grad is not None])

    run.optimizer.register_step_pre_hook(remember)
    advance(run)
    assert len(seen) == 8
    for step in (1, 4, 7):
        moved = zip(weights[step - 1], weights[step], gradients[step], strict=True)
        gain = sum(float(((before - now) * g).sum()) for before, now, g in moved) / seen[step - 1]
        assert seen[step] - seen[step - 1] == pytest.approx(1e-6 * gain, rel=1e-2)
    assert run.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[1]["lr"] != DEFAULTS[optimizer].lr


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_learns(name: str, optimizer: OptimizerName) -> None:
    package = {"schedule-free": "schedulefree", "prodigy": "prodigyopt"}.get(name)
    if package:
        pytest.importorskip(package)
    method = BASELINES[name]
    task = task_of(optimizer, 8, 512)
    run = train(task, following(method) if hasattr(method, "attach") else method, 0)
    assert run.val_loss[-1] < 0.9 * run.initial_loss
    assert max(run.test_loss, run.final_test_loss) < 0.9 * run.initial_loss


@pytest.mark.parametrize(("package", "method"), [("schedulefree", ScheduleFree()), ("prodigyopt", Prodigy())])
def test_a_missing_package(package: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{package} is not installed; pip install 'hyperpilot\[compare\]'"):
        method(Training(task_of("adamw"), 0))
    assert require("math", extra="compare") is math
