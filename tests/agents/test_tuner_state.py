"""Tuners in a run's own checkpoints."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from agents import Tuner
from tests.tiny import random_policy
from tests.user_runs import (
    Loop,
    equal,
    guarded,
    through_a_file,
)

EPOCHS = 6


def test_batch_samplers_go_on_where_they_were() -> None:
    def make(model: nn.Module) -> tuple[Tuner, Any]:
        tuner = Tuner(random_policy(), torch.optim.AdamW(model.parameters()), total_epochs=3, batch_size=32)
        return tuner, tuner.batch_sampler(50, seed=3, drop_last=True)

    model = nn.Linear(2, 2)
    tuner, sampler = make(model)
    size = sampler.batch_size
    assert [len(batch) for batch in sampler] == [size] * (50 // size) == [size] * len(sampler)
    state = tuner.state_dict()
    resumed, other = make(model)
    resumed.load_state_dict(state)
    assert list(other) == list(sampler)


@pytest.mark.parametrize("tuner_first", [True, False])
@pytest.mark.parametrize("start", ["policy", "given"])
@pytest.mark.parametrize("diverging_at", [None, 1, 3, 4])
def test_continuation_equals_the_uninterrupted_run(start: Any, diverging_at: int | None, tuner_first: bool) -> None:
    """Bitwise; also where the guard acts before or after the interruption (after epoch 3)."""
    policy = random_policy(seed=4)

    def attach(run: Loop) -> Tuner:
        return Tuner(policy, run.optimizer, model=run.model, total_epochs=EPOCHS, batch_size=32, start=start)

    def train(run: Loop, tuner: Tuner, epochs: range) -> list[float]:
        losses = []
        for epoch in epochs:
            train_loss, val_loss = run.epoch(epoch, int(tuner.hyperparameters["batch_size"]))
            tuner.step(train_loss=train_loss, val_loss=math.nan if epoch == diverging_at else val_loss)
            losses.append(val_loss)
        return losses

    whole = Loop()
    whole_tuner = attach(whole)
    train(whole, whole_tuner, range(3))
    states = {
        "model": whole.model.state_dict(),
        "optimizer": whole.optimizer.state_dict(),
        "tuner": whole_tuner.state_dict(),
    }
    saved = through_a_file(states)
    expected = train(whole, whole_tuner, range(3, EPOCHS))

    resumed = Loop(seed=99)
    tuner = attach(resumed) if tuner_first else None
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    tuner = tuner or attach(resumed)
    tuner.load_state_dict(saved["tuner"])
    assert tuner.epoch == 3
    assert train(resumed, tuner, range(3, EPOCHS)) == expected
    assert equal(resumed.weights(), whole.weights())
    assert repr(tuner.history) == repr(whole_tuner.history)  # NaN, the divergence's loss, equals itself here
    assert tuner.hyperparameters == whole_tuner.hyperparameters


@pytest.mark.parametrize("loaded", [True, False])
def test_a_checkpoint_is_a_copy(loaded: bool) -> None:
    run, tuner = guarded(random_policy(seed=4))
    tuner.step(train_loss=1.0, val_loss=run.epoch(0)[1])
    state = tuner.state_dict()
    before = copy.deepcopy(state)
    if loaded:
        tuner.load_state_dict(state)
    for epoch in range(1, 4):
        tuner.step(train_loss=1.0, val_loss=math.nan if epoch == 3 else run.epoch(epoch)[1])
    assert repr(state["history"]) == repr(before["history"])
    assert all(
        torch.equal(value, before["loop"][name])
        for name, value in state["loop"].items()
        if name != "given" and value.isfinite().all()
    )
    snapshot, earlier = state["guard"]["snapshot"], before["guard"]["snapshot"]
    for name, value in snapshot["model"].items():
        assert torch.equal(value, earlier["model"][name])
    for index, values in snapshot["optimizer"]["state"].items():
        assert all(torch.equal(value, earlier["optimizer"]["state"][index][name]) for name, value in values.items())


def test_a_checkpoint_without_a_guard() -> None:
    """The weights to return to are then the loaded ones, not those from before loading."""
    run, tuner = guarded(guard=False)
    run.epoch(0)
    resumed, guarded_tuner = guarded()
    resumed.model.load_state_dict(run.model.state_dict())
    guarded_tuner.load_state_dict(tuner.state_dict())
    resumed.epoch(1)
    guarded_tuner.step(train_loss=1.0, val_loss=math.nan)
    assert equal(resumed.weights(), run.weights())


def test_a_checkpoint_of_another_run() -> None:
    run = Loop()
    state = Tuner(random_policy(), run.optimizer, total_epochs=EPOCHS).state_dict()
    with pytest.raises(ValueError, match="total_epochs=6, not 7"):
        Tuner(random_policy(), run.optimizer, total_epochs=7).load_state_dict(state)
