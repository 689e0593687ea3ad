"""The tutorial, word for word: every block, in its order. Takes about a minute and a half on a quiet core."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agents import ControlPolicy
from agents.ppo import validation_history
from agents.trajectory import Trajectory
from tests.docs.pages import DOCS, ROOT, blocks

SKIPPED = ("make install",)
"""Commands that are not run: what they would do has been done."""

TIMEOUT = 600


def beginnings(text: str) -> list[str]:
    """What the lines begin with, numbers apart: on another machine they, and so the reasons, may be others."""
    return [re.sub(r"\d+", "#", " ".join(line.split()[:3])) for line in text.splitlines()]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A folder like a clone's after all steps, the commands that were run, and all that they printed."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("agents", "hpo_env", "inner_models", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HYPERPILOT_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    run, printed = [], ""
    for block in blocks(DOCS / "tutorial.md"):
        if block.language == "python":
            (folder / block.title).write_text(block.text)
        elif block.language == "sh":
            for command in block.text.splitlines():
                if command in SKIPPED:
                    continue
                words = [sys.executable if word == ".venv/bin/python" else word for word in shlex.split(command)]
                result = subprocess.run(
                    words, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
                )
                assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr}"
                run.append(command)
                printed += result.stdout
        else:
            assert block.language == "text", block
            assert set(beginnings(block.text)) <= {*beginnings(printed), "..."}, block.text
    return folder, run, printed


def test_every_block_runs(walked: tuple[Path, list[str], str]) -> None:
    _, run, _ = walked
    scripts = {word for command in run for word in command.split() if word.endswith(".py")}
    named = ("inspect_policy", "apply_policy", "show", "train_agent", "evaluate")
    assert scripts == {"run.py", "tune.py", "resume.py", *(f"scripts/{name}.py" for name in named)}


def test_the_tuner_helps_and_a_resumed_run_is_the_uninterrupted_one(walked: tuple[Path, list[str], str]) -> None:
    _, _, printed = walked
    plain, tuned, resumed = re.findall(r"^epoch 20 .*?validation loss ([\d.]+)", printed, re.M)
    assert float(tuned) < float(plain)
    assert resumed == tuned


def test_a_run_that_is_over_says_its_loss_again(walked: tuple[Path, list[str], str]) -> None:
    folder, _, printed = walked
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "resume.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == re.findall(r"^epoch 20  validation loss.*\n", printed, re.M)[-1]


def test_the_policy_that_was_meta_trained_is_better_than_none(walked: tuple[Path, list[str], str]) -> None:
    folder, _, _ = walked
    returns = [entry["return"] for entry in validation_history(folder / "runs/tiny")]
    assert len(returns) == 4
    assert returns[-1] > returns[0]


def test_what_is_left_behind(walked: tuple[Path, list[str], str]) -> None:
    folder, _, printed = walked
    trajectory = Trajectory.load(folder / "first.json")
    assert len(trajectory.losses["val_loss"]) == len(trajectory.values["lr"]) == 20
    assert printed.count("\nbefore epoch ") == len(trajectory.decisions) == 20
    assert ControlPolicy.load(folder / "runs/tiny/policy.safetensors").header.training["preset"] == "smoke"
    for name in ("runs/first/decisions.md", "runs/iris/result.json", "runs/judged/tables.md"):
        assert (folder / name).stat().st_size
