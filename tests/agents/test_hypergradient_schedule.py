"""Hypergradients against torch's optimizers, finite differences and the closed form of a noisy quadratic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.application import train, train_cohort
from agents.hypergradient_schedule import (
    Config,
    EveryStep,
    LearnedSchedule,
    hypergradient,
    learn,
)
from agents.unrolled import KINDS, Problem, State, Unrolled, hats
from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import Array
from inner_models.datasets import Split
from inner_models.models import ModelKind, ModelSpec
from inner_models.tasks import OptimizerName, Task
from inner_models.training import Training, parameter_groups

SCHEDULE = LearnedSchedule((1e-2, 3e-2, 1e-3), (0.3, 0.1, 0.5), (0.9, 0.8, 0.95), batch_size=4)
TASK = Task("digits", ModelSpec("mlp", 8, 1), horizon=3, interval_examples=64, train_rows=64, eval_rows=64)


def regression(optimizer: OptimizerName = "adamw", steps: int = 6) -> Problem:
    """A small network on random numbers, in double precision."""
    rows = torch.Generator().manual_seed(0)
    x, y = (torch.randn(24, size, generator=rows, dtype=torch.float64) for size in (3, 2))

    def build(generator: torch.Generator) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=generator)
        return model

    return Problem(build, Split(x[:16], y[:16]), Split(x[16:], y[16:]), "mse", steps, optimizer, batch_size=4)


def unrolled(problem: Problem, replicas: int, seed: int = 0) -> Unrolled:
    return Unrolled(problem, replicas, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_are_torchs_own(optimizer: OptimizerName) -> None:
    """Two replicas, held to torch's optimizer on one after the other; biases do not decay."""
    problem, schedule = regression(optimizer), replace(SCHEDULE, optimizer=optimizer)
    runs = unrolled(problem, 2)
    scaled = schedule.scaled.double().expand(2, -1, -1)
    state = runs.run(scaled, runs.run(scaled, runs.start, 0, 4), 4, 2)
    for replica in range(2):
        model = problem.build(torch.Generator())
        nn.utils.vector_to_parameters(runs.start.weights[replica], model.parameters())
        groups = parameter_groups(model)
        own = torch.optim.AdamW(groups) if optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
        for step in range(6):
            values = schedule.at((step + 0.5) / 6)
            for group, decays in zip(own.param_groups, (1, 0), strict=True):
                group.update(lr=values["lr"], weight_decay=decays * values["weight_decay"], momentum=values["momentum"])
                group["betas"] = (values["momentum"], 0.999)
            rows = runs.rows[replica, step]
            own.zero_grad()
            (model(problem.train.inputs[rows]) - problem.train.targets[rows]).square().mean().backward()
            own.step()
        weights = nn.utils.parameters_to_vector(model.parameters())
        torch.testing.assert_close(state.weights[replica], weights, rtol=1e-5, atol=1e-7)
        val = (model(problem.val.inputs) - problem.val.targets).square().mean()
        torch.testing.assert_close(runs.val_loss(state)[replica], val, rtol=1e-5, atol=1e-7)
    assert not torch.equal(runs.rows[0], runs.rows[1])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("window", [6, 4])
def test_finite_differences(optimizer: OptimizerName, window: int) -> None:
    """Every value of the schedule; with windows of 4, the state after the fourth step is a constant."""
    schedule = replace(SCHEDULE, optimizer=optimizer)
    runs = unrolled(regression(optimizer), 2)
    scaled = schedule.scaled.double()
    found, _ = hypergradient(runs, scaled, window, clip=math.inf)

    def loss(moved: Tensor, start: State, first: int, steps: int) -> Tensor:
        return runs.val_loss(runs.run(moved.expand(2, -1, -1), start, first, steps)).log()

    starts = [(runs.start, 0, window)]
    if window < 6:
        starts.append((runs.run(scaled.expand(2, -1, -1), runs.start, 0, window), window, 6 - window))
    expected = torch.zeros_like(found)
    for row in range(3):
        for knot in range(3):
            by = torch.zeros_like(scaled)
            by[row, knot] = 1e-5
            slopes = [(loss(scaled + by, *start) - loss(scaled - by, *start)) / 2e-5 for start in starts]
            expected[:, row, knot] = torch.stack(slopes).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().min() > 0 or window < 6


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_differentiated_twice(kind: ModelKind) -> None:
    task = replace(TASK, model=ModelSpec(kind, 8, 1, normalization="layer"))
    runs = unrolled(Problem.of(task, dropout=0.1), 2)
    slopes, _ = hypergradient(runs, LearnedSchedule.untrained().scaled, 3)
    assert slopes.isfinite().all()
    assert slopes.abs().sum((1, 2)).min() > 0


