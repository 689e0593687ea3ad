"""What is measured under a `GradScaler`: the gradient that the optimizer uses, whatever the scale, and if it does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inner_models.signals import MEASURE_EVERY, GradientMeter
from tests.recipes.page import UNTRAINED, Recipe

STEPS = 2 * MEASURE_EVERY + 1


def test_the_recipe(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe("mixed_precision").run()
    assert recipe["validate"](recipe["model"]) < UNTRAINED / 4
    assert recipe["scaler"].get_scale() > 1
    assert caplog.messages == []


def measured(
    scale: float | None, *, steps: int = STEPS, fused: bool = False, clip: bool = False, overflow: int | None = None
) -> tuple[dict[str, float], int]:
    """Train on one batch of digits in bfloat16, in which powers of two are exact.

    Args:
        scale: the scaler's; None disables it.
        fused: whether the optimizer undoes the scale in its own step.
        overflow: the step in which an element of the gradient is infinite.

    Returns:
        The gradient's signals and the number of steps, as measured.
    """
    recipe = Recipe("setup")
    model, (x, y) = recipe["model"], recipe["train_set"][:32]
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    meter = GradientMeter(optimizer)
    model.eval()  # no dropout: each step sees the same
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = recipe["loss_of"](model(x), y)
        scaler.scale(loss).backward()
        if step == overflow:
            model[0].weight.grad[0, 0] = math.inf
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    counted = meter.steps
    return meter.finish(), counted


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_the_scale_does_not_show(fused: bool, clip: bool) -> None:
    plain = measured(None, fused=fused, clip=clip)
    assert all(map(math.isfinite, plain[0].values()))
    assert measured(1.0, fused=fused, clip=clip) == plain
    assert measured(2.0**16, fused=fused, clip=clip) == plain


@pytest.mark.parametrize("overflow", [0, 3, MEASURE_EVERY])
def test_a_step_that_is_left_out_is_none(overflow: int) -> None:
    """The run is the one without that batch."""
    signals, steps = measured(2.0**16, overflow=overflow)
    expected, fewer = measured(2.0**16, steps=STEPS - 1)
    assert signals == pytest.approx(expected, rel=1e-6)
    assert steps == fewer


@pytest.mark.parametrize("overflow", [0, 3, MEASURE_EVERY])
def test_a_fused_step_that_is_left_out_is_not_measured(overflow: int) -> None:
    """A fused optimizer leaves the step out by itself, once it has been called."""
    signals, _ = measured(2.0**16, fused=True, overflow=overflow)
    expected, _ = measured(2.0**16, fused=True, steps=STEPS - 1)
    assert signals["update_ratio"] == pytest.approx(expected["update_ratio"], rel=1e-6)
    assert all(math.isfinite(value) for value in signals.values())
    assert signals["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.3)  # others of the steps are measured
