"""Actions: base schedules, reach, limits, and what a zero action means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hpo_env.actions import RANGES, BaseSchedule, apply_offsets, calibrated, move
from hpo_env.control import ControlLoop
from hpo_env.hyperparameters import CONTROLS

BASE = BaseSchedule(lr=0.004, batch_size=32, weight_decay=0.1, dropout=0.1, warmup=0.1)
FIRST = np.array([RANGES[name].first for name in CONTROLS])
STEP = np.array([RANGES[name].step for name in CONTROLS])
LIMIT = np.array([RANGES[name].limit for name in CONTROLS])


def make_loop(runs: int = 1, horizon: int = 10, base: BaseSchedule = BASE) -> ControlLoop:
    loop = ControlLoop(runs, horizon=horizon, base=base, parameters=100, momentum_sgd=False)
    loop.restart(range(runs))
    return loop


def test_base_schedule_by_hand() -> None:
    progress = np.array([0.0, 0.05, 0.1, 0.5, 1.0])
    values = BASE.values(progress)
    # Half-way through warm-up the rise is 1/2; cosine decay is (1 + cos(pi p)) / 2.
    rise = [0, 0.5, 1, 1, 1]
    cosine = [1, 0.5 * (1 + math.cos(0.05 * math.pi)), 0.5 * (1 + math.cos(0.1 * math.pi)), 0.5, 0]
    assert values["lr"] == pytest.approx([0.004 * r * c for r, c in zip(rise, cosine, strict=True)])
    assert values["batch_size"].tolist() == [32.0] * 5
    assert values["weight_decay"].tolist() == [0.1] * 5
    assert values["dropout"].tolist() == [0.1] * 5
    assert list(values) == list(CONTROLS)


def test_base_schedule_without_warmup() -> None:
    base = BaseSchedule(lr=1.0, batch_size=32, weight_decay=0.1, dropout=0.1, warmup=0.0)
    assert base.values(np.array([0.0, 0.5]))["lr"] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(("field", "value"), [("lr", 0.0), ("lr", math.nan), ("batch_size", -1.0)])
def test_base_schedule_names_the_bad_value(field: str, value: float) -> None:
    arguments: dict[str, Any] = {**BASE.to_dict(), field: value}
    with pytest.raises(ValueError, match=f"{field} must be a positive number, not {value}"):
        BaseSchedule(**arguments)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_calibrated_schedules_lie_in_the_controls_ranges(optimizer: str) -> None:
    base = calibrated(optimizer).to_dict()
    assert BaseSchedule(**base) == calibrated(optimizer)
    for name, control in CONTROLS.items():
        assert control.low <= base[name] <= control.high
        assert base[name] == pytest.approx(float(control.from_scale(control.to_scale(np.asarray(base[name])))))


def test_no_calibrated_schedule() -> None:
    with pytest.raises(ValueError, match="no calibrated schedule for optimizer 'lion'; known: adamw, sgd"):
        calibrated("lion")


@pytest.mark.parametrize(("first", "reach"), [(True, FIRST), (False, STEP)])
@pytest.mark.parametrize("sign", [-1.0, 1.0, 0.5])
def test_reach(first: bool, reach: np.ndarray[Any, np.dtype[np.float64]], sign: float) -> None:
    moved = move(np.zeros((1, 4)), np.full((1, 4), sign), np.array([first]))
    assert moved[0] == pytest.approx(sign * reach)


def test_first_and_later_decisions_side_by_side() -> None:
    moved = move(np.zeros((2, 4)), np.ones((2, 4)), np.array([True, False]))
    assert moved == pytest.approx(np.stack([FIRST, STEP]))


@pytest.mark.parametrize("sign", [-1, 1])
def test_offsets_are_limited(sign: int) -> None:
    offsets = np.zeros((1, 4))
    for _ in range(40):
        offsets = move(offsets, np.full((1, 4), sign * np.inf), np.array([False]))
        assert (np.abs(offsets) <= LIMIT).all()
    assert offsets[0].tolist() == (sign * LIMIT).tolist()


@pytest.mark.parametrize(("given", "meant"), [(np.nan, 0.0), (7.0, 1.0), (-np.inf, -1.0)])
@pytest.mark.parametrize("first", [True, False])
def test_odd_actions(given: float, meant: float, first: bool) -> None:
    offsets = np.array([[0.1, -0.2, 0.3, -0.4]])
    odd, plain = (move(offsets, np.full((1, 4), value), np.array([first])) for value in (given, meant))
    assert odd.tolist() == plain.tolist()


def test_zero_offset_keeps_the_base_exactly() -> None:
    """Also values that the controls' ranges would clip or round."""
    base = {name: np.array([value]) for name, value in zip(CONTROLS, (50.0, 20.0, 0.0, 0.0), strict=True)}
    values = apply_offsets(base, np.zeros((1, 4)))
    assert {name: value.item() for name, value in values.items()} == {
        "lr": 50.0,
        "batch_size": 20.0,
        "weight_decay": 0.0,
        "dropout": 0.0,
    }


