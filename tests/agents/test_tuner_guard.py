"""The tuner's guard: what it takes for a divergence, and what it restores."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents import Tuner
from tests.tiny import random_policy
from tests.user_runs import (
    BASE,
    LR,
    Loop,
    constant_policy,
    equal,
    guarded,
    messages,
    warmup_cosine,
)

EPOCHS = 6


def base_lr(epoch: int) -> float:
    return BASE["adamw"].lr * warmup_cosine(epoch, 12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_the_guard_restores(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    run, tuner = guarded()
    losses = [run.epoch(0)]
    tuner.step(train_loss=losses[0][0], val_loss=losses[0][1])
    best, moments = run.weights(), copy.deepcopy(run.optimizer.state_dict()["state"])
    assert not messages(caplog)
    run.epoch(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(bad)
    run.optimizer.state[next(run.model.parameters())]["exp_avg"].fill_(bad)
    assert tuner.step(train_loss=1.0, val_loss=bad)["lr"] == pytest.approx(base_lr(2) / 4)
    assert equal(run.weights(), best)
    for index, state in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[index][name]) for name, value in state.items())
    assert len(messages(caplog)) == 1
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.messages[-1].startswith("epoch 2: ")
    assert tuner.history[2]["guard"] in caplog.messages[-1]
    for epoch in range(2, 12):
        losses.append(run.epoch(epoch))
        tuner.step(train_loss=losses[-1][0], val_loss=losses[-1][1])
    assert np.isfinite(losses).all()
    assert losses[-1][1] < losses[0][1]
    assert len(messages(caplog)) == 1
    assert all(torch.isfinite(weight).all() for weight in run.weights())


def test_without_a_guard_weights_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    run, tuner = guarded(guard=False)
    run.epoch(0)
    broken = run.weights()
    tuner.step(train_loss=math.nan, val_loss=math.nan)
    assert equal(run.weights(), broken)
    assert tuner.hyperparameters["lr"] == pytest.approx(base_lr(1))
    assert messages(caplog) == ["epoch 1: train_loss and val_loss not finite"]


@pytest.mark.parametrize(
    ("losses", "acts"),
    [
        # Twice all that was gained, and three times the best, above which it acts: 0.5 + 2 max(2 - 0.5, 0.5) = 3.5.
        ([2.0, 0.5, 3.4], False),
        ([2.0, 0.5, 3.6], True),
        # Nothing gained yet: three times the best.
        ([1.0, 2.9], False),
        ([1.0, 3.1], True),
        # Negative losses: -2 + 2 max(1, 2) = 2.
        ([-1.0, -2.0, 1.9], False),
        ([-1.0, -2.0, 2.1], True),
        ([-1.0, -2.0, -math.inf], True),
    ],
)
def test_far_above_the_best(losses: list[float], acts: bool) -> None:
    _, tuner = guarded()
    for loss in losses:
        tuner.step(train_loss=loss, val_loss=loss)
    assert [entry["guard"] is not None for entry in tuner.history[1:]] == [False] * (len(losses) - 1) + [acts]


def test_overfitting_is_no_divergence() -> None:
    _, tuner = guarded()
    for train_loss, val_loss in ((1.0, 1.0), (0.1, 0.9), (0.01, 5.0), (0.001, 8.0)):
        tuner.step(train_loss=train_loss, val_loss=val_loss)
    assert all(entry["guard"] is None for entry in tuner.history)
    tuner.step(train_loss=0.001, val_loss=101.0)
    assert tuner.history[-1]["guard"] is not None


def test_overfitting_is_no_divergence_where_only_the_validation_loss_is_told() -> None:
    _, tuner = guarded()
    for val_loss in (0.3, 0.28, 0.4, 0.7, 0.9):
        tuner.step(train_loss=None, val_loss=val_loss)
    assert all(entry["guard"] is None for entry in tuner.history)
    tuner.step(train_loss=None, val_loss=31.0)
    assert tuner.history[-1]["guard"] is not None


def test_a_loss_that_was_only_ever_zero_is_no_measure() -> None:
    _, tuner = guarded()
    for val_loss in (0.0, 0.0, 0.01, 0.0, 0.01):
        tuner.step(train_loss=0.5, val_loss=val_loss)
    assert all(entry["guard"] is None for entry in tuner.history)


def test_a_finite_first_epoch_that_is_worse_than_no_training() -> None:
    run = Loop()
    first = run.weights()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=5, initial_loss=2.3)
    run.epoch(0)
    tuner.step(train_loss=4000.0, val_loss=5000.0)
    assert tuner.history[-1]["guard"] is not None
    assert equal(run.weights(), first)


def test_a_divergence_before_the_first_good_epoch() -> None:
    run, tuner = guarded()
    first = run.weights()
    run.epoch(0)
    tuner.step(train_loss=math.nan, val_loss=math.nan)
    assert equal(run.weights(), first)
    assert not run.optimizer.state_dict()["state"]
    tuner.step(train_loss=1.0, val_loss=1.0)  # nothing trained: the way back does not count as an update
    assert tuner.history[2]["observation"][tuner.policy.header.features.index("update_ratio")] == 0.0
    assert tuner.history[1]["observation"][tuner.policy.header.features.index("update_ratio")] != 0.0


@pytest.mark.parametrize("start", ["policy", "given"])
def test_divergences_in_a_row(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each restores the same snapshot, whatever was trained since, and each quarters the learning rate; after three of
    them there is another warning."""
    run, tuner = guarded(start=start, max_factor=2.0 if start == "given" else None)
    reference = LR / BASE["adamw"].lr if start == "given" else 1.0
    tuner.step(train_loss=1.0, val_loss=run.epoch(0)[1])
    best, moments = run.weights(), copy.deepcopy(run.optimizer.state_dict()["state"])
    for divergences in range(1, 5):
        run.epoch(divergences)
        assert not equal(run.weights(), best)
        tuner.step(train_loss=math.nan, val_loss=math.nan)
        assert equal(run.weights(), best)
        for index, state in run.optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, moments[index][name]) for name, value in state.items())
        assert ("4 times in a row: nothing is learned any more" in caplog.text) == (divergences == 4)
        lr = reference * base_lr(divergences + 1) / 4**divergences
        assert tuner.hyperparameters["lr"] == pytest.approx(lr, rel=0.05)


