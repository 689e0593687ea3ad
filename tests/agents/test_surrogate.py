"""The surrogate: it learns across tasks, reads curves, proposes what it promises, and comes back from disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, spearmanr

from agents import surrogate as module
from agents.application import Run, train_cohort
from agents.calibration import SEARCH_RANGES
from agents.cells import Cell
from agents.ensemble import Ensemble, Fit
from agents.meta_dataset import Studied, sampled, to_unit
from agents.schedules import Cosine
from agents.searches import OptunaSearch, SearchName
from agents.state_file import save_state
from agents.surrogate import CANDIDATES, ELITE, SPACING, Configured, Surrogate, held_out, intervals, standings
from hpo_env.base_schedules import BaseSchedule, calibrated
from hpo_env.hyperparameters import Array
from inner_models.models import ModelSpec
from inner_models.tasks import OptimizerName, Task

QUICK = Fit(members=2, hidden=32, steps=300, weight_decay=0.01)
TASK = Task("digits", ModelSpec("mlp", 8, 1), horizon=8, interval_examples=32, train_rows=64, eval_rows=32)
TRIALS = 32


def studied(dataset: int, luck: Sequence[float] = (0.0,), optimizer: OptimizerName = "adamw") -> Studied:
    """A task whose best learning rate lies where its feature `z` says.

    The log loss falls evenly to its end, and `luck`, trial after trial, is on top of what settings explain.
    """
    z = (dataset % 5) / 4
    places = np.stack([to_unit(trial, optimizer) for trial in sampled(optimizer, TRIALS)])
    ends = 2 * np.abs(places[:, 0] - z) - 1 + np.resize(luck, TRIALS)
    runs = []
    for end in ends:
        losses = (10 * np.exp(end * np.arange(1, 9) / 8)).tolist()
        runs.append(Run(0, 10.0, losses, losses, {}, 1.0, 1.0, 1.0))
    at_calibrated = replace(runs[0], val_loss=[10 * math.exp(-0.5)] * 8)
    features = {"z": z, "noise": float(np.sin(7 * dataset)), "has_dropout": 1.0}
    task = replace(TASK, dataset=f"teacher-{dataset}", optimizer=optimizer)
    return Studied(task, features, runs, [at_calibrated])


WORLD = [studied(dataset) for dataset in range(20)]


@pytest.fixture(scope="module")
def fitted() -> Surrogate:
    return Surrogate.fit(WORLD, QUICK)


def correlation(model: Surrogate, one: Studied, seen: int = 0) -> float:
    predicted, _ = model.predict(one.features, one.settings, np.exp(one.curves[:, : seen + 1]), seen / 8)
    return float(spearmanr(predicted, one.scores).statistic)


def test_it_learns_across_data_sets_what_task_and_settings_tell() -> None:
    found = [correlation(model, one) for model, one in held_out(WORLD, 2, QUICK)]
    assert len(found) == len(WORLD)
    assert np.mean(found) > 0.75
    blind = Surrogate.fit(WORLD, QUICK, names=())
    assert np.mean([correlation(blind, one) for one in WORLD]) < 0.5


def test_predictions_are_standings(fitted: Surrogate) -> None:
    mean, std = fitted.predict(WORLD[1].features, WORLD[1].settings)
    assert mean.shape == std.shape == (TRIALS,)
    truth = standings(WORLD[1].scores)
    assert np.mean((mean - truth) ** 2) < 0.5 * np.mean(truth**2)
    assert fitted.predict(WORLD[1].features, WORLD[1].settings[0])[0].shape == (1,)


def test_standings_are_normal_scores() -> None:
    found = standings([0.3, 0.1, 9.0, 0.2, 7.0])
    assert norm.cdf(found) == pytest.approx([0.5, 0.1, 0.9, 0.3, 0.7])
    assert standings([2.0, 2.0, 2.0]).tolist() == [0, 0, 0]


def test_curves_tell_what_settings_do_not() -> None:
    rng = np.random.default_rng(0)
    world = [studied(dataset, rng.normal(0, 1, TRIALS).tolist()) for dataset in range(10)]
    model = Surrogate.fit(world, QUICK)
    found = [np.mean([correlation(model, one, seen) for one in world]) for seen in (0, 1, 4)]
    assert found[0] < 0.75
    assert found[1] > found[0] + 0.1
    assert found[2] > 0.95


def test_curves_count_by_their_ratios_alone_and_may_break(fitted: Surrogate) -> None:
    one = WORLD[3]
    curves = np.exp(one.curves[:, :5])
    expected = fitted.predict(one.features, one.settings, curves, 0.5)
    same = fitted.predict(one.features, one.settings, 7 * curves, 0.5)
    np.testing.assert_allclose(same, expected, rtol=1e-4, atol=1e-5)
    broken = curves.copy()
    broken[0, 3:] = math.nan
    capped = curves.copy()
    capped[0, 3:] = 10 * capped[0, 0]
    for curve in (broken, capped):
        np.testing.assert_array_equal(
            fitted.predict(one.features, one.settings, curve, 0.5),
            fitted.predict(one.features, one.settings, capped, 0.5),
        )


def test_without_a_curve_nothing_is_seen(fitted: Surrogate) -> None:
    one = WORLD[3]
    none = fitted.predict(one.features, one.settings)
    before = fitted.predict(one.features, one.settings, np.arange(1.0, TRIALS + 1)[:, None], 0.0)
    np.testing.assert_array_equal(none, before)


def test_shares_are_whole_intervals() -> None:
    assert [intervals(share, 12) for share in (0.0, 0.01, 1 / 8, 1 / 4, 1 / 2)] == [0, 1, 2, 3, 6]


def test_held_out_data_sets_are_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    world = [*WORLD[:6], studied(0), studied(3)]
    monkeypatch.setattr(
        Surrogate,
        "fit",
        lambda inside, config: Surrogate(tuple({one.task.dataset for one in inside}), (), Known()),
    )
    found = list(held_out(world, 3))
    assert sorted(one.task.dataset for _, one in found) == sorted(one.task.dataset for one in world)
    for model, one in found:
        assert one.task.dataset not in model.names
        assert len(model.names) == 4
    with pytest.raises(ValueError, match=r"6 data sets can be held out in 2\.\.6 parts, not 7"):
        list(held_out(world, 7))


# -- proposals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The meta-features of any task."""
    given = {"z": 0.5, "noise": 0.0, "has_dropout": 1.0}
    monkeypatch.setattr(module, "meta_features", lambda task: given)
    return given


