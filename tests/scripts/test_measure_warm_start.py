"""The door to the warm start's figures, and what they are figures of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.evaluation import SPLITS
from agents.warm_start import METRICS
from inner_models.models import ModelSpec
from inner_models.tasks import Task, TaskDistribution
from scripts import measure_warm_start
from tests.scripts.doors import Door, one_line

SIZES: dict[str, Any] = {"horizon": 2, "interval_examples": 32, "train_rows": 64, "eval_rows": 32}
NAMES = ("wine", "breast-cancer", "diabetes", "iris")
JUDGED = (Task("digits", ModelSpec("mlp", 8, 1), **SIZES), Task("vowel", ModelSpec("linear"), **SIZES))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tasks to study, two on each of four data sets, and two that are judged."""
    drawn = iter(range(1000))

    def sample(distribution: TaskDistribution, rng: np.random.Generator) -> Task:
        number = next(drawn)
        return Task(NAMES[number % 4], ModelSpec("mlp", 8 + number // 4 % 2, 1), **SIZES)

    monkeypatch.setattr(TaskDistribution, "sample", sample)
    monkeypatch.setitem(SPLITS, "meta-validation", JUDGED)


QUICK = ["--tasks", 8, "--trials", 4, "--neighbours", 2, "--folds", 2, "--seeds", 2, "--bank", 4, "--workers", 1]


@pytest.mark.usefixtures("tiny")
def test_studies_and_judges(door: Door, tmp_path: Path) -> None:
    json_, markdown, figure = (tmp_path / f"found.{ending}" for ending in ("json", "md", "png"))
    files = ["--json", json_, "--markdown", markdown, "--figure", figure, "--cache", tmp_path / "cache"]
    door(measure_warm_start, *QUICK, *files, "--quiet")
    found = json.loads(json_.read_text())
    assert found["judged"] == ["digits/mlp", "vowel/linear"]
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows) == [
        "a random trial, expected",
        "calibrated",
        "base rule",
        *(f"warm start, {metric}" for metric in METRICS),
        "policy",
        "policy, begins with the warm start",
    ]
    for row in rows.values():
        assert row["n"] == 4
        for part in ("normalized_regret", "val", "test"):
            assert row[part]["ci"][0] <= row[part]["value"] <= row[part]["ci"][1]
            assert set(row[part]["by_task"]) == set(found["judged"])
    assert rows["a random trial, expected"]["normalized_regret"]["value"] == pytest.approx(1)
    assert rows["calibrated"]["val"]["by_task"] == {"digits/mlp": 0, "vowel/linear": 0}
    assert rows["policy"]["val"] != rows["policy, begins with the warm start"]["val"]
    for metric in METRICS:
        assert list(found["neighbours"][metric]) == ["1", "2", "4"]
        assert set(found["rank_correlation"][metric]) == {"meta-validation", "meta-train, held out"}
    assert found["settings"]["neighbours"] == 2
    assert markdown.read_text().count("warm start, ") == len(METRICS)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny")
def test_bad_input(door: Door, tmp_path: Path) -> None:
    cache = ["--cache", tmp_path]
    one_line(door(measure_warm_start, *cache, "--judge", "digits/mpl", status=2), "'digits/mpl'", "'digits/mlp'")
    one_line(door(measure_warm_start, *cache, "--folds", 1, status=2), "--folds must be 2 or more, not 1")
    quick = [*QUICK, *cache, "--quiet"]
    one_line(door(measure_warm_start, *quick, "--trials", 1, status=2), "--trials must be 2 or more, not 1")
    one_line(door(measure_warm_start, *quick, "--neighbours", 9, status=2), "neighbours must lie in 1..8, not 9")
    one_line(door(measure_warm_start, *quick, "--folds", 5, status=2), "5 folds need as many data sets, not 4")
