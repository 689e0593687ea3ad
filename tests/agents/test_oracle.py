"""The judge's figures of a schedule that is known to be the best there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from agents.application import Controller, Run
from agents.schedules import Constant, Cosine, Plateau, WarmupStableDecay
from agents.summary import losses, summarize
from inner_models.tasks import Task
from tests.fabricated import SEEDS, TASK, evaluation

CURVATURE, NOISE, STEPS, DIMENSIONS = 2.0, 3.0, 60, 4000


def noisy_quadratic(rates: Callable[[float], float], seed: int) -> Run:
    """SGD on h/2 mean(x^2) over many dimensions, with gradient noise of variance s^2 in each.

    One step at rate a takes v = E[x^2] to (1 - a h)^2 v + a^2 s^2. That is least, over a, where
    -2 h (1 - a h) v + 2 a s^2 = 0: at a = h v / (h^2 v + s^2), which gives v s^2 / (h^2 v + s^2), or
    1/v' = 1/v + h^2 / s^2. As v' rises with v at every a, the greedy choice is the best over the whole run too.

    Args:
        rates: last validation loss -> learning rate of the coming step.
    """
    rng = np.random.default_rng(seed)  # equal seeds: equal starts and equal noise
    x = rng.standard_normal(DIMENSIONS)
    curve = [initial := CURVATURE / 2 * float(np.mean(x**2))]
    for _ in range(STEPS):
        gradient = CURVATURE * x + NOISE * rng.standard_normal(DIMENSIONS)
        x = x - rates(curve[-1]) * gradient
        curve.append(CURVATURE / 2 * float(np.mean(x**2)))
    best = min(curve[1:])
    return Run(seed, initial, curve[1:], curve[1:], {}, best, curve[-1], 1.0)


def oracle() -> Callable[[float], float]:
    v = [1.0]

    def rate(loss: float) -> float:
        chosen = CURVATURE * v[0] / (CURVATURE**2 * v[0] + NOISE**2)
        v[0] = 1 / (1 / v[0] + CURVATURE**2 / NOISE**2)
        return chosen

    return rate


@dataclass(frozen=True)
class Stub:
    task: Task
    runs: int = 1


def scheduled(method: Any, factor: float) -> Callable[[float], float]:
    """A schedule's rates, times a factor."""
    controller: Controller = method.attach(Stub(replace(TASK, horizon=STEPS)))
    begun = False

    def rate(loss: float) -> float:
        nonlocal begun
        if begun:
            controller.step({"val_loss": np.array([loss]), "train_loss": np.array([loss])})
        begun = True
        return factor * float(controller.values["lr"][0])

    return rate


def many(make: Callable[[], Callable[[float], float]]) -> list[Run]:
    return [noisy_quadratic(make(), seed) for seed in range(SEEDS)]


def test_the_simulation_follows_its_recursion() -> None:
    """The oracle ends at 1/v = 1 + T h^2/s^2; a constant rate near a h v = 2 - a h of its own noise a s^2."""
    final = 1 / (1 + STEPS * CURVATURE**2 / NOISE**2)
    assert [r.val_loss[-1] for r in many(oracle)] == pytest.approx([CURVATURE / 2 * final] * SEEDS, rel=0.1)
    rate = 0.3
    stationary = rate * NOISE**2 / (CURVATURE * (2 - rate * CURVATURE))
    assert noisy_quadratic(lambda _: rate, 0).val_loss[-1] == pytest.approx(CURVATURE / 2 * stationary, rel=0.1)


def test_an_oracle_beats_all() -> None:
    scales = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    shapes = {"constant": Constant(), "cosine": Cosine(), "wsd": WarmupStableDecay("default"), "plateau": Plateau()}
    others: dict[str, list[Run]] = {
        f"{name}-{factor}": many(lambda m=method, f=factor: scheduled(m, f))  # type: ignore[misc]
        for name, method in shapes.items()
        for factor in scales
    }
    others["calibrated"] = others["cosine-1.0"]
    rng = np.random.default_rng(0)
    bank = [
        noisy_quadratic(scheduled(Constant() if trial % 2 else Cosine(), 10 * 10 ** rng.uniform(-3, 0)), trial % SEEDS)
        for trial in range(32)
    ]
    found = summarize(
        evaluation(
            {"quadratic": many(oracle)},
            lambda _: bank,
            {name: (lambda label, name=name: others[name]) for name in others},  # type: ignore[misc]
        )
    )["summary"]
    assert found["rse_by_task"] == {"quadratic": len(bank)}
    assert found["rse_calibrated_by_task"]["quadratic"] < len(bank)
    assert found["win_rate"] == 1.0
    assert found["against"].keys() == others.keys()
    for name, against in found["against"].items():
        assert against["win_rate"] == against["test_win_rate"] == 1.0, name
        assert against["val_log_ratio_ci"][0] > 0.02, name
        assert against["worst_decile"] > 0.02, name
    # The rates at which these shapes are at their best are among those tried, or beating them would say little.
    for name in shapes:
        ends = [float(np.mean(losses(others[f"{name}-{factor}"], "val"))) for factor in scales]
        assert 0 < int(np.argmin(ends)) < len(ends) - 1, (name, ends)
    assert found["against_searches"]["random"]["32"]["val_log_ratio_ci"][0] > 0