def test_validation_that_is_broken_is_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    """As with a row that is not finite: the training loss is, and restoring does not help."""
    run, tuner = guarded()
    missing = tuner.policy.header.features.index("val_missing")
    best = run.weights()
    for epoch in range(3):
        run.epoch(epoch)
        tuner.step(train_loss=1.0, val_loss=math.nan)
        assert equal(run.weights(), best)
        assert tuner.hyperparameters["lr"] == pytest.approx(base_lr(epoch + 1) / 4 ** (epoch + 1))
    for epoch in range(3, 6):
        run.epoch(epoch)
        trained = run.weights()
        assert tuner.step(train_loss=1.0, val_loss=math.nan)["lr"] == pytest.approx(base_lr(epoch + 1))
        assert equal(run.weights(), trained)
        assert tuner.history[-1]["observation"][missing] == (epoch > 3)
    assert "epoch 4: as bad after 3 restores in a row: the training loss is finite, so validation must" in caplog.text

    other, again = guarded()
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.load_state_dict(tuner.state_dict())
    for which in (tuner, again):
        assert which.step(train_loss=1.0, val_loss=math.nan)["lr"] == pytest.approx(base_lr(7))
        which.step(train_loss=math.nan, val_loss=math.nan)  # what is not finite in training still counts
        assert which.history[-1]["guard"] == "train_loss and val_loss not finite"
        which.step(train_loss=1.0, val_loss=0.9)
        which.step(train_loss=1.0, val_loss=math.nan)  # validation has worked since
        assert which.history[-1]["guard"] == "val_loss not finite"


def test_weights_that_are_loaded_after_the_tuner_is_made_are_what_a_divergence_goes_back_to() -> None:
    run, tuner = guarded()
    run.model.load_state_dict(Loop(seed=7).model.state_dict())
    loaded = run.weights()
    run.epoch(0)
    tuner.step(train_loss=math.nan, val_loss=math.nan)
    assert equal(run.weights(), loaded)
    run.epoch(1)  # the second step is none to begin with
    tuner.step(train_loss=math.nan, val_loss=math.nan)
    assert equal(run.weights(), loaded)


