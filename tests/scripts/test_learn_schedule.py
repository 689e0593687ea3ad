"""The door to learned schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.evaluation import SPLITS
from inner_models.models import ModelSpec
from inner_models.splits import META_TRAIN_SMALL
from inner_models.tasks import Task, TaskDistribution
from scripts import learn_schedule
from tests.scripts.doors import Door, one_line

SIZES: dict[str, Any] = {"horizon": 2, "interval_examples": 32, "train_rows": 64, "eval_rows": 32}
TASKS = tuple(Task(name, ModelSpec("mlp", 8, 1), **SIZES) for name in ("digits", "wine"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tasks to learn on and to be judged on; one of those is of an optimizer that nothing is learned for."""
    monkeypatch.setattr(TaskDistribution, "sample", lambda self, rng: {META_TRAIN_SMALL: TASKS[1]}[self])
    sgd = Task("digits", ModelSpec("mlp", 8, 1), "sgd", **SIZES)
    monkeypatch.setitem(SPLITS, "meta-validation-small", (*TASKS, sgd))


@pytest.mark.usefixtures("tiny")
def test_learns_and_judges(door: Door, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"found.{ending}" for kind, ending in (("json", "json"), ("markdown", "md"))}
    arguments = ["--updates", 2, "--adapt", 3, "--replicas", 2, "--seeds", 2, "--workers", 1, "--quiet"]
    arguments += [part for kind, file in files.items() for part in (f"--{kind}", file)]
    door(learn_schedule, *arguments, "--unroll", 1, "whole", "--figure", tmp_path / "found.png")
    found = json.loads(files["json"].read_text())
    assert found["tasks"] == ["digits/mlp", "wine/mlp"]
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == [
        "AdamW's defaults, constant",
        "K = 1",
        "whole run",
        "whole run, momentum too",
        "whole run, 3 steps on the task",
        "best of 6 random trials",
    ]
    for row in rows.values():
        assert row["n"] == 4
        for kind in ("val", "test"):
            assert row[kind]["ci"][0] <= row[kind]["iqm"] <= row[kind]["ci"][1]
            assert set(row[kind]["by_task"]) == {"digits/mlp", "wine/mlp"}
    assert rows["K = 1"]["inner_steps"] == 2 * 2 * 4  # updates, replicas, steps of a run
    assert rows["K = 1"]["schedule"] != rows["whole run"]["schedule"]
    assert rows["whole run"]["schedule"]["momentum"] == pytest.approx([0.9] * 6)
    assert rows["whole run, momentum too"]["schedule"]["momentum"] != pytest.approx([0.9] * 6, abs=1e-4)
    adapted = rows["whole run, 3 steps on the task"]
    assert adapted["runs on the task"] == 6
    assert adapted["schedules"][0] != adapted["schedules"][1]
    assert files["markdown"].read_text().count("\n") == 4 + len(rows)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny")
def test_bad_input(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    one_line(door(learn_schedule, "--unroll", 0, status=2), "--unroll takes numbers of steps from 1 on", "'0'")
    one_line(door(learn_schedule, "--tasks", "digits/mpl", status=2), "digits/mpl", "digits/mlp")
    one_line(door(learn_schedule, "--seeds", 1, status=2), "--seeds must be 2 or more")
    quick = ["--updates", 1, "--unroll", "whole", "--workers", 1]
    one_line(door(learn_schedule, *quick, "--memory", 1e-9, "--quiet", status=2), "windows of 4 steps take at least")
    monkeypatch.setitem(SPLITS, "meta-validation-small", (Task("gun-point", ModelSpec("gru", 16, 1), **SIZES),))
    one_line(door(learn_schedule, status=2), "gun-point/gru cannot be unrolled")
