"""The meta-dataset: scores as they are defined, settings that can be told apart, and nothing run twice."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from agents import cells, evaluation
from agents.calibration import SEARCH_RANGES, sample_schedules
from agents.cells import Store
from agents.meta_dataset import SCORE_CAP, SEED, Studied, draw, from_unit, sampled, study, to_unit
from hpo_env.base_schedules import BaseSchedule
from inner_models.splits import META_TRAIN_SMALL
from inner_models.tasks import Task
from tests.fabricated import run

TASK = Task.named("iris/mlp", horizon=3, interval_examples=32, eval_rows=32)


def studied(*ends: float, calibrated: tuple[float, ...] = (0.5, 2.0)) -> Studied:
    return Studied(TASK, {}, [run(end, seed) for seed, end in enumerate(ends)], [run(end) for end in calibrated])


def test_scores_are_log_ratios_to_the_calibrated_schedule() -> None:
    found = studied(0.5, 1.0, 3.9, math.nan)
    assert found.reference == pytest.approx(1.0)  # geometric
    assert found.scores == pytest.approx([math.log(0.5), 0.0, SCORE_CAP, SCORE_CAP])
    assert found.curves[0] == pytest.approx(np.log([4.0, 4.0, 2.0, 0.5]))
    assert found.curves[:, 0] == pytest.approx(math.log(4.0))
    assert np.isfinite(found.curves).all()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_settings_are_places_in_the_search_ranges(optimizer: str) -> None:
    trials = sampled(optimizer, 6)  # type: ignore[arg-type]
    assert sampled(optimizer, 3) == trials[:3]  # type: ignore[arg-type]
    assert len(set(trials)) == 6
    for trial in trials:
        place = to_unit(trial, optimizer)  # type: ignore[arg-type]
        assert ((place >= 0) & (place <= 1)).all()
        back = from_unit(place, optimizer)  # type: ignore[arg-type]
        assert back.to_dict() == pytest.approx(trial.to_dict(), rel=1e-9)
    low, high = zip(*SEARCH_RANGES[optimizer].values(), strict=True)
    assert to_unit(BaseSchedule(*low), optimizer) == pytest.approx(np.zeros(4))  # type: ignore[arg-type]
    assert to_unit(BaseSchedule(*high), optimizer) == pytest.approx(np.ones(4))  # type: ignore[arg-type]
    assert from_unit(np.full(4, 7.0), optimizer).to_dict() == pytest.approx(BaseSchedule(*high).to_dict())  # type: ignore[arg-type]


def test_a_study_trains_each_trial_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [TASK, Task.named("wine/linear", horizon=2, interval_examples=32)]
    first = study(tasks, 4, Store(tmp_path), workers=1)
    assert [one.task for one in first] == tasks
    for one in first:
        assert one.settings.shape == (4, 4)
        assert one.curves.shape == (4, 1 + one.task.horizon)
        assert [run.seed for run in one.runs] == [0, 1, 2, 0]
        assert [run.controls["lr"][-1] for run in one.runs] == [
            pytest.approx(float(trial.values(np.array(1 - 0.5 / one.task.horizon))["lr"]))
            for trial in sampled("adamw", 4)
        ]
        assert {"rows", "val_1_lr_x1"} <= set(one.features)
    monkeypatch.setattr(cells.Cell, "compute", lambda *_: pytest.fail("it was run before"))
    again = study(tasks, 4, Store(tmp_path), workers=1)
    assert [one.scores.tolist() for one in again] == [one.scores.tolist() for one in first]


def test_its_trials_are_not_those_of_the_judge() -> None:
    assert [cell.method.seed for cell in evaluation.bank(TASK, 65)] != [SEED] * 2
    assert sampled("adamw", 4) != sample_schedules("adamw", 4, np.random.default_rng(0))


def test_a_study_needs_two_trials(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trials must be at least 2, not 1"):
        study([TASK], 1, Store(tmp_path))


def test_tasks_are_drawn_by_their_seed() -> None:
    assert draw(META_TRAIN_SMALL, 5) == draw(META_TRAIN_SMALL, 8)[:5] != draw(META_TRAIN_SMALL, 5, seed=1)
