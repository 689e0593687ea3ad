"""Observations: always finite and within bounds, and the table of features is the documentation."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hpo_env.actions import RANGES
from hpo_env.base_schedules import BaseSchedule
from hpo_env.control import ControlLoop
from hpo_env.differences import relative_difference
from hpo_env.env import HPOEnv
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES, HIGH, LOW
from inner_models.signals import SIGNALS
from tests.rules import flat

INDEX = {feature.name: index for index, feature in enumerate(FEATURES)}
ODD = (np.nan, np.inf, -np.inf, 1e308, -1e308, 1e-308, 5e-324, 0.0, -0.0, -3.0, 1.0)
BASE = BaseSchedule(lr=0.01, batch_size=32, weight_decay=0.1, dropout=0.1)


def make_loop(runs: int = 1, horizon: int = 8) -> ControlLoop:
    loop = ControlLoop(runs, horizon=horizon, rule=flat(BASE), parameters=10_000, momentum_sgd=True)
    loop.restart(range(runs))
    return loop


def observe(loop: ControlLoop) -> NDArray[np.float32]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observation = loop.observe()
    assert observation.dtype == np.float32
    assert np.isfinite(observation).all()
    assert ((observation >= LOW) & (observation <= HIGH)).all()
    return observation


def named(loop: ControlLoop, run: int = 0) -> dict[str, float]:
    observation = observe(loop)[run]
    return {name: float(observation[index]) for name, index in INDEX.items()}


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_environments_documentation_is_the_table() -> None:
    documented = re.findall(r"^(\w+) +(-?[\d.]+) \.\. (-?[\d.]+) +(.+)$", HPOEnv.__doc__ or "", re.MULTILINE)
    assert [(name, float(low), float(high), meaning) for name, low, high, meaning in documented] == [
        (feature.name, feature.low, feature.high, feature.meaning) for feature in FEATURES
    ]


def test_the_environments_documentation_has_the_controls_reach() -> None:
    rows = re.findall(r"^ *\| (\d) \| `(\w+)` \| (\w+).*? \| (\S+) \| (\S+) \|$", HPOEnv.__doc__ or "", re.MULTILINE)
    expected = []
    for index, (name, control) in enumerate(CONTROLS.items()):
        pair = (RANGES[name].first, RANGES[name].step)
        reach = [f"x{math.exp(value):g}" if control.scale == "log" else f"+-{value:g}" for value in pair]
        expected.append((str(index), name, control.scale, *reach))
    assert rows == expected


def test_features_are_distinct_and_bounded() -> None:
    assert len(INDEX) == len(FEATURES)
    assert (LOW < HIGH).all()
    assert np.isfinite([LOW, HIGH]).all()
    assert HPOEnv().observation_space.shape == (len(FEATURES),)


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("before", [1.0, 0.0, np.nan, np.inf])
def test_odd_signals(value: float, before: float) -> None:
    loop = make_loop()
    loop.restart([0], {"val_loss": np.array([before])})
    for signal in (before, value, value, before, value):
        observe(loop)
        loop.decide(np.zeros((1, len(CONTROLS))))
        loop.record({name: np.array([signal]) for name in SIGNALS})
        observe(loop)


def test_odd_signals_in_every_pair() -> None:
    """All pairs of odd values, in consecutive intervals and in different signals of one interval."""
    pairs = list(itertools.product(ODD, repeat=2))
    first, second = np.array(pairs).T
    loop = make_loop(len(pairs))
    for interval in range(6):
        columns = (first, second) if interval % 2 else (second, first)
        loop.record({name: columns[index % 2] for index, name in enumerate(SIGNALS)})
        observe(loop)


@pytest.mark.parametrize("present", [set(), {"train_loss"}, {"train_loss", "grad_norm"}, set(SIGNALS) - {"train_loss"}])
def test_missing_signals(present: set[str]) -> None:
    loop = make_loop()
    for _ in range(10):  # longer than its horizon
        loop.decide(np.ones((1, len(CONTROLS))))
        loop.record({name: np.array([0.5]) for name in present})
        features = named(loop)
    assert features["val_missing"] == ("val_loss" not in present)
    assert features["gradients_missing"] == ("grad_norm" not in present)
    if "val_loss" not in present:
        for name in INDEX:
            if name.startswith(("val_c", "val_s", "val_a", "val_r", "since_best", "generalization")):
                assert features[name] == 0, name


@pytest.mark.parametrize("signal", ["val_loss", "train_loss"])
@pytest.mark.parametrize(("value", "flag"), [(np.inf, 1), (-np.inf, 1), (np.nan, 0), (1e308, 0), (1.0, 0)])
def test_infinite_losses_raise_a_flag(signal: str, value: float, flag: int) -> None:
    loop = make_loop()
    loop.record({"val_loss": np.ones(1), "train_loss": np.ones(1)} | {signal: np.array([value])})
    assert named(loop)["non_finite"] == flag


def test_values_do_not_depend_on_the_losses_unit() -> None:
    """Losses and gradient norms enter as ratios only."""
    rng = np.random.default_rng(0)
    loops = [make_loop() for _ in range(2)]
    for loop in loops:
        loop.restart([0], {"val_loss": np.array([8.0 if loop is loops[0] else 80.0])})
    for _ in range(5):
        draw = {name: rng.uniform(0.1, 1, 1) for name in SIGNALS}
        for loop, unit in zip(loops, (1, 10), strict=True):
            loop.record(
                {name: value * (unit if "loss" in name or "norm" in name else 1) for name, value in draw.items()}
            )
            observe(loop)
    np.testing.assert_allclose(observe(loops[0]), observe(loops[1]), rtol=1e-5, atol=1e-6)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (3.0, 1.0, 1.0),
        (1.0, 3.0, -1.0),
        (2.0, 2.0, 0.0),
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 2.0),
        (-1.0, 1.0, -2.0),
        (1e308, -1e308, 2.0),
        (3e-308, 1e-308, 1.0),
        (1.1, 1.0, 2 * math.tanh(math.log(1.1) / 2)),
    ],
)
def test_relative_difference_by_hand(a: float, b: float, expected: float) -> None:
    assert relative_difference(np.array([a]), np.array([b])) == pytest.approx([expected])


@pytest.mark.parametrize("other", [1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_relative_difference_of_what_is_not_finite(bad: float, other: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(relative_difference(np.array([bad, other]), np.array([other, bad]))).all()


def test_first_decision() -> None:
    loop = make_loop(horizon=8)
    loop.restart([0], {"val_loss": np.array([2.3])})
    features = named(loop)
    expected: dict[str, Any] = dict.fromkeys(INDEX, 0.0)
    expected |= {"horizon": 3 / 8, "parameters": 4 / 8, "momentum_sgd": 1.0, "first_decision": 1.0}
    expected |= {"gradients_missing": 1.0}
    base = BASE.values(np.array([0.5 / 8]))
    for name, control in CONTROLS.items():
        expected |= {name: control.normalize(base[name]).item(), f"{name}_available": 1.0}
    assert features == pytest.approx(expected)
    loop.restart([0])
    assert named(loop) == pytest.approx(expected | {"val_missing": 1.0})
    loop.restart([0], examples=np.array([1e6]))
    assert named(loop) == pytest.approx(expected | {"val_missing": 1.0, "examples": 0.75, "examples_known": 1.0})


def test_features_by_hand() -> None:
    loop = make_loop(horizon=8)
    loop.restart([0], {"val_loss": np.array([4.0])}, fixed=[{"dropout": 0.3}])
    history = [
        (3.0, 3.0, 1.0, 0.5),
        (1.0, 1.0, 2.0, 0.5),
        (3.0, 1.0, 6.0, 3.0),
    ]  # val, train, gradient norm, its spread
    for step, (val, train, norm, spread) in enumerate(history):
        loop.decide(np.array([[1.0 if step == 0 else 0.5, 0.0, -1.0, 1.0, -0.5, 0.25]]))
        loop.record(
            {
                "val_loss": np.array([val]),
                "train_loss": np.array([train]),
                "grad_norm": np.array([norm]),
                "grad_norm_std": np.array([spread]),
                "grad_cosine": np.array([-0.25]),
                "update_ratio": np.array([0.1 * 3.0**step]),
            }
        )
    features = named(loop)
    changes = [1.0, -1.0, -2 / 7, 0.0]  # r(3, 1), r(1, 3), r(3, 4), and one before the start
    assert features["val_roughness"] == 0  # until there are four changes
    expected = {
        "progress": 3 / 8,
        "first_decision": 0,
        "val_change_1": changes[0],
        "val_change_2": 0,
        "val_change_4": 0,  # before the start
        "val_change_eighth": changes[0],  # of 8 intervals, one
        "val_change_third": changes[2],  # three
        "train_change_eighth": 0,
        "train_change_third": 0,  # before the start
        "train_since_start": -1,
        "train_change_1": 0,
        "train_change_2": -1,
        "val_since_start": -2 / 7,
        "val_above_best": 1,
        "since_best": 1 / 8,
        "val_rank": 1 / 3,
        "generalization_gap": 1,
        "generalization_gap_change": 1,
        "grad_norm_change": 1,
        "grad_norm_since_start": 10 / 7,
        "grad_noise": 0.5,
        "grad_cosine": -0.25,
        "update_ratio": math.log10(0.9) + 1,
        "update_ratio_change": 1,
        "val_missing": 0,
        "gradients_missing": 0,
        "lr_offset": (math.log(30) + math.log(2.5)) / math.log(100),
        "lr_action": 0.5,
        "batch_size_offset": 0,
        "weight_decay_offset": -(math.log(30) + 2 * math.log(3)) / math.log(300),
        "weight_decay_action": -1,
        "dropout": 0,
        "dropout_offset": 0,
        "dropout_action": 0,
        "dropout_available": 0,
        "augmentation_action": -0.5,
        "label_smoothing_action": 0.25,
        "label_smoothing_offset": (2.5 * 0.25 + 2 * 0.25) / 5,
        "label_smoothing_available": 1,
    }
    assert {name: features[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    loop.record({"val_loss": np.array([3.0])})
    assert named(loop)["val_roughness"] == pytest.approx(np.std([0.0, *changes[:3]]), rel=1e-5)


@pytest.mark.parametrize(("horizon", "eighth", "third"), [(1, 1, 1), (8, 1, 3), (24, 3, 8), (64, 8, 21), (44, 6, 15)])
def test_changes_over_a_share_of_the_run(horizon: int, eighth: int, third: int) -> None:
    """Both look back as far as a run of any length needs, and at nothing before its start."""
    loop = make_loop(horizon=horizon)
    loop.restart([0], {"val_loss": np.array([1.0])})
    for interval in range(1, horizon + 1):
        loop.record({"val_loss": np.array([1.0 + interval]), "train_loss": np.array([2.0 + interval])})
        features = named(loop)
        for name, lag in (("eighth", eighth), ("third", third)):
            val = 2 * lag / (2 * (1 + interval) - lag) if interval >= lag else 0
            train = 2 * lag / (2 * (2 + interval) - lag) if interval > lag else 0  # there is none before training
            assert features[f"val_change_{name}"] == pytest.approx(val, rel=1e-5), interval
            assert features[f"train_change_{name}"] == pytest.approx(train, rel=1e-5), interval


def test_losses_since_the_start() -> None:
    loop = make_loop()
    for losses in ((4.0, 2.0), (2.0, 4.0), (np.nan, 6.0)):
        loop.record({"train_loss": np.array([losses[0]]), "val_loss": np.array([losses[1]])})
        features = named(loop)
        expected = [0.0 if np.isnan(a) else 2 * (a - b) / (a + b) for a, b in zip(losses, (4.0, 2.0), strict=True)]
        assert [features["train_since_start"], features["val_since_start"]] == pytest.approx(expected)


@pytest.mark.parametrize("examples", [np.nan, 1.0, 1e4, 1e30, np.inf])
def test_any_length_of_a_run(examples: float) -> None:
    loop = make_loop()
    loop.restart([0], examples=np.array([examples]))
    features = named(loop)
    assert features["examples_known"] == np.isfinite(examples)
    assert features["examples"] == pytest.approx({1e4: 0.5, 1e30: 1.5}.get(examples, 0.0))


def test_a_run_without_trainable_parameters() -> None:
    loop = ControlLoop(1, horizon=8, rule=flat(BASE), parameters=0, momentum_sgd=True)
    loop.restart([0])
    assert named(loop)["parameters"] == 0
