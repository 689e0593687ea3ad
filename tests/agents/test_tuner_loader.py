"""`Tuner(loader=...)`: whose batch size is moved, and how long a run it makes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from agents import Tuner
from inner_models import sampling
from tests.tiny import random_policy
from tests.user_runs import BASE, ROWS, Loop, constant_policy, warmup_cosine

DATA = TensorDataset(torch.arange(200.0))


def attached(loader: DataLoader[Any] | None, **arguments: Any) -> Tuner:
    """A tuner whose policy asks for ever larger batches."""
    run = Loop()
    return Tuner(
        constant_policy(batch_size=1.0), run.optimizer, model=run.model, total_epochs=6, loader=loader, **arguments
    )


def sizes(loader: DataLoader[Any]) -> list[int]:
    return [len(batch) for (batch,) in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_batches_have_the_size_in_use(workers: int, drop_last: bool) -> None:
    loader = DataLoader(
        DATA, batch_size=16, shuffle=True, drop_last=drop_last, num_workers=workers, persistent_workers=workers > 0
    )
    tuner = attached(loader)
    seen = set()
    for epoch in range(3):
        size = int(tuner.hyperparameters["batch_size"])
        full, rest = divmod(200, size)
        assert sizes(loader) == [size] * full + [rest] * (rest > 0 and not drop_last)
        seen.add(size)
        tuner.step(train_loss=1.0, val_loss=1.0 - epoch / 10)
    assert len(seen) == 2


class Buckets(BatchSampler):
    """A batch sampler that makes batches in a manner of its own."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2], [3]])


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(300.0))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 300


class Batches(IterableDataset[torch.Tensor]):
    """Ready batches, in a number that is known."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(300.0).view(3, 100))

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(("stream", "examples"), [(Stream, None), (SizedStream, 300)])
def test_a_stream_has_a_batch_size_and_the_length_that_it_tells(stream: type[Stream], examples: int | None) -> None:
    loader = DataLoader(stream(), batch_size=16)
    tuner = attached(loader)
    size = int(tuner.hyperparameters["batch_size"])
    assert size > 16
    assert [len(batch) for batch in loader] == [size, 300 - size]
    assert tuner.trajectory.examples_per_epoch == examples


@pytest.mark.parametrize(
    ("loader", "examples"),
    [
        (DataLoader(DATA, batch_sampler=Buckets(SequentialSampler(DATA), 4, False)), 200),
        (DataLoader(DATA, batch_size=None), None),
        (DataLoader(Batches(), batch_size=None), None),
        (DataLoader(DATA, batch_size=None, sampler=BatchSampler(SequentialSampler(range(60)), 4, False)), 60),
    ],
    ids=["own batches", "none", "ready batches", "batches by the sampler"],
)
def test_batch_sizes_that_cannot_be_set(
    loader: DataLoader[Any], examples: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tuner = attached(loader)
    assert "batch_size" not in tuner.hyperparameters
    assert [r.message for r in caplog.records if "loader" in r.message] == [
        "this loader's batch size cannot be set from outside: it stays as it is"
    ]
    assert tuner.trajectory.examples_per_epoch == examples
    with pytest.raises(ValueError, match="unknown control 'batch_size'"):
        attached(loader, controls=["batch_size"])


@pytest.mark.parametrize(
    ("loader", "examples"),
    [
        (DataLoader(DATA, batch_size=8), 200),
        (DataLoader(DATA, batch_size=8, sampler=SubsetRandomSampler(range(50))), 50),
        (DataLoader(DATA, batch_size=8, sampler=RandomSampler(DATA, num_samples=300, replacement=True)), 300),
        (DataLoader(DATA, batch_sampler=sampling.BatchSampler(200, 8, np.random.default_rng(0), examples=70)), 70),
    ],
    ids=["data set", "subset", "more than all", "ours"],
)
def test_the_length_of_an_epoch_is_the_loaders(loader: DataLoader[Any], examples: int) -> None:
    assert attached(loader).trajectory.examples_per_epoch == examples
    told = attached(None, examples_per_epoch=examples).history[0]["observation"]
    assert attached(loader, controls=["lr"]).history[0]["observation"][3] == told[3]
    assert attached(loader, examples_per_epoch=77).trajectory.examples_per_epoch == 77


def test_several_batches_make_a_step() -> None:
    loader = DataLoader(DATA, batch_size=4)
    tuner = attached(loader, batches_per_step=8, start="given")
    for epoch in range(4):
        size = tuner.hyperparameters["batch_size"]
        assert size % 16 == 0
        assert max(sizes(loader)) == size / 8
        tuner.step(train_loss=1.0, val_loss=1.0 - epoch / 10)
    assert size > 32


def test_too_much_is_said() -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 and loader: give one of them"):
        attached(DataLoader(DATA, batch_size=8), batch_size=8)
    with pytest.raises(ValueError, match="batches_per_step must be at least 1 and whole, not 0"):
        attached(DataLoader(DATA, batch_size=8), batches_per_step=0)


def test_batches_of_a_step_count_where_the_batch_size_is_not_known() -> None:
    rates = []
    for batches in (1, 8):
        run = Loop()
        tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=6, batches_per_step=batches)
        run.epoch(0)
        tuner.step(train_loss=1.0, val_loss=1.0)
        rates.append(tuner.history[1]["observation"][3])  # of how long the run is
    assert rates[1] > rates[0]


def test_who_else_sets_the_rate_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    run = Loop()
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=6)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer, patience=0)
    for epoch in range(4):
        tuner.step(train_loss=1.0, val_loss=1.0)
        if epoch:
            scheduler.step(1.0)
    first, message = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "has taken no step" in first
    assert message.startswith("epoch 4 was trained with lr ")
    assert "a scheduler perhaps" in message


def test_a_closed_tuner_gives_the_batch_size_back() -> None:
    """Else the next one, over the same loader, would take what this one left for the user's own."""
    loader = DataLoader(TensorDataset(torch.arange(100.0)), batch_size=40)
    for _ in range(2):
        tuner = attached(loader, start="given", max_factor=2)
        assert tuner.hyperparameters["batch_size"] == 80
        assert isinstance(loader.batch_sampler, torch.utils.data.BatchSampler)
        tuner.follow(loader.batch_sampler)  # once more, which changes nothing
        tuner.close()
        assert sizes(loader) == [40, 40, 20]


