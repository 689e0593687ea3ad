"""The whole thing in a few minutes: meta-train a small agent, apply it and the shipped policy to an unseen task."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from agents.controllers import with_policy
from agents.policy import ControlPolicy
from agents.ppo import POLICY_FILE
from agents.presets import PRESETS
from agents.tuner import pretrained_path
from inner_models.tasks import Task
from scripts import train_agent
from scripts.apply_policy import RESULT_FILE, baselines, compare
from scripts.common import Quiet, check_out, console, known, run_main, tensorboard_hint, write_config, write_json


@dataclass
class Config(Quiet):
    """Meta-train a small agent on bundled tasks, then compare it, the shipped policy and the usual baselines.

    Needs the packages of the extra `data`. Leaves the agent, result.json and TensorBoard events of both. Takes a few
    minutes on 2 cores, one to two with the preset smoke.

        python scripts/demo.py
        python scripts/demo.py --preset smoke --task wine/mlp --out runs/glance
    """

    out: Path | None = None
    """Folder for the results; runs/demo-<date>-<time> when left out."""
    task: str = "italy-power-demand/mlp"
    """The unseen task: its data set is in no split that an agent was trained or chosen on."""
    epochs: int = 20
    """Length of each run on it."""
    preset: str = "demo"
    """Preset of the meta-training."""
    seed: int = 0
    """Fixes everything."""


def main(config: Config) -> None:
    out = config.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    task = Task.named(config.task, horizon=config.epochs)
    known("preset", config.preset, list(PRESETS))
    comparison = out / "comparison"
    check_out(comparison)
    write_config(comparison, "demo", config)
    console.print("1. Meta-train an agent across many small training runs of other data sets.")
    train_agent.main(train_agent.Config(out=out / "agent", preset=config.preset, seed=config.seed))
    console.print(f"\n2. Train {task.name}, which it has never seen, once with each method.")
    methods = {
        "policy (fresh)": with_policy(ControlPolicy.load(out / "agent" / POLICY_FILE)),
        "policy (shipped)": with_policy(ControlPolicy.load(pretrained_path())),
        **baselines(),
    }
    write_json(comparison / RESULT_FILE, compare(task, methods, config.seed, "cpu", comparison))
    console.print("\n3. Curves of the agent's training and of these runs, side by side:")
    console.print(tensorboard_hint(out), soft_wrap=True)


if __name__ == "__main__":
    run_main(Config, main)
