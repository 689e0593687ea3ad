"""Rewards: values computed by hand, and what losses that are not numbers do."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from hpo_env.rewards import CEILING, DIVERGED, FLOOR, diverged, leave_one_out, log_fall


def array(*values: float) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def fall(previous: ArrayLike, current: ArrayLike, initial: ArrayLike) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return log_fall(*(np.atleast_1d(np.asarray(x, np.float64)) for x in (previous, current, initial)))


def test_log_fall_by_hand() -> None:
    # With V_0 = 2 the floor is 0.002 and the cap 20.
    assert fall([2, 1, 1, 2], [1, 2, 1, 0], [2, 2, 2, 2]) == pytest.approx(
        [math.log(2.002 / 1.002), math.log(1.002 / 2.002), 0, math.log(2.002 / 0.002)]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e308, 20.0, 21.0])
def test_bad_losses_count_as_the_cap(bad: float) -> None:
    assert (FLOOR, CEILING) == (1e-3, 10.0)
    assert fall(2, bad, 2) == pytest.approx(math.log(2.002 / 20.002))
    assert fall(bad, 2, 2) == pytest.approx(math.log(20.002 / 2.002))
    assert fall(bad, np.nan, 2) == pytest.approx(0)


@pytest.mark.parametrize(
    "losses",
    [[2.0, 1.5, 1.7, 0.3, 0.0, 0.1], [2.0, np.nan, 1.0], [1e-9, 1e-9, 1e-12], [0.0, 0.0], [2.0, np.inf, 500.0]],
)
def test_rewards_telescope(losses: list[float]) -> None:
    total = sum(fall(before, after, losses[0]) for before, after in itertools.pairwise(losses))
    assert np.isfinite(total).all()
    assert total == pytest.approx(fall(losses[0], losses[-1], losses[0]))


def test_runs_are_independent() -> None:
    together = fall([1, 2, np.nan], [0.5, np.nan, 1], [1, 2, 3])
    alone = [fall(p, c, i).item() for p, c, i in zip((1, 2, np.nan), (0.5, np.nan, 1), (1, 2, 3), strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        (1.0, 1.0, False),
        (np.nan, 1.0, True),
        (1.0, np.nan, True),
        (np.inf, 1.0, True),
        (1.0, np.inf, True),
        (1.0, 2 * DIVERGED, False),
        (1.0, 2 * DIVERGED + 1, True),
        (1e9, 1.0, False),  # a train loss is lost only when it is no number
    ],
)
def test_diverged(train: float, val: float, expected: bool) -> None:
    assert diverged(array(train), array(val), array(2.0)).tolist() == [expected]


def test_leave_one_out_by_hand() -> None:
    # 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2
    assert leave_one_out(array(1, 2, 6)) == pytest.approx([-3, -1.5, 4.5])
    assert leave_one_out(array(3, 1)) == pytest.approx([2, -2])
    assert leave_one_out(array(4)).tolist() == [0]
    assert leave_one_out(array()).tolist() == []