def test_losses_that_change_their_meaning_are_believed(caplog: pytest.LogCaptureFixture) -> None:
    """As where a penalty comes in by and by: what was best before never comes back, at no learning rate."""
    run, tuner = guarded()
    tuner.step(train_loss=1.0, val_loss=run.epoch(0)[1])
    best = run.weights()
    for epoch in range(1, 4):
        run.epoch(epoch)
        tuner.step(train_loss=9.0, val_loss=9.0)
        assert equal(run.weights(), best)
        assert tuner.hyperparameters["lr"] == pytest.approx(base_lr(epoch + 1) / 4**epoch)
    resumed = copy.deepcopy((tuner.state_dict(), run.optimizer.state_dict()))
    run.epoch(4)
    trained = run.weights()
    assert tuner.step(train_loss=9.0, val_loss=9.0)["lr"] == pytest.approx(base_lr(5))
    assert equal(run.weights(), trained)
    assert caplog.messages[-1].startswith("epoch 5: as bad after 3 restores in a row: ")
    for train_loss in (30.0, 9.0, 90.0, 900.0, 9000.0):
        tuner.step(train_loss=train_loss, val_loss=train_loss)
    assert [entry["guard"] is not None for entry in tuner.history] == [False, False, *[True] * 3, *[False] * 6]
    assert equal(run.weights(), trained)
    tuner.step(train_loss=1.0, val_loss=math.nan)  # what is not finite still counts
    assert tuner.history[-1]["guard"] == "val_loss not finite"
    other, again = guarded()
    other.optimizer.load_state_dict(resumed[1])
    again.load_state_dict(resumed[0])
    assert again.step(train_loss=9.0, val_loss=9.0)["lr"] == pytest.approx(base_lr(5))


def test_a_good_epoch_between_divergences_starts_the_count_anew() -> None:
    _, tuner = guarded()
    for loss in (1.0, 9.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0):
        tuner.step(train_loss=loss, val_loss=loss)
    assert [entry["guard"] is not None for entry in tuner.history[1:]] == [False, *[True] * 3, False, *[True] * 3]
    assert tuner.hyperparameters["lr"] == pytest.approx(base_lr(8) / 4**6)


def test_a_loss_that_is_not_finite_starts_the_count_anew() -> None:
    _, tuner = guarded()
    for loss in (1.0, 9.0, 9.0, 9.0, math.nan, 9.0):
        tuner.step(train_loss=loss, val_loss=loss)
    assert all(entry["guard"] for entry in tuner.history[2:])


def test_verdicts_are_taken_back_after_the_end_too() -> None:
    run = Loop()
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=2)
    tuner.step(train_loss=1.0, val_loss=1.0)
    last = tuner.hyperparameters["lr"]
    for factor in (1 / 4, 1 / 16, 1 / 64, 1, 1):
        assert tuner.step(train_loss=9.0, val_loss=9.0)["lr"] == pytest.approx(last * factor)


@pytest.mark.parametrize("sgd", [True, False])
def test_a_divergence_in_the_first_epoch_is_not_answered_by_a_higher_rate(sgd: bool) -> None:
    """Whose batches turn out to be large."""
    model = nn.Linear(3, 2)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if sgd else torch.optim.AdamW(model.parameters())
    )
    tuner = Tuner(constant_policy(), optimizer, model=model, total_epochs=12, examples_per_epoch=2048)
    for _ in range(8):
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    base = BASE["sgd" if sgd else "adamw"]
    lowered = base.lr * warmup_cosine(1, 12, base.warmup) / 4
    assert tuner.step(train_loss=math.nan, val_loss=math.nan)["lr"] == pytest.approx(lowered)


