"""The door to one axis at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.evaluation import SPLITS
from agents.scale import OTHERS, Point
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from scripts import measure_scale
from tests.scripts.doors import Door, one_line

TASKS = (
    Task("digits", ModelSpec("mlp", 8, 1), horizon=2, interval_examples=32, train_rows=64, eval_rows=32),
    Task("wine", ModelSpec("mlp", 8, 1), horizon=3, interval_examples=32, train_rows=64, eval_rows=32),
)


def test_where_a_point_places_a_task() -> None:
    task = TASKS[0]
    assert Point("horizon", 9).place(task).horizon == 9
    assert Point("width", 4).place(task).model.width == 32
    assert Point("label_noise", 0.3).place(task).label_noise == 0.3
    with pytest.raises(ValueError, match="depth"):
        Point("depth", 1).place(task)


def test_measures_every_point_against_every_other(
    door: Door, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPLITS, "meta-validation", TASKS)
    arguments = ["--policy", policy, "--seeds", 2, "--cache", tmp_path / "cache", "--workers", 1]
    file = tmp_path / "figures.json"
    door(measure_scale, *arguments, "--values", 2, 4, "--json", file)
    result = json.loads(file.read_text())
    assert [(row["axis"], row["value"], row["runs"]) for row in result["rows"]] == [
        ("horizon", 2, 4),
        ("horizon", 4, 4),
    ]
    for row in result["rows"]:
        assert set(row["against"]) == set(OTHERS)
        assert 0 <= row["out_of_depth_share"] <= 1
        for against in row["against"].values():
            low, high = against["val"]["ci"]
            assert low <= against["val"]["iqm"] <= high
            assert set(against["test"]["by_task"]) == {"digits/mlp", "wine/mlp"}
    assert result["provenance"]["command"].startswith("python scripts/measure_scale.py --axis horizon --values 2 4")
    door(measure_scale, *arguments, "--axis", "width", "--values", 2, "--tasks", "wine/mlp", "--json", file)
    assert json.loads(file.read_text())["rows"][0]["runs"] == 2
    door(measure_scale, *arguments, "--axis", "start", "--values", 0.1, 1, "--json", file)
    bad, good = json.loads(file.read_text())["rows"]
    for row in (bad, good):  # what it deviates from is what was given
        assert row["against"]["base-rule"]["val"]["by_task"] == row["against"]["calibrated"]["val"]["by_task"]
    assert good["against_good_start"] == {"near": 1, "median": 1}
    assert bad["against_good_start"]["median"] != 1
    assert bad["against"]["replay"]["val"]["by_task"] != good["against"]["replay"]["val"]["by_task"]
    door(measure_scale, *arguments, "--axis", "batch_size", "--values", 16, 64, "--json", file)
    small, large = (row["against"] for row in json.loads(file.read_text())["rows"])
    assert all(small[other]["val"]["by_task"] != large[other]["val"]["by_task"] for other in OTHERS)
    one_line(door(measure_scale, *arguments, "--tasks", "wine/mpl", "--json", file, status=2), "wine/mpl", "wine/mlp")
