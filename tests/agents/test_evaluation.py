"""The judge end to end, on two tiny tasks: every run is there, every figure too, and nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agents import evaluation
from agents.application import train_cohort
from agents.calibration import sample_schedules
from agents.cells import Cell, Store
from agents.controllers import Replay, WithPolicy, mean_trajectory
from agents.evaluation import FACTORS, Budget, Evaluation, ablations, evaluate, labels, scaled
from agents.schedules import Cosine, OneCycle
from agents.summary import summarize
from inner_models.models import ModelSpec, build_model
from inner_models.replicated_layers import parameter_count
from inner_models.tasks import Task, prepare
from tests.tiny import random_policy

TASKS = [
    Task("digits", ModelSpec("mlp", 8, 1), horizon=4, interval_examples=64, train_rows=64, eval_rows=64),
    Task("wine", ModelSpec("mlp", 8, 1), "sgd", horizon=3, interval_examples=48, train_rows=64),
]
BUDGET = Budget(seeds=2, bank=6, multiples=(0.5, 1.0), searches=("population-based",), search_cost=2, search_seeds=1)
BASELINES = {"calibrated": Cosine("calibrated"), "cosine": Cosine(), "one-cycle": OneCycle()}
REQUIRED = {
    "rse_median", "rse_by_task", "rse_calibrated_by_task", "speedup_iqm", "val_log_ratio_iqm", "val_log_ratio_ci",
    "test_log_ratio_iqm", "win_rate", "worst_decile", "bad_start_failures", "replay_log_ratio_ci",
    "replay_same_task_log_ratio_ci", "shuffled_log_ratio_ci",
}  # fmt: skip
DEPENDENT = (WithPolicy, Replay)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cells")


@pytest.fixture(scope="module", autouse=True)
def few_baselines() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BASELINES", BASELINES)
        patch.setattr(evaluation, "_CHUNK", 4)
        yield


@pytest.fixture(scope="module")
def found(folder: Path) -> Evaluation:
    return evaluate(random_policy(1, 0.3), TASKS, BUDGET, Store(folder), workers=1)


# -- what is run -------------------------------------------------------------------------------------------------------


def test_labels_tell_tasks_apart() -> None:
    digits, sgd = TASKS[0], replace(TASKS[0], optimizer="sgd")
    larger = replace(digits, horizon=8)
    tasks = [digits, sgd, larger, TASKS[1], replace(digits, seed=1), replace(sgd, seed=1)]
    named = labels(tasks)
    assert list(named.values()) == tasks
    assert list(named) == [
        "digits/mlp", "digits/mlp/sgd", "digits/mlp#2", "wine/mlp/sgd", "digits/mlp#3", "digits/mlp/sgd#2",
    ]  # fmt: skip


def test_scaled() -> None:
    task = TASKS[0]
    assert scaled(task) == task
    assert scaled(task, horizon=0.1).horizon == 1
    assert scaled(task, horizon=4) == replace(task, horizon=16)
    assert scaled(task, width=2.5).model == ModelSpec("mlp", 20, 1)


@pytest.mark.parametrize("bad", [{"seeds": 1}, {"bank": 1}, {"search_seeds": 0}, {"seeds": 2, "search_seeds": 3}])
def test_budgets_that_say_nothing(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"seeds and bank must be at least 2 and search_seeds lie in 1\.\.seeds"):
        Budget(**bad)  # type: ignore[arg-type]


def test_all_runs_are_there_and_paired(found: Evaluation) -> None:
    own = labels(TASKS)
    assert found.tasks == own
    controls = {"replay-same-task", "replay-other-tasks", "shuffled"}
    assert next(iter(found.runs)) == "policy"
    assert set(found.runs) == {"policy", *BASELINES, *ablations(found.policy), *controls}
    for name, by_label in found.runs.items():
        for label, runs in by_label.items():
            assert [run.seed for run in runs] == [0, 1], name
            assert all(len(run.val_loss) == own[label].horizon for run in runs)
            paired = [run.initial_loss for run in found.runs["policy"][label]]
            assert [run.initial_loss for run in runs] == pytest.approx(paired, rel=1e-5)
    for label, task in own.items():
        assert [len(runs[0].val_loss) for runs in found.budgets[label].values()] == [2, task.horizon]
        assert found.budgets[label][1.0] == found.runs["calibrated"][label] == found.starts[label]["calibrated"][1.0]
        assert found.starts[label]["cosine"][1.0] == found.runs["cosine"][label]
        assert [search.cost for search in found.searches[label]["population-based"]] == [[2.0]]


def test_the_bank_is_one_random_search_in_parts(found: Evaluation) -> None:
    """Trial i of a bank is the i-th schedule of one draw, trained with seed i modulo 5, whatever the budget's seeds."""
    for label, task in found.tasks.items():
        schedules = sample_schedules(task.optimizer, 6, np.random.default_rng(0))
        progress = (np.arange(task.horizon) + 0.5) / task.horizon
        assert [run.seed for run in found.banks[label]] == [0, 1, 2, 3, 4, 0]
        for run, schedule in zip(found.banks[label], schedules, strict=True):
            assert len(run.controls) == 4
            for name, values in run.controls.items():
                np.testing.assert_allclose(schedule.values(progress)[name], values, rtol=1e-12)


