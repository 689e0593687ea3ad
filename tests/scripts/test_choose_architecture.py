"""The door to architecture choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agents import architecture_choice
from agents.ensemble import Fit
from agents.final_loss import Curve, FinalLoss, Trained
from agents.state_file import load_state
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from scripts import choose_architecture
from tests.agents.test_architecture_choice import NAMES, TASKS, run, straight
from tests.scripts.doors import Door, one_line


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small menus, to learn from and to be judged on."""
    tasks = [Task(name, ModelSpec("mlp"), horizon=4, interval_examples=32, eval_rows=32) for name in NAMES]
    monkeypatch.setitem(architecture_choice.MENUS, "table", tuple(task.model for task in TASKS))
    monkeypatch.setattr(choose_architecture, "problems", lambda count: tasks[:count])
    sgd = Task("wine", ModelSpec("linear"), "sgd")
    again = replace(tasks[-1], horizon=2)
    monkeypatch.setattr(choose_architecture, "META_VALIDATION", (sgd, *tasks[6:], again))
    quick = FinalLoss.fit
    monkeypatch.setattr(FinalLoss, "fit", lambda trained: quick(trained, Fit(members=2, hidden=8, steps=20)))


@pytest.mark.usefixtures("tiny")
def test_learns_and_judges(door: Door, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"found.{ending}" for kind, ending in (("json", "json"), ("markdown", "md"))}
    arguments: list[object] = [part for kind, file in files.items() for part in (f"--{kind}", file)]
    arguments += ["--figure", tmp_path / "found.png", "--rule", tmp_path / "rule.safetensors"]
    arguments += ["--tasks", 5, "--trials", 1, "--seeds", 2, "--workers", 1, "--quiet", "--cache", tmp_path / "cells"]
    assert [task.horizon for task in choose_architecture._judged(choose_architecture.Config())] == [4, 4]
    door(choose_architecture, *arguments)
    found = json.loads(files["json"].read_text())
    rows = {row["way"]: row for row in found["ways"]}
    assert len(rows) == 5 + 3 + 1 + 3
    for row in rows.values():
        assert row["n"] == 4
        assert set(row["regret"]["by_dataset"]) == {"breast-cancer", "segment"}
        for name in ("regret", "test", "runs", "seconds"):
            assert row[name]["ci"][0] <= row[name]["mean"] <= row[name]["ci"][1]
        assert row["regret"]["mean"] >= 0
        assert row["seconds"]["mean"] > 0
    assert rows["train all"]["regret"]["mean"] == rows["train all"]["test"]["mean"] == 0
    assert rows["train all"]["runs"]["mean"] == 4
    at_random = [rows[f"best of {count} at random"] for count in (1, 2, 4)]
    regrets = [row["regret"]["mean"] for row in at_random]
    assert regrets[0] > regrets[1] > regrets[2] == 0
    assert [row["runs"]["mean"] for row in at_random] == [1, 2, 4]
    assert at_random[0]["normalized"]["mean"] == pytest.approx(1)
    assert 0 < at_random[1]["normalized"]["mean"] < 1
    for gain in found["gains"]:
        by = [rows[f"{gain['share']:.0%} by {name} loss go on"] for name in ("present", "predicted")]
        assert by[0]["runs"] == by[1]["runs"]
        assert gain["mean"] == pytest.approx(by[0]["regret"]["mean"] - by[1]["regret"]["mean"])
    assert [row["part"] for row in found["rank_correlations"]] == [0.125, 0.25, 0.5]
    assert found["candidates"]["segment"] == ["mlp 2 x 1", "mlp 4 x 1", "mlp 8 x 1", "mlp 16 x 1"]
    assert files["markdown"].read_text().count("\n| ") >= 2 + len(rows)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    FinalLoss.from_state_dict(load_state(tmp_path / "rule.safetensors"))


def test_costs_and_regrets_of_known_runs() -> None:
    ends = (0.4, 0.3, 0.2, 0.1)
    menu = Trained(TASKS, tuple([run(straight(3.0, end))] for end in ends))
    one = choose_architecture._at_random(1)(menu, 0)
    assert one.regret == pytest.approx(np.mean(np.log(np.array(ends) / 0.1)))
    assert (one.runs, one.seconds) == (1, 1)
    two = choose_architecture._at_random(2)(menu, 0)
    assert two.regret == pytest.approx((3 * 0 + 2 * np.log(2) + np.log(3)) / 6)
    halved = choose_architecture._raced(architecture_choice.Halving())(menu, 0)
    assert (halved.regret, halved.runs, halved.seconds) == (0, 1.5, 1.5)
    gain = choose_architecture._gain(0.5, _Reversed(), [menu])  # type: ignore[arg-type]
    assert (gain["mean"], gain["iqm"]) == pytest.approx((-np.log(4), -np.log(4)))
    ranks = choose_architecture._ranks(0.25, _Reversed(), [menu])  # type: ignore[arg-type]
    assert (ranks["present"]["mean"], ranks["predicted"]["mean"]) == pytest.approx((1, -1))


class _Reversed:
    def predict(self, tasks: object, curves: list[Curve]) -> list[float]:
        return [-curve.val[-1] for curve in curves]


def test_bad_input(door: Door) -> None:
    one_line(door(choose_architecture, "--seeds", 0, status=2), "--seeds must be 1 or more, not 0")
    one_line(door(choose_architecture, "--datasets", "satimag", status=2), "'satimag'", "'satimage'")
    one_line(door(choose_architecture, "--tasks", 0, status=2), "--tasks must be 1 or more, not 0")


@pytest.mark.usefixtures("tiny")
def test_too_few_data_sets(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--tasks", 1, "--trials", 1, "--seeds", 1, "--workers", 1, "--quiet", "--cache", tmp_path]
    one_line(door(choose_architecture, *arguments, status=2), "learned from 2 data sets or more, not 1")
