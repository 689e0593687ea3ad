"""A search that an LSTM has learned on meta-train, beside TPE, a Gaussian process and random search."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy.stats import spearmanr

from agents.calibration import SEARCHED
from agents.cells import Cell, Store, run_cells
from agents.emulators import Emulators, flattened
from agents.evaluation import SPLITS, Budget, bank, chosen, labels
from agents.measures import Interval, capped, expected_at_best, expected_best, interquartile_mean, log_ratio
from agents.meta_dataset import Studied, draw, study
from agents.optional import require
from agents.proposer import Config as Learning
from agents.proposer import Proposer, unroll
from agents.provenance import provenance
from agents.recurrent_search import RecurrentSearch
from agents.schedules import Cosine
from agents.searches import OptunaSearch, Searched, SearchName
from agents.summary import losses
from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import Array
from inner_models.splits import META_TRAIN
from inner_models.tasks import Task
from inner_models.workers import one_thread_each
from scripts.common import Quiet, at_least, known, progress_bar, run_main, work_bar, write_json
from scripts.evaluate import default_cache
from scripts.reporting.drawing import save
from scripts.reporting.recurrent_search_plots import Figures, search_figure, sheets_of
from scripts.reporting.sheet import present

LEARNED: dict[str, dict[str, Any]] = {
    "lstm": {},
    "lstm-without-features": {"features": False},
    "lstm-blind": {"blind": True},
}
"""Name -> what is not as in `Learning`. The blind one sees meta-features, but no scores."""


@dataclass
class Config(Quiet):
    """Learn to search on meta-train, and judge the search on meta-validation.

    Prints what the search finds by training, beside Optuna's samplers and random search; what it finds on emulators of
    data sets held out; and how well emulators predict trials left out. Needs the extras `compare` and `data`. Takes
    some eleven minutes on 2 cores; all runs but its own searches are kept in the cache. The figures in the docs are the
    second command's.

        python scripts/measure_recurrent_search.py --json runs/recurrent_search.json
        python scripts/measure_recurrent_search.py --tasks 192 --trials 64 --bank 256 --searches tpe gp --held-out
            --learned lstm lstm-without-features lstm-blind --json runs/full.json
    """

    tasks: int = 96
    """Tasks of meta-train that it learns from."""
    trials: int = 32
    """Random trials of each of these."""
    updates: int = Learning.updates
    """Of a proposer's weights."""
    learned: tuple[str, ...] = ("lstm", "lstm-blind")
    """Which proposers: lstm reads the task's meta-features, lstm-without-features the trials alone, and from lstm-blind
    all scores are hidden."""
    held_out: bool = False
    """Also learn on three quarters of the data sets, and search emulators of the rest."""
    split: Literal["meta-validation-small", "meta-validation"] = "meta-validation"
    """Where the tasks come from that are judged."""
    judged: tuple[str, ...] = ()
    """Only these tasks of the split."""
    searches: tuple[SearchName, ...] = ("tpe",)
    """Optuna's samplers beside it; each also with the calibrated schedule as its first trial."""
    budget: int = 32
    """Trials of a search."""
    seeds: int = 2
    """Searches of each kind on each task."""
    bank: int = 128
    """Random trials of each judged task."""
    workers: int = 2
    """Processes, one thread each."""
    cache: Path | None = None
    """Where finished runs are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    out: Path | None = None
    """Save the first proposer to this file."""
    json: Path | None = None
    """Write all figures to this file."""
    markdown: Path | None = None
    """Write the tables to this file."""
    figure: Path | None = None
    """Write the figure to this file (PNG)."""


@dataclass(frozen=True)
class Learned:
    """A proposer.

    Attributes:
        held_out: best scores so far of another such one, which has not seen a quarter of the data sets, on emulators of
            these, `[tasks, trials]`; none if that was left out.
        seconds: of CPU time that learning took, the emulators included.
    """

    proposer: Proposer
    held_out: Array | None
    seconds: float


@dataclass(frozen=True)
class Found:
    """What searches have found on a task: best validation loss so far, and the test loss of that trial at its best
    validation loss; `[searches, trials]` each, finite."""

    val: Array
    test: Array


def main(config: Config) -> None:
    tasks = chosen(labels(SPLITS[config.split]), config.judged)
    for name in config.learned:
        known("proposer", name, list(LEARNED))
    at_least(config, 1, "tasks", "updates", "workers")
    at_least(config, 2, "seeds", "budget", "trials")
    at_least(config, config.budget, "bank")
    if config.seeds > Budget.seeds or not config.learned:
        raise ValueError(f"--seeds must be {Budget.seeds} or less, not {config.seeds}, and --learned not empty")
    for package in ("matplotlib", *(["optuna"] if config.searches else [])):
        require(package, extra="compare")  # rather now than after a quarter of an hour
    store = Store(config.cache or default_cache())
    with work_bar("studying meta-train") as report:
        studied = study(draw(META_TRAIN, config.tasks), config.trials, store, workers=config.workers, report=report)
    inside, outside = _parts(studied) if config.held_out else (studied, [])
    learned = _learn_all(config, studied, inside, outside)
    if config.out:
        learned[config.learned[0]].proposer.save(config.out)
    judged, base = _judge(config, tasks, {name: one.proposer for name, one in learned.items()}, store)
    result: Figures = {"emulators": emulator_check(studied), "searches": _searches(config, judged, base)}
    for name, one in learned.items():
        result["searches"][name]["landmark_cost"] = one.proposer.landmark_cost
    if outside:
        curves = {name: one.held_out for name, one in learned.items()}
        curves["random"] = random_on(Emulators(outside), config.budget)
        result["held_out"] = {
            name: {str(n): _interval(interquartile_mean([-best[:, n - 1]])) for n in _counts(config)}
            for name, best in curves.items()
            if best is not None
        }
    present(sheets_of(result), config.markdown)
    if config.figure:
        save({config.figure.stem: search_figure(result)}, config.figure.parent)
    if config.json:
        names = ("tasks", "trials", "updates", "budget", "seeds", "bank")
        about = {name: getattr(config, name) for name in names} | {
            "judged": list(tasks),
            "cpu_seconds_to_learn": {name: one.seconds for name, one in learned.items()},
            "computed_on": provenance("cpu"),
        }
        write_json(config.json, {**result, **about})


def _parts(studied: Sequence[Studied]) -> tuple[list[Studied], list[Studied]]:
    """Three quarters of the data sets, and the rest."""
    datasets = sorted({one.task.dataset for one in studied})
    if len(datasets) < 4:
        raise ValueError(f"a quarter of {len(datasets)} data sets cannot be held out; take more --tasks")
    outside = np.random.default_rng(0).permutation(datasets)[: len(datasets) // 4].tolist()
    parts: tuple[list[Studied], list[Studied]] = ([], [])
    for one in studied:
        parts[one.task.dataset in outside].append(one)
    return parts


def _learn_all(
    config: Config, studied: Sequence[Studied], inside: Sequence[Studied], outside: Sequence[Studied]
) -> dict[str, Learned]:
    jobs = []
    for name in config.learned:
        learning = Learning(updates=config.updates, trials=config.budget, **LEARNED[name])
        jobs.append(delayed(_learn)(studied, inside, outside, learning))
    found: list[Learned] = []
    with progress_bar("learning to search", len(jobs)) as update, one_thread_each():
        for one in Parallel(n_jobs=config.workers, return_as="generator")(jobs):
            found.append(one)
            update(len(found), config.learned[len(found) - 1])
    return dict(zip(config.learned, found, strict=True))


def _learn(
    studied: Sequence[Studied], inside: Sequence[Studied], outside: Sequence[Studied], learning: Learning
) -> Learned:
    torch.set_num_threads(1)
    started = time.process_time()
    proposer = Proposer.fit(studied, learning)
    seconds = time.process_time() - started
    if not outside:
        return Learned(proposer, None, seconds)
    other, emulators = Proposer.fit(inside, learning), Emulators(outside)
    scores = unroll(
        other, emulators, torch.arange(len(outside)), other.contexts(outside), learning.trials,
        torch.Generator().manual_seed(0), spread=0.0,
    )  # fmt: skip
    return Learned(proposer, scores.cummin(dim=1).values.double().numpy(), seconds)


def random_on(emulators: Emulators, trials: int, searches: int = 64) -> Array:
    """Best scores so far of random searches on the means of emulators, `[tasks, trials]`, in expectation."""
    generator = torch.Generator().manual_seed(0)
    tasks = torch.arange(len(emulators.calibrated)).repeat_interleave(searches)
    function = emulators.draw(tasks, generator, spread=0.0)
    reference = function(emulators.calibrated[tasks])
    places = torch.rand(trials, len(tasks), len(SEARCHED), generator=generator)
    scores = torch.stack([function(place) - reference for place in places], dim=1)
    best: Array = scores.cummin(dim=1).values.double().numpy()
    return np.asarray(best.reshape(-1, searches, trials).mean(axis=1))


def emulator_check(studied: Sequence[Studied]) -> Figures:
    """Leave-one-out predictions of the trials' (flattened) scores: quartiles over tasks, and some of them."""
    emulators = Emulators(studied)
    mean, std = emulators.leave_one_out()
    scores = np.stack([flattened(one.scores) for one in studied])
    error = mean - scores
    spread = scores - scores.mean(axis=1, keepdims=True)
    by_task = {
        "rank correlation": [spearmanr(*pair).statistic for pair in zip(mean, scores, strict=True)],
        "explained variance": 1 - np.square(error).sum(axis=1) / np.square(spread).sum(axis=1),
        "root mean squared error": np.sqrt(np.square(error).mean(axis=1)),
        "noise": emulators.noise.numpy(),
        "share within the 95 % interval": (np.abs(error) < 1.96 * std).mean(axis=1),
    }
    quartiles = {name: np.quantile(values, [0.25, 0.5, 0.75]).tolist() for name, values in by_task.items()}
    some = np.random.default_rng(0).choice(scores.size, min(500, scores.size), replace=False)
    sample = {"predicted": mean.flat[some].round(3).tolist(), "scores": scores.flat[some].round(3).tolist()}
    return {"quartiles": quartiles, "tasks": len(studied), "sample": sample}


