"""`Replay`: a tuner's run done again without its policy, at other lengths, in other runs, and from a checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agents import Tuner
from agents.replay import Replay
from agents.trajectory import Trajectory
from tests.tiny import random_policy
from tests.user_runs import DECAY, DROPOUT, LR, ROWS, Loop, Writer, equal, through_a_file

ROOT = Path(__file__).parents[2]
EPOCHS = 6
Values = dict[str, float]


def train(
    run: Loop, attached: Tuner | Replay, epochs: range, broken: tuple[int, ...] = ()
) -> list[tuple[Values, float, float]]:
    """The values and the losses of some epochs; after the `broken` ones, a validation loss that is not finite."""
    found = []
    for epoch in epochs:
        used = attached.hyperparameters
        losses = run.epoch(epoch, int(used["batch_size"]))
        attached.step(train_loss=losses[0], val_loss=float("nan") if epoch in broken else losses[1])
        found.append((used, *losses))
    return found


def record(path: Path, broken: tuple[int, ...] = (), epochs: int = EPOCHS) -> tuple[Loop, list[Any]]:
    run = Loop()
    policy = random_policy(seed=2, scale=0.3)
    tuner = Tuner(policy, run.optimizer, model=run.model, total_epochs=EPOCHS, batch_size=32, examples_per_epoch=ROWS)
    found = train(run, tuner, range(epochs), broken)
    tuner.trajectory.save(path)
    return run, found


def replay_of(path: Path, run: Loop, **arguments: Any) -> Replay:
    settings = {"model": run.model, "total_epochs": EPOCHS, "batch_size": 32, **arguments}
    return Replay.load(path, run.optimizer, **settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trajectory.json"


# -- the same again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [(), (2,), (1, 4), (EPOCHS - 1,)])
def test_a_run_is_repeated_to_the_last_bit(broken: tuple[int, ...], path: Path) -> None:
    """Values, losses and weights; also where the guard acted."""
    first, expected = record(path, broken)
    again = Loop()
    assert train(again, replay_of(path, again), range(EPOCHS), broken) == expected
    assert equal(again.weights(), first.weights())
    assert again.settings() == first.settings() or broken == (EPOCHS - 1,)  # lowered when nothing was left to train
    assert len({values["lr"] for values, *_ in expected}) == EPOCHS


def test_losses_are_not_needed(path: Path) -> None:
    _, expected = record(path)
    run = Loop()
    replay = replay_of(path, run, guard=False)
    for values, *_ in expected:
        assert replay.hyperparameters == values
        run.epoch(replay.epoch, int(values["batch_size"]))
        after = replay.step()
    assert replay.epoch == EPOCHS
    assert after == expected[-1][0]


def test_with_a_loader(path: Path) -> None:
    """The three lines, with torch's own loader, seeded once: every batch and every loss again."""
    random_policy(seed=3, scale=0.5).save(path.with_name("policy.safetensors"))

    def batches(attach: Callable[..., Tuner | Replay]) -> list[tuple[int, float]]:
        run, found = Loop(), []
        rows = TensorDataset(run.train.inputs[:ROWS], run.train.targets[:ROWS])
        loader = DataLoader(rows, batch_size=32, shuffle=True)
        attached = attach(run.optimizer, model=run.model, loader=loader, total_epochs=8)
        for _ in range(8):
            run.model.train()
            for x, y in loader:
                run.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(run.model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                run.optimizer.step()
                found.append((len(x), loss.item()))
            attached.step(train_loss=loss.item(), val_loss=run.validate())
        if isinstance(attached, Tuner):
            attached.trajectory.save(path)
        return found

    expected = batches(partial(Tuner.load, path.with_name("policy.safetensors")))
    assert batches(partial(Replay.load, path)) == expected
    assert len({size for size, _ in expected}) > 2


def test_with_a_batch_sampler(path: Path) -> None:
    record(path)
    run = Loop()
    replay = replay_of(path, run)
    sampler = replay.batch_sampler(ROWS, seed=3)
    for _ in range(EPOCHS):
        assert len(next(iter(sampler))) == replay.hyperparameters["batch_size"]
        replay.step()
    with pytest.raises(ValueError, match="batch_size"):
        replay_of(path, Loop(), batch_size=None).batch_sampler(ROWS)


# -- another run -------------------------------------------------------------------------------------------------------


def test_another_length(path: Path) -> None:
    """Values are those at the same share of the run."""
    _, expected = record(path)
    rates = [values["lr"] for values, *_ in expected]
    run = Loop()
    replay = replay_of(path, run, total_epochs=2 * EPOCHS)
    found = []
    for _ in range(2 * EPOCHS):
        found.append(replay.hyperparameters["lr"])
        replay.step()
    assert (found[0], found[-1]) == pytest.approx((rates[0], rates[-1]))
    inner = [rates[i] ** (1 - part) * rates[i + 1] ** part for i in range(EPOCHS - 1) for part in (0.25, 0.75)]
    assert found[1:-1] == pytest.approx(inner)


def test_groups_and_layers_keep_their_ratios(path: Path) -> None:
    _, expected = record(path)
    run = Loop()
    replay_of(path, run)
    values = expected[0][0]
    rate, decay = values["lr"], values["weight_decay"]
    flat = [value for setting in run.settings() for value in setting]
    assert flat == pytest.approx([rate, decay, rate / 4, decay / 3, rate, 0])
    assert run.rates() == pytest.approx([values["dropout"], values["dropout"] / 2])


def test_controls_of_one_side_only(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What this run lacks is left out, and that is said once; what the trajectory lacks stays."""
    _, expected = record(path)
    run = Loop()
    with caplog.at_level(logging.WARNING):
        replay = Replay.load(path, run.optimizer, total_epochs=EPOCHS)
        replay.step()
    assert [record.message for record in caplog.records] == [
        "this run has no batch_size and no dropout: the trajectory's is ignored"
    ]
    assert replay.hyperparameters == {name: expected[1][0][name] for name in ("lr", "weight_decay")}
    assert run.rates() == [DROPOUT, DROPOUT / 2]

    caplog.clear()
    run = Loop()
    only = Trajectory(EPOCHS, "AdamW", {"weight_decay": [0.5] * EPOCHS}, guard=[None] * EPOCHS)
    Replay(only, run.optimizer, model=run.model, total_epochs=EPOCHS)
    assert run.settings()[0] == (LR, 0.5)
    assert run.rates() == [DROPOUT, DROPOUT / 2]
    assert caplog.records == []


def test_controls_that_are_asked_for(path: Path) -> None:
    _, expected = record(path)
    run = Loop()
    replay = replay_of(path, run, controls=["lr"])
    assert run.settings()[0] == (expected[0][0]["lr"], DECAY)
    assert replay.hyperparameters["batch_size"] == 32
    with pytest.raises(ValueError, match="momentum"):
        replay_of(path, Loop(), controls=["momentum"])


def test_another_optimizer_and_an_unfinished_run_are_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, expected = record(path, epochs=4)
    sgd = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    replay = Replay.load(path, sgd, total_epochs=EPOCHS, controls=["lr"])
    assert [record.message for record in caplog.records] == [
        "the trajectory was recorded with AdamW: its learning rates may not fit SGD",
        "only 4 of the recorded run's 6 epochs were finished: the last values stay from there on",
    ]
    rates = [replay.hyperparameters["lr"], *(replay.step()["lr"] for _ in range(EPOCHS))]
    recorded = [values["lr"] for values, *_ in expected]
    assert rates == recorded + recorded[-1:] * 3


# -- the guard ---------------------------------------------------------------------------------------------------------


def test_the_guard_lowers_further_only_when_it_acts_more_often(path: Path) -> None:
    _, expected = record(path, broken=(3,))
    recorded = [values["lr"] for values, *_ in expected]
    for broken, factors in (
        ((), [1, 1, 1, 1, 1, 1]),
        ((3,), [1, 1, 1, 1, 1, 1]),
        ((1,), [1, 1, 0.25, 0.25, 1, 1]),  # from the fourth epoch on, the recorded values are lowered themselves
        ((1, 2), [1, 1, 0.25, 0.0625, 0.25, 0.25]),
        ((4,), [1, 1, 1, 1, 1, 1]),
    ):
        run = Loop()
        found = train(run, replay_of(path, run), range(EPOCHS), broken)
        ratios = [values["lr"] / rate for (values, *_), rate in zip(found, recorded, strict=True)]
        assert ratios == pytest.approx(factors), broken


def test_without_the_guard_nothing_is_undone(path: Path) -> None:
    record(path)
    run = Loop()
    replay = replay_of(path, run, guard=False)
    run.epoch(0)
    before = run.weights()
    replay.step(train_loss=float("inf"), val_loss=float("inf"))
    assert equal(run.weights(), before)


# -- the rest of the interface -----------------------------------------------------------------------------------------


def test_the_writer(path: Path) -> None:
    _, expected = record(path)
    run, writer = Loop(), Writer()
    replay = replay_of(path, run, writer=writer)
    replay.step(val_loss=0.5)
    assert ("inner/val_loss", 0.5, 1) in writer.scalars
    assert ("control/lr", expected[0][0]["lr"], 1) in writer.scalars


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_epochs": 0}, "total_epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batches_per_step": 0}, "batches_per_step"),
        ({"loader": DataLoader(TensorDataset(torch.zeros(4)))}, "give one of them"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, path: Path) -> None:
    record(path)
    run = Loop()
    with pytest.raises(ValueError, match=message):
        replay_of(path, run, **arguments)
    assert run.settings()[0] == (LR, DECAY)


def test_nothing_to_replay() -> None:
    with pytest.raises(ValueError, match="no finished epoch"):
        Replay(Trajectory(3, "AdamW", {"lr": []}), Loop().optimizer, total_epochs=3)


def test_a_bad_loss_changes_nothing(path: Path) -> None:
    record(path)
    run = Loop()
    replay = replay_of(path, run)
    before = replay.hyperparameters
    with pytest.raises(ValueError, match="val_loss"):
        replay.step(val_loss="low")  # type: ignore[arg-type]
    assert (replay.epoch, replay.hyperparameters) == (0, before)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 4])
def test_resumed_to_the_last_bit(at: int, path: Path) -> None:
    """With divergences before and after the checkpoint that the recorded run did not have."""
    record(path, broken=(2,))
    broken = (0, 3, 4)
    whole = Loop()
    expected = train(whole, replay_of(path, whole), range(EPOCHS), broken)

    first = Loop()
    replay = replay_of(path, first)
    found = train(first, replay, range(at), broken)
    saved: dict[str, Any] = through_a_file(
        {"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict(), "replay": replay.state_dict()}
    )
    second = Loop(seed=7)
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    resumed = replay_of(path, second)
    resumed.load_state_dict(saved["replay"])
    found += train(second, resumed, range(at, EPOCHS), broken)
    assert found == expected
    assert equal(second.weights(), whole.weights())


def test_samplers_are_resumed(path: Path) -> None:
    record(path)
    replay = replay_of(path, Loop())
    sampler = replay.batch_sampler(ROWS, seed=3)
    list(sampler)
    state = replay.state_dict()
    expected = list(sampler)
    other = replay_of(path, Loop())
    follower = other.batch_sampler(ROWS, seed=4)
    other.load_state_dict(state)
    assert list(follower) == expected


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=5), "version"),
        (lambda s: s.clear(), "version"),
        (lambda s: s["settings"].update(total_epochs=9), "another trajectory, or with other arguments"),
        (lambda s: s["settings"].update(trajectory="0"), "another trajectory"),
        (lambda s: s.update(epoch=-1), "epoch"),
        (lambda s: s.update(epoch=1.5), "epoch"),
        (lambda s: s.update(undone=7), "undone"),
        (lambda s: s["shares"].update(lr=[2.0]), "shares"),
        (lambda s: s["shares"].update(dropout=[]), "shares"),
        (lambda s: s.update(samplers=[{}]), "samplers"),
        (lambda s: s["guard"].pop("snapshot"), "snapshot"),
        (lambda s: s["guard"].update(in_a_row=5), "count of divergences is damaged: 5"),
        (lambda s: s["guard"].update(unmeasured=6), "count of divergences is damaged: 6"),
    ],
)
def test_a_damaged_state_changes_nothing(change: Change, message: str, path: Path) -> None:
    record(path)
    run = Loop()
    replay = replay_of(path, run)
    train(run, replay, range(2))
    before = through_a_file(replay.state_dict())
    damaged = through_a_file(before)
    change(damaged)
    with pytest.raises(ValueError, match=message):
        replay.load_state_dict(damaged)
    after = replay.state_dict()
    assert {name: after[name] for name in after if name != "guard"} == {
        name: before[name] for name in before if name != "guard"
    }


# -- docs/replay.md ----------------------------------------------------------------------------------------------------


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs as it stands."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "replay.md").read_text(), re.DOTALL)
    loader = DataLoader(TensorDataset(torch.zeros(64)), batch_size=32)
    names: dict[str, Any] = {"loader": loader, "train_loss": 1.0, "val_loss": 1.0}
    values = []
    for block in blocks:
        run = Loop()
        names |= {"model": run.model, "optimizer": run.optimizer}
        exec(block, names)
        values.append(run.settings())
    assert len(blocks) == 3
    assert values[0] == values[1] != values[2]