def test_bad_starts(found: Evaluation) -> None:
    for label, task in found.tasks.items():
        starts = found.starts[label]
        assert list(starts) == ["policy", "calibrated", "cosine"]
        for name in ("calibrated", "cosine"):
            first = [runs[0].controls["lr"][0] for runs in starts[name].values()]
            np.testing.assert_allclose(np.array(first) / first[2], FACTORS, rtol=1e-12)
        for factor, runs in starts["policy"].items():
            given = WithPolicy(found.policy, start="given", lr_factor=factor)
            again = train_cohort(task, given, [0, 1])
            assert [run.controls for run in runs] == [run.controls for run in again]


def test_replays_leave_out_what_they_must_not_know(found: Evaluation) -> None:
    """On the same task, each seed is led by the other seeds' mean; on other tasks, by the other tasks' alone."""
    rules = found.policy.header.base_rules
    own = {label: [np.array(run.notes["offsets"]) for run in runs] for label, runs in found.runs["policy"].items()}
    assert all(offsets.shape == (4 if label == "digits/mlp" else 3, 6) for label in own for offsets in own[label])
    for label, task in found.tasks.items():
        swapped = Replay(rules, np.stack([mean_trajectory([own[label][1]]), mean_trajectory([own[label][0]])]))
        (other,) = (runs for name, runs in own.items() if name != label)
        elsewhere = Replay(rules, mean_trajectory(other)[None])
        for name, replay in (("replay-same-task", swapped), ("replay-other-tasks", elsewhere)):
            expected = train_cohort(task, replay, [0, 1])
            for run, again in zip(found.runs[name][label], expected, strict=True):
                for control, values in again.controls.items():
                    np.testing.assert_allclose(run.controls[control], values, rtol=1e-9)
        assert found.runs["shuffled"][label][0].controls != found.runs["policy"][label][0].controls


def parameters_of(task: Task) -> int:
    return parameter_count(build_model(task.model, prepare(task).dataset))


def test_ablations_move_what_they_say(found: Evaluation) -> None:
    for label, task in found.tasks.items():
        base, own = found.runs["base-rule"][label][0], found.runs["policy"][label][0]
        for name in found.policy.header.controls:
            run = found.runs[f"{name}-only"][label][0]
            assert {other for other in run.controls if run.controls[other] != base.controls[other]} <= {name}
        assert found.runs["lr-only"][label][0].controls["lr"] != base.controls["lr"]
        examples, parameters = prepare(task).interval_examples * task.horizon, parameters_of(task)
        rule = found.policy.header.base_rule(task.optimizer).schedule(examples, parameters)
        expected = rule.values((np.arange(task.horizon) + 0.5) / task.horizon)
        for name, values in base.controls.items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-12)
        assert found.runs["length-not-told"][label][0].controls["lr"] != own.controls["lr"]
    random, blanked = (found.runs[name]["digits/mlp"] for name in ("random-actions", "blanked"))
    assert random[0].controls != random[1].controls
    for name, moved in blanked[0].controls.items():  # up to the rounding of a product of several rows
        np.testing.assert_allclose(blanked[1].controls[name], moved, rtol=1e-5)


