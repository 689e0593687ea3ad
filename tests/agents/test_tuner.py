"""`Tuner` in users' own loops: what it sets, and what it refuses."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Required, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agents import PolicyError, Tuner
from agents.arguments import TunerArguments
from agents.tuner import PRETRAINED
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import HIGH, LOW
from inner_models.signals import MEASURE_EVERY, GradientMeter
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
    warmup_cosine,
)

EPOCHS = 6
CONTINUOUS = ("lr", "weight_decay", "dropout")


# -- use ---------------------------------------------------------------------------------------------------------------


def test_three_lines(tmp_path: Path) -> None:
    random_policy(seed=2, scale=0.3).save(tmp_path / "policy.safetensors")
    run = Loop()
    before = run.validate()
    tuner = Tuner.load(tmp_path / "policy.safetensors", run.optimizer, model=run.model, total_epochs=EPOCHS)
    in_use = []
    for epoch in range(EPOCHS):
        in_use.append(tuner.hyperparameters)
        assert run.settings()[0] == (in_use[-1]["lr"], in_use[-1]["weight_decay"])
        assert run.rates()[0] == in_use[-1]["dropout"]
        train_loss, val_loss = run.epoch(epoch)
        assert tuner.step(train_loss=train_loss, val_loss=val_loss) == tuner.hyperparameters
    assert tuner.epoch == EPOCHS
    assert val_loss < before
    for name in CONTINUOUS:
        assert len({values[name] for values in in_use}) > EPOCHS // 2, name
    assert [entry["hyperparameters"] for entry in tuner.history] == in_use
    assert [entry["epoch"] for entry in tuner.history] == list(range(EPOCHS))
    assert tuner.history[-1]["signals"].keys() == {"train_loss", "val_loss"}
    assert all(entry["guard"] is None for entry in tuner.history)


def test_losses_steer() -> None:
    """What is reported reaches the policy."""
    chosen = []
    for val_loss in (0.5, 2.5):
        run = Loop()
        policy = random_policy(scale=0.3)
        tuner = Tuner(policy, run.optimizer, model=run.model, total_epochs=EPOCHS, initial_loss=2.0)
        chosen.append(tuner.step(train_loss=1.0, val_loss=val_loss))
    assert all(chosen[0][name] != chosen[1][name] for name in CONTINUOUS)


def test_tensors_are_numbers() -> None:
    chosen = []
    for kind in (float, torch.tensor, lambda x: torch.tensor([x], requires_grad=True), np.float64):
        run = Loop()
        tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=EPOCHS, initial_loss=kind(2.25))
        chosen.append(tuner.step(train_loss=kind(1.5), val_loss=kind(1.25)))
        assert tuner.history[1]["signals"] == {"train_loss": 1.5, "val_loss": 1.25}
    assert all(values == chosen[0] for values in chosen)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_tuner(workers: int) -> None:
    run = Loop()
    tuner = Tuner(constant_policy(batch_size=0.5), run.optimizer, total_epochs=4, batch_size=32, start="given")
    sampler = tuner.batch_sampler(ROWS)
    loader = DataLoader(TensorDataset(torch.arange(ROWS)), batch_sampler=sampler, num_workers=workers)
    sizes = []
    for _ in range(4):
        batches = [rows for (rows,) in loader]
        sizes.append(int(tuner.hyperparameters["batch_size"]))
        assert all(len(rows) == sizes[-1] for rows in batches[:-1])
        assert len(loader) == len(batches) == math.ceil(ROWS / sizes[-1])
        assert torch.cat(batches).sort().values.equal(torch.arange(ROWS))
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert sizes == [64, 96, 128, 176]  # by 4 ** 0.5, then by 2 ** 0.5, to multiples of 16


def test_a_sampler_of_ones_own() -> None:
    run = Loop()
    tuner = Tuner(constant_policy(batch_size=1.0), run.optimizer, total_epochs=4, batch_size=32)
    samplers = [tuner.batch_sampler(TensorDataset(torch.zeros(48))), tuner.batch_sampler(48, seed=1)]
    for _ in range(3):
        assert [sampler.batch_size for sampler in samplers] == [tuner.hyperparameters["batch_size"]] * 2
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert list(samplers[0]) != list(samplers[1])


@pytest.mark.parametrize("start", ["policy", "given"])
def test_groups_and_layers_keep_their_ratios(start: Any) -> None:
    run = Loop()
    tuner = Tuner(random_policy(seed=2), run.optimizer, model=run.model, total_epochs=EPOCHS, start=start)
    for epoch in range(EPOCHS):
        (lr, decay), (first_lr, first_decay), (bias_lr, bias_decay) = run.settings()
        assert (first_lr, first_decay, bias_lr) == pytest.approx((lr / 4, decay / 3, lr), rel=1e-12)
        assert bias_decay == 0.0
        assert run.rates()[1] == pytest.approx(run.rates()[0] / 2)
        tuner.step(train_loss=1.0 / (epoch + 1), val_loss=1.0)
    assert decay != DECAY


def test_without_a_model_or_batch_size() -> None:
    """Controls that a run does not have stay out of everything that is reported."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adagrad([parameter])
    tuner = Tuner(random_policy(), optimizer, total_epochs=3)
    assert tuner.hyperparameters.keys() == {"lr"}
    assert tuner.history[0]["hyperparameters"].keys() == {"lr"}