def test_an_optimizer_that_takes_no_step_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    run, other = Loop(), Loop()
    tuner = Tuner(constant_policy(), run.optimizer, total_epochs=6, examples_per_epoch=ROWS)
    for _ in range(2):
        other.epoch(0)
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert "has taken no step: is it the one that is trained with?" in caplog.text
    caplog.clear()
    run.epoch(0)
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert not caplog.text


@pytest.mark.parametrize("rate", [None, 1e-5])
def test_a_group_that_comes_late_loses_its_rate_with_a_word(
    rate: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    run = Loop()
    tuner = Tuner(constant_policy(), run.optimizer, total_epochs=6, examples_per_epoch=ROWS)
    rate_now = tuner.hyperparameters["lr"]
    run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate or rate_now})
    for _ in range(2):
        run.epoch(0)
        tuner.step(train_loss=1.0, val_loss=1.0)
        assert run.optimizer.param_groups[-1]["lr"] == tuner.hyperparameters["lr"]
    assert caplog.messages == (
        [
            "epoch 1: a parameter group was added with lr 1e-05, and has the largest of all groups from now on: for a "
            "share of what the tuner sets, add the group before the tuner is made"
        ]
        if rate
        else []
    )


def test_no_epoch_is_dropped_whole() -> None:
    loader = DataLoader(TensorDataset(torch.arange(100.0)), batch_size=16, drop_last=True)
    tuner = attached(loader)
    for _ in range(3):
        assert sizes(loader) == [100]  # the policy asked for more
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert tuner.hyperparameters["batch_size"] == 100


def test_a_decision_that_cannot_be_explained_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: object, **options: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("agents.tuner.reason", fails)
    run = Loop()
    tuner = Tuner(constant_policy(), run.optimizer, total_epochs=6, examples_per_epoch=ROWS)
    run.optimizer.step()
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert [entry["reason"] for entry in tuner.history] == ["", ""]
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "explaining a decision failed; the run goes on without it"
    ]


