"""Telemetry: several epochs' signals as one interval's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpo_env.telemetry import combined
from inner_models.signals import SIGNALS

PARTS = [
    {"train_loss": [3.0, 1.0], "val_loss": [5.0, 2.0], "grad_norm": [1.0, 0.5], "update_ratio": [3.0, 0.1]},
    {"train_loss": [2.0, 1.5], "val_loss": [4.0, 9.0], "grad_norm": [2.0, 0.5], "update_ratio": [4.0, 0.1]},
    {"train_loss": [1.0, 2.0], "val_loss": [7.0, 3.0], "grad_norm": [6.0, 0.5], "update_ratio": [12.0, 0.1]},
]


def test_one_epoch_is_the_interval() -> None:
    rng = np.random.default_rng(0)
    part = {name: rng.normal(size=3) for name in SIGNALS} | {"grad_norm": np.array([1.0, np.nan, np.inf])}
    found = combined([part])
    assert found.keys() == part.keys()
    for name, values in part.items():
        np.testing.assert_array_equal(found[name], values)


def test_epochs_by_hand() -> None:
    found = combined([{name: np.array(values) for name, values in part.items()} for part in PARTS])
    assert {name: values.tolist() for name, values in found.items()} == {
        "train_loss": [2.0, 1.5],
        "val_loss": [7.0, 3.0],
        "grad_norm": [3.0, 0.5],
        "update_ratio": [13.0, pytest.approx(0.1 * math.sqrt(3))],
    }


def test_the_order_of_epochs_matters_to_the_validation_loss_alone() -> None:
    parts = [{name: np.array(values) for name, values in part.items()} for part in PARTS]
    forth, back = combined(parts), combined(parts[::-1])
    assert back["val_loss"].tolist() == PARTS[0]["val_loss"]
    for name in ("train_loss", "grad_norm", "update_ratio"):
        np.testing.assert_allclose(forth[name], back[name], rtol=1e-15)


@pytest.mark.parametrize("name", ["train_loss", "grad_norm", "update_ratio"])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_missing_or_lost_in_one_epoch_is_so_in_the_interval(name: str, odd: float) -> None:
    for place in range(3):
        parts = [{name: np.array([1.0, 2.0])} for _ in range(3)]
        parts[place][name][0] = odd
        found = combined(parts)[name]
        np.testing.assert_array_equal(found[0], odd)
        assert math.isfinite(found[1])


@pytest.mark.parametrize("present", [{"train_loss"}, {"train_loss", "val_loss"}, set(SIGNALS) - {"update_ratio"}])
def test_signals_that_no_epoch_has(present: set[str]) -> None:
    assert combined([{name: np.ones(1) for name in present}] * 2).keys() == present


@pytest.mark.parametrize("name", ["train_loss", "grad_norm", "update_ratio"])
def test_what_is_too_large_to_add_up_is_infinite(name: str) -> None:
    """Without a warning, which is an error in these tests."""
    assert combined([{name: np.array([1e308])}] * 3)[name].tolist() == [math.inf]
    assert np.isnan(combined([{name: np.array([math.inf])}, {name: np.array([-math.inf])}])[name]) == (
        name != "update_ratio"
    )
