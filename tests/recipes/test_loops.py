"""Recipes for loops that do more than the plain one, run from the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from agents import ControlPolicy, Tuner
from inner_models.signals import GradientMeter
from tests.recipes.page import SNIPPETS, UNTRAINED, Moving, Recipe
from tests.user_runs import equal

PLAIN = ("schedulers", "steps", "sam", "optimizers")
ELSEWHERE = ("accumulation", "workers", "mixed_precision", "distributed")


def test_every_recipe_is_run() -> None:
    here = ("groups", "checkpoint", "compiled", "averaged", "closure")
    assert SNIPPETS.keys() == {"setup", *PLAIN, *here, *ELSEWHERE}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_recipes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe(name).run()
    assert recipe["validate"](recipe["model"]) < UNTRAINED / 4
    assert recipe["tuner"].epoch == recipe["EPOCHS"]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("attach", "leaves_a_trace"),
    [
        (partial(lr_scheduler.StepLR, step_size=3), True),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=8), True),
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8), True),
        (lr_scheduler.ReduceLROnPlateau, False),
    ],
)
def test_schedulers_that_are_still_there(
    attach: Callable[[Optimizer], Any], leaves_a_trace: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As the page's table has it."""
    recipe = Recipe("schedulers")
    optimizer = torch.optim.AdamW(recipe["model"].parameters())
    attach(optimizer)
    Tuner.pretrained(optimizer, total_epochs=8)
    assert ["scheduler is attached" in message for message in caplog.messages] == [True] * leaves_a_trace


# -- parameter groups --------------------------------------------------------------------------------------------------


def test_groups() -> None:
    recipe, seen = Recipe("groups"), []
    model, train = recipe["model"], recipe["train"]

    def watched(model: nn.Module, optimizer: Optimizer, loader: Any) -> float:
        before = [p.clone() for p in model.parameters()]
        loss: float = train(model, optimizer, loader)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        seen.append(([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups], moved))
        return loss

    recipe["train"] = watched
    assert recipe["validate"](recipe.run()["model"]) < UNTRAINED / 2
    for epoch, (settings, moved) in enumerate(seen):
        (lr, decay), (bias_lr, bias_decay), (backbone_lr, backbone_decay), (both_lr, both_decay) = settings
        assert (bias_lr, backbone_lr, both_lr) == (lr, pytest.approx(lr / 10), pytest.approx(lr / 10))
        assert (bias_decay, backbone_decay, both_decay) == (0.0, decay, 0.0)
        assert decay > 0
        assert 0 < lr <= 3e-3 * (1 + 1e-9)  # max_factor, from the 1e-3 that was given
        assert moved == [epoch >= 2, epoch >= 2, True, True]  # the backbone's weight and bias, the head's
    assert len({settings[0] for settings, _ in seen}) == recipe["EPOCHS"]
    assert len(list(model.parameters())) == 4


def test_a_group_that_comes_later_gets_the_largest_rate() -> None:
    recipe = Recipe("groups")
    optimizer = torch.optim.AdamW([{"params": [recipe["model"][3].weight]}, {"params": recipe["model"][0].weight}])
    optimizer.param_groups[1]["lr"] /= 10
    tuner = Tuner.pretrained(optimizer, total_epochs=8)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 1e-7})
    tuner.step(train_loss=2.0, val_loss=2.0)
    first, tenth, late = [group["lr"] for group in optimizer.param_groups]
    assert (tenth, late) == (pytest.approx(first / 10), first)


# -- checkpoints -------------------------------------------------------------------------------------------------------


ENDS = 5


class Ended(Exception):
    """What ends a run in these tests."""


def test_a_run_that_was_ended_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(*arguments: Any) -> float:
        if interrupted["tuner"].epoch == ENDS:
            torch.rand(1)  # the order of rows that an unfinished epoch has drawn is drawn again
            raise Ended
        loss: float = train(*arguments)
        return loss

    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = Recipe("checkpoint").run()
    monkeypatch.chdir(tmp_path)
    interrupted = Recipe("checkpoint")
    train, interrupted["train"] = interrupted["train"], ending
    with pytest.raises(Ended):
        interrupted.run()
    resumed = Recipe("checkpoint").watch().run()
    assert len(resumed.rows) == (resumed["EPOCHS"] - ENDS) * 79  # batches of 16: it did not begin anew
    assert resumed["tuner"].history == whole["tuner"].history
    assert resumed["tuner"].hyperparameters == whole["tuner"].hyperparameters
    assert equal(list(resumed["model"].state_dict().values()), list(whole["model"].state_dict().values()))


# -- other models and other steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["batch_size", "dropout"])
def test_compiled(control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for training and for evaluation; and once more for sizes that vary, but anew for every dropout rate."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(ControlPolicy, "act", Moving(control, 0.5))
    recipe = Recipe("compiled")
    recipe["EPOCHS"] = 4
    if control == "dropout":
        recipe["Tuner"] = SimpleNamespace(pretrained=lambda *run, controls, **more: Tuner.pretrained(*run, **more))
    recipe.run()
    used = {entry["hyperparameters"][control] for entry in recipe["tuner"].history}
    assert len(used) > 2
    assert len(seen) == (2 * len(used) if control == "dropout" else 3)


def test_the_guard_takes_the_averaged_model_back() -> None:
    recipe = Recipe("averaged")
    train = recipe["train"]

    def breaking(model: nn.Module, optimizer: Optimizer, loader: Any) -> float:
        loss: float = train(model, optimizer, loader)
        if recipe["tuner"].epoch == 4:
            with torch.no_grad():
                model.get_parameter("0.weight")[0] = math.nan
            return math.nan
        return loss

    recipe["train"] = breaking
    recipe.run()
    assert [entry["guard"] is not None for entry in recipe["tuner"].history].index(True) == 5
    assert recipe["averaged_loss"] < UNTRAINED / 4


def test_closures(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with LBFGS learns; its gradients are measured."""
    measured = []
    finish = GradientMeter.finish

    def seen(meter: GradientMeter) -> dict[str, float]:
        measured.append(finish(meter))
        return measured[-1]

    monkeypatch.setattr(GradientMeter, "finish", seen)
    recipe = Recipe("closure").run()
    assert recipe["validate"](recipe["model"]) < UNTRAINED / 2
    assert caplog.messages == []
    assert [math.isfinite(signals["grad_norm"]) for signals in measured] == [True] * recipe["EPOCHS"]
