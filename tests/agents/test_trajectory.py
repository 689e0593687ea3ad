"""`Trajectory`: what a tuner did, through a file, at other lengths, and from files that are not as they should be."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from agents import Tuner
from agents.trajectory import FORMAT_VERSION, Trajectory
from tests.faults.policy_inputs import NASTY, clear
from tests.tiny import random_policy
from tests.user_runs import ROWS, Loop

EPOCHS = 5


def recorded(total_epochs: int = EPOCHS, val_losses: dict[int, float | None] | None = None) -> Trajectory:
    """Of a run of five epochs; `val_losses` replaces some."""
    run = Loop()
    arguments: dict[str, Any] = {"model": run.model, "total_epochs": total_epochs, "examples_per_epoch": ROWS}
    tuner = Tuner(random_policy(scale=0.3), run.optimizer, batch_size=32, **arguments)
    for epoch in range(EPOCHS):
        train_loss, val_loss = run.epoch(epoch, int(tuner.hyperparameters["batch_size"]))
        tuner.step(train_loss=train_loss, val_loss=(val_losses or {}).get(epoch, val_loss))
    return tuner.trajectory


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    return recorded()


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_what_was_done() -> None:
    run, policy = Loop(), random_policy(scale=0.3)
    tuner = Tuner(policy, run.optimizer, model=run.model, total_epochs=EPOCHS, examples_per_epoch=ROWS)
    assert tuner.trajectory.epochs == 0
    used, losses = [], []
    for epoch in range(EPOCHS):
        used.append(tuner.hyperparameters)
        losses.append(run.epoch(epoch))
        tuner.step(train_loss=losses[-1][0], val_loss=losses[-1][1])
    found = tuner.trajectory
    assert found.values == {name: [values[name] for values in used] for name in used[0]}
    assert found.losses == {"train_loss": [loss[0] for loss in losses], "val_loss": [loss[1] for loss in losses]}
    assert (found.total_epochs, found.epochs, found.optimizer) == (EPOCHS, EPOCHS, "AdamW")
    assert (found.controls, found.examples_per_epoch, found.policy) == (tuple(used[0]), ROWS, policy.digest)
    assert found.decisions == tuner.history
    assert found.guard == [None] * EPOCHS


def test_through_a_file(trajectory: Trajectory, tmp_path: Path) -> None:
    trajectory.save(tmp_path / "a" / "run.json")
    assert Trajectory.load(tmp_path / "a" / "run.json") == trajectory
    trajectory.save(str(tmp_path / "a" / "run.json"))
    assert Trajectory.load(str(tmp_path / "a" / "run.json")) == trajectory


def test_losses_that_are_none_or_not_finite(tmp_path: Path) -> None:
    found = recorded(val_losses={1: None, 2: math.nan})
    assert [loss is None for loss in found.losses["val_loss"]] == [False, True, True, False, False]
    assert [what is not None for what in found.guard] == [False, False, True, False, False]
    found.save(tmp_path / "run.json")
    assert Trajectory.load(tmp_path / "run.json") == found
    assert "NaN" not in (tmp_path / "run.json").read_text()
    assert "Infinity" not in (tmp_path / "run.json").read_text()


# -- at other lengths --------------------------------------------------------------------------------------------------


def made(values: dict[str, list[float]], total_epochs: int = 2) -> Trajectory:
    epochs = len(next(iter(values.values())))
    return Trajectory(total_epochs, "AdamW", values, guard=[None] * epochs)


def test_the_same_length_is_exact(trajectory: Trajectory) -> None:
    assert trajectory.values_for(EPOCHS) == trajectory.values


def test_interpolated_by_hand() -> None:
    """On the control's own scale, over the share of the run, and no further than what was recorded."""
    rates = made({"lr": [1e-3, 1e-1], "batch_size": [32.0, 128.0], "dropout": [0.1, 0.5]}).values_for(4)
    assert rates["lr"] == pytest.approx([1e-3, 10**-2.5, 10**-1.5, 1e-1], rel=1e-12)
    assert rates["batch_size"] == [32, 48, 96, 128]  # 45.3 and 90.5, rounded to multiples of 16
    odds = [share / (1 - share) for share in rates["dropout"]]
    assert odds == pytest.approx([1 / 9, (1 / 9) ** 0.75, (1 / 9) ** 0.25, 1], rel=1e-9)
    shorter = made({"lr": [1e-4, 1e-2, 1e-2, 1e-4]}, 4).values_for(2)
    assert shorter["lr"] == pytest.approx([1e-3, 1e-3], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr", [1e-3, 1e-9]),
        ("lr", [1e-3, 0.0]),
        ("lr", [0.0, 0.0]),
        ("lr", [1e-13, 1e-15]),
        ("lr", [5.0, 1e-3]),
        ("batch_size", [3.0, 7.0]),
        ("batch_size", [20.0, 20.0]),
        ("batch_size", [4096.0, 512.0]),
        ("weight_decay", [1e-8, 5.0]),
        ("dropout", [0.001, 0.999]),
        ("dropout", [0.0, 1.0]),
    ],
)
def test_values_outside_of_the_range(name: str, values: list[float]) -> None:
    """They are as recorded at the ends, and in between they lie in between."""
    for length in (3, 4, 50):
        found = made({name: values}).values_for(length)[name]
        assert len(found) == length
        assert all(min(values) <= value <= max(values) for value in found)
        assert (found[0], found[-1]) == pytest.approx((values[0], values[-1]), rel=1e-9, abs=1e-11)


