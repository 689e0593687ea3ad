"""Schedules learned by hypergradients on meta-train, against the calibrated cosine on tasks of other data sets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from joblib import Parallel, delayed

from agents.application import Run, train, train_cohort
from agents.calibration import RandomTrials
from agents.evaluation import SPLITS, chosen, labels
from agents.hypergradient_schedule import Config as Learning
from agents.hypergradient_schedule import EveryStep, LearnedSchedule, learn
from agents.measures import expected_at_best, interquartile_mean, log_ratio
from agents.optional import require
from agents.provenance import provenance
from agents.schedules import Cosine
from agents.state_file import save_state
from agents.summary import losses
from agents.unrolled import Problem
from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import Array
from inner_models.splits import META_TRAIN_SMALL
from inner_models.tasks import Task
from inner_models.workers import give_back_memory, one_thread_each
from scripts.common import Quiet, at_least, progress_bar, run_main, write_json
from scripts.reporting.drawing import POLICY, paper, save, subplots
from scripts.reporting.sheet import Sheet, present, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE = "whole"


@dataclass
class Config(Quiet):
    """Learn learning rate and weight decay through K unrolled steps on meta-train, and judge them on meta-validation.

    Prints the log ratios to the calibrated cosine for each K, with momentum learned too, after a few more hypergradient
    steps on each task itself, and for random search at the cost of these. Needs the extras `compare` (figure) and
    `data`. Takes six minutes of CPU time, most of it in two processes.

        python scripts/learn_schedule.py --json results/hypergradient.json --figure docs/figures/hypergradient.png
    """

    unroll: tuple[str, ...] = ("1", "4", "16", "64", WHOLE)
    """Steps of a window (K), and `whole` for the whole run. The rest is learned with the last one."""
    updates: int = 40
    """Hypergradient steps on meta-train; each is on another task."""
    adapt: int = 8
    """Hypergradient steps on each task that is judged; 0 leaves this out."""
    replicas: int = 4
    """Runs a step."""
    memory: float = 8.0
    """GiB that an unrolled window may take."""
    seed: int = 0
    """Of the learning: its tasks, initial weights, data order, dropout masks."""
    split: Literal["meta-validation-small", "meta-validation"] = "meta-validation-small"
    """Where the tasks come from that are judged; those with AdamW."""
    tasks: tuple[str, ...] = ()
    """Only these of the split's tasks."""
    seeds: int = 5
    """Runs of each task and method, paired."""
    workers: int = 2
    """Processes, one thread each."""
    json: Path | None = None
    """Write all figures to this file."""
    markdown: Path | None = None
    """Write the table to this file."""
    save: Path | None = None
    """Write the schedule learned with the last window to this file, for scripts/evaluate.py --learned."""
    figure: Path | None = None
    """Write the figure to this file (PNG)."""


@dataclass(frozen=True)
class Learned:
    """What one learning left."""

    schedule: LearnedSchedule
    inner_steps: int
    seconds: float


@dataclass(frozen=True)
class Losses:
    """Final validation loss and test loss at the best validation loss of a method, `[seeds]` each, on one task."""

    val: Array
    test: Array


