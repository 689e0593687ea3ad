"""The door to why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agents import policy_file
from agents.evaluation import SPLITS
from agents.policy import ControlPolicy
from agents.trajectory import Trajectory
from agents.tuner import Tuner
from hpo_env.observations import FEATURES
from scripts import inspect_policy
from scripts.reporting.inspection_plots import decisions, largest_moves
from tests.agents.test_inspection import TASKS
from tests.linear import linear_policy
from tests.scripts.doors import Door, one_line
from tests.tiny import random_policy
from tests.user_runs import ROWS, Loop


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """One that looks at two things."""
    path = tmp_path / "policy.safetensors"
    linear_policy({"val_since_start": {"lr": 1.0}, "progress": {"weight_decay": 0.5}}).save(path)
    return path


@pytest.fixture
def run(tmp_path: Path, policy: Path) -> Path:
    """The trajectory of a user's run of four epochs with that policy, in a folder of a run's folder."""
    loop = Loop()
    tuner = Tuner.load(policy, loop.optimizer, model=loop.model, total_epochs=4, examples_per_epoch=ROWS)
    for epoch in range(4):
        train_loss, val_loss = loop.epoch(epoch)
        tuner.step(train_loss=train_loss, val_loss=val_loss)
    tuner.close()
    folder = tmp_path / "run"
    tuner.trajectory.save(folder / "policy" / "trajectory.json")
    return folder


def test_an_inspection_leaves_tables_figures_and_numbers(
    door: Door, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPLITS, "meta-validation", TASKS)
    out, file = tmp_path / "out", tmp_path / "figures.json"
    arguments = ["--policy", policy, "--budget", "quick", "--cache", tmp_path / "cache", "--workers", 1]
    door(inspect_policy, *arguments, "--out", out, "--json", file)
    for name in ("responses.png", "importance.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    result = json.loads(file.read_text())
    assert list(result["features"]) == ["val_since_start"]
    assert result["features"]["val_since_start"]["by_control"]["lr"] > 0
    assert set(result["responses"]) == {"val_since_start", "progress"}
    assert len(result["blind"]) == len(FEATURES) - 2
    assert result["seeds"] == 2
    tables = (out / "inspection.md").read_text()
    assert "| validation since start |" in tables
    assert "Blind to" in tables
    assert json.loads((out / "config.json").read_text())["script"] == "inspect_policy"
    one_line(door(inspect_policy, *arguments, "--out", out, status=2), "already holds a run")


def test_a_run_is_told_decision_by_decision(door: Door, policy: Path, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "told.json"
    door(inspect_policy, "--policy", policy, "--run", run, "--out", tmp_path / "out", "--json", file)
    trajectory = Trajectory.load(run / "policy" / "trajectory.json")
    result = json.loads(file.read_text())
    assert result["same_policy"]
    assert [told["epoch"] for told in result["decisions"]] == [1, 2, 3, 4]
    assert [told["reason"] for told in result["decisions"]] == [d["reason"] for d in trajectory.decisions]
    lines = (tmp_path / "out" / "decisions.md").read_text().splitlines()
    assert lines[0].startswith("### Decisions in a run of 4 epochs, AdamW")
    rows = [line for line in lines if line.startswith("| ") and line[2].isdigit()]
    for row, decision in zip(rows, trajectory.decisions, strict=True):
        assert row.endswith(f"| {decision['reason']} |")
    losses = trajectory.losses["val_loss"]
    assert [row.split(" | ")[1] for row in rows] == ["", *(f"{loss:.4f}" for loss in losses[:3])]
    assert "% of the run done" in rows[3]  # what the policy's weight decay follows
    assert (tmp_path / "out" / "decisions.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_another_policy_is_said_to_be_one(door: Door, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    random_policy().save(other)
    file = tmp_path / "told.json"
    door(inspect_policy, "--policy", other, "--run", run / "policy", "--out", tmp_path / "out", "--json", file)
    assert not json.loads(file.read_text())["same_policy"]
    assert (tmp_path / "out" / "decisions.md").read_text().startswith("This run was done with another policy")


def test_figures_have_words_for_the_start_the_guard_and_the_largest_moves(run: Path) -> None:
    trajectory = Trajectory.load(run / "policy" / "trajectory.json")
    start = trajectory.decisions[0]
    quiet, large = ({**start, "epoch": 1 + n, "action": [0.01 * n, 0.0, 0.0, 0.9]} for n in (0, 1))
    moves = [{**start, "epoch": 3 + n, "action": [0.1 + 0.1 * n, 1.0, 0.0, 0.0]} for n in range(4)]
    guarded = {**start, "epoch": 9, "guard": "val_loss not finite", "action": [0.0] * 4}
    trajectory.decisions[:] = [start, quiet, large, *moves, guarded]
    kept = [decision["epoch"] for decision in largest_moves(trajectory)]
    assert "batch_size" not in start["hyperparameters"]
    assert kept == [0, 1, 2, 5, 6, 9]


def test_the_figure_of_a_run_counts_epochs_and_shows_its_marks(run: Path) -> None:
    pytest.importorskip("matplotlib")
    trajectory = Trajectory.load(run / "policy" / "trajectory.json")
    figure = decisions(trajectory)
    figure.draw_without_rendering()
    assert [float(tick) for tick in figure.axes[-1].get_xticks() if 1 <= tick <= 4] == [1, 2, 3, 4]
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == ["1", "2", "3", "4"]
    for axes in figure.axes:
        at = [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
        marks = [line for line, epochs in zip(axes.lines, at, strict=True) if len(epochs) == 2]
        assert [epochs for epochs in at if len(epochs) == 2] == [[0.5] * 2, [1.5] * 2, [2.5] * 2, [3.5] * 2]
        assert all(axes.xaxis.get_zorder() < mark.get_zorder() < 2 for mark in marks)  # the grid, and the curves
    assert "the guard stepped in, and the policy's largest actions" in figure.get_suptitle()


def test_bad_input_is_one_line(door: Door, run: Path, policy: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    missing = tmp_path / "missing"
    told = door(inspect_policy, "--run", missing, *out, status=2)
    assert told == f"error: no run folder or trajectory file {missing}\n"
    for wrong, right in (("rnu", run), ("run/polic", run / "policy"), ("run/policy/trajectry.json", None)):
        meant = right or run / "policy" / "trajectory.json"
        told = door(inspect_policy, "--run", tmp_path / wrong, *out, status=2)
        one_line(told, f"no run folder or trajectory file {tmp_path / wrong}; did you mean {meant}?")
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line(door(inspect_policy, "--run", empty, *out, status=2), str(empty), "trajectory.json")
    (empty / "trajectory.json").write_text("{}")
    one_line(door(inspect_policy, "--run", empty, *out, status=2), "trajectory.json", "cannot be used")
    (run / "trajectory.json").write_bytes((run / "policy" / "trajectory.json").read_bytes())
    one_line(door(inspect_policy, "--run", run, *out, status=2), "2 runs")
    one_line(door(inspect_policy, "--policy", missing, *out, status=2), "no policy file")
    made = ControlPolicy.load(policy)
    foreign = replace(made.header, features=made.header.features[::-1])
    (tmp_path / "foreign.safetensors").write_bytes(policy_file.to_bytes(foreign, made.state_dict()))
    one_line(door(inspect_policy, "--policy", tmp_path / "foreign.safetensors", *out, status=2), "other features")
    assert not (tmp_path / "out" / "config.json").exists()
