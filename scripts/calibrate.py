"""Calibrate the base schedule on meta-train and write it as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from agents.calibration import calibrate
from inner_models.splits import META_TRAIN
from inner_models.tasks import OptimizerName
from scripts.common import run_main

SHORTER = replace(META_TRAIN, horizons=(8, 32), interval_examples=(256, 1024))
"""Meta-train with runs of moderate length: each of hundreds of configurations is trained on every task."""


@dataclass
class Config:
    """Find the AdamW and SGD schedules that are best on average over meta-train, by random search."""

    out: Path
    """File to write."""
    configurations: int = 256
    """Random configurations for each optimizer."""
    tasks: int = 20
    """Meta-train tasks of the first round; the finalists meet twice as many fresh ones."""
    seed: int = 0
    """Seed of configurations and tasks."""
    workers: int = 2
    """Processes."""


def main(config: Config) -> None:
    schedules, figures = {}, {}
    for optimizer in get_args(OptimizerName):
        schedule, found = calibrate(
            optimizer,
            SHORTER,
            configurations=config.configurations,
            tasks=config.tasks,
            seed=config.seed,
            workers=config.workers,
        )
        schedules[optimizer], figures[optimizer] = schedule.to_dict(), found
        print(f"{optimizer}: {schedule} {found}")
    command = (
        f"python scripts/calibrate.py --configurations {config.configurations} --tasks {config.tasks} "
        f"--seed {config.seed} --out hpo_env/base_schedule.json"
    )
    table = {"command": command, "schedules": schedules, "figures": figures}
    config.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    run_main(Config, main)