def main(config: Config) -> None:
    tasks, windows = _tasks(config), [_window(name) for name in config.unroll]
    at_least(config, 2, "seeds")
    at_least(config, 1, "workers")
    at_least(config, 0, "adapt")
    if not windows:
        raise ValueError(f"--unroll takes numbers of steps from 1 on, or {WHOLE}, one or more of them")
    settings = [
        Learning(config.updates, unroll, config.replicas, memory=config.memory) for unroll in (*windows, windows[-1])
    ]
    settings[-1] = replace(settings[-1], learned=("lr", "weight_decay", "momentum"))
    names = [_name(window) for window in windows]
    last = names[-1]
    rng = np.random.default_rng(config.seed)
    drawn = tuple(META_TRAIN_SMALL.sample(rng) for _ in range(config.updates))
    untrained = LearnedSchedule.untrained()
    jobs = [(drawn, untrained, setting, config.seed) for setting in settings]
    with progress_bar("learning schedules", len(jobs) + len(tasks) * bool(config.adapt)) as update:
        found = _all(jobs, config, lambda done: update(done, f"{done} on meta-train"))
        learned = dict(zip((*names, _with_momentum(last)), found, strict=True))
        adapted: list[Learned] = []
        if config.adapt:
            few = replace(settings[-2], updates=config.adapt)
            own = [((task,) * config.adapt, learned[last].schedule, few, config.seed) for task in tasks.values()]
            adapted = _all(own, config, lambda done: update(len(jobs) + done, f"{done} on the tasks themselves"))
    seeds = range(config.seeds)
    base = [_losses(train_cohort(task, Cosine("calibrated"), seeds)) for task in tasks.values()]
    rows = [
        _row("AdamW's defaults, constant", tasks, base, [_engine(task, untrained, seeds) for task in tasks.values()])
    ]
    for name, one in learned.items():
        judge = _torch if name == _with_momentum(last) else _engine
        losses = [judge(task, one.schedule, seeds) for task in tasks.values()]
        rows.append(_row(name, tasks, base, losses) | _about(one))
    if adapted:
        trials = config.adapt * config.replicas
        losses = [_engine(task, one.schedule, seeds) for task, one in zip(tasks.values(), adapted, strict=True)]
        about = {"schedules": [asdict(one.schedule) for one in adapted], "runs on the task": trials}
        rows.append(_row(f"{last}, {config.adapt} steps on the task", tasks, base, losses) | about)
        searched = [_random(task, trials, config.seeds) for task in tasks.values()]
        rows.append(_row(f"best of {trials} random trials", tasks, base, searched) | {"runs on the task": trials})
    head, *lines = _cells(rows)
    present([Sheet.plain("log ratio to the calibrated cosine: above 0 better", head, lines)], config.markdown)
    if config.save:
        save_state(config.save, learned[last].schedule.state_dict())
    if config.figure:
        save({config.figure.stem: figure(names, rows)}, config.figure.parent)
    if config.json:
        settings_used = {name: getattr(config, name) for name in ("updates", "adapt", "replicas", "seed", "seeds")}
        about = {"tasks": list(tasks), **settings_used, "computed_on": provenance("cpu")}
        write_json(config.json, {"rows": rows, **about})


def _tasks(config: Config) -> dict[str, Task]:
    split = labels([task for task in SPLITS[config.split] if task.optimizer == "adamw"])
    tasks = chosen(split, config.tasks)
    for task in tasks.values() if config.adapt else ():
        Problem.of(task)
    return tasks


def _window(name: str) -> int | None:
    if name == WHOLE:
        return None
    if not name.isdecimal() or int(name) < 1:
        raise ValueError(f"--unroll takes numbers of steps from 1 on, or {WHOLE}, not {name!r}")
    return int(name)


def _name(window: int | None) -> str:
    return "whole run" if window is None else f"K = {window}"


def _with_momentum(name: str) -> str:
    return f"{name}, momentum too"


Job = tuple[tuple[Task, ...], LearnedSchedule, Learning, int]


def _all(jobs: Sequence[Job], config: Config, report: Any) -> list[Learned]:
    done: list[Learned] = []
    with one_thread_each():
        for one in Parallel(n_jobs=config.workers, return_as="generator")(delayed(_one)(*job) for job in jobs):
            done.append(one)
            report(len(done))
    return done


def _one(tasks: Sequence[Task], start: LearnedSchedule, learning: Learning, seed: int) -> Learned:
    torch.set_num_threads(1)
    started = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    try:
        schedule, steps = learn(
            lambda update: Problem.of(tasks[update], start.batch_size, start.dropout), start, learning, generator
        )
    except MemoryError as error:  # bad input, to a script
        raise ValueError(str(error)) from None
    give_back_memory()
    return Learned(schedule, steps, time.process_time() - started)


def _engine(task: Task, schedule: LearnedSchedule, seeds: Sequence[int]) -> Losses:
    return _losses(train_cohort(task, schedule, seeds))


