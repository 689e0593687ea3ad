"""Actions: reach, limits, and what a zero offset means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from hpo_env import actions
from hpo_env.actions import RANGES
from hpo_env.hyperparameters import CONTROLS, SCALES, by_name, in_columns

FIRST = np.array([RANGES[name].first for name in CONTROLS])
STEP = np.array([RANGES[name].step for name in CONTROLS])
LIMIT = np.array([RANGES[name].limit for name in CONTROLS])


CENTRE = {name: control.denormalize(np.array([0.5, 0.5])) for name, control in CONTROLS.items()}
"""Of two runs, in the middle of every control's range."""


def peaks(**values: float) -> dict[str, NDArray[np.float64]]:
    """Base values of one run."""
    return {name: np.array([values.get(name, CENTRE[name][0])]) for name in CONTROLS}


Named = dict[str, NDArray[np.float64]]


def move(
    offsets: NDArray[np.float64],
    acts: NDArray[np.float64],
    first: NDArray[np.bool_],
    base: Named,
    factor: float = math.inf,
) -> NDArray[np.float64]:
    return actions.move(offsets, acts, first, actions.limits(in_columns(base), factor))


def apply_offsets(base: Named, offsets: NDArray[np.float64]) -> Named:
    return by_name(actions.apply_offsets(in_columns(base), offsets))


@pytest.mark.parametrize(("first", "reach"), [(True, FIRST), (False, STEP)])
@pytest.mark.parametrize("sign", [-1.0, 1.0, 0.5])
def test_reach(first: bool, reach: NDArray[np.float64], sign: float) -> None:
    moved = move(np.zeros((1, len(CONTROLS))), np.full((1, len(CONTROLS)), sign), np.array([first]), peaks())
    assert moved[0] == pytest.approx(sign * reach)


def test_first_and_later_decisions_side_by_side() -> None:
    moved = move(np.zeros((2, len(CONTROLS))), np.ones((2, len(CONTROLS))), np.array([True, False]), CENTRE)
    assert moved == pytest.approx(np.stack([FIRST, STEP]))