def test_an_unfinished_run_ends_with_its_last_value() -> None:
    half = made({"lr": [1e-3, 1e-2]}, 4)
    assert half.values_for(4)["lr"] == [1e-3, 1e-2, 1e-2, 1e-2]
    assert half.values_for(8)["lr"][3:] == pytest.approx([1e-2] * 5, rel=1e-12)


# -- files that are not what they should be ----------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]

CASES: dict[str, tuple[Change, str]] = {
    "another format": (lambda p: p.update(format="csv"), "format.*give what Trajectory.save wrote"),
    "a later version": (lambda p: p.update(format_version=FORMAT_VERSION + 1), "format_version.*upgrade"),
    "a version that is none": (lambda p: p.update(format_version=True), "format_version"),
    "no epochs": (lambda p: p.pop("guard"), "guard"),
    "a missing entry": (lambda p: p.pop("values"), "values"),
    "another entry": (lambda p: p.update(code="1"), "code"),
    "an unknown control": (lambda p: p["values"].update(momentum=[0.9] * EPOCHS), "momentum"),
    "too few values": (lambda p: p["values"]["lr"].pop(), r"values.lr .*5 entries"),
    "a value that is null": (lambda p: p["values"]["lr"].__setitem__(2, None), r"lr\[2\].*None"),
    "a negative rate": (lambda p: p["values"]["lr"].__setitem__(2, -1e-3), r"lr\[2\].*-0.001"),
    "an empty batch": (lambda p: p["values"]["batch_size"].__setitem__(0, 0), r"batch_size\[0\]"),
    "dropout above 1": (lambda p: p["values"]["dropout"].__setitem__(0, 1.5), r"dropout\[0\].*1.5"),
    "a loss that is text": (lambda p: p["losses"]["val_loss"].__setitem__(0, "low"), r"val_loss\[0\].*low"),
    "too many losses": (lambda p: p["losses"]["val_loss"].append(1.0), "losses.val_loss"),
    "an endless run": (lambda p: p.update(total_epochs=10**9), "total_epochs.*1000000000"),
    "escape sequences": (lambda p: p["guard"].__setitem__(0, "\x1b[2J"), "guard.*printable"),
    "an action of text": (lambda p: p["decisions"][0].update(action=["up"]), r"decisions\[0\].action\[0\]"),
    "a decision without values": (lambda p: p["decisions"][1].pop("hyperparameters"), r"decisions\[1\]"),
    "a deep decision": (lambda p: p["decisions"][0].update(more=[[[[[1]]]]]), "nested too deeply"),
    "a policy of numbers": (lambda p: p.update(policy=7), "policy"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(case: str, trajectory: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    trajectory.save(path)
    payload = json.loads(path.read_text())
    change, message = CASES[case]
    change(payload)
    path.write_text(json.dumps(payload))
    with pytest.raises(ValueError, match=message) as caught:
        Trajectory.load(path)
    assert str(caught.value).startswith(str(path))
    assert clear(str(caught.value))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xfe", b"[]", b"{}", b"null", b'{"format": "hyperpilot-trajectory"', b"[" * 100_000,
        b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a":' * 100_000,
    ],
)  # fmt: skip
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"run\.json cannot be used as a trajectory") as caught:
        Trajectory.load(tmp_path / "run.json")
    assert clear(str(caught.value))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trajectory.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"not a regular file|cannot be read"):
        Trajectory.load(tmp_path)
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate((64 << 20) + 1)  # a hole: it takes no room
    with pytest.raises(ValueError, match="67108865 bytes"):
        Trajectory.load(tmp_path / "large.json")


def test_nothing_is_saved_that_cannot_be_loaded(trajectory: Trajectory, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    trajectory.save(path)
    for broken in (replace(trajectory, values={"lr": [1.0]}), replace(trajectory, total_epochs=0)):
        with pytest.raises(ValueError, match="must be"):
            broken.save(path)
    assert Trajectory.load(path) == trajectory


def test_what_is_let_through_can_be_used(trajectory: Trajectory) -> None:
    """Entries changed at random: a clear refusal, or a trajectory that replays at any length and can be saved again."""
    rng = random.Random(0)
    let_through = 0
    for _ in range(800):
        payload = {"format": "hyperpilot-trajectory", "format_version": FORMAT_VERSION, **asdict(trajectory)}
        _change(payload, rng)
        found = _read(json.dumps(payload))
        if found is None:
            continue
        let_through += 1
        assert Trajectory.from_json(found.to_json()) == found
        for length in (1, 7):
            for values in found.values_for(length).values():
                assert len(values) == length
                assert all(math.isfinite(value) and value >= 0 for value in values)
    assert 50 < let_through < 750


def _read(text: str) -> Trajectory | None:
    try:
        return Trajectory.from_json(text)
    except ValueError as error:
        if not clear(str(error)):
            raise AssertionError(f"unclear: {error!r}") from error
        return None


def _change(value: Any, rng: random.Random) -> None:
    """Replace or remove one entry somewhere in `value`."""
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or rng.random() < 0.1:
            break
        value = value[key]
    if rng.random() < 0.2:
        del value[key]
    elif isinstance(value[key], float) and rng.random() < 0.5:
        value[key] *= rng.choice((0, 1e-6, 0.5, 2, 1e3, 1e12))
    else:
        value[key] = rng.choice(NASTY)
