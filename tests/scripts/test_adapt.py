"""`train_agent.py --adapt`: what it leaves, and one clear line with exit 2 for bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agents.policy import ControlPolicy, PolicyHeader
from agents.policy_file import to_bytes
from hpo_env.base_schedules import calibrated_rule
from inner_models.splits import META_VALIDATION
from scripts import measure_adaptation, train_agent
from tests.scripts.doors import Door, one_line
from tests.tiny import random_policy


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path, own = tmp_path / "policy.safetensors", random_policy()
    rules = {kind: calibrated_rule(kind).to_dict() for kind in ("adamw", "sgd")}
    own.header = replace(own.header, base_rules=rules)
    own.save(path)
    return path


def arguments(policy: Path, out: Path, *more: object, task: str = "wine/mlp") -> Sequence[object]:
    return ["--adapt", policy, "--task", task, "--epochs", 2, "--episodes", 10, "--out", out, *more]


def test_it_leaves_a_policy_and_its_history(
    door: Door, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, history = tmp_path / "out", tmp_path / "history.json"
    door(train_agent, *arguments(policy, out, "--json", history, "--seed", 2))
    record = ControlPolicy.load(out / "policy.safetensors").header.training["adaptations"][0]
    command = (
        "python scripts/train_agent.py --adapt policy.safetensors --task wine/mlp --episodes 10 --epochs 2 --seed 2 "
        "--device cpu --out out"
    )
    assert (record["command"], record["episodes"], record["seed"]) == (command, 16, 2)
    assert [entry["episodes"] for entry in json.loads(history.read_text())["history"]] == [8, 16]
    one_line(door(train_agent, *arguments(policy, out), status=2), "already holds a run", "--out")


def test_bad_input(door: Door, policy: Path, tmp_path: Path) -> None:
    def refused(*given: object) -> str:
        return door(train_agent, *given, status=2)

    out = tmp_path / "out"
    one_line(refused(*arguments(policy, out, task="wne/mlp")), "'wne'", "'wine'")
    one_line(refused(*arguments(policy, out, task="wine/cnn")), "cnn", "table")
    one_line(refused(*arguments(policy, out, "--episodes", 0)), "episodes must be at least 2, not 0")
    one_line(refused(*arguments(policy, out, "--resume")), "--resume")
    one_line(refused(*arguments(policy, out, "--preset", "smoke")), "--preset")
    one_line(refused(*arguments(policy, out, "--device", "cdua")), "'cuda'")
    one_line(refused("--adapt", policy, "--out", out), "--adapt and --task")
    one_line(refused("--task", "wine/mlp", "--out", out), "--adapt and --task")
    one_line(refused(*arguments(tmp_path / "none.safetensors", out)), "no policy file at", "none.safetensors")
    one_line(refused(*arguments(policy, out, "--epochs", 65)), "at most 64 epochs")
    assert not (out / "config.json").exists()


def test_a_policy_of_other_features_or_controls(door: Door, tmp_path: Path) -> None:
    for name in ("features", "controls"):
        header = PolicyHeader(hidden=(4,), base_rules={}, **{name: ("lr",)})  # type: ignore[arg-type]
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(to_bytes(header, ControlPolicy(header).state_dict()))
        text = door(train_agent, *arguments(path, tmp_path / "out"), status=2)
        one_line(text, f"{name}.safetensors was made for other {name}", "train anew")


def test_what_it_gains_is_measured(door: Door, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(META_VALIDATION[2], horizon=2, interval_examples=64, train_rows=64, eval_rows=64)
    monkeypatch.setattr(measure_adaptation, "META_VALIDATION", (task,))
    file, table, figure = (tmp_path / name for name in ("figures.json", "table.md", "figure.png"))
    door(
        measure_adaptation, "--json", file, "--markdown", table, "--figure", figure, "--policy", policy,
        "--tasks", "concrete/mlp", "--episodes", 2, 4, "--seeds", 2, "--others", 4,
    )  # fmt: skip
    rows = json.loads(file.read_text())["rows"]
    assert [(row["task"], row["episodes"], row["runs"]) for row in rows] == [("concrete/mlp", n, 4) for n in (2, 4)]
    for row in rows:
        for kind in ("val", "test"):
            assert row[kind]["gain"] == pytest.approx(sum(row[kind]["by_adaptation"]) / 2)
            assert row[kind]["ci"][0] <= row[kind]["gain"] <= row[kind]["ci"][1]
    assert rows[0]["seeds_to_choose_from"] == 3
    assert rows[1]["val"]["best_of_seeds"] >= rows[0]["val"]["best_of_seeds"] >= 0
    assert figure.stat().st_size > 10_000
    assert len(table.read_text().splitlines()) == 6
    one_line(door(measure_adaptation, "--json", file, "--tasks", "concret/mlp", status=2), "'concrete/mlp'")
