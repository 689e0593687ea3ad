"""Calibrate what policies deviate from on meta-train and write it as JSON."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from agents.calibration import calibrate, fit_rule
from inner_models.splits import META_TRAIN
from inner_models.tasks import OptimizerName
from scripts.common import Quiet, console, progress_bar, run_main, write_json

SHORTER = replace(META_TRAIN, horizons=(8, 32), examples=(2048, 32_768))
"""Meta-train with runs of moderate length: each of hundreds of configurations is trained on every task."""


@dataclass
class Config(Quiet):
    """Find the one schedule that is best on average over meta-train, or the base rule, of AdamW and of SGD.

    Needs the packages of the extra `data`. Leaves a JSON file in the form of hpo_env/base_schedule.json or
    hpo_env/base_rule.json. Takes hours with the default numbers, the second example under a minute.

        python scripts/calibrate.py --out runs/schedule.json
        python scripts/calibrate.py --what rule --trials 8 --tasks 8 --out runs/rule.json
    """

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
    kinds = get_args(OptimizerName)
    tasks = config.tasks or ((160, 120) if config.what == "rule" else (20,))
    total = len(kinds) * (sum(tasks) if config.what == "rule" else 3 * tasks[0])
    common: dict[str, Any] = {"seed": config.seed, "workers": config.workers}
    with progress_bar("calibrating", total) as update:
        done = itertools.count(1)
        common["report"] = lambda remark: update(next(done), remark)
        for optimizer in kinds:
            if config.what == "rule":
                rule, figures = fit_rule(optimizer, META_TRAIN, trials=config.trials, tasks=tasks, **common)
                table.setdefault("rules", {})[optimizer] = rule.to_dict()
            else:
                schedule, figures = calibrate(
                    optimizer, SHORTER, configurations=config.configurations, tasks=tasks[0], **common
                )
                table.setdefault("schedules", {})[optimizer] = schedule.to_dict()
            table.setdefault("figures", {})[optimizer] = figures
    for optimizer, found in table["rules" if config.what == "rule" else "schedules"].items():
        console.print(f"{optimizer}: {found} {table['figures'][optimizer]}", soft_wrap=True)
    write_json(config.out, table)


def command(config: Config) -> str:
    """The command line that gives this table."""
    sizes = f"--trials {config.trials}" if config.what == "rule" else f"--configurations {config.configurations}"
    tasks = f" --tasks {' '.join(map(str, config.tasks))}" if config.tasks else ""
    options = f"--what {config.what} {sizes}{tasks} --seed {config.seed} --out {config.out.name}"
    return f"python scripts/calibrate.py {options}"


if __name__ == "__main__":
    run_main(Config, main)
