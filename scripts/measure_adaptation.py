"""What adapting a policy to its task gains over attaching it as it is, and what the same runs would have bought."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.adaptation import Settings, adapt
from agents.application import Run, train_cohort
from agents.controllers import WithPolicy
from agents.evaluation import chosen, labels
from agents.measures import expected_at_best, expected_best, log_ratio, mean, trials_to_reach, win_rate
from agents.optional import require
from agents.policy import ControlPolicy
from agents.provenance import provenance
from agents.summary import losses
from agents.tuner import pretrained_path
from hpo_env.hyperparameters import Array
from inner_models.splits import META_VALIDATION
from inner_models.tasks import Task
from scripts.common import Quiet, at_least, progress_bar, run_main, write_json
from scripts.reporting.sheet import Sheet, present, with_ends

FRESH = 2_000_000
"""First seed of the runs that are judged: no adaptation and no other evaluation has trained with it."""


@dataclass
class Config(Quiet):
    """Adapt a policy to tasks of meta-validation, and judge it on fresh seeds, paired, against itself as it was.

    The same number of runs, one more included, could have gone into further seeds of the policy as it was, of which the
    best by validation loss is kept. Needs the extra `data`, and `compare` for the figure. Takes a few minutes
    of one core.

        python scripts/measure_adaptation.py --json runs/adaptation.json --figure docs/figures/adaptation.png
    """

    json: Path
    """File for the figures."""
    markdown: Path | None = None
    """Write the table to this file."""
    figure: Path | None = None
    """Draw the gains to this file (PNG)."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    tasks: tuple[str, ...] = ("satimage/mlp", "spambase/mlp", "concrete/mlp", "mnist-5k/mlp")
    """Which tasks of meta-validation."""
    episodes: tuple[int, ...] = (8, 32, 128)
    """Runs to adapt from."""
    adaptations: int = 2
    """Adaptations of each kind, with other seeds."""
    seeds: int = 10
    """Runs that each of them is judged on."""
    others: int = 33
    """Runs of the policy as it was, to choose the best from."""


def main(config: Config) -> None:
    policy = ControlPolicy.load(config.policy or pretrained_path())
    tasks = chosen(labels(META_VALIDATION), config.tasks)
    at_least(config, 1, "adaptations", "seeds")
    at_least(config, config.seeds, "others")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with progress_bar("measuring", len(tasks) * len(config.episodes)) as update:
        for label in tasks:
            before = train_cohort(tasks[label], WithPolicy(policy), range(FRESH, FRESH + config.others))
            for episodes in config.episodes:
                rows.append({"task": label, **_row(config, policy, tasks[label], episodes, before)})
                update(len(rows), f"{label}, {episodes} episodes")
    title = "ln(loss of the policy as it was / adapted): above 0 adaptation is better"
    present([Sheet.plain(title, HEAD, map(_cells, rows))], config.markdown)
    if config.figure:
        draw(rows, config.figure)
    origin = {**provenance("cpu"), "policy": policy.digest, "seconds": round(time.perf_counter() - started)}
    write_json(config.json, {"rows": rows, "provenance": origin})


def _row(config: Config, policy: ControlPolicy, task: Task, episodes: int, before: Sequence[Run]) -> dict[str, Any]:
    paired = before[: config.seeds]
    after: list[list[Run]] = []
    started = time.perf_counter()
    for seed in range(config.adaptations):
        with tempfile.TemporaryDirectory() as folder:
            adapted = adapt(policy, task, Path(folder), replace(Settings(), episodes=episodes), seed=seed)
        after.append(train_cohort(task, WithPolicy(adapted), [run.seed for run in paired]))
    row: dict[str, Any] = {"episodes": episodes, "runs": config.adaptations * len(paired)}
    chosen = min(episodes + 1, len(before))
    val, test = losses(list(before), "val"), losses(list(before), "test")
    best: dict[str, Array] = {"val": expected_best(val), "test": expected_at_best(val, test)}
    for kind, all_ in (("val", val), ("test", test)):
        ratios = [log_ratio(all_[: len(paired)], losses(runs, kind)) for runs in after]
        interval = mean([np.mean(ratios, axis=0)])
        row[kind] = {
            "before": float(all_.mean()),
            "after": float(np.mean([losses(runs, kind) for runs in after])),
            "gain": interval.value,
            "ci": [interval.low, interval.high],
            "win_rate": win_rate(np.concatenate(ratios)),
            "by_adaptation": [float(ratio.mean()) for ratio in ratios],
            "best_of_seeds": float(np.log(all_.mean() / best[kind][chosen - 1])),
            "worth_seeds": trials_to_reach(best[kind], all_.mean() * np.exp(-interval.value)),
        }
    row |= {
        "seeds_to_choose_from": chosen,
        "seeds_at_most": len(before),
        "seconds": (time.perf_counter() - started) / config.adaptations,
    }
    return row


HEAD = [
    "task", "episodes", "n", "gain, validation", "gain, test", "wins, test", "best of as many seeds, validation",
    "best of as many seeds, test", "worth seeds: validation, test",
]  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    gains = [with_ends(row[kind]["gain"], row[kind]["ci"]) for kind in ("val", "test")]
    seeds = [f"{row[kind]['best_of_seeds']:+.3f}" for kind in ("val", "test")]
    seeds[0] += f" (of {row['seeds_to_choose_from']})"
    capped = {kind: row[kind]["worth_seeds"] >= row["seeds_at_most"] for kind in ("val", "test")}
    worth = ", ".join(f"{'over ' * over}{row[kind]['worth_seeds']}" for kind, over in capped.items())
    wins = f"{row['test']['win_rate']:.0%}"
    return [row["task"], str(row["episodes"]), str(row["runs"]), *gains, wins, *seeds, worth]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Gain against episodes, a line a task, with the best of as many seeds dashed."""
    figure = require("matplotlib.figure", extra="compare").Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("val", "test"), strict=True):
        for index, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
            own = [row for row in rows if row["task"] == task]
            episodes, gains = [row["episodes"] for row in own], np.array([row[kind]["gain"] for row in own])
            ends = np.abs(np.transpose([row[kind]["ci"] for row in own]) - gains)
            axes.errorbar(episodes, gains, ends, color=f"C{index}", marker="o", capsize=3, label=task)
            axes.plot(episodes, [row[kind]["best_of_seeds"] for row in own], color=f"C{index}", ls="--", lw=1)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(episodes, [str(number) for number in episodes])
        name = {"val": "validation loss at the end", "test": "test loss at the best validation loss"}[kind]
        axes.set(xlabel="episodes (training runs of the task)", ylabel="ln(before / after)", title=name)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_main(Config, main)
