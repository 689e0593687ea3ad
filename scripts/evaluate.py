"""The judge: a policy against everything that a user would pick instead, on the tasks of a split."""

from __future__ import annotations

import hashlib
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from agents.cells import Store
from agents.evaluation import BUDGETS, SPLITS, Budget, Evaluation, evaluate, scaled
from agents.learned import read_all
from agents.optional import require
from agents.policy import ControlPolicy
from agents.searches import publish
from agents.summary import summarize
from agents.tuner import pretrained_path
from inner_models.splits import META_TRAIN, datasets_of
from inner_models.tasks import Task
from scripts.common import (
    Quiet,
    check_device,
    check_out,
    console,
    known,
    recorded,
    run_main,
    tensorboard_hint,
    work_bar,
    write_config,
    write_json,
)
from scripts.reporting.drawing import save
from scripts.reporting.files import write_csv, write_tensorboard
from scripts.reporting.plots import figures
from scripts.reporting.tables import markdown, overview


def default_cache() -> Path:
    """Where finished cells are kept: $HYPERPILOT_CACHE, or a folder of the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HYPERPILOT_CACHE") or Path(base) / "hyperpilot")


@dataclass
class Config(Quiet):
    """Judge a policy: its runs, those of every baseline and control, a bank of random-search trials, and searches.

    Needs the extras `compare` and `data`. Leaves tables.md, figures, result.json, CSV and TensorBoard events. Takes six
    minutes on 2 cores, an hour and a half with --budget full. What has been run is kept in the cache and never run
    again: interrupt it, and the same command goes on; another policy on the same tasks takes one or two minutes.

        python scripts/evaluate.py --policy runs/default/policy.safetensors --out runs/judged
        python scripts/evaluate.py --tasks concrete --seeds 2 --bank 16 --out runs/glance
        python scripts/evaluate.py --learned runs/warm_start.safetensors runs/surrogate.safetensors --out runs/beside
    """

    out: Path
    """Folder for result.json, CSV, figures, tables, TensorBoard events and the Optuna studies."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    learned: tuple[Path, ...] = ()
    """Files of other learned methods, to be judged beside: what measure_warm_start.py and learn_schedule.py
    leave with --save, measure_surrogate.py and measure_recurrent_search.py with --out; one of each kind."""
    split: Literal["meta-validation", "meta-validation-small", "meta-test"] = "meta-validation"
    """Which tasks: meta-test is run once per shipped policy, meta-validation decides between designs."""
    budget: Literal["quick", "full"] = "quick"
    """quick: all but the searches. full: everything."""
    tasks: tuple[str, ...] = ()
    """Only these of the split's data sets or tasks; or, where the split has no such one, tasks <data set>/<model>."""
    seeds: int | None = None
    """Runs of each task and method; the budget's own number when left out."""
    bank: int | None = None
    """Random-search trials of each task; the budget's own number when left out."""
    search_cost: int | None = None
    """Full runs that each search may spend; the budget's own number when left out."""
    search_seeds: int | None = None
    """Searches of each kind on each task; the budget's own number when left out."""
    horizon_factor: float = 1.0
    """Longer (or shorter) runs: a factor on every task's number of intervals."""
    width_factor: float = 1.0
    """Larger (or smaller) models: a factor on every task's width."""
    json: Path | None = None
    """Also write the figures to this file."""
    markdown: Path | None = None
    """Also write the tables to this file."""
    storage: str | None = None
    """Optuna storage URL for the searches' studies; studies.db in the folder when left out."""
    cache: Path | None = None
    """Where finished cells are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    workers: int = 2
    """Processes, one thread each. On a GPU there is one."""


def main(config: Config) -> None:
    check_device(config.device)
    for name in ("horizon_factor", "width_factor", "workers"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name.replace('_', '-')} must be a positive number, not {getattr(config, name)}")
    budget = _budget(config)
    tasks = [scaled(task, horizon=config.horizon_factor, width=config.width_factor) for task in _tasks(config)]
    policy = ControlPolicy.load(config.policy or pretrained_path())
    learned = read_all(config.learned)
    for method, task in product(learned.values(), tasks):
        method.check(task.optimizer)
    packages = ["matplotlib", "schedulefree", "prodigyopt"]
    packages += ["optuna"] if budget.searches or "recurrent-search" in learned else []
    packages += ["cmaes"] if budget.searches else []
    for package in packages:
        require(package, extra="compare")  # rather now than after hours
    seen = sorted(datasets_of(tuple(tasks)) & datasets_of(META_TRAIN))
    if seen:
        console.print(f"note: {', '.join(seen)} may have been trained on: part of meta-train", soft_wrap=True)
    check_out(config.out)
    store = Store(config.cache or default_cache())
    started = time.perf_counter()
    with work_bar("evaluating") as report:
        evaluation = evaluate(
            policy,
            tasks,
            budget,
            store,
            learned=learned,
            workers=config.workers,
            device=config.device,
            report=report,
        )
    result = summarize(evaluation)
    result["provenance"] = {
        "computed_on": store.origins,
        "policy": policy.digest,
        "trained": policy.header.training,
        "split": config.split,
        "budget": asdict(budget),
        "tasks": {label: repr(task) for label, task in evaluation.tasks.items()},
        "command": _command(config),
        "seconds_of_this_call": time.perf_counter() - started,
    }
    for table in overview(result):
        console.print(table)
    _write(config, evaluation, result)


def _write(config: Config, evaluation: Evaluation, result: dict[str, Any]) -> None:
    """Everything that is left behind; the config comes last, and marks the folder as done."""
    tables = markdown(result, result["provenance"], evaluation.budget)
    for path in filter(None, (config.out / "result.json", config.json)):
        write_json(path, result)
    for path in filter(None, (config.out / "tables.md", config.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tables)
    write_csv(evaluation, config.out / "runs.csv")
    drawn = figures(evaluation, result)
    save(drawn, config.out / "figures")
    write_tensorboard(evaluation, result, drawn, config.out / "tensorboard")
    storage = config.storage or f"sqlite:///{config.out / 'studies.db'}"
    for label, found in evaluation.searches.items():
        for name, searches in found.items():
            settings = repr((evaluation.tasks[label], evaluation.budget))  # lest others' studies be mixed in
            version = hashlib.sha256(settings.encode()).hexdigest()[:8]
            publish(searches, storage, f"{label}/{name}/{version}")
    write_config(config.out, "evaluate", config)
    console.print(f"figures, tables and curves are in {config.out}", soft_wrap=True)
    console.print(tensorboard_hint(config.out / "tensorboard"), soft_wrap=True)
    if any(evaluation.searches.values()):
        console.print(f"look at the searches: optuna-dashboard {storage}", soft_wrap=True)


def _budget(config: Config) -> Budget:
    given = BUDGETS[config.budget]
    seeds = given.seeds if config.seeds is None else config.seeds
    return replace(
        given,
        seeds=seeds,
        bank=given.bank if config.bank is None else config.bank,
        search_cost=given.search_cost if config.search_cost is None else config.search_cost,
        search_seeds=min(given.search_seeds, seeds) if config.search_seeds is None else config.search_seeds,
    )


def _tasks(config: Config) -> list[Task]:
    split = SPLITS[config.split]
    if not config.tasks:
        return list(split)
    chosen = []
    for name in config.tasks:
        found = [task for task in split if name in (task.name, task.dataset)]
        if not found and "/" not in name:
            known("task or data set", name, sorted({own for task in split for own in (task.name, task.dataset)}))
        chosen += found or [Task.named(name)]
    return list(dict.fromkeys(chosen))


def _command(config: Config) -> str:
    """What repeats this evaluation, into another folder."""
    given = {
        "split": config.split,
        "budget": config.budget,
        "seeds": config.seeds,
        "bank": config.bank,
        "search-cost": config.search_cost,
        "search-seeds": config.search_seeds,
        "horizon-factor": None if config.horizon_factor == 1 else config.horizon_factor,
        "width-factor": None if config.width_factor == 1 else config.width_factor,
        "device": None if config.device == "cpu" else config.device,
        "json": config.json and recorded(config.json),
        "markdown": config.markdown and recorded(config.markdown),
    }
    options = [f"--{name} {value}" for name, value in given.items() if value is not None]
    if config.tasks:
        options.append(f"--tasks {' '.join(config.tasks)}")
    if config.learned:
        options.append(f"--learned {' '.join(path.name for path in config.learned)}")
    if config.policy:
        options.append(f"--policy {config.policy.name}")
    return " ".join(["python scripts/evaluate.py", *options, "--out runs/evaluation"])


if __name__ == "__main__":
    run_main(Config, main)
