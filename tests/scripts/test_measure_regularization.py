"""`scripts/measure_regularization.py` from its arguments to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inner_models.tasks import Task
from scripts import measure_regularization
from tests.scripts.doors import Door, one_line

TASKS = tuple(
    Task.named(f"{name}/mlp", horizon=2, interval_examples=48, eval_rows=48) for name in ("digits", "diabetes")
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_regularization, "META_VALIDATION", TASKS)


def test_tables_figure_and_record(door: Door, tmp_path: Path) -> None:
    arguments = ["--strengths", 0.1, 0.3, "--seeds", 2, "--workers", 1, "--cache", tmp_path / "cache"]
    files = ["--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md", "--figure", tmp_path / "figures" / "a.png"]
    door(measure_regularization, *arguments, *files)
    record = json.loads((tmp_path / "a.json").read_text())
    rows = {(row["regularizer"], row["modality"], row["strength"]): row for row in record["rows"]}
    assert {key: row["n"] for key, row in rows.items()} == {
        **{("augmentation", what, s): n for what, n in (("all", 4), ("image", 2), ("table", 2)) for s in (0.1, 0.3)},
        **{("label_smoothing", what, s): 2 for what in ("all", "image") for s in (0.1, 0.3)},
    }
    for row in rows.values():
        assert row["val"]["low"] <= row["val"]["value"] <= row["val"]["high"]
    effects = {(effect["regularizer"], effect["label"]): effect["val"] for effect in record["effects"]}
    smoothing = effects["label_smoothing", "digits/mlp"]
    wins = sum(ratio > 0 for ratio in smoothing[1]) / 2
    assert rows["label_smoothing", "all", 0.3]["wins"] == wins
    text = (tmp_path / "a.md").read_text()
    assert text.count("| **augmentation** |") == text.count("| **label smoothing** |") == 2
    assert "| diabetes/mlp | " in text
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_it_refuses(door: Door, tmp_path: Path) -> None:
    file = ["--json", tmp_path / "a.json", "--cache", tmp_path / "cache"]
    one_line(door(measure_regularization, *file, "--seeds", 1, status=2), "seeds must be at least 2, not 1")
    one_line(door(measure_regularization, *file, "--strengths", 1.5, status=2), "not 1.5")
    one_line(door(measure_regularization, *file, "--tasks", 0, status=2), "--tasks must be 1 or more, not 0")
    assert not (tmp_path / "a.json").exists()