@pytest.mark.parametrize("sign", [-1, 1])
def test_offsets_are_limited(sign: int) -> None:
    room = SCALES.room(np.stack(list(peaks().values()), 1))[max(sign, 0)][0]
    offsets = np.zeros((1, len(CONTROLS)))
    for _ in range(40):
        offsets = move(offsets, np.full((1, len(CONTROLS)), sign * np.inf), np.array([False]), peaks())
        assert (np.abs(offsets) <= LIMIT).all()
    assert offsets[0] == pytest.approx(sign * np.minimum(LIMIT, np.abs(room)))
    assert [abs(offset) == limit for offset, limit in zip(offsets[0], LIMIT, strict=True)] == [
        True,
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("factor", [1.5, 20.0])
def test_offsets_stay_within_a_factor(factor: float) -> None:
    offsets = np.zeros((1, len(CONTROLS)))
    for sign in (1, -1):
        for _ in range(40):
            offsets = move(offsets, np.full((1, len(CONTROLS)), float(sign)), np.array([False]), peaks(), factor)
        assert offsets[0, [0, 2]] == pytest.approx(sign * math.log(factor))
        assert (np.abs(offsets) <= math.log(factor)).all()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("at", [0.0, 0.1, 0.9, 1.0])
def test_offsets_do_not_wind_up(at: float, sign: float) -> None:
    """After any number of moves against an end of the range, the first move back shows at once, and whole."""
    base = {name: control.denormalize(np.array([at])) for name, control in CONTROLS.items()}
    offsets = move(np.zeros((1, len(CONTROLS))), np.full((1, len(CONTROLS)), sign), np.array([True]), base)
    for _ in range(20):
        offsets = move(offsets, np.full((1, len(CONTROLS)), sign), np.array([False]), base)
    reached = apply_offsets(base, offsets)
    back = apply_offsets(base, move(offsets, np.full((1, len(CONTROLS)), -sign), np.array([False]), base))
    for index, (name, control) in enumerate(CONTROLS.items()):
        end = control.high if sign > 0 else control.low
        if (at > 0.5) == (sign > 0):
            assert reached[name][0] == pytest.approx(end), name
        moved = sign * (control.to_scale(reached[name]) - control.to_scale(back[name]))[0]
        assert moved == pytest.approx(STEP[index], rel=0.1), name  # the batch size is rounded


def test_each_run_has_its_own_room() -> None:
    base = {name: np.array([control.low, control.high]) for name, control in CONTROLS.items()}
    down, up = (
        move(np.zeros((2, len(CONTROLS))), np.full((2, len(CONTROLS)), sign), np.array([False] * 2), base)
        for sign in (-1.0, 1.0)
    )
    assert down == pytest.approx(np.stack([0 * STEP, -STEP]))
    assert up == pytest.approx(np.stack([STEP, 0 * STEP]))


@pytest.mark.parametrize(("given", "meant"), [(np.nan, 0.0), (7.0, 1.0), (-np.inf, -1.0)])
@pytest.mark.parametrize("first", [True, False])
def test_odd_actions(given: float, meant: float, first: bool) -> None:
    offsets = np.array([[0.1, -0.2, 0.3, -0.4, 0.5, -0.6]])
    odd, plain = (
        move(offsets, np.full((1, len(CONTROLS)), value), np.array([first]), peaks()) for value in (given, meant)
    )
    assert odd.tolist() == plain.tolist()


def test_zero_offset_keeps_the_base_exactly() -> None:
    """Also values that the controls' ranges would clip or round."""
    base = {name: np.array([value]) for name, value in zip(CONTROLS, (50.0, 20.0, 0.0, 0.0, 0.0, 0.0), strict=True)}
    values = apply_offsets(base, np.zeros((1, len(CONTROLS))))
    assert {name: value.item() for name, value in values.items()} == {
        "lr": 50.0,
        "batch_size": 20.0,
        "weight_decay": 0.0,
        "dropout": 0.0,
        "augmentation": 0.0,
        "label_smoothing": 0.0,
    }


def test_offsets_act_on_each_scale() -> None:
    base = {name: np.array([value]) for name, value in zip(CONTROLS, (0.01, 32.0, 0.1, 0.2, 0.1, 0.3), strict=True)}
    values = apply_offsets(base, np.array([[math.log(3), math.log(2), -math.log(10), math.log(2), 0.0, -math.log(3)]]))
    assert values["lr"] == pytest.approx([0.03])
    assert values["batch_size"].tolist() == [64]
    assert values["weight_decay"] == pytest.approx([0.01])
    assert values["dropout"] == pytest.approx([1 / 3])  # odds 1/4, doubled
    assert values["augmentation"].tolist() == [0.1]
    assert values["label_smoothing"] == pytest.approx([1 / 8])  # odds 3/7, a third of them


def test_a_value_outside_the_range_moves_from_where_it_is() -> None:
    """The end of a cosine lies below the range of lr: half of it is half of it."""
    base = {"lr": np.array([1e-8, 1e-8, 5.0]), "batch_size": np.array([4096.0, 4.0, 4096.0])}
    base |= {"weight_decay": np.full(3, 0.1), "dropout": np.full(3, 0.1)}
    base |= {"augmentation": np.full(3, 0.1), "label_smoothing": np.full(3, 0.1)}
    offsets = np.zeros((3, len(CONTROLS)))
    offsets[:, 0] = [-math.log(2), math.log(2), 0.1]
    offsets[:, 1] = [0.001, 0.001, -math.log(2)]
    values = apply_offsets(base, offsets)
    assert values["lr"] == pytest.approx([5e-9, 2e-8, 1.0])
    assert values["batch_size"].tolist() == [4096, 16, 2048]