def test_only_the_chosen_controls_move() -> None:
    run = Loop()
    before = run.settings(), run.rates()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=3, controls=["lr"])
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert list(tuner.history[0]["hyperparameters"]) == ["lr"]
    assert run.rates() == before[1]
    assert [decay for _, decay in run.settings()] == [decay for _, decay in before[0]]
    assert [lr for lr, _ in run.settings()] != [lr for lr, _ in before[0]]
    with pytest.raises(ValueError, match="unknown control 'dropuot'; did you mean 'dropout'"):
        Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=3, controls=["dropuot"])


@pytest.mark.parametrize("name", ["batch_size", "dropout", "augmentation", "label_smoothing"])
def test_a_control_that_the_run_lacks_is_told_with_the_mend(name: str) -> None:
    mend = {"batch_size": "loader=", "label_smoothing": "criterion="}.get(name, "model=")
    with pytest.raises(ValueError, match=rf"unknown control '{name}' in this run, which has lr.*needs {mend}"):
        Tuner(random_policy(), Loop().optimizer, total_epochs=3, controls=[name])


def test_no_control_is_proposed_that_is_not_alike() -> None:
    with pytest.raises(ValueError, match=r"^unknown control 'learning_rate'; known: lr"):
        Tuner(random_policy(), Loop().optimizer, total_epochs=3, controls=["learning_rate"])


@pytest.mark.parametrize(("momentum", "told"), [(0.0, True), (0.5, True), (0.9, False), (0.92, False), (0.99, True)])
def test_a_momentum_that_the_policy_does_not_know(
    momentum: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = torch.optim.SGD(Loop().model.parameters(), lr=0.1, momentum=momentum)
    Tuner(random_policy(), optimizer, total_epochs=30)
    expected = [f"the policy knows SGD with momentum 0.9; with {momentum:g} its learning rates may not fit: consider "
                "start='given'"]  # fmt: skip
    assert caplog.messages == expected * told
    caplog.clear()
    Tuner(random_policy(), optimizer, total_epochs=30, start="given")
    assert not caplog.messages


def test_what_is_no_sgd_is_not_told_of_its_momentum(caplog: pytest.LogCaptureFixture) -> None:
    Tuner(random_policy(), torch.optim.RMSprop(Loop().model.parameters()), total_epochs=30)  # momentum 0
    assert ["AdamW and SGD; with RMSprop" in message for message in caplog.messages] == [True]


def test_sgd_has_its_own_base() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    tuner = Tuner(constant_policy(), optimizer, total_epochs=EPOCHS)
    base = BASE["sgd"]
    assert tuner.hyperparameters["lr"] == pytest.approx(base.lr * warmup_cosine(0, EPOCHS, base.warmup))


def test_closed() -> None:
    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=EPOCHS)
    assert len(run.optimizer._optimizer_step_pre_hooks) == 1
    tuner.close()
    assert not run.optimizer._optimizer_step_pre_hooks


# -- synchronization ---------------------------------------------------------------------------------------------------