def _judge(
    config: Config, tasks: Mapping[str, Task], proposers: Mapping[str, Proposer], store: Store
) -> tuple[dict[str, dict[str, Found]], dict[str, Found]]:
    """What each method has found on each task, and the calibrated schedule's own losses, `[seeds, 1]`."""
    cells = {label: _cells(config, task) for label, task in tasks.items()}
    every = [cell for of_task in cells.values() for of_method in of_task.values() for cell in of_method]
    with work_bar("searching meta-validation") as report:
        run_cells(every, store, workers=config.workers, report=report)
    jobs = [(label, name) for label in tasks for name in proposers]
    calls = (delayed(_search)(proposers[name], config.budget, tasks[label], config.seeds) for label, name in jobs)
    own: dict[tuple[str, str], list[Searched]] = {}
    with progress_bar("searching by LSTM", len(jobs)) as update, one_thread_each():
        for job, searched in zip(jobs, Parallel(n_jobs=config.workers, return_as="generator")(calls), strict=True):
            own[job] = searched
            update(len(own), " by ".join(job))
    judged, base = {}, {}
    for label in tasks:
        found: dict[str, list[Any]] = {
            name: [r for cell in of_method for r in store.load(cell)] for name, of_method in cells[label].items()
        }
        runs, trials = found.pop("calibrated")[: config.seeds], found.pop("random")
        found |= {name: own[label, name] for name in proposers}
        initial = np.array([[run.initial_loss] for run in runs])
        base[label] = Found(*(losses(runs, kind)[:, None] for kind in ("val", "test")))
        val, test = losses(trials, "val"), losses(trials, "test")
        expected = (curve[: config.budget] for curve in (expected_best(val), expected_at_best(val, test)))
        judged[label] = {"random": Found(*(np.tile(curve, (config.seeds, 1)) for curve in expected))}
        for name, studies in found.items():
            curves = ([study.best for study in studies], [study.test for study in studies])
            judged[label][name] = Found(*(capped(curve, initial) for curve in curves))
    return judged, base


