"""A tuner never ends its user's run, and goes on from a checkpoint to the last bit: short forms of `make faults`."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from agents import Tuner
from agents.tuner_state import VERSION
from inner_models.signals import GradientMeter, _Sample
from tests.faults import signals
from tests.faults.signals import GRADIENTS, SETTINGS, VALUES, WRONG, Setting, UserRun, out_of_bounds, same
from tests.tiny import random_policy
from tests.user_runs import Loop, Writer, equal, messages, through_a_file

POLICY = random_policy(seed=1, scale=2.0)


# -- bad signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VALUES)
def test_bad_losses(kind: str) -> None:
    """Each with every signal, setting and time; all combinations are in `make faults`."""
    shift = list(VALUES).index(kind)
    for index, signal in enumerate(signals.SIGNALS):
        setting, when = SETTINGS[(index + shift) % 4], list(signals.TIMES)[(index + shift // 4) % 4]
        assert signals.bad_signal(setting, signal, kind, when, POLICY) == [], (setting, signal, when)


@pytest.mark.parametrize("name", ["train_loss", "val_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_policy_is_told_of_losses_that_are_not_finite(name: str, value: float) -> None:
    tuner = Tuner(POLICY, Loop().optimizer, total_epochs=3)
    tuner.step(**{"train_loss": 1.0, "val_loss": 1.0, name: value})
    assert tuner.history[1]["observation"][tuner.policy.header.features.index("non_finite")] == 1
    assert tuner.history[1]["signals"][name] == math.inf


@pytest.mark.parametrize("kind", WRONG)
def test_losses_that_are_mistakes(kind: str) -> None:
    for signal in signals.SIGNALS:
        assert signals.wrong_signal(SETTINGS[0], signal, kind, POLICY) == [], signal


@pytest.mark.parametrize("kind", GRADIENTS)
def test_bad_gradients(kind: str) -> None:
    for setting in SETTINGS:
        assert signals.bad_gradient(setting, kind, POLICY) == [], setting


@pytest.mark.parametrize("frozen", ["one", "all", "empty"])
def test_parameters_that_cannot_be_measured_from_the_start(frozen: str) -> None:
    model = nn.Linear(2, 2)
    if frozen == "empty":
        optimizer = torch.optim.AdamW([nn.Parameter(torch.empty(0))])
    else:
        model.requires_grad_(frozen == "one").weight.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters())
    tuner = Tuner(POLICY, optimizer, model=model, total_epochs=4)
    for val_loss in (1.0, math.nan, 1.0):
        optimizer.step()
        tuner.step(train_loss=1.0, val_loss=val_loss)
        assert not out_of_bounds(tuner)


def test_a_loss_that_is_missing_is_not_measured() -> None:
    """Whatever the policy needs; the guard goes by the other one."""
    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=8)
    index = tuner.policy.header.features.index("val_missing")
    for epoch in range(5):
        train_loss, val_loss = run.epoch(epoch)
        tuner.step(train_loss=train_loss, val_loss=val_loss if epoch % 3 == 1 else None)
    assert [entry["observation"][index] for entry in tuner.history[1:]] == [1, 0, 1, 1, 0]
    assert "val_loss" not in tuner.history[1]["signals"]
    best = run.weights()
    run.epoch(5)
    tuner.step(train_loss=math.nan)
    assert equal(run.weights(), best)
    before = tuner.history[-1]
    tuner.step(train_loss=None)
    assert tuner.history[-1]["signals"] == {}
    assert before["guard"] == "train_loss not finite"


def test_each_kind_of_trouble_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """And every time at the level DEBUG."""
    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=3, initial_loss=math.inf)
    caplog.set_level(logging.DEBUG, "hyperpilot")
    for _ in range(4):
        tuner.step(train_loss=math.nan, val_loss=None)
        tuner.step(train_loss=1.0, val_loss=1.0)
    told = [(record.levelno, record.getMessage().split(": ")[-1]) for record in caplog.records]
    restored = "train_loss not finite; restored the best snapshot and lowered lr to a quarter"
    over = "values stay as they are"
    assert told.count((logging.WARNING, restored)) == told.count((logging.WARNING, over)) == 1
    assert told.count((logging.WARNING, "val_loss not measured")) == 1
    assert told.count((logging.DEBUG, restored)) == told.count((logging.DEBUG, "val_loss not measured")) == 3
    assert len(told) == 4 + 4 + 5 + 1 + 8  # five epochs too many; one line of the initial loss; eight of no steps


def test_a_failure_of_the_measuring_is_told_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=5)
    monkeypatch.setattr("inner_models.signals._entries", lambda tensor, at: 1 / 0)
    missing = tuner.policy.header.features.index("gradients_missing")
    for epoch in range(3):
        train_loss, val_loss = run.epoch(epoch)
        tuner.step(train_loss=train_loss, val_loss=val_loss)
    assert messages(caplog) == ["measuring gradients failed; the run goes on without it"]
    assert "ZeroDivisionError" in caplog.text
    assert [entry["observation"][missing] for entry in tuner.history[1:]] == [1.0] * 3
    monkeypatch.undo()
    train_loss, val_loss = run.epoch(3)
    tuner.step(train_loss=train_loss, val_loss=val_loss)
    assert tuner.history[-1]["observation"][missing] == 0.0


def test_an_interval_that_cannot_begin(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(meter: GradientMeter) -> None:
        meter._steps, meter._measured = 0, []
        raise MemoryError

    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=5)
    ratios = []
    for epoch in range(3):
        run.epoch(epoch)
        with monkeypatch.context() as patch:
            if epoch == 0:
                patch.setattr(_Sample, "go_on", lambda sample: False)
                patch.setattr(GradientMeter, "begin", fail)
            tuner.step(train_loss=1.0, val_loss=1.0)
        ratios.append(tuner.history[-1]["observation"][tuner.policy.header.features.index("update_ratio")])
    assert [ratio != 0.0 for ratio in ratios] == [True, False, True]  # the second had no start to be compared with
    assert len(messages(caplog)) == 1


class Full(Writer):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        raise OSError(28, "No space left on device")


def test_a_writer_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    tuner = Tuner(random_policy(), Loop().optimizer, total_epochs=5, writer=Full())
    for _ in range(3):
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert caplog.messages[1:] == ["writing to TensorBoard failed; the run goes on without it"]
    assert "has taken no step" in caplog.messages[0]
    assert "No space left" in caplog.text


def test_a_snapshot_that_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mixture is ever restored, the learning rate is lowered, and the next best is kept again."""

    def fail(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> None:
        raise MemoryError

    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=9)
    train_loss, _ = run.epoch(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", fail)
        tuner.step(train_loss=train_loss, val_loss=1.0)
    assert caplog.messages[-1] == "keeping a snapshot failed; the run goes on without it"
    now = run.weights()
    resumed = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=9)
    resumed.load_state_dict(through_a_file(tuner.state_dict()))
    lr = tuner._loop.values()["lr"]
    tuner.step(train_loss=1.0, val_loss=math.nan)
    assert equal(run.weights(), now)
    assert "restoring the best snapshot failed" in caplog.messages[-1]
    assert tuner._loop._lr_scale == 0.25
    assert lr > 0
    tuner.step(train_loss=0.5, val_loss=0.5)
    best = run.weights()
    run.epoch(3)
    tuner.step(train_loss=1.0, val_loss=math.nan)
    assert equal(run.weights(), best)