# -- the noisy quadratic of Wu et al. 2018 -----------------------------------------------------------------------------

CURVATURES, COPIES = np.array([1.0, 0.1]), 200
STEPS, NOISE = 40, 0.3
RATES = np.geomspace(0.05, 1.0, 1000)


class Scaled(nn.Module):
    """w sqrt(h), such that the mean squared error to c sqrt(h) is half the sum of h (w - c)^2."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        h = torch.tensor(CURVATURES, dtype=torch.float32).repeat(COPIES)
        self.root = (h * len(h) / 2).sqrt()
        self.w = nn.Parameter(torch.randn(len(h), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * self.root).expand(len(x), -1)


def quadratic() -> Problem:
    root = Scaled(torch.Generator()).root
    optima = NOISE * torch.randn(2000, len(root), generator=torch.Generator().manual_seed(1))
    none = torch.zeros(1, len(root))
    return Problem(Scaled, Split(optima, optima * root), Split(none, none), "mse", STEPS, "sgd", batch_size=1)


def closed_form(rates: Array, window: int) -> tuple[Array, Array]:
    """d log(expected loss at the end of a window) / d log lr, mean over windows, and the expected loss after the run.

    Without momentum E w^2 becomes (1 - lr h)^2 E w^2 + (lr h noise)^2; its slope is carried on within a window alone.
    """
    step_sizes = rates[:, None] * CURVATURES
    square, slope = np.ones_like(step_sizes), np.zeros_like(step_sizes)
    slopes = []
    for step in range(1, STEPS + 1):
        keep = 1 - step_sizes
        slope = keep**2 * slope - 2 * step_sizes * keep * square + 2 * (step_sizes * NOISE) ** 2
        square = keep**2 * square + (step_sizes * NOISE) ** 2
        if step % window == 0:
            slopes.append((slope @ CURVATURES) / (square @ CURVATURES))
            slope = np.zeros_like(slope)
    return np.mean(slopes, axis=0), square @ CURVATURES / 2


def end_of(window: int) -> float:
    """The learning rate at which windows of this length see nothing to gain."""
    return float(RATES[np.argmax(closed_form(RATES, window)[0] > 0)])


def constant(lr: float) -> LearnedSchedule:
    return LearnedSchedule((lr,), (1e-6,), (0.01,), batch_size=1, optimizer="sgd")


def test_short_horizons_want_rates_that_are_too_small() -> None:
    """The rate that a window ends at grows with its length, up to the best one; the hypergradient agrees everywhere."""
    windows = (1, 5, STEPS)
    ends = np.array([end_of(window) for window in windows])
    assert (ends[1:] > 1.15 * ends[:-1]).all()
    assert ends[-1] == pytest.approx(RATES[closed_form(RATES, STEPS)[1].argmin()], rel=0.01)
    for window in windows:
        expected, _ = closed_form(ends, window)
        for lr, slope in zip(ends, expected, strict=True):
            scaled = constant(lr).scaled
            scaled[2] = -50.0  # no momentum, less than a schedule may have
            found, _ = hypergradient(unrolled(quadratic(), 32), scaled, window, clip=math.inf)
            assert found[:, 0, 0].mean().item() == pytest.approx(slope, rel=0.05, abs=0.03), (window, lr)


def test_learning_ends_where_the_closed_form_says() -> None:
    config = Config(updates=12, unroll=1, replicas=4, lr=0.1, learned=("lr",), clip=1.0)
    found, taken = learn(lambda _: quadratic(), constant(0.33), config, torch.Generator().manual_seed(0))
    assert found.lr[0] == pytest.approx(end_of(1), rel=0.15)
    assert (*found.weight_decay, *found.momentum) == pytest.approx((1e-6, 0.01))
    assert taken == 12 * 4 * STEPS


# -- learning ----------------------------------------------------------------------------------------------------------


def test_more_hypergradient_steps_on_a_task_lower_its_loss() -> None:
    problem, start = Problem.of(TASK), LearnedSchedule.untrained(knots=3)
    config = Config(updates=6, replicas=2, lr=0.5)
    found, taken = learn(lambda _: problem, start, config, torch.Generator().manual_seed(0))
    assert taken == 6 * 2 * 12
    losses = []
    for schedule in (start, found):
        judged = unrolled(problem, 8, seed=1)
        _, last = hypergradient(judged, schedule.scaled)
        losses.append(last.mean().item())
    assert losses[1] < losses[0] - 0.05
    assert found.momentum == pytest.approx(start.momentum)
    assert (found.batch_size, found.dropout) == (16, calibrated("adamw").dropout)


def test_equal_seeds_are_equal_whatever_the_global_generator() -> None:
    problem, start = Problem.of(TASK, dropout=0.5), LearnedSchedule.untrained()
    config = Config(updates=2, unroll=5, replicas=2)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(learn(lambda _: problem, start, config, torch.Generator().manual_seed(7))[0])
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(1), drawn)
    assert found[0] == found[1] != start


def test_a_window_keeps_nothing_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = unrolled(regression(), 2)
    begun, run = list[bool](), runs.run

    def spy(scaled: Tensor, state: State, first: int, steps: int) -> State:
        begun.append(any(part.requires_grad for part in state))
        return run(scaled, state, first, steps)

    monkeypatch.setattr(runs, "run", spy)
    hypergradient(runs, SCHEDULE.scaled.double(), 4)
    assert begun == [False, False]


def test_each_replica_is_clipped_alone_and_lost_ones_count_for_nothing() -> None:
    runs = unrolled(regression(), 3)
    scaled = SCHEDULE.scaled.double()
    whole, _ = hypergradient(runs, scaled, clip=math.inf)
    norms = whole.flatten(1).norm(dim=1)
    clip = float(norms.sort().values[1])
    clipped, _ = hypergradient(runs, scaled, clip=clip)
    torch.testing.assert_close(clipped, whole * (clip / norms).clamp(max=1)[:, None, None])
    runs.start.weights[1] = math.nan
    lost, losses = hypergradient(runs, scaled, clip=math.inf)
    assert not lost[1].any()
    assert losses.isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(lost[[0, 2]], whole[[0, 2]])


# -- what was learned, on runs -----------------------------------------------------------------------------------------


def logit(value: float) -> float:
    return math.log(value / (1 - value))


def test_piecewise_linear_on_each_scale() -> None:
    schedule = LearnedSchedule((1e-2, 1e-4, 1e-3), (0.1, 0.1, 1e-3), (0.9, 0.5, 0.99))
    assert [schedule.at(at)["lr"] for at in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-3], rel=1e-5)
    assert schedule.at(0.75)["weight_decay"] == pytest.approx(1e-2, rel=1e-5)
    assert logit(schedule.at(0.25)["momentum"]) == pytest.approx(logit(0.9) / 2, rel=1e-4)
    assert LearnedSchedule((0.1,), (0.2,), (0.3,)).at(0.7)["lr"] == pytest.approx(0.1)
    assert hats(torch.tensor([0.0, 0.1, 0.9]), 3).sum(0).tolist() == pytest.approx([1, 1, 1])
    assert schedule.with_scaled(schedule.scaled).lr == pytest.approx(schedule.lr)


def test_attach_sets_what_was_learned() -> None:
    schedule = replace(SCHEDULE, batch_size=32, dropout=0.25)
    run = train_cohort(TASK, schedule, [0])[0]
    for name in ("lr", "weight_decay"):
        expected: Array = np.array([schedule.at(at)[name] for at in (1 / 6, 1 / 2, 5 / 6)])
        assert run.controls[name] == pytest.approx(expected)
        assert len(set(run.controls[name])) == 3
    assert run.controls["batch_size"] == [32, 32, 32]
    assert run.controls["dropout"] == [0.25] * 3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_step_sets_momentum_too(optimizer: OptimizerName) -> None:
    schedule = replace(SCHEDULE, batch_size=16, optimizer=optimizer)
    seen = []

    def attach(run: Training) -> Any:
        controller = EveryStep(schedule)(run)

        def look(own: torch.optim.Optimizer, *_: Any) -> None:
            decayed, others = own.param_groups
            momentum = decayed["betas"][0] if optimizer == "adamw" else decayed["momentum"]
            seen.append((decayed["lr"], decayed["weight_decay"], momentum))
            assert others["weight_decay"] == 0
            assert others["lr"] == decayed["lr"]

        run.optimizer.register_step_post_hook(look)
        return controller

    run = train(replace(TASK, optimizer=optimizer), attach, 0)
    assert len(seen) == 12
    for step, values in enumerate(seen):
        assert values == pytest.approx(tuple(schedule.at((step + 0.5) / 12).values()))
    assert run.controls["batch_size"] == [16] * 3


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="unroll must be 1 step or more, not 0; leave it out for the whole run"):
        Config(unroll=0)
    with pytest.raises(ValueError, match="updates must be 1 or more, not 0"):
        Config(updates=0)
    with pytest.raises(ValueError, match="lr, clip and memory must be positive"):
        Config(clip=0)
    with pytest.raises(ValueError, match="learned must be some of lr, weight_decay, momentum, not dropout"):
        Config(learned=("dropout",))
    with pytest.raises(ValueError, match="must have equally many values"):
        LearnedSchedule((0.1, 0.2), (0.1,), (0.9,))
    with pytest.raises(ValueError, match=r"momentum must lie in 0\.01\.\.0\.999, not be 1\.0"):
        LearnedSchedule((0.1,), (0.1,), (1.0,))
    with pytest.raises(ValueError, match=r"lr must lie in 1e-06\.\.1, not be nan"):
        LearnedSchedule((math.nan,), (0.1,), (0.9,))
    with pytest.raises(ValueError, match="gun-point/gru cannot be unrolled: its model must be one of linear, mlp"):
        Problem.of(Task.named("gun-point/gru"))
    with pytest.raises(ValueError, match=r"digots.*digits"):
        Problem.of(Task("digots", ModelSpec("mlp")))
    for use in (
        lambda: train_cohort(replace(TASK, optimizer="sgd"), SCHEDULE, [0]),
        lambda: train(replace(TASK, optimizer="sgd"), EveryStep(SCHEDULE), 0),
        lambda: learn(lambda _: regression("sgd"), SCHEDULE, Config(), torch.Generator()),
    ):
        with pytest.raises(ValueError, match="learned for adamw, and means nothing to sgd"):
            use()


def test_windows_that_do_not_fit() -> None:
    config = Config(memory=1e-4, unroll=6)
    with pytest.raises(MemoryError, match=r"windows of 6 steps take at least .* may take 0.0001; lower unroll"):
        learn(lambda _: Problem.of(TASK), LearnedSchedule.untrained(), config, torch.Generator())
    learn(
        lambda _: regression(), SCHEDULE, replace(config, updates=1), torch.Generator()
    )  # some fifty weights: these do


def test_divergence() -> None:
    start = LearnedSchedule((1.0,), (1e-6,), (0.999,), batch_size=1, optimizer="sgd")
    problem = replace(regression("sgd", 16), train=Split(torch.ones(16, 3), torch.full((16, 2), 1e30)))
    problem = replace(problem, build=lambda generator: regression().build(generator).float())
    problem = replace(problem, val=Split(problem.val.inputs.float(), problem.val.targets.float()))
    with pytest.raises(ValueError, match="no replica's validation loss is finite in update 0; begin with a lower lr"):
        learn(lambda _: problem, start, Config(updates=1), torch.Generator())