@pytest.mark.parametrize(("rows", "drop_last", "norm", "warns"), [
    (1025, False, True, True), (1025, True, True, False), (1025, False, False, False), (1024, False, True, False),
])  # fmt: skip
def test_a_last_row_that_batch_norm_cannot_train_on(
    rows: int, drop_last: bool, norm: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2) if norm else nn.ReLU())
    loader = DataLoader(TensorDataset(torch.zeros(rows, 3)), batch_size=50, drop_last=drop_last)
    Tuner(constant_policy(), torch.optim.AdamW(model.parameters()), model=model, loader=loader, total_epochs=3)
    assert ("drop_last=True" in caplog.text) == warns


def test_a_sampler_without_room_for_the_batch_size_is_no_other_hand(caplog: pytest.LogCaptureFixture) -> None:
    run = Loop()
    tuner = Tuner(
        constant_policy(), run.optimizer, model=run.model, total_epochs=6, batch_size=32, examples_per_epoch=10
    )
    tuner.batch_sampler(10, drop_last=True)
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert "scheduler" not in caplog.text


class ShortStream(IterableDataset[torch.Tensor]):
    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(40.0))


def test_a_stream_that_drops_its_last_batch_does_not_drop_all() -> None:
    loader = DataLoader(ShortStream(), batch_size=16, drop_last=True)
    tuner = attached(loader)
    for epoch in range(4):
        assert sum(map(len, loader)) > 0
        tuner.step(train_loss=1.0, val_loss=1.0 - epoch / 10)
    assert tuner.hyperparameters["batch_size"] == 40


# -- lengths and sizes that loops show, and those that they leave open -------------------------------------------------


class Balanced:
    """A batch sampler of the user's own, whose batches do not make up a whole pass."""

    def __init__(self, batch_size: int, batches: int) -> None:
        self.size, self.batches = batch_size, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(self.size))] * self.batches)


class Told(Balanced):
    @property
    def batch_size(self) -> int:
        return self.size


def train(run: Loop, steps: int) -> None:
    for _ in range(steps):
        run.optimizer.zero_grad()
        torch.autograd.backward(run.model(run.train.inputs[:4]).square().mean())
        run.optimizer.step()


def at_lr(batch_size: float, **arguments: Any) -> float:
    """The first learning rate of a run whose batches are known to stay at that size."""
    run = Loop()
    sampler = DataLoader(TensorDataset(torch.arange(4096.0)), batch_size=int(batch_size))
    return Tuner(
        constant_policy(), run.optimizer, model=run.model, total_epochs=6, loader=sampler, controls=["lr"], **arguments
    ).hyperparameters["lr"]


def test_a_sampler_that_says_its_batch_size_is_believed_from_the_start() -> None:
    run = Loop()
    loader = DataLoader(DATA, batch_sampler=Told(128, 3))
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=6, loader=loader)
    assert tuner.hyperparameters["lr"] == pytest.approx(at_lr(128))
    assert tuner.trajectory.examples_per_epoch == 3 * 128


class Shard(BatchSampler):
    """One process's share of the batches, as Accelerate makes it: without the attributes of its class."""

    def __init__(self, batch_size: int, batches: int) -> None:
        self.batch_size, self.batches, self.drop_last = batch_size, batches, False

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(self.batch_size))] * self.batches)


def test_a_shard_of_batches_has_a_length() -> None:
    tuner = attached(DataLoader(DATA, batch_sampler=Shard(16, 5)))
    assert tuner.trajectory.examples_per_epoch == 80


def test_a_sampler_that_says_nothing_is_taken_for_nothing() -> None:
    """An epoch of 2 steps over a data set of 200 rows need not be one in batches of 100."""
    run = Loop()
    loader = DataLoader(DATA, batch_sampler=Balanced(16, 2))
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=6, loader=loader)
    first = tuner.hyperparameters["lr"]
    train(run, 2)
    after = tuner.step(train_loss=1.0, val_loss=1.0)["lr"]
    told = Loop()
    tuner = Tuner(constant_policy(), told.optimizer, model=told.model, total_epochs=6, examples_per_epoch=200)
    assert tuner.hyperparameters["lr"] == pytest.approx(first)
    train(told, 2)
    assert tuner.step(train_loss=1.0, val_loss=1.0)["lr"] == pytest.approx(after * math.sqrt(100 / 48))


