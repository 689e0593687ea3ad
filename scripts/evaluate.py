"""A policy against the baselines on several tasks and seeds, paired: log loss ratios with intervals, and wins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.table import Table
from scipy.stats import bootstrap

from agents.application import BASELINES, Run, jsonable, train, with_policy
from agents.policy import ControlPolicy
from agents.rollouts import capped
from agents.tuner import pretrained_path
from hpo_env.hyperparameters import Array
from inner_models.tasks import Task
from scripts.common import check_device, console, progress_bar, run_main, write_json

MEASURES = {"val": "final validation loss", "test": "test loss at the best validation epoch"}


@dataclass
class Config:
    """Train every task with the policy and with each baseline, with equal seeds, and compare the losses."""

    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    tasks: tuple[str, ...] = ("letter/mlp", "italy-power-demand/gru", "deliveries/mlp")
    """Tasks: <data set>/<model>."""
    seeds: int = 5
    """Runs of each task and method."""
    epochs: int = 30
    """Length of each run."""
    json: Path | None = None
    """Also write all figures to this file."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    workers: int = 2
    """Processes, one thread each."""


def main(config: Config) -> None:
    check_device(config.device)
    if config.seeds < 2:
        raise ValueError(f"seeds must be at least 2 for an interval, not {config.seeds}")
    policy = ControlPolicy.load(config.policy or pretrained_path())
    tasks = [Task.named(name, horizon=config.epochs) for name in config.tasks]
    methods = ("policy", *BASELINES)
    cells = [(task, method, seed) for task in tasks for method in methods for seed in range(config.seeds)]
    jobs = (delayed(_cell)(*cell, policy, config.device) for cell in cells)
    runs: dict[tuple[str, str, int], Run] = {}
    with progress_bar("evaluating", len(cells)) as update:
        finished = Parallel(n_jobs=config.workers, return_as="generator")(jobs)
        for (task, method, seed), run in zip(cells, finished, strict=True):
            runs[task.name, method, seed] = run
            update(len(runs), task.name)
    result = {
        task.name: {method: _summary(runs, task.name, method, config.seeds) for method in methods} for task in tasks
    }
    for task in tasks:
        console.print(_table(task, result[task.name], config))
    if config.json:
        write_json(config.json, result)


def _cell(task: Task, method: str, seed: int, policy: ControlPolicy, device: str) -> Run:
    torch.set_num_threads(1)
    return train(task, with_policy(policy) if method == "policy" else BASELINES[method], seed, device=device)


def _summary(runs: dict[tuple[str, str, int], Run], task: str, method: str, seeds: int) -> dict[str, Any]:
    """Mean losses of a method and, for a baseline, the policy's log loss ratios against it."""
    result: dict[str, Any] = {"seconds": float(np.mean([runs[task, method, seed].seconds for seed in range(seeds)]))}
    for name in MEASURES:
        losses = np.array([_loss(runs[task, method, seed], name) for seed in range(seeds)])
        result[name] = jsonable(losses.tolist())
        if method != "policy":
            own = np.array([_loss(runs[task, "policy", seed], name) for seed in range(seeds)])
            result[f"{name}_log_ratio"] = log_ratio(losses, own)
    return result


def _loss(run: Run, measure: str) -> float:
    return run.val_loss[-1] if measure == "val" else run.test_loss


def log_ratio(baseline: Array, policy: Array) -> dict[str, Any]:
    """Mean of ln(baseline / policy) over paired seeds, its bootstrap 95 % interval, and the seeds that the policy wins.

    A diverged run counts as a loss of `agents.rollouts.LOST`.
    """
    ratios = np.log(capped(baseline)) - np.log(capped(policy))
    if np.ptp(ratios) == 0:
        low = high = float(ratios[0])
    else:
        interval = bootstrap((ratios,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"mean": float(ratios.mean()), "interval": [low, high], "wins": int((ratios > 0).sum())}


def _table(task: Task, result: dict[str, dict[str, Any]], config: Config) -> Table:
    title = f"{task.name}: {config.epochs} epochs, n = {config.seeds} seeds; log ratio above 0: the policy is better"
    table = Table(title=title)
    for heading in ("method", "val loss", "test loss", "val log ratio", "test log ratio", "wins (test)", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, figures in result.items():
        cells = [f"{np.mean([np.nan if loss is None else loss for loss in figures[name]]):.4f}" for name in MEASURES]
        ratios = [figures.get(f"{name}_log_ratio") for name in MEASURES]
        cells += [f"{r['mean']:+.3f} [{r['interval'][0]:+.3f}, {r['interval'][1]:+.3f}]" if r else "" for r in ratios]
        cells.append(f"{ratios[1]['wins']}/{config.seeds}" if ratios[1] else "")
        table.add_row(method, *cells, f"{figures['seconds']:.1f}")
    return table


if __name__ == "__main__":
    run_main(Config, main)
