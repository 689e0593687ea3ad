"""Searches at equal cost: Optuna's samplers and pruners, and population-based training."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agents import population_based, searches
from agents.application import held_out_rows
from agents.calibration import SEARCH_RANGES, final_losses
from agents.optional import MissingPackage
from agents.population_based import Population, PopulationBased
from agents.searches import SEARCHES, SETTINGS, OptunaSearch, Searched, SearchName, Trial, publish
from hpo_env.base_schedules import BaseSchedule
from hpo_env.hyperparameters import CONTROLS
from inner_models.batched_training import BatchedTraining
from inner_models.models import ModelSpec
from inner_models.tasks import Task

optuna = pytest.importorskip("optuna")
pytest.importorskip("cmaes")

TASK = Task("digits", ModelSpec("mlp", 8, 1), horizon=9, interval_examples=64, train_rows=96, eval_rows=64)
MOVED = ("lr", "batch_size", "weight_decay", "dropout")
WITHOUT_DROPOUT = replace(TASK, model=ModelSpec("linear"), horizon=3)
PRUNED: tuple[SearchName, ...] = ("successive-halving", "hyperband")
WHOLE = tuple(name for name in SEARCHES if name not in (*PRUNED, "classic-grid"))
"""Searches of which every trial takes a full run."""


def timeless(searched: Sequence[Searched]) -> list[Searched]:
    return [replace(study, seconds=0.0) for study in searched]


def same(found: Searched, expected: Searched) -> None:
    """Equal, but for rounding."""
    assert [trial.pruned for trial in found.trials] == [trial.pruned for trial in expected.trials]
    for one, other in zip(found.trials, expected.trials, strict=True):
        assert one.params == pytest.approx(other.params, rel=1e-3)
        np.testing.assert_allclose(one.val_loss, other.val_loss, rtol=1e-3)
    for name in ("cost", "best", "test"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-3)


class Watched(BatchedTraining):
    """The engine, which counts what is trained and tells what is evaluated."""

    made: list[Watched]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.intervals, self.evaluated = 0, [""]
        self.made.append(self)

    def advance(self, hyperparameters: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        self.intervals += int((hyperparameters["lr"] > 0).sum())
        return super().advance(hyperparameters)

    def evaluate(self, split: Any) -> NDArray[np.float64]:
        self.evaluated.append(split if isinstance(split, str) else "held out")
        return super().evaluate(split)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """The engines that searches make."""
    Watched.made = []
    for module in (searches, population_based):
        monkeypatch.setattr(module, "BatchedTraining", Watched)
    return Watched.made


class Fragile(BatchedTraining):
    """The engine, where weights break above a learning rate."""

    limit = 3e-3

    def advance(self, hyperparameters: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        self._state["values"][hyperparameters["lr"] > self.limit] = math.nan
        return super().advance(hyperparameters)


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> type[Fragile]:
    for module in (searches, population_based):
        monkeypatch.setattr(module, "BatchedTraining", Fragile)
    monkeypatch.setattr(Fragile, "limit", Fragile.limit)
    return Fragile


@pytest.mark.parametrize("budget", [1, 6])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_trials_spend_the_budget_exactly(name: SearchName, budget: int, watched: list[Watched]) -> None:
    """Also where it is no multiple of the workers."""
    found = OptunaSearch(name, budget).run(TASK, [0, 1])
    assert watched[0].intervals == 2 * budget * TASK.horizon
    for study in found:
        assert [len(trial.val_loss) for trial in study.trials] == [TASK.horizon] * budget
        assert not any(trial.pruned for trial in study.trials)
        assert study.cost == [min(budget, 4)] * min(budget, 4) + [6] * (budget - min(budget, 4))


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_frees_budget_for_more_trials(name: SearchName, watched: list[Watched]) -> None:
    budget = 12
    found = OptunaSearch(name, budget).run(TASK, [0, 1])
    lengths = [[len(trial.val_loss) for trial in study.trials] for study in found]
    assert watched[0].intervals == sum(map(sum, lengths))
    for study, trained in zip(found, lengths, strict=True):
        assert budget - 1 < sum(trained) / TASK.horizon <= budget
        assert study.cost[-1] == pytest.approx(sum(trained) / TASK.horizon)
        assert sorted(study.cost) == study.cost
        assert len(study.trials) > budget
        for trial in study.trials:
            assert trial.pruned == (len(trial.val_loss) < TASK.horizon)
    assert any(trial.pruned for study in found for trial in study.trials)
    assert any(not trial.pruned for study in found for trial in study.trials)


def test_successive_halving_prunes_at_its_rungs() -> None:
    lengths = {len(trial.val_loss) for trial in OptunaSearch("successive-halving", 16).run(TASK, [0])[0].trials}
    assert lengths == {1, 4, 9}


def test_classic_grid_costs_what_its_epochs_cost() -> None:
    task = replace(TASK, horizon=4)
    (whole,) = OptunaSearch("classic-grid", 64).run(task, [0])
    assert len(whole.trials) == 48
    assert whole.cost[-1] == 28
    assert len({tuple(trial.params.items()) for trial in whole.trials}) == 48
    for trial in whole.trials:
        assert len(trial.val_loss) == trial.params["epochs"]
        assert (trial.params["weight_decay"], trial.params["dropout"]) == (0.01, 0.1)  # the usual defaults
    (part,) = OptunaSearch("classic-grid", 5).run(task, [0])
    assert 4 < part.cost[-1] <= 5
    assert {tuple(trial.params.items()) for trial in part.trials} < {
        tuple(trial.params.items()) for trial in whole.trials
    }


def test_classic_grid_ends_where_its_next_point_does_not_fit() -> None:
    """Epochs of 3, 5 and 9 intervals: all points take 272, and the last of them may be the one that does not fit."""
    for study in OptunaSearch("classic-grid", 30).run(TASK, range(8)):
        assert len(study.trials) in (46, 47)
        assert 30 - 8 / 9 <= study.cost[-1] <= 30


@pytest.mark.parametrize("task", [TASK, WITHOUT_DROPOUT])
def test_grid_ends_with_its_points(task: Task) -> None:
    (found,) = OptunaSearch("grid", 80, slots=16).run(replace(task, horizon=1), [0])
    assert len({tuple(trial.params.items()) for trial in found.trials}) == len(found.trials) == found.cost[-1] == 64
    for name, (low, high) in SEARCH_RANGES["adamw"].items():
        values = {trial.params[name] for trial in found.trials if name in trial.params}
        assert all(low <= value <= high for value in values)
        assert len(values) == {"lr": 4, "batch_size": 4, "dropout": 2 * (task == TASK)}.get(
            name, 2 + 2 * (task != TASK)
        )


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_are_deterministic_and_do_not_depend_on_cohort_mates(name: SearchName) -> None:
    search = OptunaSearch(name, 12)
    found = search.run(TASK, [3, 4])
    assert timeless(found) == timeless(search.run(TASK, [3, 4]))
    same(search.run(TASK, [4])[0], found[1])
    assert [study.seed for study in found] == [3, 4]
    assert found[0].trials[0].params != found[1].trials[0].params
    assert min(study.seconds for study in found) > 0


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("task", [TASK, replace(TASK, optimizer="sgd"), WITHOUT_DROPOUT])
def test_values_lie_in_the_search_ranges(name: SearchName, task: Task) -> None:
    (found,) = OptunaSearch(name, 4).run(task, [0])
    expected = [control for control in SEARCH_RANGES["adamw"] if control != "dropout" or task != WITHOUT_DROPOUT]
    for trial in found.trials:
        assert [control for control in trial.params if control != "epochs"] == expected
        assert trial.params["batch_size"] % CONTROLS["batch_size"].multiple == 0
        for control in expected:
            low, high = SEARCH_RANGES[task.optimizer][control]
            assert low * (1 - 1e-9) <= trial.params[control] <= high * (1 + 1e-9)


@pytest.mark.parametrize("name", ["tpe", "classic-grid", "successive-halving"])
def test_curves_are_those_of_the_incumbents_trained_alone(name: SearchName) -> None:
    (found,) = OptunaSearch(name, 6).run(TASK, [2])
    seen = math.inf
    for trial, best, test in zip(found.trials, found.best, found.test, strict=True):
        if not trial.pruned and trial.val_loss[-1] < seen:
            seen, judged = trial.val_loss[-1], alone(trial)
            assert judged[0] == pytest.approx(seen, rel=1e-4)
        assert best == seen
        if seen < math.inf:
            assert test == pytest.approx(judged[1], rel=1e-4)
    assert seen < math.inf


def alone(trial: Trial) -> tuple[float, float]:
    """Final validation loss of a trial that is trained by itself, and test loss where its validation loss is least."""
    training = BatchedTraining(TASK, [2])
    schedule = BaseSchedule(**{name: value for name, value in trial.params.items() if name in CONTROLS})
    intervals = int(trial.params.get("epochs", TASK.horizon))
    best = test = math.inf
    for interval in range(intervals):
        values = schedule.values(np.array([(interval + 0.5) / intervals]))
        (loss,) = training.advance(values)["val_loss"]
        if loss < best:
            best, test = loss, float(training.evaluate(held_out_rows(TASK))[0])
    return float(loss), test


def test_trials_are_the_calibration_s_runs() -> None:
    (found,) = OptunaSearch("grid", 4).run(TASK, [5])
    schedules = [BaseSchedule(**trial.params) for trial in found.trials]
    expected = final_losses(TASK, schedules, seed=5)
    np.testing.assert_allclose([trial.val_loss[-1] for trial in found.trials], expected, rtol=1e-4)


def test_samplers_see_no_test_data(watched: list[Watched]) -> None:
    OptunaSearch("tpe", 2).run(TASK, [0])
    PopulationBased(2).run(TASK, [0])
    for training in watched:
        with pytest.raises(LookupError, match="without the test split"):
            training.evaluate("test")
        assert training.evaluated == ["", *["val"] * TASK.horizon, "held out", "test"]


@pytest.mark.parametrize("name", SEARCHES)
def test_diverged_trials_neither_crash_nor_win(name: SearchName, fragile: type[Fragile]) -> None:
    found = OptunaSearch(name, 16).run(TASK, [0, 1])
    for study in found:
        broken = [trial for trial in study.trials if math.inf in trial.val_loss]
        sound = [trial for trial in study.trials if math.inf not in trial.val_loss]
        assert len(broken) > 1
        assert all(trial.params["lr"] > fragile.limit for trial in broken)
        assert all(trial.val_loss[-1] == math.inf for trial in broken)
        assert study.best[-1] == min(trial.val_loss[-1] for trial in sound if not trial.pruned)
        assert math.isfinite(study.test[-1])
        if name == "successive-halving":
            assert all(trial.pruned and len(trial.val_loss) == 1 for trial in broken)


@pytest.mark.parametrize("name", SEARCHES)
def test_nothing_converges(name: SearchName, fragile: type[Fragile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragile, "limit", 0.0)
    (found,) = OptunaSearch(name, 14).run(TASK, [0])
    assert set(found.best) == set(found.test) == {math.inf}
    assert Searched.from_dict(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize("name", ["successive-halving", "classic-grid"])
def test_records_survive_json(name: SearchName, fragile: type[Fragile]) -> None:
    (found,) = OptunaSearch(name, 4).run(TASK, [0])
    assert any(math.inf in trial.val_loss for trial in found.trials)
    assert Searched.from_dict(json.loads(json.dumps(asdict(found)))) == found
    assert Searched.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_searches_and_settings() -> None:
    assert set(SETTINGS) == set(SEARCHES)
    with pytest.raises(ValueError, match="tpe"):
        OptunaSearch("tpo", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget must be at least 1, not 0"):
        OptunaSearch("tpe", 0)
    with pytest.raises(ValueError, match="slots must be at least 1, not 0"):
        OptunaSearch("tpe", 1, slots=0)
    with pytest.raises(ValueError, match="population must be at least 2, not 1"):
        PopulationBased(1)


def test_optuna_s_log_is_silent_and_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    OptunaSearch("tpe", 2).run(TASK, [0])
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


@pytest.mark.parametrize("package", ["optuna", "cmaes"])
def test_missing_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{package}.*pip install 'hyperpilot\[compare\]'"):
        OptunaSearch("cma-es", 2).run(TASK, [0])
    PopulationBased(2).run(TASK, [0])


def test_importing_searches_leaves_optuna_alone() -> None:
    program = "import sys, agents.searches, agents.population_based; print('optuna' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'searches.db'}"


@pytest.mark.parametrize("name", ["successive-halving", "classic-grid"])
def test_publish(name: SearchName, storage: str, fragile: type[Fragile]) -> None:
    found = OptunaSearch(name, 6).run(TASK, [0, 1])
    for _ in range(2):  # the second changes nothing
        publish(found, storage, f"digits/{name}")
        summaries = optuna.get_all_study_summaries(storage)
        assert sorted(summary.study_name for summary in summaries) == [f"digits/{name}/seed{seed}" for seed in (0, 1)]
        for record in found:
            study = optuna.load_study(study_name=f"digits/{name}/seed{record.seed}", storage=storage)
            assert study.direction == optuna.study.StudyDirection.MINIMIZE
            assert len(study.trials) == len(record.trials)
            assert study.best_value == record.best[-1]
            for stored, trial in zip(study.trials, record.trials, strict=True):
                assert stored.params == pytest.approx(trial.params)
                assert list(stored.intermediate_values) == list(range(1, len(trial.val_loss) + 1))
                assert list(stored.intermediate_values.values()) == trial.val_loss
                assert (stored.state == optuna.trial.TrialState.PRUNED) == trial.pruned
                failed = not trial.pruned and trial.val_loss[-1] == math.inf
                assert (stored.state == optuna.trial.TrialState.FAIL) == failed


def test_publish_completes_what_was_interrupted(storage: str) -> None:
    (found,) = OptunaSearch("tpe", 3).run(TASK, [0])
    publish([replace(found, trials=found.trials[:1])], storage, "digits")
    publish([found], storage, "digits")
    trials = optuna.load_study(study_name="digits/seed0", storage=storage).trials
    assert [trial.value for trial in trials] == [trial.val_loss[-1] for trial in found.trials]


@pytest.mark.parametrize("url", ["searches.db", "sqlite:////no/such/folder/searches.db", "nosuch://localhost/searches"])
def test_publish_names_a_bad_storage(url: str) -> None:
    with pytest.raises(ValueError, match=f"no Optuna storage at '{url}'"):
        publish([], url, "digits")


def test_populations_are_deterministic_and_do_not_depend_on_cohort_mates() -> None:
    search = PopulationBased(5)
    found = search.run(TASK, [3, 4])
    assert timeless(found) == timeless(search.run(TASK, [3, 4]))
    same(search.run(TASK, [4])[0], found[1])
    assert found[0].trials[0].params != found[1].trials[0].params


def test_population_costs_its_size(watched: list[Watched]) -> None:
    found = PopulationBased(6).run(TASK, [0, 1])
    assert watched[0].intervals == 2 * 6 * TASK.horizon
    for study in found:
        assert study.cost == [6.0]
        assert len(study.trials) == 6
        assert study.best == [min(trial.val_loss[-1] for trial in study.trials)]
        assert math.isfinite(study.test[0])
        for trial in study.trials:
            assert len(trial.val_loss) == TASK.horizon
            for name, (low, high) in SEARCH_RANGES["adamw"].items():
                assert low * (1 - 1e-9) <= trial.params[name] <= high * (1 + 1e-9)


def test_losers_take_over_weights_and_hyperparameters() -> None:
    training = BatchedTraining(TASK, [0] * 12)
    population = Population(training, range(1, 11), seed=0)
    training.advance({name: np.concatenate([v[:1], v, v[:1]]) for name in MOVED for v in [population.values(name)]})
    before = {name: population.values(name) for name in MOVED}
    population.observe(np.array([0.0, 5, 1, 3, math.nan, 2, 6, 4, 8, 7, 5.5, 0]))
    untouched = [training.snapshot(replica) for replica in range(12)]
    taken = population.select()
    assert set(taken) == {7, 3}  # the losses 8 and NaN
    assert set(taken.values()) <= {1, 4}  # 1 and 2
    for replica in range(12):
        expected = untouched[taken[replica - 1] + 1 if replica - 1 in taken else replica]
        assert all((training.snapshot(replica)[name] == expected[name]).all() for name in expected)
    for member in range(10):
        same_values = [population.values(name)[member] == before[name][member] for name in MOVED]
        assert all(same_values) == (member not in taken)


def test_exploring_multiplies_or_draws_anew() -> None:
    """Every control keeps moving: factors are no match for the rounding of batch sizes."""
    training = BatchedTraining(TASK, [0] * 10)
    population = Population(training, range(10), seed=0)
    ratios: dict[str, list[float]] = {name: [] for name in MOVED}
    sizes = set()
    for _ in range(100):
        population.observe(np.arange(10.0))
        latent = {name: values.copy() for name, values in population._values.items()}
        for loser, donor in population.select().items():
            for name in MOVED:
                ratios[name].append(population._values[name][loser] / latent[name][donor])
        sizes |= set(population.values("batch_size"))
        assert all(CONTROLS[name].low <= v <= CONTROLS[name].high for name in MOVED for v in population.values(name))
    for name, found in ratios.items():
        shares = [np.isclose(found, factor).mean() for factor in (0.8, 1.2)]
        assert all(0.25 < share < 0.5 for share in shares), (name, shares)
    assert len(sizes) > 8


@pytest.mark.parametrize("limit", [3e-3, 0.0])
def test_diverged_members_are_replaced(limit: float, fragile: type[Fragile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragile, "limit", limit)
    (found,) = PopulationBased(10).run(TASK, [1])
    assert sum(trial.val_loss[0] == math.inf for trial in found.trials) > 2
    if limit:
        assert sum(trial.val_loss[-1] == math.inf for trial in found.trials) <= 2
        assert math.isfinite(found.best[0])
        assert math.isfinite(found.test[0])
    else:
        assert (found.best, found.test) == ([math.inf], [math.inf])