def test_a_batch_has_no_more_rows_than_there_are() -> None:
    run = Loop()
    loader = DataLoader(TensorDataset(torch.arange(64.0)), batch_size=4096)
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=6, loader=loader, controls=["lr"])
    assert tuner.hyperparameters["lr"] == pytest.approx(at_lr(64))


@pytest.mark.parametrize("before", [0, 7])
def test_the_batch_size_is_not_learnt_from_part_of_an_epoch(before: int) -> None:
    """As where a checkpoint was written within the first one."""
    run = Loop()
    arguments: dict[str, Any] = {"model": run.model, "total_epochs": 6, "examples_per_epoch": 1024}
    tuner = Tuner(constant_policy(), run.optimizer, **arguments)
    train(run, before)
    state = tuner.state_dict()
    tuner.close()
    tuner = Tuner(constant_policy(), run.optimizer, **arguments)
    tuner.load_state_dict(state)
    rates = []
    for steps in (8 - before, 8, 8):
        train(run, steps)
        rates.append(tuner.step(train_loss=1.0, val_loss=1.0)["lr"])
    peak = BASE["adamw"].lr * np.array([warmup_cosine(epoch, 6) for epoch in (1, 2, 3)])
    follows = math.sqrt(128 / 48)
    np.testing.assert_allclose(rates, peak * ([1, follows, follows] if before else follows), rtol=1e-6)


def test_a_state_of_other_batches_is_gone_on_with_at_those_of_now() -> None:
    run = Loop()
    states: list[dict[str, Any]] = []
    for batch_size in (32, 256):
        loader = DataLoader(TensorDataset(torch.arange(4096.0)), batch_size=batch_size)
        tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=6, loader=loader, controls=["lr"])
        if states:
            tuner.load_state_dict(states[0])
        tuner.step(train_loss=1.0, val_loss=1.0)
        states.append(tuner.state_dict())
    assert tuner.hyperparameters["lr"] == pytest.approx(at_lr(256) * warmup_cosine(2, 6) / warmup_cosine(0, 6))


@pytest.mark.parametrize(("batches", "warns"), [(1, True), (4, False)])
def test_steps_of_several_batches_are_noticed(batches: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    run = Loop()
    loader = DataLoader(DATA, batch_size=8)
    tuner = Tuner(
        constant_policy(), run.optimizer, model=run.model, total_epochs=6, loader=loader, batches_per_step=batches,
        controls=["lr"],
    )  # fmt: skip
    for _ in range(3):
        train(run, 6)
        tuner.step(train_loss=1.0, val_loss=1.0)
    expected = "epoch 1: 200 examples made 6 optimizer steps, with batches of 8: give batches_per_step"
    assert [message[: len(expected)] for message in caplog.messages] == [expected] * warns


def test_two_tuners_of_one_loader_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    loader = DataLoader(DATA, batch_size=8)
    first, second = attached(loader), attached(loader, controls=["batch_size"], start="given")
    assert not caplog.messages
    for tuner in (first, second):
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert "epoch 1 was trained with batch_size" in caplog.text


def test_the_length_is_a_followed_samplers() -> None:
    run, followed = Loop(), Loop()
    arguments: dict[str, Any] = {"total_epochs": 6, "batch_size": 32}
    told = Tuner(random_policy(), run.optimizer, model=run.model, examples_per_epoch=200, **arguments)
    tuner = Tuner(random_policy(), followed.optimizer, model=followed.model, **arguments)
    tuner.follow(BatchSampler(RandomSampler(range(200)), 32, drop_last=False))
    assert tuner.trajectory.examples_per_epoch == 200
    assert tuner.history[0]["observation"] == told.history[0]["observation"]
    assert tuner.hyperparameters == told.hyperparameters
    assert len(tuner.history) == 1


@pytest.mark.parametrize("start", ["policy", "given"])
def test_a_length_that_was_not_told_is_missed(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = Loop()
    tuner = Tuner(constant_policy(), run.optimizer, model=run.model, total_epochs=6, start=start)
    for _ in range(2):
        train(run, 3)
        tuner.step(train_loss=1.0, val_loss=1.0)
    missed = "epoch 1: the run's length was not known until now, and its first values are not made for it: give loader"
    assert [message[: len(missed)] for message in caplog.messages] == [missed] * (start == "policy")
