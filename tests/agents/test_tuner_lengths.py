"""`Tuner` in runs of many epochs, in runs of unknown length, and in runs unlike any that its policy knows."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from agents import ControlPolicy, Tuner
from hpo_env.base_schedules import REGULARIZERS, BaseRule
from tests.rules import flat
from tests.tiny import random_policy
from tests.user_runs import (
    BASE,
    DECAY,
    DROPOUT,
    LR,
    ROWS,
    Loop,
    Writer,
    constant_policy,
    equal,
    through_a_file,
    warmup_cosine,
)

LONG = 130
"""Epochs; a decision is due every third."""

CONSTANT = ("batch_size", "weight_decay", "dropout")


def features(tuner: Tuner, decision: int = -1) -> dict[str, float]:
    return dict(zip(tuner.policy.header.features, tuner.history[decision]["observation"], strict=True))


def difference(a: float, b: float) -> float:
    return 2 * (a - b) / (abs(a) + abs(b))


def long_tuner(run: Loop, policy: ControlPolicy | None = None, **arguments: Any) -> Tuner:
    return Tuner(
        policy or random_policy(seed=4, scale=0.3),
        run.optimizer,
        **{"model": run.model, "total_epochs": LONG, "examples_per_epoch": ROWS, "batch_size": 32, **arguments},
    )


# -- many epochs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "per_decision"), [(64, 1), (65, 2), (128, 2), (LONG, 3)])
def test_a_long_run_decides_less_often(epochs: int, per_decision: int) -> None:
    tuner = long_tuner(Loop(), total_epochs=epochs)
    for epoch in range(epochs):
        assert len(tuner.history) == 1 + epoch // per_decision
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert [entry["epoch"] for entry in tuner.history] == list(range(0, epochs, per_decision))
    for decision in range(len(tuner.history)):
        seen = features(tuner, decision)
        assert seen["progress"] == pytest.approx(decision / math.ceil(epochs / per_decision))
        assert seen["horizon"] == pytest.approx(math.log2(math.ceil(epochs / per_decision)) / 8)
        assert seen["examples"] == pytest.approx(math.log10(ROWS * epochs) / 8)


@pytest.mark.parametrize("start", ["policy", "given"])
def test_between_decisions_only_the_schedule_moves(start: Any) -> None:
    """Base and schedule are those of an epoch, not of a stretch; a decision holds for a stretch."""
    policy = random_policy(seed=4, scale=0.3)
    policy.header = replace(policy.header, base_rules={kind: flat(base).to_dict() for kind, base in BASE.items()})
    run = Loop()
    tuner = long_tuner(run, policy, start=start, batch_size=None)
    base = LR if start == "given" else BASE["adamw"].lr
    used = []
    for epoch in range(LONG):
        used.append(tuner.hyperparameters)
        assert run.settings()[0] == (used[-1]["lr"], used[-1]["weight_decay"])
        used[-1]["factor"] = used[-1]["lr"] / (base * warmup_cosine(epoch, LONG))
        returned = tuner.step(train_loss=1.0 / (epoch + 1), val_loss=1.0 + math.sin(epoch) / 2)
        assert returned == tuner.hyperparameters
    for decision, entry in enumerate(tuner.history):
        stretch = used[3 * decision : 3 * decision + 3]
        assert {name: stretch[0][name] for name in ("lr", "weight_decay", "dropout")} == entry["hyperparameters"]
        for name in ("weight_decay", "dropout"):
            assert len({values[name] for values in stretch}) == 1
        for values in stretch:
            assert values["factor"] == pytest.approx(stretch[0]["factor"], rel=1e-9)
            assert values["lr"] not in (other["lr"] for other in stretch if other is not values)
    for name in ("factor", "weight_decay", "dropout"):  # decisions do move
        assert len({round(values[name], 12) for values in used}) > 3, name


def test_a_decision_sees_all_that_was_trained_since_the_last() -> None:
    rng = np.random.default_rng(0)
    train, val = rng.uniform(1, 2, LONG).tolist(), rng.uniform(1, 2, LONG).tolist()
    tuner = long_tuner(Loop(), guard=False)
    for train_loss, val_loss in zip(train, val, strict=True):
        tuner.step(train_loss=train_loss, val_loss=val_loss)
    for decision in range(2, len(tuner.history)):
        end, seen = 3 * decision, features(tuner, decision)
        now, before = np.mean(train[end - 3 : end]), np.mean(train[end - 6 : end - 3])
        assert seen["train_change_1"] == pytest.approx(difference(float(now), float(before)), abs=1e-6)
        assert seen["val_change_1"] == pytest.approx(difference(val[end - 1], val[end - 4]), abs=1e-6)
        assert seen["generalization_gap"] == pytest.approx(difference(val[end - 1], float(now)), abs=1e-6)
        assert tuner.history[decision]["signals"] == {"train_loss": train[end - 1], "val_loss": val[end - 1]}


def test_the_distance_moved_is_the_stretchs() -> None:
    """As far as a random walk of three equal epochs goes."""
    run = Loop()
    tuner = long_tuner(run, constant_policy(), guard=False)
    for _ in range(3):
        start = [parameter.detach().clone() for parameter in run.model.parameters()]
        run.optimizer.zero_grad()
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()  # so that the meter counts a step
        with torch.no_grad():
            size = math.sqrt(sum(float(p.square().sum()) for p in run.model.parameters()))
            for parameter, before in zip(run.model.parameters(), start, strict=True):
                parameter.copy_(before * 1.1)
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert size > 0
    assert features(tuner)["update_ratio"] == pytest.approx(math.log10(math.sqrt(3) * 0.1 / 1.1) + 1, rel=1e-4)


def test_more_epochs_than_a_long_total(caplog: pytest.LogCaptureFixture) -> None:
    tuner = long_tuner(Loop())
    for _ in range(LONG - 1):
        tuner.step(train_loss=1.0, val_loss=1.0)
    values = tuner.hyperparameters
    for epoch in range(5):
        assert tuner.step(train_loss=1.0, val_loss=1.0) == values
        assert len(caplog.records) == 1 + (epoch > 0), epoch  # the first says that nothing is trained here
    assert len(tuner.history) == 44


def test_every_epoch_is_written() -> None:
    run, writer = Loop(), Writer()
    tuner = long_tuner(run, writer=writer)
    used = []
    for _ in range(7):
        used.append(tuner.hyperparameters)
        tuner.step(train_loss=1.0, val_loss=1.0)
    written = {(tag, step): value for tag, value, step in writer.scalars}
    assert len(written) == len(writer.scalars)
    for epoch, values in enumerate(used, start=1):
        assert {name: written[f"control/{name}", epoch] for name in values} == values
        assert written["inner/train_loss", epoch] == 1.0


@pytest.mark.parametrize("diverging_at", [0, 1, 2, 4])
def test_the_guard_does_not_wait_for_a_decision(diverging_at: int) -> None:
    run = Loop()
    tuner = long_tuner(run, constant_policy(), batch_size=None)
    best = run.weights()
    for epoch in range(7):
        train_loss, val_loss = run.epoch(epoch)
        values = tuner.step(train_loss=train_loss, val_loss=math.nan if epoch == diverging_at else val_loss)
        if epoch == diverging_at:
            assert equal(run.weights(), best)
        best = run.weights()
        lowered = 0.25 if epoch >= diverging_at else 1.0
        follows = math.sqrt(32 / BASE["adamw"].batch_size)  # the run's batches, known after an epoch
        assert values["lr"] == pytest.approx(lowered * follows * BASE["adamw"].lr * warmup_cosine(epoch + 1, LONG))
        assert run.settings()[0][0] == values["lr"]


@pytest.mark.parametrize("diverging_at", [0, 1, 2])
def test_the_history_has_what_the_guard_did_between_decisions(diverging_at: int) -> None:
    """With the decision that follows."""
    tuner = long_tuner(Loop())
    for epoch in range(6):
        tuner.step(train_loss=1.0, val_loss=math.nan if epoch == diverging_at else 1.0)
    assert [entry["guard"] for entry in tuner.history] == [None, "val_loss not finite", None]


def test_losses_that_come_only_now_and_then() -> None:
    """A policy that does without validation may still see one that is not taken in every epoch."""
    policy = random_policy(seed=4, scale=0.3)
    policy.header = replace(policy.header, required_signals=("train_loss",))
    tuner = long_tuner(Loop(), policy)
    for epoch in range(9):
        tuner.step(train_loss=1.0, val_loss=2.0 + epoch if epoch in (0, 2, 4, 5) else None)
    assert [features(tuner, decision)["val_missing"] for decision in range(4)] == [1, 0, 0, 1]
    assert features(tuner, 2)["val_change_1"] == pytest.approx(difference(7.0, 4.0))


@pytest.mark.parametrize("start", ["policy", "given"])
@pytest.mark.parametrize("epochs", [3, 4, 5])
@pytest.mark.parametrize("diverging_at", [None, 3, 6])
def test_continuation_from_within_a_stretch(start: Any, epochs: int, diverging_at: int | None) -> None:
    """Bitwise what the uninterrupted run does, wherever in a stretch (3..5) it was interrupted."""
    policy = random_policy(seed=4, scale=0.5)

    def train(run: Loop, tuner: Tuner, epochs: range) -> list[float]:
        losses = []
        for epoch in epochs:
            train_loss, val_loss = run.epoch(epoch, int(tuner.hyperparameters["batch_size"]))
            tuner.step(train_loss=train_loss, val_loss=math.nan if epoch == diverging_at else val_loss)
            losses.append(val_loss)
        return losses

    whole = Loop()
    whole_tuner = long_tuner(whole, policy, start=start, examples_per_epoch=None)
    train(whole, whole_tuner, range(epochs))
    state = {"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()}
    saved = through_a_file({**state, "tuner": whole_tuner.state_dict()})
    assert len(saved["tuner"]["intervals"]["parts"]) == epochs - 3
    expected = train(whole, whole_tuner, range(epochs, 11))

    resumed = Loop(seed=99)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    tuner = long_tuner(resumed, policy, start=start, examples_per_epoch=None)
    tuner.load_state_dict(saved["tuner"])
    assert tuner.epoch == epochs
    assert train(resumed, tuner, range(epochs, 11)) == expected
    assert equal(resumed.weights(), whole.weights())
    assert repr(tuner.history) == repr(whole_tuner.history)
    assert tuner.hyperparameters == whole_tuner.hyperparameters
    assert len(tuner.history) == 4


def test_a_checkpoint_from_within_a_stretch_is_a_copy() -> None:
    tuner = long_tuner(Loop())
    for _ in range(4):
        tuner.step(train_loss=1.0, val_loss=1.0)
    state = tuner.state_dict()
    before = copy.deepcopy(state["intervals"])
    tuner.step(train_loss=2.0, val_loss=2.0)
    assert repr(state["intervals"]) == repr(before)
    tuner.load_state_dict(state)
    tuner.step(train_loss=3.0, val_loss=3.0)
    assert repr(state["intervals"]) == repr(before)


# -- length ------------------------------------------------------------------------------------------------------------

SLOPED = BaseRule(
    {"lr": (-5.0, -0.4, 0.0), "batch_size": (math.log(32), 0.0, 0.0), "weight_decay": (-2.0, -0.2, 0.0)}
    | {"dropout": (-2.5, -0.5, 0.1), "augmentation": (-3.0, 0.1, 0.0), "label_smoothing": (-3.0, 0.0, 0.1)}
)
"""Depends on the length of the run in all but the batch size."""


def staying(rule: BaseRule = SLOPED) -> ControlPolicy:
    policy = constant_policy()
    policy.header = replace(policy.header, base_rules=dict.fromkeys(("adamw", "sgd"), rule.to_dict()))
    return policy


def base_of(run: Loop, examples: float, epoch: int, total: int, rule: BaseRule = SLOPED) -> dict[str, float]:
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    values = rule.schedule(examples, parameters).values(np.array([(epoch + 0.5) / total]))
    return {name: float(value[0]) for name, value in values.items() if name not in REGULARIZERS}


def known(tuner: Tuner) -> list[float]:
    return [features(tuner, decision)["examples_known"] for decision in range(len(tuner.history))]


@pytest.mark.parametrize("total", [6, LONG])
def test_the_length_is_told_or_learnt(total: int) -> None:
    """After one epoch there is no difference."""
    told, untold = Loop(), Loop()
    tuners = [
        Tuner(staying(), run.optimizer, model=run.model, total_epochs=total, batch_size=32, examples_per_epoch=given)
        for run, given in ((told, ROWS), (untold, None))
    ]
    assert tuners[0].hyperparameters == pytest.approx(base_of(told, ROWS * total, 0, total), rel=1e-12)
    assert tuners[1].hyperparameters == pytest.approx(base_of(untold, math.nan, 0, total), rel=1e-12)
    for epoch in range(5):
        for run, tuner in zip((told, untold), tuners, strict=True):
            train_loss, val_loss = run.epoch(epoch)
            values = tuner.step(train_loss=train_loss, val_loss=val_loss)
            assert values == pytest.approx(base_of(run, ROWS * total, epoch + 1, total), rel=1e-12)
    assert known(tuners[0])[0] == 1
    assert known(tuners[1])[0] == 0
    assert features(tuners[1], 0)["examples"] == 0
    assert set(known(tuners[0])[1:] + known(tuners[1])[1:]) == {1.0}
    assert features(tuners[0])["examples"] == features(tuners[1])["examples"]
    assert features(tuners[0])["examples"] == pytest.approx(math.log10(ROWS * total) / 8)


@pytest.mark.parametrize(("batch_size", "expected"), [(16, 12 * 32), (48, 4 * 32)])
def test_batches_of_unknown_size_are_taken_for_32(batch_size: int, expected: int) -> None:
    run = Loop()
    tuner = Tuner(staying(), run.optimizer, model=run.model, total_epochs=6)
    for epoch in range(3):
        train_loss, val_loss = run.epoch(epoch, batch_size)
        tuner.step(train_loss=train_loss, val_loss=val_loss)
        assert features(tuner)["examples"] == pytest.approx(math.log10(6 * expected) / 8)


def test_the_length_is_counted_in_the_batches_in_use() -> None:
    """Those of the epoch, not the ones that are decided on after it."""
    run, policy = Loop(), constant_policy(batch_size=1.0)
    policy.header = replace(policy.header, base_rules=staying().header.base_rules)
    tuner = Tuner(policy, run.optimizer, model=run.model, total_epochs=6, batch_size=32)
    assert tuner.hyperparameters["batch_size"] == 128
    train_loss, val_loss = run.epoch(0, 64)  # 3 steps
    tuner.step(train_loss=train_loss, val_loss=val_loss)
    assert tuner.hyperparameters["batch_size"] == 256
    assert features(tuner)["examples"] == pytest.approx(math.log10(3 * 128 * 6) / 8)


def test_no_length_is_learnt_from_an_epoch_without_steps() -> None:
    """Where the tuner sees no optimizer step, the length stays unknown until it does."""
    run = Loop()
    tuner = Tuner(staying(), run.optimizer, model=run.model, total_epochs=6)
    for epoch in range(2):
        tuner.step(train_loss=1.0, val_loss=1.0)
        assert known(tuner)[-1] == 0
        expected = base_of(run, math.nan, epoch + 1, 6)
        assert tuner.hyperparameters["lr"] == pytest.approx(expected["lr"], rel=1e-12)
    run.epoch(2)
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert known(tuner)[-1] == 1
    assert tuner.hyperparameters["lr"] == pytest.approx(base_of(run, ROWS * 6, 3, 6)["lr"], rel=1e-12)


@pytest.mark.parametrize("start", ["policy", "given"])
def test_the_batch_sampler_tells_the_length(start: Any) -> None:
    """Then the first decision is taken with it, as if it had been told from the start."""
    policy = random_policy(seed=4, scale=0.3)
    runs = [Loop(), Loop()]
    told, tuner = (
        Tuner(
            policy, run.optimizer, model=run.model, total_epochs=6, batch_size=32, start=start, initial_loss=2.25,
            examples_per_epoch=examples,
        )
        for run, examples in zip(runs, (ROWS, None), strict=True)
    )  # fmt: skip
    assert tuner.hyperparameters != told.hyperparameters
    samplers = [each.batch_sampler(ROWS) for each in (told, tuner)]
    assert tuner.hyperparameters == told.hyperparameters
    assert repr(tuner.history) == repr(told.history)
    assert [entry["signals"] for entry in tuner.history] == [{"val_loss": 2.25}]
    assert samplers[0].batch_size == samplers[1].batch_size == tuner.hyperparameters["batch_size"]
    assert runs[0].settings() == runs[1].settings()
    assert runs[0].rates() == runs[1].rates()
    other = tuner.batch_sampler(10 * ROWS)  # of validation, say: the length is known by now
    assert other.batch_size == samplers[0].batch_size
    for epoch in range(4):
        for run, each in zip(runs, (told, tuner), strict=True):
            train_loss, val_loss = run.epoch(epoch, int(each.hyperparameters["batch_size"]))
            each.step(train_loss=train_loss, val_loss=val_loss)
    assert repr(tuner.history) == repr(told.history)
    assert equal(runs[0].weights(), runs[1].weights())


def test_a_batch_sampler_tells_nothing_once_training_has_begun() -> None:
    run = Loop()
    tuner = Tuner(staying(), run.optimizer, model=run.model, total_epochs=6, batch_size=32)
    run.epoch(0)
    tuner.step(train_loss=1.0, val_loss=1.0)
    before = tuner.hyperparameters, repr(tuner.history)
    tuner.batch_sampler(50 * ROWS)
    assert (tuner.hyperparameters, repr(tuner.history)) == before


def test_a_length_that_was_told_stands() -> None:
    run = Loop()
    tuner = Tuner(staying(), run.optimizer, model=run.model, total_epochs=6, examples_per_epoch=5 * ROWS)
    run.epoch(0)
    tuner.step(train_loss=1.0, val_loss=1.0)
    base = base_of(run, 5 * ROWS * 6, 1, 6)
    follows = math.sqrt(5 * ROWS / 6 / base["batch_size"])  # rows of one of the six steps, by what was told
    assert tuner.hyperparameters["lr"] == pytest.approx(follows * base["lr"], rel=1e-12)


@pytest.mark.parametrize("told", ["a loader", "a batch size", "nothing"])
def test_the_learning_rate_follows_a_batch_size_that_stays(told: str) -> None:
    """From the first decision on, where it is known, or from the first epoch on."""
    run, controls = Loop(), ["lr", "weight_decay"]
    arguments: dict[str, Any] = {"total_epochs": 6, "examples_per_epoch": ROWS, "controls": controls}
    if told == "a loader":
        arguments["loader"] = DataLoader(TensorDataset(torch.arange(ROWS)), batch_size=64)
    elif told == "a batch size":
        arguments["batch_size"] = 64
    tuner = Tuner(staying(), run.optimizer, model=run.model, **arguments)
    follows = math.sqrt(64 / base_of(run, ROWS * 6, 0, 6)["batch_size"])
    for epoch in range(3):
        at_start = 1.0 if told == "nothing" and not epoch else follows
        assert tuner.hyperparameters["lr"] == pytest.approx(at_start * base_of(run, ROWS * 6, epoch, 6)["lr"])
        run.epoch(epoch, 64 if epoch == 0 else 8)  # what is known by then stands
        tuner.step(train_loss=1.0, val_loss=1.0)


def test_a_batch_size_that_was_learnt_survives_a_checkpoint() -> None:
    run = Loop()
    arguments: dict[str, Any] = {"model": run.model, "total_epochs": 6, "examples_per_epoch": ROWS}
    tuner = Tuner(staying(), run.optimizer, **arguments)
    run.epoch(0, 64)
    tuner.step(train_loss=1.0, val_loss=1.0)
    state = through_a_file(tuner.state_dict())
    tuner.close()
    other = Tuner(staying(), run.optimizer, **arguments)
    other.load_state_dict(state)
    run.epoch(1, 16)
    assert other.step(train_loss=1.0, val_loss=1.0)["lr"] == pytest.approx(
        math.sqrt(64 / base_of(run, ROWS * 6, 2, 6)["batch_size"]) * base_of(run, ROWS * 6, 2, 6)["lr"]
    )


def test_what_is_given_does_not_depend_on_the_length() -> None:
    chosen = []
    for examples in (None, ROWS, 1000 * ROWS):
        run = Loop()
        tuner = Tuner(
            staying(), run.optimizer, model=run.model, total_epochs=6, start="given", examples_per_epoch=examples
        )
        run.epoch(0)
        chosen.append(tuner.step(train_loss=1.0, val_loss=1.0))
    assert chosen[0] == chosen[1] == chosen[2]
    assert chosen[0] == pytest.approx({"lr": LR * warmup_cosine(1, 6), "weight_decay": DECAY, "dropout": DROPOUT})


def test_what_is_given_may_be_left_by_the_factor() -> None:
    run = Loop()
    policy = constant_policy(lr=1.0, weight_decay=-1.0)
    tuner = Tuner(policy, run.optimizer, total_epochs=6, start="given", max_factor=100.0)
    for _ in range(5):
        values = tuner.step(train_loss=1.0, val_loss=1.0)
    assert values["lr"] == pytest.approx(100 * LR * warmup_cosine(5, 6))
    assert values["weight_decay"] == pytest.approx(DECAY / 100)


def test_a_run_shorter_than_any_that_the_policy_knows(caplog: pytest.LogCaptureFixture) -> None:
    policy = random_policy()
    policy.header = replace(policy.header, trained_ranges={"horizons": (8, 64)})
    for total in (8, 500, 7):
        assert not caplog.records
        Tuner(policy, Loop().optimizer, total_epochs=total)
    assert caplog.messages == ["this policy was trained on runs of 8 epochs or more, not 7"]


# -- out of its depth --------------------------------------------------------------------------------------------------

KNOWN_CHANGES = {"train_change_1": (-0.5, 0.5), "horizons": (1, 64)}
"""What is out of depth beyond -1.5..1.5."""


def sheltered(policy: ControlPolicy) -> ControlPolicy:
    policy.header = replace(policy.header, trained_ranges=KNOWN_CHANGES)
    return policy


def stepped(tuner: Tuner, losses: Sequence[float]) -> list[dict[str, float]]:
    """The values in use in each epoch."""
    used = [tuner.hyperparameters]
    return used + [tuner.step(train_loss=loss, val_loss=1.0) for loss in losses]


@pytest.mark.parametrize("start", ["policy", "given"])
def test_out_of_its_depth_the_base_schedule_takes_over(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """At once, for as long as it lasts, and with one warning; afterwards the policy goes on from the base."""
    run = Loop()
    policy = sheltered(constant_policy(lr=0.5, weight_decay=-0.5, dropout=0.1))
    arguments: dict[str, Any] = {"start": start, "model": run.model, "total_epochs": 9, "guard": False}
    tuner = Tuner(policy, run.optimizer, examples_per_epoch=ROWS, **arguments)
    used = stepped(tuner, [1.0, 1.1, 9.9, 99.0, 99.0, 99.0, 9.0, 9.0])
    lost = [False, False, False, True, True, False, False, True, False]
    assert [entry["out_of_depth"] for entry in tuner.history] == lost
    base = BASE["adamw"] if start == "policy" else replace(BASE["adamw"], lr=LR, weight_decay=DECAY, dropout=DROPOUT)
    lr = [values["lr"] / (base.lr * warmup_cosine(epoch, 9)) for epoch, values in enumerate(used)]
    step = math.sqrt(2.5)
    assert lr == pytest.approx(
        [math.sqrt(30), *[math.sqrt(30) * step**k for k in (1, 2)], 1, 1, step, step**2, 1, step]
    )
    for epoch, values in enumerate(used):
        assert (values["weight_decay"] == pytest.approx(base.weight_decay)) == lost[epoch]
        assert (values["dropout"] == pytest.approx(base.dropout)) == lost[epoch]
    assert len(caplog.messages) == 2  # the first says that nothing is trained here
    assert caplog.messages[1].startswith("epoch 3: this run looks unlike any that the policy was trained on")


def test_out_of_its_depth_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    policy = constant_policy(lr=1.0)
    policy.header = replace(policy.header, trained_ranges={"parameters": (0.9, 1.0)})
    tuner = Tuner(policy, Loop().optimizer, total_epochs=4, examples_per_epoch=ROWS)
    used = stepped(tuner, [1.0, 1.0, 1.0])
    assert [values["lr"] for values in used] == pytest.approx(
        [BASE["adamw"].lr * warmup_cosine(epoch, 4) for epoch in range(4)]
    )
    assert len(caplog.messages) == 2
    assert "has taken no step" in caplog.messages[1]


def test_out_of_its_depth_for_a_stretch(caplog: pytest.LogCaptureFixture) -> None:
    """In a long run it is told at decisions, and the base schedule moves in between."""
    tuner = long_tuner(Loop(), sheltered(constant_policy(lr=0.5)), guard=False)
    used = stepped(tuner, [1.0] * 3 + [50.0] * 3 + [50.0] * 2)
    lr = [values["lr"] / (BASE["adamw"].lr * warmup_cosine(epoch, LONG)) for epoch, values in enumerate(used)]
    start = math.sqrt(30)
    assert lr == pytest.approx([start] * 3 + [start * math.sqrt(2.5)] * 3 + [1.0] * 3)
    assert [entry["out_of_depth"] for entry in tuner.history] == [False, False, True]
    assert caplog.messages[1].startswith("epoch 6: ")


def test_a_lowered_learning_rate_stays_lowered_out_of_depth() -> None:
    run = Loop()
    policy = sheltered(constant_policy(lr=0.5))
    tuner = Tuner(policy, run.optimizer, model=run.model, total_epochs=9, examples_per_epoch=ROWS)
    used = stepped(tuner, [1.0, 1.0, math.nan])
    assert tuner.history[-1]["guard"]
    used += stepped(tuner, [1.0, 2.9, 2.9 * 2.9])[1:]
    assert not any(entry["out_of_depth"] for entry in tuner.history)
    used += stepped(tuner, [0.5])[1:]
    assert tuner.history[-1]["out_of_depth"]
    assert used[-1]["lr"] == pytest.approx(0.25 * BASE["adamw"].lr * warmup_cosine(7, 9))


def test_a_policy_without_ranges_is_never_out_of_its_depth() -> None:
    tuner = Tuner(random_policy(), Loop().optimizer, total_epochs=9, examples_per_epoch=ROWS, guard=False)
    stepped(tuner, [1e-30, 1e30, math.nan, -1e30])
    assert not any(entry["out_of_depth"] for entry in tuner.history)