class Known(Ensemble):
    """Learning rates promise, and high ones are doubtful."""

    def __init__(self) -> None:
        super().__init__(*[Any] * 3)  # type: ignore[arg-type]

    def predict(self, inputs: Any) -> tuple[Array, Array]:
        lr = inputs[:, 0]
        return -lr, np.where(lr > 0.5, 1.0, 0.0)


def test_proposals_are_the_most_promising(features: dict[str, float], fitted: Surrogate) -> None:
    for z in (0.25, 0.75):
        features["z"] = z
        (first,) = fitted.propose(TASK)
        assert to_unit(first, "adamw")[0] == pytest.approx(z, abs=0.2)
    assert fitted.propose(TASK) == [first]


def test_doubt_is_worth_kappa(features: dict[str, float]) -> None:
    for kappa, expected in ((0.0, 1.0), (0.4, 1.0), (2.0, 0.5)):
        (found,) = Surrogate((), ("adamw",), Known(), kappa).propose(TASK)
        assert to_unit(found, "adamw")[0] == pytest.approx(expected - 0.5 * ELITE / CANDIDATES, abs=2e-3)
        assert to_unit(found, "adamw")[2] == pytest.approx(0.5, abs=0.1)  # of the best ones the mean, not one


@pytest.mark.parametrize("has_dropout", [0.0, 1.0])
def test_proposals_are_distinct_and_the_best_comes_first(features: dict[str, float], has_dropout: float) -> None:
    features["has_dropout"] = has_dropout
    model = Surrogate((), ("adamw",), Known(), kappa=0.0)
    found = model.propose(TASK, 8)
    places = np.stack([to_unit(schedule, "adamw") for schedule in found])
    assert len(found) == 8
    if not has_dropout:
        assert places[:, 3] == pytest.approx(np.zeros(8))
    assert min(math.dist(a, b) for index, a in enumerate(places) for b in places[:index]) > SPACING / 3
    assert np.argmax(places[:, 0]) == 0
    assert places[:, 0].min() > 0.6
    assert model.propose(TASK, 3) == found[:3]


def test_the_first_proposal_is_a_one_trial_method(features: dict[str, float], fitted: Surrogate) -> None:
    (first,) = fitted.propose(TASK)
    runs = train_cohort(TASK, fitted, [0, 1])
    for interval in range(TASK.horizon):
        expected = first.values(np.asarray((interval + 0.5) / TASK.horizon))
        for run in runs:
            assert {name: values[interval] for name, values in run.controls.items()} == pytest.approx(
                {name: float(expected[name]) for name in run.controls}
            )