def optimizer_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Enough for gradients to be measured three times, with and without a momentum."""
    device = next(model.parameters()).device
    for _ in range(2 * MEASURE_EVERY + 1):
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.ones(2, 4, device=device)).square().mean())
        optimizer.step()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_read_between_decisions(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Tensors on the meta device have no values: reading or moving one, which would synchronize a GPU, is an error."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to("meta")
    optimizer = OPTIMIZERS[name](model.parameters())
    tuner = Tuner(random_policy(), optimizer, model=model, total_epochs=3, guard=False)
    optimizer_steps(model, optimizer)
    assert [step.products.is_meta for step in tuner._meter._measured] == [True] * 3
    assert not caplog.records  # a failure to measure would have been logged
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert "meta" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_synchronization_between_decisions_on_cuda(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).cuda()
    optimizer = OPTIMIZERS[name](model.parameters())
    tuner = Tuner(random_policy(), optimizer, model=model, total_epochs=3)
    optimizer_steps(model, optimizer)  # libraries that start up may synchronize
    for epoch in range(2):
        tuner.step(train_loss=1.0, val_loss=1.0 - epoch / 10)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer_steps(model, optimizer)
            assert not caplog.records  # a failure to measure would have been logged
            with pytest.raises(RuntimeError, match="synchroniz"):
                GradientMeter.finish(tuner._meter)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# -- starts ------------------------------------------------------------------------------------------------------------


def test_staying_is_the_base_schedule() -> None:
    run, base = Loop(), BASE["adamw"]
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=EPOCHS, batch_size=48)
    for epoch in range(EPOCHS):
        expected = {name: getattr(base, name) for name in tuner.hyperparameters}
        expected["lr"] = base.lr * warmup_cosine(epoch, EPOCHS, base.warmup)
        assert tuner.hyperparameters == pytest.approx(expected, rel=1e-12)
        tuner.step(train_loss=1.0, val_loss=1.0)


def test_staying_with_what_is_given_keeps_it() -> None:
    run = Loop()
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=EPOCHS, batch_size=20, start="given")
    for epoch in range(EPOCHS):
        factor = warmup_cosine(epoch, EPOCHS)
        expected = [(LR * factor, DECAY), (LR / 4 * factor, DECAY / 3), (LR * factor, 0.0)]
        assert np.allclose(run.settings(), expected, rtol=1e-12, atol=0)
        assert run.rates() == [DROPOUT, DROPOUT / 2]
        assert tuner.hyperparameters["batch_size"] == 20
        tuner.step(train_loss=1.0, val_loss=1.0)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("max_factor", [1.3, 5.0])
@pytest.mark.parametrize(
    ("lr", "batch_size", "decay", "dropout"),
    [(LR, 32, DECAY, DROPOUT), (1e-7, 2, 0.0, 0.0), (0.9, 500, 2.9, 0.45), (1e-5, 20, 1e-6, 0.005)],
)
def test_given_values_stay_within_the_factor(
    lr: float, batch_size: int, decay: float, dropout: float, max_factor: float, sign: float
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    policy = constant_policy(**dict.fromkeys(CONTROLS, sign))
    tuner = Tuner(
        policy, optimizer, model=model, total_epochs=10, batch_size=batch_size, start="given", max_factor=max_factor
    )
    reached = []
    for epoch in range(10):
        values = tuner.hyperparameters
        given = {"lr": lr * warmup_cosine(epoch, 10), "batch_size": batch_size, "weight_decay": decay}
        assert ("weight_decay" in values, "dropout" in values) == (decay > 0, dropout > 0)
        for name, value in given.items():
            if name not in values:
                continue
            assert value / max_factor * (1 - 1e-9) <= values[name] <= value * max_factor * (1 + 1e-9), name
        odds, given_odds = (p / (1 - p) for p in (values.get("dropout", 0.0), dropout))
        assert given_odds / max_factor * (1 - 1e-9) <= odds <= given_odds * max_factor * (1 + 1e-9)
        reached.append(values["lr"] / given["lr"])
        tuner.step(train_loss=1.0, val_loss=1.0)
    if lr != 0.9:  # near the top of the range there is no way up
        assert reached[-1] == pytest.approx(max_factor**sign)


# -- misuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"total_epochs": 0},
        {"examples_per_epoch": 0},
        {"start": "x"},
        {"batch_size": 0},
        {"start": "given", "max_factor": 1.0},
        {"start": "given", "max_factor": math.nan},
        {"initial_loss": "much"},
    ],
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    run = Loop()
    name, value = list(arguments.items())[-1]
    with pytest.raises(ValueError, match=f"{name} must be .*{value}") as caught:
        Tuner(random_policy(), run.optimizer, **{"model": run.model, "total_epochs": EPOCHS, **arguments})
    assert "\n" not in str(caught.value)


def test_max_factor_is_for_given_values() -> None:
    with pytest.raises(ValueError, match="max_factor=3 is for start='given', to stay near your own values"):
        Tuner(random_policy(), Loop().optimizer, total_epochs=EPOCHS, max_factor=3)


def test_the_length_stays() -> None:
    tuner = Tuner(random_policy(), Loop().optimizer, total_epochs=EPOCHS)
    with pytest.raises(AttributeError, match="total_epochs"):
        tuner.total_epochs = 20  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("optimizer", nn.Linear(2, 2), "a torch.optim.Optimizer, not Linear"),
        ("loader", [(1, 2)], r"the DataLoader itself, not \[\(1, 2\)\]"),
        ("model", "m", "an nn.Module, not 'm'"),
        ("criterion", nn.functional.cross_entropy, "an nn.Module, not <function cro"),
        ("writer", "runs/x", "a SummaryWriter, not 'runs/x'"),
    ],
)
def test_what_is_of_another_kind(name: str, value: Any, kind: str) -> None:
    arguments: dict[str, Any] = {"optimizer": Loop().optimizer, "total_epochs": EPOCHS, name: value}
    with pytest.raises(ValueError, match=f"{name} must be {kind}"):
        Tuner(random_policy(), **arguments)


def test_a_bad_construction_leaves_the_optimizer_alone() -> None:
    run = Loop()
    before = run.settings()
    with pytest.raises(PolicyError):
        Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=EPOCHS, signals=())
    assert run.settings() == before
    assert not run.optimizer._optimizer_step_pre_hooks


def test_a_signal_that_the_run_does_not_have() -> None:
    run = Loop()
    with pytest.raises(PolicyError, match="needs val_loss at every step"):
        Tuner(random_policy(), run.optimizer, total_epochs=EPOCHS, signals=("train_loss",))


def test_a_policy_that_needs_no_validation() -> None:
    run, policy = Loop(), random_policy()
    policy.header = replace(policy.header, required_signals=("train_loss",))
    tuner = Tuner(policy, run.optimizer, model=run.model, total_epochs=EPOCHS, signals=("train_loss",))
    tuner.step(train_loss=1.0)
    assert tuner.epoch == 1
    missing = [feature == 1.0 for feature in tuner.history[1]["observation"]]
    assert missing[policy.header.features.index("val_missing")]
    tuner.step(train_loss=math.nan)
    assert tuner.history[2]["guard"] == "train_loss not finite"


@pytest.mark.parametrize("value", ["low", [1.0], {}, object(), 1j, 10**400, torch.ones(2), np.ones(2)])
@pytest.mark.parametrize("name", ["train_loss", "val_loss"])
def test_losses_that_are_not_numbers(name: str, value: Any) -> None:
    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, total_epochs=EPOCHS)
    before = tuner.hyperparameters
    losses: dict[str, Any] = {"train_loss": 1.0, "val_loss": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        tuner.step(**losses)
    assert (tuner.epoch, tuner.hyperparameters) == (0, before)


def test_no_batch_size_to_follow() -> None:
    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, total_epochs=EPOCHS)
    before = tuner.hyperparameters, repr(tuner.history)
    with pytest.raises(ValueError, match="made without batch_size"):
        tuner.batch_sampler(ROWS)
    assert (tuner.hyperparameters, repr(tuner.history)) == before


def test_more_epochs_than_total(caplog: pytest.LogCaptureFixture) -> None:
    run = Loop()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=2, examples_per_epoch=ROWS)
    run.optimizer.step()
    tuner.step(train_loss=1.0, val_loss=1.0)
    values = tuner.hyperparameters
    for epoch in range(4):
        assert len(caplog.records) == (epoch > 1), epoch
        run.optimizer.step()
        assert tuner.step(train_loss=1.0, val_loss=1.0) == values
    assert "more epochs than total_epochs=2" in caplog.messages[0]
    assert tuner.epoch == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308, 0.0, -1.0])
@pytest.mark.parametrize("name", ["train_loss", "val_loss", "both"])
def test_bad_signals_do_no_harm(name: str, bad: float) -> None:
    run = Loop()
    tuner = Tuner(
        random_policy(seed=1, scale=3.0),
        run.optimizer,
        model=run.model,
        total_epochs=8,
        batch_size=64,
        initial_loss=bad,
        guard=False,
    )
    for epoch in range(8):
        use = bad if epoch % 3 else 1.0
        tuner.step(train_loss=1.0 if name == "val_loss" else use, val_loss=1.0 if name == "train_loss" else use)
    for entry in tuner.history:
        observation = np.array(entry["observation"])
        assert np.isfinite(observation).all()
        assert (observation >= LOW).all()
        assert (observation <= HIGH).all()
        assert np.isfinite(entry["action"]).all()
        for control, value in entry["hyperparameters"].items():
            assert CONTROLS[control].low <= value <= CONTROLS[control].high


def test_warnings_of_what_does_not_go_together(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    Tuner(random_policy(), optimizer, total_epochs=3)
    assert ["scheduler" in caplog.messages[0], "Adam" in caplog.messages[1]] == [True, True]


def test_a_scheduler_that_begins_at_zero_leaves_the_groups_their_ratio() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(3))], "lr": lr} for lr in (1e-4, 1e-3)]
    optimizer = torch.optim.AdamW(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 10)
    Tuner(random_policy(), optimizer, total_epochs=3)
    low, high = (group["lr"] for group in optimizer.param_groups)
    assert low == pytest.approx(high / 10)


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Muon])
def test_decoupled_decay_is_moved(kind: Any) -> None:
    optimizer = kind([nn.Parameter(torch.ones(3, 3))], weight_decay=0.1)
    assert "weight_decay" in Tuner(constant_policy(weight_decay=1.0), optimizer, total_epochs=3).hyperparameters
    assert optimizer.param_groups[0]["weight_decay"] != 0.1


def test_a_rate_that_the_optimizer_lacks() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="lr of a parameter group must be a finite number, not None"):
        Tuner(random_policy(), optimizer, total_epochs=3)


def test_an_optimizer_that_accelerate_prepared() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(3, 2)
    prepared = accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters()))
    tuner = Tuner(random_policy(), prepared, model=model, total_epochs=3)
    torch.autograd.backward(model(torch.ones(4, 3)).square().mean())
    prepared.step()
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert tuner.history[1]["observation"][tuner.policy.header.features.index("gradients_missing")] == 0.0


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_parameters_that_come_and_go() -> None:
    """Groups added and parameters unfrozen while the run is under way, as in gradual unfreezing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model[0].parameters())
    model[0].bias.requires_grad_(False)
    tuner = Tuner(random_policy(), optimizer, model=model, total_epochs=4)
    for change in (
        lambda: model[0].bias.requires_grad_(True),
        lambda: optimizer.add_param_group({"params": [*model[1].parameters()]}),
    ):
        change()
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.ones(4, 2)).square().mean())
        optimizer.step()
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert optimizer.param_groups[1]["lr"] == tuner.hyperparameters["lr"]
    tuner.step(train_loss=math.nan, val_loss=math.nan)
    assert np.isfinite([entry["observation"] for entry in tuner.history]).all()