def _cells(config: Config, task: Task) -> dict[str, list[Cell]]:
    """What others run on a task, by method; the random bank is the judge's."""
    starts = {"": (), " from calibrated": (calibrated(task.optimizer),)}
    return {
        "calibrated": [Cell(task, Cosine("calibrated"), tuple(range(Budget.seeds)))],
        "random": bank(task, config.bank),
        **{
            f"{name}{start}": [
                Cell(task, OptunaSearch(name, config.budget, first=first), (seed,)) for seed in range(config.seeds)
            ]
            for name in config.searches
            for start, first in starts.items()
        },
    }


def _search(proposer: Proposer, budget: int, task: Task, seeds: int) -> list[Searched]:
    torch.set_num_threads(1)
    return RecurrentSearch(proposer, budget).run(task, range(seeds))


def _counts(config: Config) -> list[int]:
    """Numbers of trials at which searches are compared: powers of two, and the whole budget."""
    return sorted({*(2**power for power in range(config.budget.bit_length())), config.budget})


def _searches(config: Config, judged: Mapping[str, Mapping[str, Found]], base: Mapping[str, Found]) -> Figures:
    """Log ratios to the calibrated schedule by method and trials; at the end also on test and by task."""
    found: Figures = {}
    for name in next(iter(judged.values())):
        ratios = {
            kind: [log_ratio(np.broadcast_to(getattr(base[label], kind), own.shape), own)
                   for label, of_task in judged.items() for own in [getattr(of_task[name], kind)]]
            for kind in ("val", "test")
        }  # fmt: skip
        found[name] = {
            str(n): _interval(interquartile_mean([r[:, n - 1] for r in ratios["val"]])) for n in _counts(config)
        }
        found[name]["test"] = _interval(interquartile_mean([r[:, -1] for r in ratios["test"]]))
        found[name]["by_task"] = {label: float(r[:, -1].mean()) for label, r in zip(judged, ratios["val"], strict=True)}
        found[name]["n"] = sum(len(r) for r in ratios["val"])
    return found


def _interval(interval: Interval) -> Figures:
    return {"value": interval.value, "ci": [interval.low, interval.high]}


if __name__ == "__main__":
    run_main(Config, main)
