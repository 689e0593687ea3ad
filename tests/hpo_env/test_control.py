"""The control loop: what a decision sets, what is told of a run, and how long an interval is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hpo_env.actions import RANGES
from hpo_env.base_schedules import BaseRule, BaseSchedule
from hpo_env.control import MAX_DECISIONS, ControlLoop, Intervals, epochs_per_decision
from hpo_env.hyperparameters import CONTROLS, SCALES
from hpo_env.observations import FEATURES
from tests.rules import RULES, flat
from tests.user_runs import through_a_file

BASE = BaseSchedule(lr=0.004, batch_size=32, weight_decay=0.1, dropout=0.1, warmup=0.1)
RULE = RULES["adamw"]
STAY = np.zeros((1, len(CONTROLS)))
INDEX = {feature.name: index for index, feature in enumerate(FEATURES)}


def make_loop(
    runs: int = 1,
    horizon: int = 10,
    rule: BaseRule = RULE,
    given: BaseSchedule | None = None,
    parameters: int = 3000,
    **arguments: Any,
) -> ControlLoop:
    """A loop that deviates from `given`, or from `rule`."""
    loop = ControlLoop(
        runs, horizon=horizon, rule=rule, given=given, parameters=parameters, momentum_sgd=False, **arguments
    )
    loop.restart(range(runs))
    return loop


def lists(values: dict[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    return {name: column.tolist() for name, column in values.items()}


def offsets_seen(loop: ControlLoop) -> NDArray[np.float64]:
    """`[runs, controls]`, the distances from the rule that are observed, in scale units."""
    columns = [INDEX[f"{name}_offset"] for name in CONTROLS]
    return np.asarray(loop.observe()[:, columns] * np.array([RANGES[name].limit for name in CONTROLS]))


# -- decisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("factor", "max_factor", "first", "last"),
    [
        (1.0, math.inf, 30, 100),
        (0.1, math.inf, 3, 100),
        (0.01, math.inf, 1, 100),
        (0.01, 1000.0, 1, 10),
        (0.01, 3.0, 0.03, 0.03),
    ],
)
def test_a_rate_that_is_off_can_be_mended_at_once(
    factor: float, max_factor: float, first: float, last: float, sign: int
) -> None:
    """The first decision reaches the rule's value, later ones as far beyond it as from a good start."""
    rule = replace(BASE, lr=1e-2)
    loop = make_loop(rule=flat(rule), given=replace(rule, lr=rule.lr * factor**sign), max_factor=max_factor)
    reached = []
    for interval in range(10):
        lr = loop.decide(np.array([[sign, 0.0, 0.0, 0.0, 0.0, 0.0]]))["lr"]
        reached.append(lr / rule.values(np.array([(interval + 0.5) / 10]))["lr"])
        loop.record({})
    assert [reached[0], reached[6]] == pytest.approx([first**sign, last**sign])


def test_zero_actions_follow_the_base_schedule_exactly() -> None:
    loop = make_loop(given=BASE)
    for interval in range(12):  # past its length the run holds the last interval's values
        values = loop.decide(STAY)
        expected = BASE.values(np.array([(min(interval, 9) + 0.5) / 10]))
        assert lists(values) == lists(expected)
        loop.record({})