def test_groups_that_are_taken_away() -> None:
    run = Loop()
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=6)
    _, *expected = run.settings()
    del run.optimizer.param_groups[0]
    tuner._apply(tuner._loop.values())
    assert run.settings() == expected
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert len(tuner.history) == 2


def test_a_group_that_is_added_without_decay_stays_so() -> None:
    first, second, third = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = torch.optim.AdamW([first], weight_decay=0.1)
    tuner = Tuner(random_policy(), optimizer, total_epochs=4)
    optimizer.add_param_group({"params": [second], "weight_decay": 0.0})
    optimizer.add_param_group({"params": [third]})
    for _ in range(2):
        found = tuner.step(train_loss=1.0, val_loss=1.0)
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == [found["weight_decay"], 0.0, found["weight_decay"]]


def test_squares_of_gradients_do_not_overflow_under_autocast() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    tuner = Tuner(random_policy(), optimizer, total_epochs=4)
    with torch.autocast("cpu", torch.float16):
        for _ in range(2):
            parameter.grad = torch.full((2,), 300.0)
            optimizer.step()
        assert tuner._meter.finish()["grad_norm"] == pytest.approx(300 * 2**0.5)


def test_sparse_gradients_go_unmeasured() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    tuner = Tuner(random_policy(), optimizer, total_epochs=3)
    torch.autograd.backward(embedding(torch.tensor([1])).sum())
    optimizer.step()
    tuner.step(train_loss=1.0, val_loss=1.0)
    missing = tuner.policy.header.features.index("gradients_missing")
    assert tuner.history[1]["observation"][missing] == 1.0