def _torch(task: Task, schedule: LearnedSchedule, seeds: Sequence[int]) -> Losses:
    """Step by step, for the engine moves no momentum."""
    return _losses([train(task, EveryStep(schedule), seed) for seed in seeds])


def _losses(runs: Sequence[Run]) -> Losses:
    return Losses(losses(runs, "val"), losses(runs, "test"))


def _random(task: Task, trials: int, seeds: int) -> Losses:
    """Expected losses of the best of so many random trials by validation loss, from a bank of twice as many."""
    bank = _losses(train_cohort(task, RandomTrials(0, 2 * trials), [trial % seeds for trial in range(2 * trials)]))
    expected = [float(expected_at_best(bank.val, values)[trials - 1]) for values in (bank.val, bank.test)]
    return Losses(*(np.full(seeds, value) for value in expected))


def _row(name: str, tasks: dict[str, Task], base: Sequence[Losses], own: Sequence[Losses]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "n": sum(len(losses.val) for losses in own)}
    for kind in ("val", "test"):
        ratios = [log_ratio(getattr(b, kind), getattr(o, kind)) for b, o in zip(base, own, strict=True)]
        value = interquartile_mean(ratios)
        by_task = {task: float(ratio.mean()) for task, ratio in zip(tasks, ratios, strict=True)}
        row[kind] = {"iqm": value.value, "ci": [value.low, value.high], "by_task": by_task}
    return row


def _about(one: Learned) -> dict[str, Any]:
    return {"schedule": asdict(one.schedule), "inner_steps": one.inner_steps, "cpu_seconds": one.seconds}


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table, its head first."""
    lines = [["method", "n", "validation", "test", *rows[0]["val"]["by_task"], "inner steps to learn", "CPU s"]]
    for row in rows:
        ratios = [with_ends(row[kind]["iqm"], row[kind]["ci"]) for kind in ("val", "test")]
        by_task = [f"{value:+.3f}" for value in row["val"]["by_task"].values()]
        cost = [f"{row['inner_steps']:,}", f"{row['cpu_seconds']:.0f}"] if "inner_steps" in row else ["", ""]
        if "runs on the task" in row:
            cost = [f"{row['runs on the task']} runs a task", ""]
        lines.append([row["method"], str(row["n"]), *ratios, *by_task, *cost])
    return lines


@paper
def figure(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> Figure:
    """The learning rates learned with each K, and what they are worth."""
    found, ((rates, worth),) = subplots(1, 2, width=8.0, height=3.2)
    chosen = [row for row in rows if row["method"] in names]
    shades = require("matplotlib", extra="compare").colormaps["viridis"](np.linspace(0.85, 0.0, len(chosen)))
    for row, shade in zip(chosen, shades, strict=True):
        lr = row["schedule"]["lr"]
        rates.plot(np.linspace(0, 1, len(lr)), lr, color=shade, marker="o", markersize=3, label=row["method"])
    progress = np.linspace(0.005, 0.975, 195)
    rates.plot(progress, calibrated("adamw").values(progress)["lr"], color="#777777", ls="--", label="calibrated")
    rates.set(yscale="log", xlabel="share of the run", ylabel="learning rate", title="what is learned")
    rates.legend()
    for kind, shift, style in (("val", -0.1, {"color": POLICY}), ("test", 0.1, {"color": "#332288", "fmt": "s"})):
        ratios = np.array([[row[kind]["iqm"], *row[kind]["ci"]] for row in chosen])
        errors = np.abs(ratios[:, 1:] - ratios[:, :1]).T
        label = {"val": "validation", "test": "test"}[kind]
        at = np.arange(len(chosen)) + shift
        worth.errorbar(at, ratios[:, 0], errors, **{"fmt": "o", "markersize": 4, "label": label, **style})
    worth.axhline(0, color="#777777", ls="--", linewidth=1)
    worth.set(xticks=range(len(chosen)), xticklabels=[row["method"] for row in chosen])
    worth.set(ylabel="log ratio to calibrated", title=f"what it is worth (n = {chosen[0]['n']})")
    worth.legend(loc="lower right")
    return found


if __name__ == "__main__":
    run_main(Config, main)