def test_the_best_snapshot_keeps_its_memory() -> None:
    def tensors(state: Any) -> list[Tensor]:
        parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
        return [state] if isinstance(state, Tensor) else [tensor for part in parts for tensor in tensors(part)]

    run, tuner = guarded()
    assert tuner._guard is not None
    tuner.step(train_loss=1.0, val_loss=run.epoch(0)[1])
    first = tensors(tuner._guard._snapshot)
    before = [tensor.clone() for tensor in first]
    tuner.step(train_loss=1.0, val_loss=run.epoch(1)[1])
    second = tensors(tuner._guard._snapshot)
    assert [a is b for a, b in zip(first, second, strict=True)] == [True] * len(first)
    assert not any(torch.equal(a, b) for a, b in zip(before, second, strict=True))
    assert equal([*tuner._guard._snapshot["model"].values()], run.weights())


def test_a_snapshot_follows_tensors_that_change_shape_or_type() -> None:
    class Growing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("seen", torch.zeros(1))

    model = Growing()
    tuner = Tuner(random_policy(), torch.optim.AdamW(model.parameters()), model=model, total_epochs=5)
    for epoch, seen in enumerate((torch.zeros(1), torch.ones(3), torch.arange(3), torch.tensor(7.5))):
        model.seen = seen.clone()
        tuner.step(train_loss=1.0, val_loss=1.0 - epoch / 10)
        model.seen.zero_()
        tuner.step(train_loss=1.0, val_loss=math.nan)
        assert model.seen.dtype == seen.dtype
        assert torch.equal(model.seen, seen)


@pytest.mark.parametrize("first_inside", [True, False])
def test_steps_inside_and_outside_of_inference_mode(first_inside: bool) -> None:
    """As where `step` stands within the validation's `with torch.inference_mode()`, in some epochs."""
    run = Loop()
    with torch.inference_mode(first_inside):
        tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=12)
    for epoch in range(4):
        val_loss = run.epoch(epoch)[1]
        with torch.inference_mode((epoch % 2 == 0) == first_inside):
            tuner.step(train_loss=1.0, val_loss=val_loss)
    best = run.weights()
    run.epoch(4)
    with torch.inference_mode(not first_inside):
        tuner.step(train_loss=1.0, val_loss=math.nan)
    assert equal(run.weights(), best)
    run.epoch(5)  # with moments that may be written to
    tuner.step(train_loss=1.0, val_loss=1.0)
    measured = tuner.policy.header.features.index("gradients_missing")
    assert [entry["observation"][measured] for entry in tuner.history[1:]] == [0.0] * 6


def test_after_surgery_no_moments_are_restored_that_do_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    def train() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.ones(4, 3)).square().mean())
        optimizer.step()

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    tuner = Tuner(constant_policy(), optimizer, model=model, total_epochs=6)
    train()
    tuner.step(train_loss=1.0, val_loss=1.0)
    model[1] = nn.Linear(2, 5)
    optimizer.param_groups[0]["params"][2:] = list(model[1].parameters())
    train()
    tuner.step(train_loss=math.nan, val_loss=math.nan)
    train()
    assert "restoring the best snapshot failed" in caplog.text  # the model's part, which says so
    assert optimizer.state[optimizer.param_groups[0]["params"][2]]["exp_avg"].shape == (5, 2)


@pytest.mark.parametrize("epochs", [2, 5])
def test_a_rate_that_is_not_the_tuners_is_left_alone(epochs: int, caplog: pytest.LogCaptureFixture) -> None:
    run = Loop()
    rates = [lr for lr, _ in run.settings()]
    tuner = Tuner(
        constant_policy(), run.optimizer, model=run.model, total_epochs=epochs, controls=["weight_decay", "dropout"]
    )
    tuner.step(train_loss=1.0, val_loss=1.0)
    tuner.step(train_loss=1.0, val_loss=math.nan)
    assert [lr for lr, _ in run.settings()] == rates
    assert "restored the best snapshot" in caplog.text
    assert "lr" not in caplog.text + tuner.history[-1]["reason"]


def test_a_divergence_at_the_end_or_later_lowers_lr_too() -> None:
    run = Loop()
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=2)
    tuner.step(train_loss=1.0, val_loss=1.0)
    last = tuner.hyperparameters["lr"]
    for divergences in range(1, 3):
        assert tuner.step(train_loss=1.0, val_loss=math.nan)["lr"] == pytest.approx(last / 4**divergences)
        assert run.settings()[0][0] == pytest.approx(last / 4**divergences)