def test_offsets_act_on_each_scale() -> None:
    base = {name: np.array([value]) for name, value in zip(CONTROLS, (0.01, 32.0, 0.1, 0.2), strict=True)}
    values = apply_offsets(base, np.array([[math.log(3), math.log(2), -math.log(10), math.log(2)]]))
    assert values["lr"] == pytest.approx([0.03])
    assert values["batch_size"].tolist() == [64]
    assert values["weight_decay"] == pytest.approx([0.01])
    assert values["dropout"] == pytest.approx([1 / 3])  # odds 1/4, doubled


# -- in the loop -------------------------------------------------------------------------------------------------------


def test_zero_actions_follow_the_base_schedule_exactly() -> None:
    loop = make_loop(horizon=10)
    for interval in range(12):  # past its length the run holds the last interval's values
        values = loop.decide(np.zeros((1, 4)))
        expected = BASE.values(np.array([(min(interval, 9) + 0.5) / 10]))
        assert {name: value.tolist() for name, value in values.items()} == {
            name: value.tolist() for name, value in expected.items()
        }
        loop.record({})


def test_an_offset_stays_until_it_is_moved() -> None:
    loop = make_loop()
    up = np.array([[1.0, 0.0, 0.0, 0.0]])
    for interval, (action, offset) in enumerate([(up, 10), (0 * up, 10), (up, 20), (up, 30), (-up, 15)]):
        values = loop.decide(action)
        base = BASE.values(np.array([(interval + 0.5) / 10]))
        assert values["lr"] == pytest.approx(offset * base["lr"])
        assert values["dropout"] == pytest.approx(base["dropout"], rel=0)
        loop.record({})


def test_fixed_controls_do_not_move() -> None:
    loop = make_loop(runs=2)
    loop.restart([0, 1], fixed=[{"dropout": 0.0, "batch_size": 48.0}, {}], lr_scale=np.array([2.0, 1.0]))
    values = loop.decide(np.ones((2, 4)))
    assert values["dropout"][0] == 0
    assert values["batch_size"][0] == 48
    assert values["dropout"][1] > 0.5 - 1e-9
    assert values["batch_size"][1] == 128
    assert loop.state.actions[0].tolist() == [1, 0, 1, 0]
    assert loop.state.offsets[0, [1, 3]].tolist() == [0, 0]
    assert values["lr"][0] == pytest.approx(2 * values["lr"][1])


def test_restart_concerns_its_runs_only() -> None:
    loop = make_loop(runs=3)
    loop.decide(np.ones((3, 4)))
    loop.record({"val_loss": np.ones(3)})
    before = loop.values()
    loop.restart([1], {"val_loss": np.array([9.0])})
    after = loop.values()
    assert loop.state.telemetry.interval.tolist() == [1, 0, 1]
    assert loop.state.offsets[1].tolist() == [0, 0, 0, 0]
    for name in ("batch_size", "weight_decay", "dropout"):
        assert after[name][[0, 2]].tolist() == before[name][[0, 2]].tolist()
        assert after[name][1] == getattr(BASE, name)
    # The restarted run's next decision is its first.
    assert loop.decide(np.ones((3, 4)))["batch_size"].tolist() == [256, 128, 256]


def test_horizon_is_positive() -> None:
    with pytest.raises(ValueError, match="horizon must be at least 1 interval, not 0"):
        make_loop(horizon=0)


def test_a_value_outside_the_range_moves_from_where_it_is() -> None:
    """The end of a cosine lies below the range of lr: half of it is half of it."""
    base = {"lr": np.array([1e-8, 1e-8, 5.0]), "batch_size": np.array([4096.0, 4.0, 4096.0])}
    base |= {"weight_decay": np.full(3, 0.1), "dropout": np.full(3, 0.1)}
    offsets = np.zeros((3, len(CONTROLS)))
    offsets[:, 0] = [-math.log(2), math.log(2), 0.1]
    offsets[:, 1] = [0.001, 0.001, -math.log(2)]
    values = apply_offsets(base, offsets)
    assert values["lr"] == pytest.approx([5e-9, 2e-8, 1.0])
    assert values["batch_size"].tolist() == [4096, 16, 2048]