@pytest.mark.parametrize("named", [False, True])
def test_the_gradients_of_a_closure_are_measured(named: bool) -> None:
    """After its first call, which makes them: the same as in a step without one."""
    observations = []
    for closed in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        tuner = Tuner(random_policy(), optimizer, total_epochs=3)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = model(torch.ones(1, 2)).square().sum()
            loss.backward()
            return float(loss.item())

        for _ in range(10):
            if not closed:
                closure()
                optimizer.step()
            elif named:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
        tuner.step(train_loss=1.0, val_loss=1.0)
        observations.append(tuner.history[1]["observation"])
    assert observations[0] == observations[1]
    assert observations[0][tuner.policy.header.features.index("gradients_missing")] == 0.0


# -- writer, package ---------------------------------------------------------------------------------------------------


def test_writer() -> None:
    run, writer = Loop(), Writer()
    tuner = Tuner(random_policy(), run.optimizer, model=run.model, total_epochs=3, writer=writer)
    used = []
    for epoch in range(4):
        used.append(tuner.hyperparameters)
        tuner.step(train_loss=float(epoch), val_loss=10.0 + epoch)
    assert len({(tag, step) for tag, _, step in writer.scalars}) == len(writer.scalars)
    found = {(tag, step): value for tag, value, step in writer.scalars if tag.split("/")[0] in ("inner", "control")}
    found = {key: value for key, value in found.items() if key[0] != "inner/update_ratio"}
    inner = {(f"inner/{name}", e + 1): o + e for e in range(4) for name, o in (("train_loss", 0.0), ("val_loss", 10.0))}
    control = {(f"control/{name}", e + 1): value for e, values in enumerate(used) for name, value in values.items()}
    assert len(control) == 12
    assert found == {**inner, **control}


