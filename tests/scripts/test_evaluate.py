"""The judge's door: what it leaves behind, that nothing is run twice, and one clear line for bad input."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import evaluation
from agents.cells import Cell, Store
from agents.ensemble import Fit
from agents.evaluation import Budget
from agents.hypergradient_schedule import LearnedSchedule
from agents.meta_dataset import study
from agents.proposer import Config as Learning
from agents.proposer import Proposer
from agents.schedules import Constant, Cosine
from agents.state_file import save_state
from agents.surrogate import Surrogate
from agents.warm_start import WarmStart
from inner_models.tasks import Task
from scripts import evaluate
from tests.scripts.doors import Door, one_line
from tests.tiny import random_policy

optuna = pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

TASKS = (
    Task.named("wine/mlp", horizon=3, interval_examples=48),
    Task.named("digits/linear", horizon=4, interval_examples=32, train_rows=64, eval_rows=64, optimizer="sgd"),
)
KEYS = {
    "rse_median", "rse_by_task", "rse_calibrated_by_task", "speedup_iqm", "val_log_ratio_iqm", "val_log_ratio_ci",
    "test_log_ratio_iqm", "win_rate", "worst_decile", "bad_start_failures", "replay_log_ratio_ci",
    "replay_same_task_log_ratio_ci", "shuffled_log_ratio_ci",
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYPERPILOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(evaluation.SPLITS, "meta-validation", TASKS)
    monkeypatch.setattr(evaluation, "BASELINES", {"calibrated": Cosine("calibrated"), "constant": Constant()})
    budget = Budget(seeds=2, bank=6, multiples=(0.5, 1.0), searches=("tpe",), search_cost=4, search_seeds=2)
    monkeypatch.setitem(evaluation.BUDGETS, "full", budget)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take most of the time."""
    monkeypatch.setattr(evaluate, "figures", lambda *_: {})


def judge(door: Door, policy: Path, out: Path, *arguments: object, status: int = 0) -> str:
    own = ("--policy", policy, "--budget", "full", "--workers", 1, "--out", out)
    return door(evaluate, *own, *arguments, status=status)


def test_what_it_leaves_behind(door: Door, policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    judge(door, policy, out, "--json", tmp_path / "x.json", "--markdown", tmp_path / "x.md")
    result = json.loads((tmp_path / "x.json").read_text())
    assert result == json.loads((out / "result.json").read_text())
    assert set(result) == {"tasks", "summary", "provenance"}
    assert set(result["summary"]) >= KEYS
    assert set(result["summary"]["bad_start_failures"]) >= {"policy", "calibrated"}
    assert list(result["tasks"]) == ["wine/mlp", "digits/linear/sgd"] == list(result["summary"]["rse_by_task"])
    command = result["provenance"]["command"]
    assert command.startswith("python scripts/evaluate.py --split meta-validation --budget full")
    assert command.endswith(" --json x.json --markdown x.md --policy policy.safetensors --out runs/evaluation")
    assert str(tmp_path) not in (tmp_path / "x.json").read_text() + (tmp_path / "x.md").read_text()
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = {row["method"] for row in rows}
    assert {"policy", "calibrated", "constant", "shuffled", "replay-other-tasks", "lr-only"} <= methods
    assert len(rows) >= len(methods) * len(TASKS) * 2
    assert "shuffled" in (tmp_path / "x.md").read_text()
    for picture in (out / "figures").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "figures").iterdir())) >= 4
    events = EventAccumulator(str(out / "tensorboard" / "policy"))
    events.Reload()
    assert [event.step for event in events.Scalars("wine-mlp/val_loss")] == [1, 2, 3]
    studies = optuna.get_all_study_names(f"sqlite:///{out / 'studies.db'}")
    named = {(*name.rsplit("/", 3)[:2], name.rsplit("/", 1)[1]) for name in studies}
    assert named == {(task, "tpe", f"seed{seed}") for task in result["tasks"] for seed in (0, 1)}


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_run_twice(door: Door, policy: Path, tmp_path: Path, computed: list[Cell]) -> None:
    judge(door, policy, tmp_path / "a")
    assert len({cell.key for cell in computed}) == len(computed) > 0
    first = json.loads((tmp_path / "a" / "result.json").read_text())
    computed.clear()
    judge(door, policy, tmp_path / "b")
    assert computed == []
    second = json.loads((tmp_path / "b" / "result.json").read_text())
    assert first["summary"] == second["summary"]
    other = tmp_path / "other.safetensors"
    random_policy(seed=9).save(other)
    judge(door, other, tmp_path / "c")
    assert {type(cell.method).__name__ for cell in computed} == {"WithPolicy", "Replay"}


