"""The door to the surrogate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents.evaluation import SPLITS
from agents.meta_features import LANDMARK_COST
from agents.proposer import Proposer
from agents.searches import OptunaSearch
from agents.surrogate import FIT, Surrogate
from inner_models.models import ModelSpec
from inner_models.tasks import Task, TaskDistribution
from scripts import measure_surrogate
from tests.scripts.doors import Door, one_line

SIZES: dict[str, Any] = {"horizon": 4, "interval_examples": 32, "train_rows": 64, "eval_rows": 32}
STUDIED = ("digits", "wine", "iris", "breast-cancer", "diabetes")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tasks to learn from, and others to be judged on."""
    drawn = (Task(name, ModelSpec("mlp", 8, 1), **SIZES) for name in STUDIED)
    monkeypatch.setattr(TaskDistribution, "sample", lambda self, rng: next(drawn))
    monkeypatch.setattr(measure_surrogate, "FIT", replace(FIT, members=2))
    judged = (Task("teacher-0", ModelSpec("mlp", 8, 1), **SIZES), Task("teacher-1", ModelSpec("linear"), **SIZES))
    monkeypatch.setitem(SPLITS, "meta-validation", judged)


@pytest.mark.usefixtures("tiny")
def test_learns_and_judges(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setattr(Proposer, "load", lambda path: SimpleNamespace(landmark_cost=0.5))
    monkeypatch.setattr(measure_surrogate, "RecurrentSearch", lambda proposer, budget: OptunaSearch("tpe", budget))
    arguments = ["--tasks", 5, "--trials", 4, "--steps", 20, "--parts", 2, "--seeds", 2, "--bank", 8, "--budget", 4]
    arguments += [
        "--first",
        2,
        "--searches",
        "tpe",
        "--workers",
        1,
        "--proposer",
        "lstm",
        "--cache",
        tmp_path / "cache",
        "--quiet",
    ]
    arguments += ["--json", tmp_path / "found.json", "--markdown", tmp_path / "found.md", "--figures", tmp_path]
    door(measure_surrogate, *arguments, "--cache", tmp_path / "cache", "--out", tmp_path / "surrogate.safetensors")
    found = json.loads((tmp_path / "found.json").read_text())
    tasks = ["teacher-0/mlp", "teacher-1/linear"]
    ranks = found["rank_correlation"]
    assert {name: list(by_share) for name, by_share in ranks.items()} == {
        "surrogate": ["0", "0.125", "0.25", "0.5"],
        "without meta-features": ["0", "0.125", "0.25", "0.5"],
        "present loss": ["0.125", "0.25", "0.5"],
    }
    for entry in (entry for by_share in ranks.values() for entry in by_share.values()):
        assert list(entry["by_task"]) == tasks
        assert entry["value"] == pytest.approx(sum(entry["by_task"].values()) / 2)
        assert -1 <= entry["ci"][0] <= entry["value"] <= entry["ci"][1] <= 1
    first = found["first_proposal"]
    proposed = Surrogate.load(tmp_path / "surrogate.safetensors").propose(SPLITS["meta-validation"][0])[0]
    assert first["by_task"]["teacher-0/mlp"]["settings"] == pytest.approx(proposed.to_dict())
    for row in first["by_task"].values():
        assert 1 <= row["rse"] <= 8
    assert list(found["searches"]) == ["random", "tpe", "tpe from calibrated", "tpe from surrogate", "recurrent"]
    assert found["searches"]["recurrent"] == found["searches"]["tpe"]
    for by_trials in found["searches"].values():
        assert list(by_trials) == ["1", "2", "4"]
        values = [entry["value"] for entry in by_trials.values()]
        assert values == sorted(values)
    assert found["searches"]["tpe from calibrated"]["1"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["landmark_cost"] == {"tpe from surrogate": LANDMARK_COST, "recurrent": 0.5}
    held_out = found["held_out"]
    assert held_out["tasks"] == len(held_out["rank_correlation"]["surrogate"]["0"]["by_task"]) == 5
    picks = {name: figures["value"] for name, figures in held_out["score_of_the_pick"].items()}
    assert picks.pop("best trial") <= min(picks.values())
    assert (tmp_path / "found.md").read_text().count("###") == 4
    for name in ("surrogate", "surrogate-searches"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny")
def test_bad_input(door: Door) -> None:
    one_line(door(measure_surrogate, "--judged", "teacher-0/mpl", status=2), "teacher-0/mpl", "teacher-0/mlp")
    one_line(door(measure_surrogate, "--seeds", 1, status=2), "--seeds must be 2 or more, not 1")
    one_line(door(measure_surrogate, "--first", 33, status=2), "--budget must be 33 or more, not 32")
    one_line(door(measure_surrogate, "--parts", 1, status=2), "--parts must be 2 or more, not 1")
    one_line(door(measure_surrogate, "--proposer", "none", "--tasks", 5, status=2), "there is no file none")


@pytest.mark.usefixtures("tiny")
def test_too_few_tasks(door: Door) -> None:
    one_line(door(measure_surrogate, "--tasks", 2, status=2), "--tasks 2 leave 1 data sets to learn from, 2 are needed")
    one_line(door(measure_surrogate, "--tasks", 3, "--parts", 9, status=2), "--parts must be 3 or less", "not 9")
