"""The door to families: rows and probes of a tiny measurement, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inner_models.models import ModelSpec
from inner_models.tasks import Task
from scripts import measure_families
from tests.fabricated import run
from tests.scripts.doors import Door, one_line

SMALL: list[Any] = ["--members", 2, "--seeds", 2, "--epochs", 2, "--workers", 1, "--quiet"]


@pytest.fixture(autouse=True)
def parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that need no extra."""
    tasks = tuple(Task(name, ModelSpec("mlp", 8, 1)) for name in ("wine", "diabetes", "markov-text-0"))
    monkeypatch.setattr(measure_families, "META_VALIDATION", tasks)


def test_measures(door: Door, tmp_path: Path) -> None:
    json_, markdown, figure = (tmp_path / f"found.{ending}" for ending in ("json", "md", "png"))
    arguments = ["--cache", tmp_path / "cache", "--json", json_, "--markdown", markdown, "--figure", figure, *SMALL]
    door(measure_families, *arguments, "--parents", "wine", "diabetes")
    found = json.loads(json_.read_text())
    rows = {(row["kind"], row["parent"]): row for row in found["rows"]}
    kinds = ("classification", "regression", "embedding")
    assert set(rows) == {(kind, parent) for kind in kinds for parent in ("wine", "diabetes", "all")}
    for (kind, parent), row in rows.items():
        assert row["runs"] == (8 if parent == "all" else 4)
        for other in ("calibrated", "constant"):
            for loss in ("val", "test"):
                found_ = row["against"][other][loss]
                assert found_["ci"][0] <= found_["iqm"] <= found_["ci"][1]
                assert len(found_["by_member"]) == row["runs"] / 2
                parts = [rows[kind, name]["against"][other][loss]["by_member"] for name in ("wine", "diabetes")]
                assert parent != "all" or found_["by_member"] == [*parts[0], *parts[1]]
    probes = {probe["parent"]: probe for probe in found["probes"]}
    assert {parent: probe["score"] for parent, probe in probes.items()} == {"wine": "accuracy", "diabetes": "R2"}
    wine = probes["wine"]
    assert wine["mean"]["inputs"] > 0.8
    gains = np.subtract(*(wine["by_member"][name] for name in ("policy", "calibrated")))
    assert wine["gain"]["mean"] == pytest.approx(gains.mean())
    assert all(name.startswith("wine:") for name in found["provenance"]["members"]["wine, embedding"])
    assert markdown.read_text().count("| wine |") == 4
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_row_by_hand() -> None:
    """Two members whose seeds agree: the interval is that of the members."""
    tasks = tuple(Task.named("wine/mlp", horizon=horizon) for horizon in (1, 2))
    losses = {"policy": (1.0, 1.0), "calibrated": (2.0, 4.0), "constant": (0.5, 1.0)}
    runs = {
        (task, name): [replace(run(val, seed), notes={"out_of_depth": [False, name == "policy"]}) for seed in range(3)]
        for name, vals in losses.items()
        for task, val in zip(tasks, vals, strict=True)
    }
    row = measure_families._row("regression", "wine", [tasks], runs)
    calibrated, constant = (row["against"][name]["val"] for name in ("calibrated", "constant"))
    assert calibrated["by_member"] == pytest.approx(np.log([2, 4]))
    assert calibrated["iqm"] == pytest.approx(np.log(8) / 2)
    assert calibrated["ci"] == pytest.approx(np.log([2, 4]))
    assert calibrated["win_rate"] == 1
    assert constant["iqm"] == pytest.approx(-np.log(2) / 2)
    assert constant["win_rate"] == 0.25
    assert (row["runs"], row["out_of_depth_share"]) == (6, 0.5)


def test_bad_input(door: Door, tmp_path: Path) -> None:
    arguments = ["--json", tmp_path / "found.json", *SMALL]
    one_line(door(measure_families, *arguments, "--parents", "wien", status=2), "'wien'", "did you mean 'wine'")
    one_line(door(measure_families, *arguments, "--parents", "digits", status=2), "meta-validation 'digits'")
    one_line(door(measure_families, *arguments, "--parents", "markov-text-0", status=2), "is text, without features")
    one_line(door(measure_families, *arguments, "--members", 1, status=2), "--members must be 2 or more, not 1")
    one_line(door(measure_families, *arguments, "--parents", status=2), "--parents and --kinds must not be empty")
