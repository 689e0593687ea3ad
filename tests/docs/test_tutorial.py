"""The tutorial, word for word: every block, in its order. Takes about a minute and a half on a quiet core."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

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


def walk(folder: Path) -> tuple[list[str], str]:
    """Take all steps in a folder that is made like a clone's: the commands that were run, and all that they printed."""
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
    return run, printed


def test_the_tutorial(tmp_path: Path) -> None:
    """In one test, as every process that runs tests would have to walk through it anew."""
    run, printed = walk(tmp_path)
    scripts = {word for command in run for word in command.split() if word.endswith(".py")}
    named = ("inspect_policy", "apply_policy", "show", "train_agent", "evaluate")
    assert scripts == {"run.py", "tune.py", "resume.py", *(f"scripts/{name}.py" for name in named)}

    # The tuner helps, and a resumed run is the uninterrupted one.
    plain, tuned, resumed = re.findall(r"^epoch 20 .*?validation loss ([\d.]+)", printed, re.M)
    assert float(tuned) < float(plain)
    assert resumed == tuned

    # A run that is over says its loss again.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "resume.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == re.findall(r"^epoch 20  validation loss.*\n", printed, re.M)[-1]

    # The policy that was meta-trained is better than none.
    returns = [entry["return"] for entry in validation_history(tmp_path / "runs/tiny")]
    assert len(returns) == 4
    assert returns[-1] > returns[0]
    header = ControlPolicy.load(tmp_path / "runs/tiny/policy.safetensors").header
    assert header.scores["mean_return"] >= returns[0]
    assert header.training["preset"] == "smoke"

    # What is left behind.
    trajectory = Trajectory.load(tmp_path / "first.json")
    assert len(trajectory.losses["val_loss"]) == len(trajectory.values["lr"]) == 20
    assert printed.count("\nbefore epoch ") == len(trajectory.decisions) == 20
    for name in ("runs/first/decisions.md", "runs/iris/result.json", "runs/judged/tables.md"):
        assert (tmp_path / name).stat().st_size