@pytest.mark.parametrize("lr", [math.inf, math.nan])
def test_settings_that_are_not_finite_are_mistakes(lr: float) -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(1))]}])
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(ValueError, match=f"lr of a parameter group must be a finite number, not {lr}"):
        Tuner(random_policy(), optimizer, total_epochs=3)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("name", ["total_epochs", "examples_per_epoch", "batch_size"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 2.5, -1, "3", True, 2**63, 10**400, [3]])
def test_counts_that_are_mistakes(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1 and whole, not "):
        Tuner(random_policy(), Loop().optimizer, **{"total_epochs": 3, name: value})


@pytest.mark.parametrize("value", [3.0, np.int64(3), np.float32(3)])
def test_counts_of_other_types(value: Any) -> None:
    tuner = Tuner(random_policy(), Loop().optimizer, total_epochs=value, examples_per_epoch=value, batch_size=value)
    assert type(tuner.total_epochs) is int
    assert tuner.batch_sampler(np.int64(50)).rows == 50


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_resumed_at_every_epoch(tmp_path: Path) -> None:
    outcome = signals.resumed(48, tmp_path)
    assert outcome.failures == ()


def test_groups_keep_their_ratios_to_the_last_bit_after_resuming() -> None:
    """Also where the tuner is made of the values in the checkpoint: 0.1 v / v is not always 0.1."""
    policy, differences = random_policy(scale=0.3), 0
    for seed in range(40):
        parameters = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
        groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups)
        tuner = Tuner(policy, optimizer, total_epochs=8, initial_loss=1.0 + seed)
        tuner.step(train_loss=1.0, val_loss=1.0)
        state = through_a_file(tuner.state_dict())
        resumed = Tuner(policy, optimizer, total_epochs=8)
        differences += resumed._binding.shares != tuner._binding.shares
        resumed.load_state_dict(state)
        assert resumed._binding.shares == tuner._binding.shares
    assert differences