def saved(folder: Path) -> list[Path]:
    """A file of each kind that was learned on a few runs, with both optimizers but for the schedule."""
    tasks = [replace(one, dataset=name) for one in TASKS for name in ("digits", "vowel", "vehicle", "wine", "segment")]
    studied = study(tasks, 4, Store(folder / "cache"), workers=1)
    WarmStart.fit(studied, neighbours=2).save(folder / "a.safetensors")
    Surrogate.fit(studied, Fit(steps=2)).save(folder / "b.safetensors")
    Proposer.fit(studied, Learning(hidden=8, trials=2, updates=1, batch=2)).save(folder / "c.safetensors")
    save_state(folder / "d.safetensors", LearnedSchedule.untrained().state_dict())
    return [folder / f"{name}.safetensors" for name in "abcd"]


def test_what_was_learned_stands_beside_the_policy(door: Door, policy: Path, tmp_path: Path) -> None:
    files = saved(tmp_path)
    judge(door, policy, tmp_path / "out", "--tasks", "wine", "--learned", *files)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    one_trial = {"warm-start", "surrogate", "learned-schedule"}
    assert one_trial <= set(result["summary"]["against"])
    assert set(result["summary"]["against_searches"]) == {"random", "tpe", "recurrent-search"}
    assert list(result["summary"]["against_searches"]["recurrent-search"])[-1] == "4"  # 3 trials and the landmarks
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert all(f"- `{name}`: " in tables for name in (*one_trial, "recurrent-search"))
    studies = optuna.get_all_study_names(f"sqlite:///{tmp_path / 'out' / 'studies.db'}")
    assert sum("recurrent-search" in name for name in studies) == 2
    told = judge(door, policy, tmp_path / "no", "--learned", files[3], status=2)
    one_line(told, "learned for adamw, and means nothing to sgd")
    told = judge(door, policy, tmp_path / "no", "--learned", files[0], files[0], status=2)
    one_line(told, "a.safetensors is a second warm-start")
    told = judge(door, policy, tmp_path / "no", "--learned", tmp_path / "none.safetensors", status=2)
    one_line(told, "there is no file", "none.safetensors")
    save_state(tmp_path / "e.safetensors", {"kind": "surrogate", "names": []})
    told = judge(door, policy, tmp_path / "no", "--learned", tmp_path / "e.safetensors", status=2)
    one_line(told, "e.safetensors holds no surrogate that this version can read")
    told = judge(door, policy, tmp_path / "no", "--learned", policy, status=2)
    one_line(told, "policy.safetensors is damaged: it has no checksum")
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("undrawn")
def test_it_goes_on_after_an_interruption(
    door: Door, policy: Path, tmp_path: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Cell.compute

    def interrupted(cell: Cell, device: str) -> Any:
        if len(computed) == 7:
            raise KeyboardInterrupt
        return counted(cell, device)

    monkeypatch.setattr(Cell, "compute", interrupted)
    assert "interrupted" in judge(door, policy, tmp_path / "a", status=130)
    monkeypatch.setattr(Cell, "compute", counted)
    judge(door, policy, tmp_path / "a")
    assert len({cell.key for cell in computed}) == len(computed)


@pytest.mark.usefixtures("undrawn")
def test_longer_runs_of_larger_models(door: Door, policy: Path, tmp_path: Path, computed: list[Cell]) -> None:
    scale = ("--horizon-factor", 2, "--width-factor", 2)
    judge(door, policy, tmp_path / "a", "--tasks", "wine", "wine/mlp", *scale)  # the same task, named twice
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["tasks"]["wine/mlp"]["horizon"] == 6
    assert {cell.task.model.width for cell in computed} == {2 * TASKS[0].model.width}
    assert "--horizon-factor 2" in result["provenance"]["command"]
    assert result["summary"]["replay_log_ratio_ci"] is None  # there is no other task


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--seeds", "1"], ["seeds", "1"]),
        (["--bank", "1"], ["bank", "1"]),
        (["--device", "cdua"], ["'cdua'", "'cuda'"]),
        (["--tasks", "wnie/mlp"], ["'wnie'", "'wine'"]),
        (["--horizon-factor", "0"], ["horizon-factor", "0"]),
        (["--width-factor", "nan"], ["width-factor", "nan"]),
        (["--workers", "0"], ["workers", "0"]),
        (["--search-seeds", "3"], ["search_seeds", "3"]),
    ],
)
def test_bad_input(door: Door, policy: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    one_line(judge(door, policy, tmp_path / "out", *arguments, status=2), *parts)
    assert not (tmp_path / "out").exists()


def test_a_cache_that_is_a_file(door: Door, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one_line(judge(door, policy, tmp_path / "out", "--cache", tmp_path / "file", status=2), str(tmp_path / "file"))


def test_a_folder_that_holds_a_run(door: Door, policy: Path, tmp_path: Path, computed: list[Cell]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    one_line(judge(door, policy, tmp_path / "out", status=2), "out", "already holds a run")
    assert computed == []


def test_a_missing_package_is_noticed_at_once(
    door: Door, policy: Path, tmp_path: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cmaes", None)
    one_line(judge(door, policy, tmp_path / "out", status=2), "cmaes", "pip install 'hyperpilot[compare]'")
    assert computed == []