@pytest.mark.skipif(not resources.files("agents").joinpath(PRETRAINED).is_file(), reason="no pretrained policy yet")
def test_pretrained() -> None:
    run = Loop()
    before = run.validate()
    tuner = Tuner.pretrained(run.optimizer, model=run.model, total_epochs=EPOCHS, initial_loss=before)
    for epoch in range(EPOCHS):
        train_loss, val_loss = run.epoch(epoch)
        tuner.step(train_loss=train_loss, val_loss=val_loss)
    assert val_loss < before


def test_using_a_policy_needs_no_training_library() -> None:
    code = (
        "import sys; from agents import Tuner; "
        "print(*({'stable_baselines3', 'tensorboard', 'optuna'} & {name.split('.')[0] for name in sys.modules}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "\n"


def test_the_typed_arguments_are_the_tuners() -> None:
    """What `pretrained`, `load` and the callbacks hand on has the names and types that `Tuner` itself has."""
    own = {
        name: parameter
        for name, parameter in inspect.signature(Tuner).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert TunerArguments.__annotations__.keys() == own.keys()
    types = get_type_hints(Tuner.__init__)
    assert get_type_hints(TunerArguments) == {name: types[name] for name in own}
    extras = get_type_hints(TunerArguments, include_extras=True)
    required = {name for name, hint in extras.items() if get_origin(hint) is Required}
    assert required == {name for name, parameter in own.items() if parameter.default is inspect.Parameter.empty}