def test_a_configuration_runs_as_the_calibrated_one_does() -> None:
    one, other = (train_cohort(TASK, method, [3]) for method in (Configured(calibrated("adamw")), Cosine("calibrated")))
    assert one[0].val_loss == other[0].val_loss
    keys = {Cell(TASK, Configured(calibrated(name)), (0,)).key for name in ("adamw", "sgd")}
    assert len(keys) == 2


# -- warm starts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpe", "gp", "cma-es", "successive-halving", "hyperband"])
def test_searches_begin_with_what_they_are_given(name: SearchName) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    outside = BaseSchedule(lr=1.0, batch_size=64, weight_decay=0.1, dropout=0.2)
    first = (calibrated("adamw"), outside)
    (found,) = OptunaSearch(name, 3, slots=1, first=first).run(TASK, [0])
    for schedule, trial in zip(first, found.trials, strict=False):
        expected = {control: getattr(schedule, control) for control in trial.params}
        expected["lr"] = min(expected["lr"], SEARCH_RANGES["adamw"]["lr"][1])
        assert trial.params == pytest.approx(expected)
    assert 2 < found.cost[-1] <= 3
    (cold,) = OptunaSearch(name, 3, slots=1).run(TASK, [0])
    assert cold.trials[0].params != found.trials[0].params


def test_grids_take_no_first_configurations() -> None:
    for name in ("grid", "classic-grid"):
        with pytest.raises(ValueError, match=f"a {name} takes no first configurations"):
            OptunaSearch(name, 4, first=(calibrated("adamw"),))
    warm, cold = OptunaSearch("tpe", 4, first=(calibrated("adamw"),)), OptunaSearch("tpe", 4)
    assert Cell(TASK, warm, (0,)).key != Cell(TASK, cold, (0,)).key


# -- the disk, and bad input -------------------------------------------------------------------------------------------


def test_the_disk_keeps_it(tmp_path: Path, fitted: Surrogate) -> None:
    changed = replace(fitted, kappa=1.5)
    changed.save(tmp_path / "surrogate")
    loaded = Surrogate.load(tmp_path / "surrogate")
    assert (loaded.names, loaded.optimizers, loaded.kappa) == (fitted.names, fitted.optimizers, 1.5)
    one = WORLD[0]
    np.testing.assert_array_equal(
        loaded.predict(one.features, one.settings), fitted.predict(one.features, one.settings)
    )
    save_state(tmp_path / "other", {"kind": "something else"})
    with pytest.raises(ValueError, match="not the state of a surrogate but of 'something else'"):
        Surrogate.load(tmp_path / "other")
    (tmp_path / "surrogate").write_bytes((tmp_path / "surrogate").read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        Surrogate.load(tmp_path / "surrogate")


def test_bad_input(features: dict[str, float], fitted: Surrogate) -> None:
    one = WORLD[0]
    with pytest.raises(ValueError, match="needs studied tasks"):
        Surrogate.fit([])
    with pytest.raises(ValueError, match="2 members need as many groups at least, not 1"):
        Surrogate.fit([studied(0), studied(0)], QUICK)
    with pytest.raises(ValueError, match="lacks the meta-features z, noise"):
        fitted.predict({"has_dropout": 1.0}, one.settings)
    with pytest.raises(ValueError, match="lacks the meta-features has_dropout"):
        fitted.predict({"z": 1.0, "noise": 1.0}, one.settings)
    with pytest.raises(ValueError, match=r"have the shapes \(32, 3\)"):
        fitted.predict(one.features, one.settings[:, :3])
    with pytest.raises(ValueError, match=r"have the shapes \(32, 4\) and \(31, 9\)"):
        fitted.predict(one.features, one.settings, np.exp(one.curves[1:]), 1.0)
    with pytest.raises(ValueError, match=r"4 intervals of a run cannot be the share 0\.0 of it"):
        fitted.predict(one.features, one.settings, np.exp(one.curves[:, :5]))
    with pytest.raises(ValueError, match=r"0 intervals of a run cannot be the share 0\.5 of it"):
        fitted.predict(one.features, one.settings, share=0.5)
    with pytest.raises(ValueError, match="has studied adamw, not sgd"):
        fitted.propose(replace(TASK, optimizer="sgd"))
    for count in (0, 4096):
        with pytest.raises(ValueError, match=rf"count must lie in 1\.\.\d+, .* not {count}"):
            fitted.propose(TASK, count)
