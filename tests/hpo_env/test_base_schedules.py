"""Base schedules, and the rules that fit one to a run's length and size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hpo_env.base_schedules import TYPICAL, BaseRule, BaseSchedule, calibrated, calibrated_rule, shape
from hpo_env.hyperparameters import CONTROLS
from tests.rules import RULES, flat

BASE = BaseSchedule(lr=0.004, batch_size=32, weight_decay=0.1, dropout=0.1, warmup=0.1)
ROWS = {"lr": (-5.0, -0.5, 0.25), "batch_size": (4.0, 0.25, 0.0), "weight_decay": (-2.0, 0.0, -1.0)}
ROWS |= {"dropout": (-1.0, -0.5, 1.0), "augmentation": (-2.0, 0.5, 0.0), "label_smoothing": (-3.0, 0.0, 0.5)}
RULE = BaseRule(ROWS, warmup=0.2)


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


# -- rules -------------------------------------------------------------------------------------------------------------


def test_a_rule_by_hand() -> None:
    """Of a run of e^2 times the typical examples, and e times the typical parameters."""
    peaks = RULE.peaks(np.array([math.exp(2) * TYPICAL["examples"]]), np.array([math.e * TYPICAL["parameters"]]))
    assert list(peaks) == list(CONTROLS)
    assert peaks["lr"] == pytest.approx(math.exp(-5 - 1 + 0.25))
    assert peaks["batch_size"].tolist() == [96]  # exp(4.5) = 90.02, to a multiple of 16
    assert peaks["weight_decay"] == pytest.approx(math.exp(-2 - 1))
    odds = math.exp(-1 - 1 + 1)
    assert peaks["dropout"] == pytest.approx(odds / (1 + odds))


def test_a_rule_knows_every_run_by_itself() -> None:
    examples, parameters = np.array([300.0, 1e4, np.nan, 1e7]), np.array([50.0, 3e3, 1e6, 2e4])
    peaks = RULE.peaks(examples, parameters)
    for run, (length, size) in enumerate(zip(examples, parameters, strict=True)):
        alone = RULE.schedule(length, size)
        assert {name: values[run] for name, values in peaks.items()} == {
            name: getattr(alone, name) for name in CONTROLS
        }


@pytest.mark.parametrize("unknown", [math.nan, 0.0, -1.0, math.inf])
def test_a_run_of_unknown_length_is_taken_for_a_typical_one(unknown: float) -> None:
    typical = RULE.schedule(TYPICAL["examples"], 500)
    assert RULE.schedule(unknown, 500) == typical
    assert RULE.schedule(2 * TYPICAL["examples"], 500) != typical


def test_slopes_do_not_matter_where_runs_are_typical() -> None:
    plain = BaseRule({name: (row[0], 0.0, 0.0) for name, row in ROWS.items()}, warmup=0.2)
    assert RULE.schedule(*TYPICAL.values()) == plain.schedule(*TYPICAL.values()) == plain.schedule(1e6, 1e6)


def test_what_a_rule_gives_lies_in_the_controls_ranges() -> None:
    steep = BaseRule({name: (row[0], 5.0, -5.0) for name, row in ROWS.items()})
    for examples, parameters in ((1.0, 1e9), (1e9, 1.0), (1e9, 0.0)):
        found = steep.schedule(examples, parameters).to_dict()
        for name, control in CONTROLS.items():
            assert found[name] == pytest.approx(control.low if parameters > 1 else control.high), name


def test_a_rules_schedule_is_shaped_by_its_warmup() -> None:
    schedule = RULE.schedule(1e5, 1e4)
    assert schedule.warmup == 0.2
    progress = np.linspace(0, 1, 11)
    np.testing.assert_allclose(schedule.values(progress)["lr"], schedule.lr * shape(progress, 0.2), rtol=1e-12)


def test_flat() -> None:
    """The tests' own helper."""
    for examples in (100, 1e6):
        given = replace(BASE, augmentation=0.1, label_smoothing=0.2)
        found = flat(given).schedule(examples, 1e5).to_dict()
        assert found == pytest.approx(given.to_dict())


@pytest.mark.parametrize("rule", [RULE, *RULES.values()])
def test_a_rule_survives_json(rule: BaseRule) -> None:
    again = BaseRule.from_dict(json.loads(json.dumps(rule.to_dict())))
    assert again == rule
    assert again.to_dict() == rule.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": None}, "three coefficients for each of lr, batch_size, weight_decay, dropout"),
        ({"momentum": (0.0, 0.0, 0.0)}, "three coefficients for each of"),
        ({"lr": (0.0, 0.0)}, "three coefficients for each of"),
        ({"lr": (math.nan, 0.0, 0.0)}, "must be finite"),
        ({"dropout": (0.0, math.inf, 0.0)}, "must be finite"),
    ],
)
def test_coefficients_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseRule({name: row for name, row in {**ROWS, **change}.items() if row is not None})


@pytest.mark.parametrize("warmup", [1.1, -0.1, math.nan])
def test_a_warmup_that_is_none(warmup: float) -> None:
    with pytest.raises(ValueError, match=r"warmup lie in 0\.\.1"):
        BaseRule(ROWS, warmup)


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"coefficients": ROWS},
        {"warmup": 0.1},
        {"coefficients": [*ROWS.values()], "warmup": 0.1},
        {"coefficients": {**ROWS, "lr": 1.0}, "warmup": 0.1},
        {"coefficients": {**ROWS, "lr": [0.0, 0.0]}, "warmup": 0.1},
        {"coefficients": {**ROWS, "lr": ["x", 0.0, 0.0]}, "warmup": 0.1},
        {"coefficients": ROWS, "warmup": "0.1"},
        {"coefficients": ROWS, "warmup": None},
    ],
)
def test_entries_that_are_no_rule(entries: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        BaseRule.from_dict(entries)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("examples", [1e3, 1e4, 2e5])
@pytest.mark.parametrize("parameters", [100.0, 1e5])
def test_the_calibrated_rule_gives_usable_schedules(optimizer: str, examples: float, parameters: float) -> None:
    """Whatever its numbers are, over the lengths and sizes that occur in meta-training."""
    schedule = calibrated_rule(optimizer).schedule(examples, parameters)
    assert 1e-4 < schedule.lr < 0.5
    assert 0 <= schedule.warmup < 0.5


def test_no_calibrated_rule() -> None:
    with pytest.raises(ValueError, match="for optimizer 'lion'; known: adamw, sgd"):
        calibrated_rule("lion")
