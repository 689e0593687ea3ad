"""The ensemble regression: it learns, it doubts where it must, it comes back from disk, and it refuses nonsense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.ensemble import Ensemble, Fit
from agents.state_file import load_state, save_state
from hpo_env.hyperparameters import Array

QUICK = Fit(members=4, hidden=32, steps=400, weight_decay=0.01, noise=0.01)


def _data(rows: int = 600, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(-1, 1, (rows, 3)) * [1, 10, 0] + [0, 50, 7]  # of unlike scales; the last one constant
    return inputs, np.sin(2 * inputs[:, 0]) + 0.1 * (inputs[:, 1] - 50), rng.integers(0, 8, rows).astype(float)


def test_it_learns_a_function_and_doubts_where_it_saw_nothing() -> None:
    inputs, targets, groups = _data()
    ensemble = Ensemble.fit(inputs, targets, groups, QUICK)
    fresh, truth, _ = _data(seed=1)
    mean, std = ensemble.predict(fresh)
    assert mean.shape == std.shape == (600,)
    assert np.mean((mean - truth) ** 2) < 0.05 * truth.var()
    outside = ensemble.predict([[3.0, 80.0, 7.0]])[1]
    assert outside > 3 * np.median(std)


def test_every_member_leaves_its_groups_out() -> None:
    """A group unlike the others splits the members: the one that has not seen it does not know."""
    inputs, targets, groups = _data()
    odd = groups == 3
    targets = np.where(odd, 5.0, 0.0)
    marked = np.column_stack([inputs, odd])
    layers = Ensemble.fit(marked, targets, groups, QUICK)
    spread = layers.predict(marked)[1]
    assert spread[odd].mean() > 2.0 > 0.3 > spread[~odd].mean()


def test_equal_seeds_fit_alike_and_the_disk_keeps_it(tmp_path: Path) -> None:
    data = _data(100)
    first, again = (Ensemble.fit(*data, Fit(members=2, hidden=8, steps=20)) for _ in range(2))
    other = Ensemble.fit(*data, Fit(members=2, hidden=8, steps=20, seed=1))
    save_state(tmp_path / "ensemble", first.state_dict())
    loaded = Ensemble.from_state_dict(load_state(tmp_path / "ensemble"))
    expected = first.predict(data[0])
    for same in (again, loaded):
        assert all(np.array_equal(a, b) for a, b in zip(same.predict(data[0]), expected, strict=True))
    assert not np.array_equal(other.predict(data[0])[0], expected[0])


@pytest.mark.parametrize(
    ("inputs", "targets", "groups", "message"),
    [
        ([[1.0]], [1.0, 2.0], [0], "shapes"),
        ([1.0], [1.0], [0], "shapes"),
        ([[np.nan], [1.0]], [1.0, 2.0], [0, 1], "finite"),
        ([[0.0], [1.0]], [np.inf, 2.0], [0, 1], "finite"),
        ([[0.0], [1.0]], [1.0, 2.0], [0, 0], "2 members need as many groups at least, not 1"),
    ],
)
def test_nonsense_is_refused(inputs: Any, targets: Any, groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble.fit(inputs, targets, groups, Fit(members=2))


def test_a_fit_needs_members_and_steps() -> None:
    with pytest.raises(
        ValueError, match="members must be at least 2, hidden and steps at least 1, not 1, 128 and 3000"
    ):
        Fit(members=1)
