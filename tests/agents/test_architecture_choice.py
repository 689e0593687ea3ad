"""Architecture choice: races that stop what they should and cost what they say, and a prediction that learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agents import cells
from agents.application import Run, train_cohort
from agents.architecture_choice import (
    MENUS,
    PROBLEMS,
    Choice,
    Cohorts,
    Halving,
    Recorded,
    choose,
    hyperband,
    menu,
    problems,
    race,
    train_menus,
)
from agents.cells import Store
from agents.controllers import WithPolicy
from agents.ensemble import Fit
from agents.final_loss import Curve, FinalLoss, Trained, deficits
from agents.schedules import Cosine
from agents.state_file import load_state, save_state
from hpo_env.hyperparameters import Array
from inner_models.batched_training import BatchedTraining
from inner_models.datasets import load_dataset
from inner_models.models import ModelSpec, build_model
from inner_models.splits import META_TRAIN, datasets_of
from inner_models.tasks import Task
from tests.tiny import random_policy

WIDTHS = (2, 4, 8, 16)
TASK = Task("wine", ModelSpec("mlp", 8, 1), horizon=8, interval_examples=32, eval_rows=32)
TASKS = tuple(replace(TASK, model=ModelSpec("mlp", width, 1)) for width in WIDTHS)
QUICK = Fit(members=2, hidden=16, steps=300, weight_decay=0.01, noise=0.05)


def run(curve: Sequence[float], seed: int = 0) -> Run:
    """One that starts at 4, and whose training losses are half the validation losses."""
    return Run(seed, 4.0, [loss / 2 for loss in curve], list(curve), {}, curve[-1], curve[-1], 1.0)


def straight(start: float, end: float) -> list[float]:
    """Eight losses, from the first below `start` on, on a straight line of logarithms."""
    return [float(loss) for loss in np.geomspace(start, end, 9)[1:]]


def pool(*curves: Sequence[float]) -> Recorded:
    return Recorded(TASKS[: len(curves)], [[run(curve)] for curve in curves])


class Foretold:
    """A predictor that knows the end."""

    def __init__(self, *ends: float) -> None:
        self._ends = dict(zip(TASKS, ends, strict=True))

    def predict(self, tasks: Sequence[Task], curves: Sequence[Curve]) -> Array:
        return np.array([self._ends[task] for task in tasks])


FALLING = [straight(3.0, end) for end in (0.4, 0.3, 0.2, 0.1)]


def intervals(choice: Choice) -> dict[int, int]:
    return {candidate: len(curve.train) for candidate, curve in choice.curves.items()}


def test_halving_stops_the_worse_part_and_counts_what_was_trained() -> None:
    choice = race(pool(*FALLING), Halving())
    assert intervals(choice) == {0: 1, 1: 1, 2: 2, 3: 8}
    assert (choice.chosen, choice.task) == (3, TASKS[3])
    assert choice.cost == 12 / 8
    assert intervals(race(pool(*FALLING), Halving(share=0.75))) == {0: 1, 1: 8, 2: 8, 3: 8}
    assert intervals(race(pool(*FALLING), Halving(share=0.75), among=(0, 2))) == {0: 8, 2: 8}


def test_the_present_loss_misleads_where_a_prediction_does_not() -> None:
    late = [2.9] * 7 + [0.01]
    curves = (*FALLING[:3], late)
    assert race(pool(*curves), Halving()).chosen == 2
    assert race(pool(*curves), Halving(Foretold(0.4, 0.3, 0.2, 0.01))).chosen == 3


def test_among_those_trained_to_the_end_the_loss_itself_decides() -> None:
    choice = race(pool(*FALLING), Halving(Foretold(0.0, 0.1, 0.2, 0.3), share=0.9))
    assert intervals(choice) == dict.fromkeys(range(4), 8)
    assert choice.chosen == 3


def test_hyperband_pays_for_each_candidate_once() -> None:
    eight = tuple(replace(TASK, model=ModelSpec("mlp", width, 1)) for width in range(2, 10))
    runs = [[run(straight(3.0, 0.1 + 0.1 * position))] for position in range(8)]
    choices = [hyperband(Recorded(eight, runs), np.random.default_rng(seed)) for seed in range(4)]
    for choice in choices:
        assert set(choice.curves) == set(range(8))  # its first halving begins with 8
        assert choice.chosen == 0
        assert all(length in (1, 2, 4, 8) for length in intervals(choice).values())
        whole = [candidate for candidate, length in intervals(choice).items() if length == 8]
        assert 0 in whole
        assert 4 <= len(whole) <= 7  # the last one trains 4 to the end
    assert len({choice.cost for choice in choices}) > 1


def test_live_training_is_recorded_training(tmp_path: Path) -> None:
    method = WithPolicy(random_policy(scale=2.0))
    seeds = (3, 5)
    recorded = Recorded(TASKS, [train_cohort(task, method, seeds) for task in TASKS])
    for rule in (Halving(), Halving(Foretold(0.1, 0.2, 0.0, 0.3), 0.7)):
        known, lived = race(recorded, rule), race(Cohorts(TASKS, method, seeds), rule)
        assert known.cost < len(TASKS)
        assert (lived.chosen, lived.cost) == (known.chosen, known.cost)
        for candidate, curve in known.curves.items():
            assert lived.curves[candidate].val == pytest.approx(curve.val, abs=1e-6)
            assert lived.curves[candidate].train == pytest.approx(curve.train, abs=1e-6)


def test_choose_trains_only_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = 0
    advance = BatchedTraining.advance

    def counted(self: BatchedTraining, hyperparameters: Mapping[str, Array]) -> dict[str, Array]:
        nonlocal trained
        trained += 1
        return advance(self, hyperparameters)

    monkeypatch.setattr(BatchedTraining, "advance", counted)
    choice = choose(TASK, Halving())
    assert choice.task in menu(TASK)
    assert trained == sum(intervals(choice).values()) == round(choice.cost * TASK.horizon)
    assert choice.cost < len(menu(TASK)) / 2
    few = choose(TASK, Halving(), candidates=TASKS[:2], method=Cosine("calibrated"))
    assert few.task in TASKS[:2]


@pytest.mark.parametrize("name", ["wine", "digits", "gun-point", "markov-text-0"])
def test_menus_hold_models_for_their_data(name: str) -> None:
    candidates = menu(Task(name, ModelSpec("mlp"), horizon=3))
    assert 8 <= len(set(candidates)) == len(candidates) <= 12
    for task in candidates:
        assert task.horizon == 3
        build_model(task.model, load_dataset(name))
    assert set(MENUS) == {"table", "image", "sequence", "text"}


def test_problems_are_of_different_data_sets_of_meta_train() -> None:
    some = problems(12)
    assert len({task.dataset for task in some}) == 12
    assert {task.dataset for task in some} <= datasets_of(META_TRAIN)
    assert problems(5) == some[:5]
    more = problems(len(PROBLEMS.entries) + 1)
    assert len({task.dataset for task in more}) == len(more) - 1
    assert more[0].dataset == more[-1].dataset
    assert more[0] != more[-1]
    assert problems(5, seed=1) != some[:5]
    assert all(task.optimizer == "adamw" for task in some)
    assert all((task.interval_examples or 0) * task.horizon <= 16_384 for task in some)


def test_menus_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MENUS, "table", tuple(task.model for task in TASKS[:2]))
    first = train_menus([TASK], Cosine("calibrated"), (0, 1), Store(tmp_path), workers=1)
    monkeypatch.setattr(cells.Cell, "compute", lambda *_: pytest.fail("it was run before"))
    assert train_menus([TASK], Cosine("calibrated"), (0, 1), Store(tmp_path), workers=1) == first
    assert first[0].tasks == TASKS[:2]
    assert [[run.seed for run in runs] for runs in first[0].runs] == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Halving(share=1.0), "lie between 0 and 1, not 1.0"),
        (lambda: race(pool(*FALLING), Halving(), (0.5, 0.25)), r"must rise between 0 and 1, not \(0.5, 0.25\)"),
        (lambda: race(pool(*FALLING), Halving(), (0.5, 1.0)), "must rise between 0 and 1"),
        (lambda: problems(0), "at least 1 task is needed to learn from, not 0"),
        (lambda: choose(TASK, Halving(), seeds=()), "at least one candidate and one seed are needed, not 9 and 0"),
        (lambda: choose(TASK, Halving(), candidates=[TASK, replace(TASK, horizon=4)]), "differ in the model alone"),
        (lambda: choose(TASK, Halving(), candidates=[replace(TASK, model=ModelSpec("cnn"))]), "'cnn' takes image data"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_deficits() -> None:
    assert deficits(np.log([2.0, 1.0, 1.0])) == pytest.approx([math.log1p(math.log(2) / 0.1), 0, 0])


def test_curves_are_of_all_seeds_and_finite() -> None:
    curve = Curve.of([run([1.0, math.e**2]), run([math.e**2, math.nan])])
    assert curve.val[:2] == pytest.approx([math.log(4), 1.0])
    assert np.isfinite(curve.val).all()
    assert curve.until(1).val.shape == (2,)
    assert curve.until(1).train == pytest.approx([1.0 - math.log(2)])


def overtaking(names: Sequence[str]) -> list[Trained]:
    """Data sets where the wider a model the worse it begins and the better it ends."""
    found = []
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        tasks = tuple(replace(task, dataset=name) for task in TASKS)
        level = rng.uniform(0.3, 3.0)
        ends = (0.8, 0.6, 0.45, 0.3)
        curves = [straight(level * (1 + 0.2 * k), level * ends[k] * rng.uniform(0.97, 1.03)) for k in range(4)]
        found.append(Trained(tasks, tuple([run(curve)] for curve in curves)))
    return found


NAMES = ("wine", "pima", "vowel", "vehicle", "ionosphere", "diabetes", "breast-cancer", "segment")


def test_a_prediction_learns_who_will_be_ahead_on_other_data_sets(tmp_path: Path) -> None:
    trained = overtaking(NAMES)
    predictor = FinalLoss.fit(trained[:-1], QUICK)
    new = trained[-1]
    pool = Recorded(new.tasks, new.runs)
    early = [pool.train(candidate, 1) for candidate in range(4)]
    assert np.argsort([curve.val[-1] for curve in early]).tolist() == [0, 1, 2, 3]
    foretold = predictor.predict(new.tasks, early)
    assert np.argsort(foretold).tolist() == [3, 2, 1, 0]
    assert race(pool, Halving()).chosen != 3
    assert race(pool, Halving(predictor)).chosen == 3
    again = FinalLoss.fit(trained[:-1], QUICK)
    assert again.predict(new.tasks, early).tolist() == foretold.tolist()
    save_state(tmp_path / "rule.safetensors", predictor.state_dict())
    loaded = FinalLoss.from_state_dict(load_state(tmp_path / "rule.safetensors"))
    assert loaded.predict(new.tasks, early).tolist() == foretold.tolist()


def test_what_is_done_needs_no_prediction() -> None:
    trained = overtaking(NAMES[:4])
    predictor = FinalLoss.fit(trained, QUICK)
    whole = [Curve.of(runs) for runs in trained[0].runs]
    assert np.diff(predictor.predict(trained[0].tasks, whole)) == pytest.approx(
        np.diff(deficits([curve.val[-1] for curve in whole]))
    )


def test_a_prediction_needs_data_sets() -> None:
    with pytest.raises(ValueError, match="learned from 5 data sets or more, not 2"):
        FinalLoss.fit(overtaking(NAMES[:2]))
    with pytest.raises(ValueError, match="not 0"):
        FinalLoss.fit([])