# -- the store ---------------------------------------------------------------------------------------------------------


def test_nothing_is_computed_again(found: Evaluation, folder: Path, computed: list[Cell]) -> None:
    again = evaluate(random_policy(1, 0.3), TASKS, BUDGET, Store(folder), workers=1)
    assert computed == []
    assert (again.runs, again.banks, again.budgets) == (found.runs, found.banks, found.budgets)
    assert (again.starts, again.searches) == (found.starts, found.searches)


def test_another_policy_shares_what_does_not_depend_on_it(
    found: Evaluation, folder: Path, computed: list[Cell]
) -> None:
    other = evaluate(random_policy(2, 0.3), TASKS, BUDGET, Store(folder), workers=1)
    assert {type(cell.method) for cell in computed} == set(DEPENDENT)
    assert len({cell.key for cell in computed}) == len(computed)
    # Per task: its own run, the ablations but the base rule (which both have), five starts, two replays, the shuffled.
    assert len(computed) == len(TASKS) * (1 + len(ablations(other.policy)) - 1 + len(FACTORS) + 3)
    assert other.runs["policy"] != found.runs["policy"]
    for name in (*BASELINES, "base-rule"):
        assert other.runs[name] == found.runs[name]


def test_more_trials_keep_those_that_were_there(found: Evaluation, folder: Path, computed: list[Cell]) -> None:
    more = evaluate(found.policy, TASKS, replace(BUDGET, bank=8), Store(folder), workers=1)
    assert [cell.seeds for cell in computed] == [(4, 0, 1, 2)] * 2
    for label, bank in more.banks.items():
        assert bank[:4] == found.banks[label][:4]
        assert len(bank) == 8


def test_a_damaged_cell_stops_it(found: Evaluation, tmp_path: Path) -> None:
    store = Store(tmp_path)
    cell = Cell(TASKS[0], WithPolicy(found.policy, record=True), (0, 1))
    store.path(cell).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        evaluate(found.policy, TASKS[:1], BUDGET, store, workers=1)
    assert store.path(cell).read_text() == "{"


# -- the figures -------------------------------------------------------------------------------------------------------


def test_all_figures_are_there_as_json(found: Evaluation) -> None:
    figures = summarize(found)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert set(figures) == {"tasks", "summary"}
    summary, tasks = figures["summary"], figures["tasks"]
    assert set(summary) >= REQUIRED
    assert summary["bad_start_failures"].keys() >= {"policy", "calibrated"}
    assert list(tasks) == list(summary["rse_by_task"]) == list(summary["rse_calibrated_by_task"]) == list(found.tasks)
    for name in ("val_log_ratio", "replay_log_ratio", "replay_same_task_log_ratio", "shuffled_log_ratio"):
        low, high = summary[f"{name}_ci"]
        assert low <= high
    assert summary["against"].keys() == found.runs.keys() - {"policy"}
    assert summary["against_searches"].keys() == {"random", "population-based"}
    for label, task in tasks.items():
        assert task["methods"].keys() == found.runs.keys()
        final = [run.val_loss[-1] for run in found.runs["one-cycle"][label]]
        assert task["methods"]["one-cycle"]["val"] == pytest.approx(final)


def test_one_task_has_no_others(found: Evaluation, folder: Path) -> None:
    alone = evaluate(found.policy, TASKS[:1], BUDGET, Store(folder), workers=1)
    assert not {"replay-other-tasks", "shuffled"} & set(alone.runs)
    summary = summarize(alone)["summary"]
    assert summary["replay_log_ratio_ci"] is summary["shuffled_log_ratio_ci"] is None
    assert len(summary["replay_same_task_log_ratio_ci"]) == 2
