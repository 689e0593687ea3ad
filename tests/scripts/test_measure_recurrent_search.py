"""The door to the learned search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.emulators import Emulators
from agents.evaluation import SPLITS
from agents.meta_features import LANDMARK_COST
from agents.proposer import Proposer
from inner_models.models import ModelSpec
from inner_models.tasks import Task, TaskDistribution
from scripts import measure_recurrent_search
from scripts.measure_recurrent_search import emulator_check, random_on
from tests.scripts.doors import Door, one_line
from tests.studied import bowl, studied

pytest.importorskip("optuna")

SIZES: dict[str, Any] = {"horizon": 2, "interval_examples": 32, "train_rows": 64, "eval_rows": 32}
STUDIED = ("digits", "wine", "breast-cancer", "diabetes")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tasks to learn on, one of each data set in turn, and two to be judged on."""
    turn = iter(range(100))
    spec = ModelSpec("mlp", 8, 1)
    monkeypatch.setattr(TaskDistribution, "sample", lambda self, rng: Task(STUDIED[next(turn) % 4], spec, **SIZES))
    judged = (Task("iris", spec, **SIZES), Task("iris", ModelSpec("linear"), **SIZES))
    monkeypatch.setitem(SPLITS, "meta-validation-small", judged)


@pytest.mark.usefixtures("tiny")
def test_learns_and_judges(door: Door, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"found.{ending}" for kind, ending in (("json", "json"), ("markdown", "md"))}
    arguments = ["--tasks", 4, "--trials", 4, "--updates", 2, "--budget", 3, "--bank", 5, "--workers", 1, "--quiet"]
    arguments += ["--split", "meta-validation-small", "--searches", "tpe", "--held-out", "--cache", tmp_path / "cache"]
    arguments += ["--learned", *measure_recurrent_search.LEARNED]
    arguments += [part for kind, file in files.items() for part in (f"--{kind}", file)]
    door(measure_recurrent_search, *arguments, "--figure", tmp_path / "a.png", "--out", tmp_path / "a.safetensors")
    found = json.loads(files["json"].read_text())
    assert found["judged"] == ["iris/mlp", "iris/linear"]
    learned = ["lstm", "lstm-without-features", "lstm-blind"]
    assert list(found["searches"]) == ["random", "tpe", "tpe from calibrated", *learned]
    for name, row in found["searches"].items():
        assert row["n"] == 4
        assert set(row) - {"landmark_cost"} == {"1", "2", "3", "test", "by_task", "n"}
        assert row["1"]["value"] <= row["2"]["value"] <= row["3"]["value"]
        assert row["3"]["ci"][0] <= row["3"]["value"] <= row["3"]["ci"][1]
        if "calibrated" in name or "lstm" in name:  # they begin with it
            assert row["1"]["value"] == pytest.approx(0.0, abs=1e-4)
    costs = [found["searches"][name]["landmark_cost"] for name in learned]
    assert costs == [LANDMARK_COST, 0.0, LANDMARK_COST]
    for name in ("random", *learned):
        assert found["held_out"][name]["1"]["value"] <= found["held_out"][name]["3"]["value"]
    assert found["held_out"]["lstm"]["1"]["value"] == 0
    assert len(found["emulators"]["quartiles"]["rank correlation"]) == 3
    assert set(found["cpu_seconds_to_learn"]) == set(learned)
    assert files["markdown"].read_text().count("| lstm-blind |") == 2
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert Proposer.load(tmp_path / "a.safetensors").names


@pytest.mark.usefixtures("tiny")
def test_bad_input(door: Door, tmp_path: Path) -> None:
    small = ["--split", "meta-validation-small", "--cache", tmp_path]
    one_line(door(measure_recurrent_search, *small, "--judged", "iris/mpl", status=2), "iris/mpl", "iris/mlp")
    one_line(door(measure_recurrent_search, *small, "--learned", "lsmt", status=2), "lsmt", "lstm")
    one_line(door(measure_recurrent_search, *small, "--seeds", 6, status=2), "--seeds must be 5 or less, not 6")
    one_line(door(measure_recurrent_search, *small, "--bank", 8, status=2), "--bank must be 32 or more, not 8")
    few = ["--tasks", 2, "--trials", 2, "--workers", 1, "--held-out", "--quiet"]
    one_line(door(measure_recurrent_search, *small, *few, status=2), "a quarter of 2 data sets", "more --tasks")


def test_the_check_tells_good_emulators_from_bad_ones() -> None:
    rng = np.random.default_rng(0)
    noise = studied(lambda places: np.exp(rng.normal(size=places.shape[:-1]) / 4))
    smooth, rough = (emulator_check([one])["quartiles"] for one in (studied(bowl(np.full(4, 0.4))), noise))
    assert smooth["rank correlation"][1] > 0.9 > 0.5 > rough["rank correlation"][1]
    assert smooth["explained variance"][1] > 0.8 > 0.2 > rough["explained variance"][1]
    assert smooth["noise"][1] < rough["noise"][1]


def test_random_search_on_emulators_is_an_expectation() -> None:
    emulators = Emulators([studied(bowl(np.full(4, center))) for center in (0.3, 0.6)])
    best = random_on(emulators, 5, searches=200)
    assert best.shape == (2, 5)
    assert (np.diff(best, axis=1) <= 0).all()
    generator = torch.Generator().manual_seed(9)
    for task in range(2):
        function = emulators.draw(torch.full((2000,), task), generator, spread=0.0)
        scores = function(torch.rand(2000, 4, generator=generator)) - function(emulators.calibrated[[task] * 2000])
        assert best[task, 0] == pytest.approx(float(scores.mean()), abs=0.06)
        assert best[task, 4] == pytest.approx(float(scores.view(400, 5).amin(dim=1).mean()), abs=0.06)