@pytest.mark.parametrize(
    "kind", [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]
)
def test_row_orders_of_any_generator_are_resumed(kind: type[np.random.BitGenerator]) -> None:
    def make(seed: int) -> tuple[Tuner, Any]:
        tuner = Tuner(random_policy(), Loop().optimizer, total_epochs=3, batch_size=32)
        return tuner, tuner.batch_sampler(50, seed=np.random.Generator(kind(seed)))

    (tuner, sampler), (resumed, other) = make(1), make(2)
    list(sampler)
    resumed.load_state_dict(through_a_file(tuner.state_dict()))
    assert list(other) == list(sampler)


def test_samplers_that_were_not_made_before_loading() -> None:
    run = UserRun(Setting(batches=True), POLICY)
    state = run.tuner.state_dict()
    tuner = Tuner(POLICY, run.optimizer, model=run.model, total_epochs=8, batch_size=16)
    with pytest.raises(ValueError, match="a run with 1 batch samplers, not 0: make them first"):
        tuner.load_state_dict(state)


# -- states that do not fit --------------------------------------------------------------------------------------------


def test_damaged_states(tmp_path: Path) -> None:
    assert signals.damaged_states(50, tmp_path).failures == ()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": VERSION + 1}, f"it has version {VERSION + 1}; this .* reads {VERSION}: upgrade hyperpilot"),
        ({"version": None}, f"it has version None; this hyperpilot reads {VERSION}$"),
        ({"verdict": []}, "it.verdict must not be"),
        ({"hyperparameters": {"lr": math.nan}}, "it.hyperparameters"),
        ({"settings": {}}, "total_epochs"),
        ({"unknown": 1}, "it must not have an entry 'unknown'"),
        ({"samplers": [{"bit_generator": "PCG64"}]}, "state"),
    ],
)
def test_states_of_other_versions_and_tuners(entries: dict[str, Any], message: str) -> None:
    run = UserRun(SETTINGS[0], POLICY)
    earlier = run.tuner.state_dict()
    run.tuner.step(train_loss=run.epoch(), val_loss=1.0)
    before = copy.deepcopy(run.state())
    with pytest.raises(ValueError, match=f"the tuner's state cannot be used: .*{message}"):
        run.tuner.load_state_dict({**earlier, **entries})
    assert same(run.state(), before)


@pytest.mark.parametrize("state", [None, [], 3, {}, torch.ones(2)])
def test_what_is_no_state(state: Any) -> None:
    with pytest.raises(ValueError, match="it has version None"):
        UserRun(SETTINGS[0], POLICY).tuner.load_state_dict(state)


@pytest.mark.parametrize("name", ["guard", "loop", "history", "intervals", "policy"])
def test_states_that_lack_an_entry(name: str) -> None:
    run = UserRun(SETTINGS[0], POLICY)
    state = run.tuner.state_dict()
    del state[name]
    with pytest.raises(ValueError, match=f"it must have an entry '{name}'"):
        run.tuner.load_state_dict(state)


def test_a_snapshot_of_another_model() -> None:
    run = UserRun(Setting(), POLICY)
    state = run.tuner.state_dict()
    state["guard"]["snapshot"]["model"]["0.weight"] = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="the guard's snapshot is of another model"):
        run.tuner.load_state_dict(state)


def test_a_snapshot_with_an_optimizer_that_was_not_loaded() -> None:
    run = UserRun(Setting(), POLICY)
    run.epoch()
    run.tuner.step(train_loss=1.0, val_loss=1.0)
    fresh = UserRun(Setting(), POLICY)
    with pytest.raises(ValueError, match="the optimizer's state was not loaded first"):
        fresh.tuner.load_state_dict(run.tuner.state_dict())


def test_another_policy_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    """As after an upgrade of the package: the run goes on."""
    run = UserRun(Setting(), POLICY)
    other = UserRun(Setting(), random_policy(seed=2))
    other.tuner.load_state_dict(run.tuner.state_dict())
    assert caplog.messages == ["the state is of a run with another policy; from now on this one decides"]
    assert other.tuner.hyperparameters == run.tuner.hyperparameters