def test_an_offset_stays_until_it_is_moved() -> None:
    loop = make_loop(rule=flat(BASE))
    up = np.array([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    for interval, (action, offset) in enumerate([(up, 30), (0 * up, 30), (up, 75), (up, 100), (-up, 40)]):
        values = loop.decide(action)
        base = BASE.values(np.array([(interval + 0.5) / 10]))
        assert values["lr"] == pytest.approx(offset * base["lr"])
        assert values["dropout"] == pytest.approx(base["dropout"], rel=0)
        loop.record({})


def test_fixed_controls_do_not_move() -> None:
    loop = make_loop(2, given=BASE)
    loop.restart([0, 1], fixed=[{"dropout": 0.0, "batch_size": 48.0}, {}])
    values = loop.decide(np.ones((2, len(CONTROLS))))
    assert values["dropout"][0] == 0
    assert values["batch_size"][0] == 48
    assert values["dropout"][1] > 0.5 - 1e-9
    assert values["batch_size"][1] == 128
    assert loop.state.actions[0].tolist() == [1, 0, 1, 0, 1, 1]
    assert loop.state.offsets[0, [1, 3]].tolist() == [0, 0]
    assert values["lr"][0] == values["lr"][1]


@pytest.mark.parametrize(
    ("sgd", "stays", "factor"),
    [
        (False, {}, 1),  # the policy moves it
        (False, {"batch_size": 0.0}, 1),  # it is not known
        (False, {"batch_size": 32.0}, 1),
        (False, {"batch_size": 128.0}, 2),
        (False, {"batch_size": 8192.0}, math.sqrt(8)),
        (False, {"batch_size": 1.0}, math.sqrt(0.5)),
        (True, {"batch_size": 128.0}, 4),
        (True, {"batch_size": 8192.0}, 8),
        (True, {"batch_size": 0.0}, 1),
    ],
)
def test_the_learning_rate_follows_a_batch_size_that_stays(sgd: bool, stays: dict[str, float], factor: float) -> None:
    """Its root, with SGD itself, to the base's 32; and where it is learnt later, from then on."""
    known, late = (ControlLoop(2, horizon=10, rule=flat(BASE), parameters=3000, momentum_sgd=sgd) for _ in range(2))
    known.restart([0, 1], fixed=[stays, {}])
    expected = BASE.values(np.array([0.05]))["lr"].item()
    assert known.decide(np.zeros((2, len(CONTROLS))))["lr"] == pytest.approx([factor * expected, expected])
    late.restart([0, 1], fixed=[dict.fromkeys(stays, 0.0), {}])
    late.tell_batch_size(stays.get("batch_size") or 32.0)
    late.tell_batch_size(16.0)  # it is known by now
    late.decide(np.zeros((2, len(CONTROLS))))
    assert late.values()["lr"].tolist() == known.values()["lr"].tolist()
    np.testing.assert_array_equal(late.observe(), known.observe())


def test_what_is_given_does_not_follow_the_batch_size() -> None:
    """It is the user's own, for that batch size; its distance is from what the rule says there."""
    loop = make_loop(rule=flat(BASE), given=BASE)
    loop.restart([0], fixed=[{"batch_size": 128.0}])
    assert loop.decide(STAY)["lr"] == BASE.values(np.array([0.05]))["lr"]
    distance = loop.observe()[0, INDEX["lr_offset"]]
    assert distance == pytest.approx(-math.log(2) / RANGES["lr"].limit)


def test_restart_concerns_its_runs_only() -> None:
    loop = make_loop(3, given=BASE)
    loop.decide(np.ones((3, len(CONTROLS))))
    loop.record({"val_loss": np.ones(3)})
    before = loop.values()
    loop.restart([1], {"val_loss": np.array([9.0])})
    after = loop.values()
    assert loop.state.telemetry.interval.tolist() == [1, 0, 1]
    assert loop.state.offsets[1].tolist() == [0] * len(CONTROLS)
    base = {**lists(before), **lists(BASE.values(np.array([0.5 / 10])))}
    for name in CONTROLS:  # the others' learning rate, too, stays that of the interval just trained
        assert after[name][[0, 2]].tolist() == before[name][[0, 2]].tolist()
        assert after[name][[1]].tolist() == base[name]
    # The restarted run's next decision is its first.
    assert loop.decide(np.ones((3, len(CONTROLS))))["batch_size"].tolist() == [256, 128, 256]


def test_horizon_is_positive() -> None:
    with pytest.raises(ValueError, match="horizon must be at least 1 interval, not 0"):
        make_loop(horizon=0)


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_epochs_per_decision_by_hand() -> None:
    found = [epochs_per_decision(epochs) for epochs in (1, 64, 65, 128, 129, 130, 192, 193, 1000)]
    assert found == [1, 1, 2, 2, 3, 3, 3, 4, 16]


def test_there_are_never_more_decisions_than_the_policy_knows() -> None:
    for epochs in range(1, 3000):
        per_decision = epochs_per_decision(epochs)
        assert math.ceil(epochs / per_decision) <= MAX_DECISIONS
        assert per_decision == 1 or math.ceil(epochs / (per_decision - 1)) > MAX_DECISIONS  # and none too few


@pytest.mark.parametrize("epochs", [1, 64, 65, 130, 200])
def test_epochs_make_intervals(epochs: int) -> None:
    """Of as many epochs each, but for the last one; a run that goes on has one after every epoch."""
    intervals, per_decision, ended = Intervals(epochs), epochs_per_decision(epochs), list[int]()
    assert intervals.horizon == math.ceil(epochs / per_decision)
    for epoch in range(epochs + 3):
        assert intervals.epoch == epoch
        assert intervals.progress == (epoch + 0.5) / epochs
        found = intervals.finish_epoch({"train_loss": np.array([float(epoch)]), "val_loss": np.array([float(epoch)])})
        if found is not None:
            first = ended[-1] + 1 if ended else 0
            assert found["train_loss"] == np.mean(range(first, epoch + 1))
            assert found["val_loss"] == epoch
            ended.append(epoch)
    ends = sorted({*range(per_decision - 1, epochs, per_decision), epochs - 1})
    assert ended == [*ends, epochs, epochs + 1, epochs + 2]
    assert len(ends) == intervals.horizon


def test_intervals_go_on_from_their_state() -> None:
    one, other = Intervals(130), Intervals(130)
    for epoch in range(140):
        other.load_state_dict(one.state_dict(), runs=2)
        signals = {"train_loss": np.array([epoch, math.nan]), "val_loss": np.array([math.inf, -epoch])}
        found, expected = other.finish_epoch(signals), one.finish_epoch(signals)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            np.testing.assert_equal(found, expected)
        other = Intervals(130)


@pytest.mark.parametrize(
    ("epoch", "parts"),
    [
        (-1, []),
        (1.0, [{"train_loss": [1.0]}]),
        (True, [{"train_loss": [1.0]}]),
        (4, []),
        (3, [{"train_loss": [1.0]}]),
        (500, [{"train_loss": [1.0]}]),
        (4, [{"test_loss": [1.0]}]),
        (4, [{"train_loss": [1.0, 2.0]}]),
        (4, [{"train_loss": 1.0}]),
        (4, [{"train_loss": ["x"]}]),
    ],
)
def test_states_that_no_intervals_have(epoch: Any, parts: Any) -> None:
    intervals = Intervals(130)
    intervals.finish_epoch({"train_loss": np.array([1.0])})
    before = intervals.state_dict()
    with pytest.raises(ValueError):  # noqa: PT011
        intervals.load_state_dict({"epoch": epoch, "parts": parts})
    assert intervals.state_dict() == before


def test_in_between_only_the_base_schedule_moves() -> None:
    loop = make_loop(given=BASE)
    decided = loop.decide(np.array([[0.5, 1.0, -0.5, 0.5, 0.5, -0.5]]), None, 0.05)
    for progress in (0.1, 0.4, 0.99):
        values = loop.values_at(progress)
        base = BASE.values(np.array([progress]))
        assert values["lr"] == pytest.approx(math.sqrt(30) * base["lr"])
        assert {name: values[name].tolist() for name in CONTROLS if name != "lr"} == {
            name: decided[name].tolist() for name in CONTROLS if name != "lr"
        }
        assert loop.state.values[0].tolist() == [values[name][0] for name in CONTROLS]
    assert loop.state.telemetry.interval.tolist() == [0]


def test_a_decision_for_a_part_of_the_run() -> None:
    loop = make_loop(given=BASE)
    assert loop.decide(STAY, None, 0.3)["lr"] == pytest.approx(BASE.values(np.array([0.3]))["lr"])
    loop.record({})
    assert loop.decide(STAY)["lr"] == pytest.approx(BASE.values(np.array([0.15]))["lr"])


# -- the rule and what is told of the run ------------------------------------------------------------------------------


def test_the_base_is_the_rules_for_the_runs_length_and_size() -> None:
    loop = make_loop(3, parameters=700)
    loop.restart(range(3), examples=np.array([500.0, 90_000.0, np.nan]))
    values = loop.decide(np.zeros((3, len(CONTROLS))))
    for run, examples in enumerate((500.0, 90_000.0, math.nan)):
        expected = RULE.schedule(examples, 700).values(np.array([0.05]))
        assert {name: column[run] for name, column in values.items()} == {name: v[0] for name, v in expected.items()}
    assert len(set(values["lr"].tolist())) == 3


def test_the_base_follows_what_is_told_later() -> None:
    """Only where the length was not known; the offsets, and what has been decided, stay."""
    loop = make_loop(3)
    loop.restart(range(3), examples=np.array([np.nan, 700.0, np.nan]))
    action = np.tile([0.2, 0.0, 0.1, -0.1, 0.1, -0.1], (3, 1))
    before = loop.decide(action)
    seen = loop.observe()
    assert seen[:, INDEX["examples_known"]].tolist() == [0, 1, 0]
    assert seen[:, INDEX["examples"]] == pytest.approx([0, math.log10(700) / 8, 0])
    loop.tell_examples(50_000.0)
    assert loop.state.examples.tolist() == [50_000.0, 700.0, 50_000.0]
    after, seen = loop.values(), loop.observe()
    assert seen[:, INDEX["examples_known"]].tolist() == [1, 1, 1]
    assert seen[[0, 2], INDEX["examples"]] == pytest.approx(math.log10(50_000) / 8)
    short, long = RULE.schedule(math.nan, 3000), RULE.schedule(50_000.0, 3000)
    assert after["lr"][[0, 2]] == pytest.approx(before["lr"][[0, 2]] * long.lr / short.lr)
    assert after["lr"][0] != before["lr"][0]
    assert {name: column[1] for name, column in after.items()} == {name: column[1] for name, column in before.items()}
    loop.tell_examples(9.0)  # they are known by now
    assert lists(loop.values()) == lists(after)


def test_telling_says_whether_it_was_news() -> None:
    loop = make_loop(2)
    loop.restart([0, 1], examples=np.array([np.nan, 500.0]))
    assert loop.tell_examples(700.0)
    assert not loop.tell_examples(800.0)
    assert loop.state.examples.tolist() == [700.0, 500.0]


def test_a_first_decision_is_taken_back() -> None:
    """All of it: what is observed and what is decided next are as if it had not been."""
    loop = make_loop(2)
    initial, shifts = {"val_loss": np.array([2.0, 3.0])}, np.array([[1.0, 0.5, -1.0, 0.5, 1.0, -1.0], [0.0] * 6])
    loop.restart([0, 1], initial, fixed=[{}, {"dropout": 0.25}], shifts=shifts)
    before, values = loop.observe(), lists(loop.values())
    actions = np.array([[0.3, -0.4, 0.5, 0.2, 0.4, -0.3]] * 2)
    decided = lists(loop.decide(actions, None, 0.01))
    loop.take_back()
    np.testing.assert_array_equal(loop.observe(), before)
    assert lists(loop.values()) == values
    assert lists(loop.decide(actions, None, 0.01)) == decided


@pytest.mark.parametrize("runs", [[1], [0, 2]])
def test_what_was_told_is_forgotten_with_the_run(runs: list[int]) -> None:
    loop = make_loop(3)
    loop.tell_examples(5e4)
    loop.restart(runs)
    assert np.flatnonzero(np.isnan(loop.state.examples)).tolist() == runs


def test_given_values_do_not_follow_what_is_told() -> None:
    loop = make_loop(given=BASE)
    before = loop.decide(STAY)
    loop.tell_examples(1e6)
    assert lists(loop.values()) == lists(before)


def test_the_distance_of_given_values_from_the_rule_is_seen() -> None:
    rule = flat(BASE)
    given = BaseSchedule(lr=0.04, batch_size=64, weight_decay=0.01, dropout=0.2, warmup=0.1)
    expected = [math.log(10), math.log(2), -math.log(10), math.log(0.25 * 9), 0.0, 0.0]
    loop = make_loop(rule=rule, given=given)
    assert offsets_seen(loop)[0] == pytest.approx(expected, rel=1e-5)
    action = np.array([[-math.log(10) / math.log(30), *[0.0] * 5]])
    assert loop.decide(action)["lr"] == pytest.approx(BASE.values(np.array([0.05]))["lr"])
    assert offsets_seen(loop)[0] == pytest.approx([0, *expected[1:]], rel=1e-5, abs=1e-6)
    assert (offsets_seen(make_loop(rule=rule)) == 0).all()


def test_a_base_that_is_off_is_seen_and_can_be_undone() -> None:
    """By moving back as far as the distance says."""
    loop = make_loop(2, rule=flat(BASE), max_factor=math.inf)
    shifts = np.array([[math.log(20), math.log(2), -math.log(8), 1.5, 0.5, 1.0], [0.0] * 6])
    loop.restart([0, 1], shifts=shifts)
    off = loop.values()
    assert off["lr"][0] == pytest.approx(20 * off["lr"][1])
    assert off["batch_size"].tolist() == [64, 32]
    assert off["weight_decay"][0] == pytest.approx(off["weight_decay"][1] / 8)
    assert offsets_seen(loop) == pytest.approx(shifts, rel=1e-5)
    first = np.array([RANGES[name].first for name in CONTROLS])
    values = loop.decide(-offsets_seen(loop) / first)
    for name, column in values.items():
        assert column[0] == pytest.approx(column[1], rel=1e-5), name
    assert offsets_seen(loop) == pytest.approx(np.zeros((2, len(CONTROLS))), abs=1e-5)
    loop.record({})
    assert loop.decide(np.zeros((2, len(CONTROLS))))["lr"][0] == pytest.approx(BASE.values(np.array([0.15]))["lr"][0])


def test_shifts_keep_to_the_controls_ranges() -> None:
    """And what is seen is how far the values are off, not how far they were to be."""
    loop = make_loop(2, rule=flat(BASE))
    loop.restart([0, 1], shifts=np.array([[50.0] * 6, [-50.0] * 6]))
    rows = offsets_seen(loop)
    downs, ups = SCALES.room(np.array([[getattr(BASE, name) for name in CONTROLS]]))
    for index, (name, control) in enumerate(CONTROLS.items()):
        down, up = downs[:, index], ups[:, index]
        limit = 2 * RANGES[name].limit  # of the feature
        assert rows[:, index] == pytest.approx([min(up[0], limit), max(down[0], -limit)], rel=1e-5), name
        if name != "lr":
            assert loop.values()[name] == pytest.approx([control.high, control.low])


# -- back to the base --------------------------------------------------------------------------------------------------


def test_a_run_goes_back_to_its_base() -> None:
    loop = make_loop(2)
    loop.decide(np.ones((2, len(CONTROLS))))
    loop.record({})
    values = loop.decide(np.ones((2, len(CONTROLS))), np.array([True, False]))
    base = RULE.schedule(math.nan, 3000).values(np.array([0.15]))
    assert {name: column[0] for name, column in values.items()} == {name: column[0] for name, column in base.items()}
    assert values["lr"][1] > 50 * values["lr"][0]
    loop.record({})
    again = loop.decide(np.array([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 2), np.array([False, False]))
    # From there it is moved as any other, by the reach of a later decision.
    assert again["lr"][0] == pytest.approx(2.5 * RULE.schedule(math.nan, 3000).values(np.array([0.25]))["lr"][0])


def test_a_lowered_learning_rate_is_lowered_at_the_base_too() -> None:
    loop = make_loop(given=BASE)
    loop.scale_lr(0, 0.25)
    assert loop.decide(np.ones((1, len(CONTROLS))), np.array([True]))["lr"] == pytest.approx(
        0.25 * BASE.values(np.array([0.05]))["lr"]
    )
    assert loop.values_at(0.5)["lr"] == pytest.approx(0.25 * BASE.values(np.array([0.5]))["lr"])


# -- state -------------------------------------------------------------------------------------------------------------


def test_a_loop_goes_on_from_its_state() -> None:
    rng = np.random.default_rng(0)
    loops = [make_loop(2), make_loop(2)]
    for loop in loops:
        loop.restart([0, 1], fixed=[{}, {"batch_size": 0.0}])
    loops[0].restart(
        [0, 1],
        {"val_loss": np.array([2.0, 3.0])},
        shifts=np.array([[1.0, 0.0, -1.0, 0.5, 1.0, -1.0], [0.0] * 6]),
        fixed=[{}, {"batch_size": 0.0}],
    )
    for _ in range(3):
        loops[0].decide(rng.uniform(-1, 1, (2, len(CONTROLS))))
        loops[0].record({"val_loss": rng.uniform(1, 2, 2), "train_loss": rng.uniform(1, 2, 2)})
    loops[0].tell_examples(4e4)
    loops[0].scale_lr(1, 0.25)
    loops[0].tell_batch_size(200.0)
    loops[0].values_at(0.33)
    loops[1].load_state_dict(through_a_file(loops[0].state_dict()))
    for _ in range(3):
        assert lists(loops[1].values()) == lists(loops[0].values())
        np.testing.assert_array_equal(loops[1].observe(), loops[0].observe())
        actions, signals = rng.uniform(-1, 1, (2, len(CONTROLS))), {"val_loss": rng.uniform(1, 2, 2)}
        assert lists(loops[0].decide(actions)) == lists(loops[1].decide(actions))
        for loop in loops:
            loop.record(signals)


def test_a_state_of_other_runs() -> None:
    with pytest.raises(ValueError, match=r"offsets is torch.float64 \(2, 6\), not torch.float64 \(3, 6\)"):
        make_loop(3).load_state_dict(make_loop(2).state_dict())


def test_a_run_that_has_outlasted_its_length_goes_on_from_its_state() -> None:
    loop, other = make_loop(horizon=3), make_loop(horizon=3)
    for interval in range(9):
        other.load_state_dict(loop.state_dict())
        for each in (loop, other):
            each.decide(STAY)
            each.record({"val_loss": np.array([1.0 + interval])})
        np.testing.assert_array_equal(other.observe(), loop.observe())
    make_loop(horizon=3).load_state_dict(loop.state_dict())
    loop.load_state_dict(make_loop(horizon=3).state_dict())
    assert loop.state.telemetry.interval.tolist() == [0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offsets", torch.full((1, 6), math.nan, dtype=torch.float64)),
        ("offsets", torch.zeros(1, 6)),
        ("offsets", torch.zeros(1, 3, dtype=torch.float64)),
        ("actions", torch.full((1, 6), 1.5, dtype=torch.float64)),
        ("values", torch.full((1, 6), -1.0, dtype=torch.float64)),
        ("shifts", torch.full((1, 6), math.inf, dtype=torch.float64)),
        ("lr_scale", torch.full((1,), 2.0, dtype=torch.float64)),
        ("examples", torch.full((1,), -5.0, dtype=torch.float64)),
        ("batch_size", torch.zeros(1, dtype=torch.float64)),
        ("interval", torch.tensor([-1])),
        ("interval", torch.tensor([11])),
        ("interval", torch.tensor([2**40])),
        ("history/val_loss", torch.ones(1, 10, dtype=torch.float64)),
        ("history/val_loss", torch.ones(1, 12, dtype=torch.float64)),
        ("given", {"lr": math.nan, "batch_size": 32.0, "weight_decay": 0.1, "dropout": 0.1, "warmup": 0.1}),
        ("given", {"lr": 1.0, "batch_size": 32.0, "weight_decay": 1e30, "dropout": 0.1, "warmup": 0.1}),
        ("given", None),
        ("given", {"lr": 1.0}),
        ("unknown", torch.zeros(1)),
    ],
)
def test_damaged_states_of_a_loop(name: str, value: Any) -> None:
    loop = make_loop(given=BASE)
    before, values = loop.state_dict(), lists(loop.values())
    with pytest.raises((ValueError, TypeError)):
        loop.load_state_dict({**before, name: value})
    after = loop.state_dict()
    assert {key: repr(entry) for key, entry in after.items()} == {key: repr(entry) for key, entry in before.items()}
    assert lists(loop.values()) == values


def test_a_loop_goes_on_from_what_the_other_was_given() -> None:
    loop = make_loop(given=BASE)
    other = make_loop(given=BaseSchedule(lr=0.1, batch_size=64, weight_decay=0.2, dropout=0.3))
    loop.decide(np.full((1, 6), 0.3))
    other.load_state_dict(through_a_file(loop.state_dict()))
    assert lists(other.decide(STAY)) == lists(loop.decide(STAY))
    np.testing.assert_array_equal(other.observe(), loop.observe())


@pytest.mark.parametrize("factor", [1.0, 0.5, math.nan])
def test_the_factor_leaves_room(factor: float) -> None:
    with pytest.raises(ValueError, match=f"max_factor must be above 1, not {factor}"):
        make_loop(max_factor=factor)
