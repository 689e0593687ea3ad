"""Calibrate what policies deviate from on meta-train and write it as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from agents.calibration import calibrate, fit_rule
from inner_models.splits import META_TRAIN
from inner_models.tasks import OptimizerName
from scripts.common import run_main

SHORTER = replace(META_TRAIN, horizons=(8, 32), examples=(2048, 32_768))
"""Meta-train with runs of moderate length: each of hundreds of configurations is trained on every task."""


@dataclass
class Config:
    """Find the one schedule that is best on average over meta-train, or the base rule, of AdamW and of SGD."""

    out: Path
    """File to write."""
    what: Literal["schedule", "rule"] = "schedule"
    """schedule: the best of random ones; rule: one for each length and size of a run, by a cross-entropy method."""
    trials: int = 32
    """Trials on each task (rule)."""
    configurations: int = 256
    """Random configurations (schedule)."""
    tasks: tuple[int, ...] = ()
    """Meta-train tasks of each round; by default 160 and 120 (rule), or 20 and 40 (schedule)."""
    seed: int = 0
    """Seed of trials and tasks."""
    workers: int = 2
    """Processes."""


def main(config: Config) -> None:
    table: dict[str, Any] = {"command": command(config)}
    for optimizer in get_args(OptimizerName):
        if config.what == "rule":
            rule, figures = fit_rule(
                optimizer,
                META_TRAIN,
                trials=config.trials,
                tasks=config.tasks or (160, 120),
                seed=config.seed,
                workers=config.workers,
            )
            table.setdefault("rules", {})[optimizer] = rule.to_dict()
            print(f"{optimizer}: {rule} {figures}")
        else:
            schedule, figures = calibrate(
                optimizer,
                SHORTER,
                configurations=config.configurations,
                tasks=(config.tasks or (20,))[0],
                seed=config.seed,
                workers=config.workers,
            )
            table.setdefault("schedules", {})[optimizer] = schedule.to_dict()
            print(f"{optimizer}: {schedule} {figures}")
        table.setdefault("figures", {})[optimizer] = figures
    config.out.write_text(json.dumps(table, indent=2) + "\n")


def command(config: Config) -> str:
    """The command line that gives this table."""
    sizes = f"--trials {config.trials}" if config.what == "rule" else f"--configurations {config.configurations}"
    tasks = f" --tasks {' '.join(map(str, config.tasks))}" if config.tasks else ""
    options = f"--what {config.what} {sizes}{tasks} --seed {config.seed} --out {config.out.name}"
    return f"python scripts/calibrate.py {options}"


if __name__ == "__main__":
    run_main(Config, main)
