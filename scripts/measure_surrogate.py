"""The surrogate on meta-validation: what it predicts, what it proposes, and what it saves a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import spearmanr

from agents.application import Run
from agents.calibration import RandomTrials, sample_schedules
from agents.cells import Cell, Store, run_cells
from agents.ensemble import Fit
from agents.evaluation import SPLITS, bank, chosen, labels
from agents.measures import (
    Interval,
    capped,
    expected_best,
    interquartile_mean,
    log_ratio,
    mean,
    random_search_equivalents,
)
from agents.meta_dataset import Studied, draw, study, to_unit
from agents.meta_features import LANDMARK_COST, meta_features
from agents.optional import require
from agents.proposer import Proposer
from agents.provenance import provenance
from agents.recurrent_search import RecurrentSearch
from agents.schedules import Cosine
from agents.searches import OptunaSearch, SearchName
from agents.summary import MEASURES, losses
from agents.surrogate import FIT, SHARES, Configured, Surrogate, held_out, intervals
from hpo_env.base_schedules import BaseSchedule, calibrated
from hpo_env.hyperparameters import Array
from inner_models.splits import META_TRAIN
from inner_models.tasks import Task
from scripts.common import Quiet, at_least, run_main, work_bar, write_json
from scripts.evaluate import default_cache
from scripts.reporting.drawing import save
from scripts.reporting.sheet import present
from scripts.reporting.surrogate_plots import Figures, search_figure, sheets_of, surrogate_figure

PREDICTORS = ("surrogate", "without meta-features", "present loss")

KAPPAS = (0.0, 0.5, 1.0, 2.0)


@dataclass
class Config(Quiet):
    """Fit the surrogate to random trials on meta-train, and judge it on meta-validation.

    Prints how its predictions rank trials (zero-shot, and from parts of their curves), what its first proposal is worth
    in one trial, and what its proposals save searches that begin with them. Needs the extras `compare` and `data`.
    Takes some nine minutes on 2 cores, two where measure_warm_start.py has run; what has been run is kept in the cache.
    The figures in the docs are the second command's.

        python scripts/measure_surrogate.py --json runs/surrogate.json
        python scripts/measure_surrogate.py --tasks 192 --trials 64 --searches tpe gp --json results/surrogate.json
    """

    tasks: int = 96
    """Tasks of meta-train that it learns from."""
    trials: int = 32
    """Random trials of each of these."""
    steps: int = FIT.steps
    """Of fitting it."""
    parts: int = 4
    """Parts that the data sets of meta-train are held out in, one after the other; 0 leaves this out."""
    judged: tuple[str, ...] = ()
    """Only these tasks of the split."""
    split: Literal["meta-validation-small", "meta-validation"] = "meta-validation"
    """Where the tasks come from that are judged."""
    seeds: int = 5
    """Runs of each judged task and one-trial method, paired."""
    bank: int = 256
    """Random trials of each judged task."""
    searches: tuple[SearchName, ...] = ("tpe",)
    """Searches that begin with the surrogate's proposals, and without."""
    first: int = 4
    """Proposals that they begin with."""
    budget: int = 32
    """Trials of a search."""
    search_seeds: int = 2
    """Searches of each kind on each task."""
    proposer: Path | None = None
    """What `scripts/measure_recurrent_search.py --out` saved: its search, too."""
    workers: int = 2
    """Processes, one thread each."""
    cache: Path | None = None
    """Where finished runs are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    out: Path | None = None
    """Save the surrogate to this file."""
    json: Path | None = None
    """Write all figures to this file."""
    markdown: Path | None = None
    """Write the tables to this file."""
    figures: Path | None = None
    """Write the figures (PNG) to this folder."""


@dataclass(frozen=True)
class Judged:
    """What was run on a task of the split.

    Attributes:
        proposals: the surrogate's.
        bank, calibrated, proposed: random trials; one a seed with the calibrated schedule and with the first proposal.
        searches: name -> best validation loss so far after each trial, `[search seeds, trials]`, finite.
    """

    task: Task
    proposals: Sequence[BaseSchedule]
    bank: list[Run]
    calibrated: list[Run]
    proposed: list[Run]
    searches: Mapping[str, Array]


def main(config: Config) -> None:
    tasks = chosen(labels(SPLITS[config.split]), config.judged)
    at_least(config, 1, "tasks", "workers", "first", "search_seeds")
    at_least(config, 2, "seeds", "trials", *(["parts"] if config.parts else []))
    at_least(config, config.search_seeds, "seeds")
    at_least(config, config.first, "budget")
    at_least(config, config.budget, "bank")
    drawn = draw(META_TRAIN, config.tasks)
    datasets = len({task.dataset for task in drawn})
    learned_from = datasets - math.ceil(datasets / config.parts) if config.parts else datasets
    if learned_from < FIT.members:
        raise ValueError(
            f"--tasks {config.tasks} leave {learned_from} data sets to learn from, {FIT.members} are needed; take more"
        )
    if config.parts > datasets:
        raise ValueError(f"--parts must be {datasets} or less, as many as there are data sets, not {config.parts}")
    for package in ("matplotlib", "optuna"):
        require(package, extra="compare")  # rather now than after a quarter of an hour
    proposer = Proposer.load(config.proposer) if config.proposer else None
    store = Store(config.cache or default_cache())
    with work_bar("studying meta-train") as report:
        studied = study(drawn, config.trials, store, workers=config.workers, report=report)
    fit = replace(FIT, steps=config.steps)
    surrogate, blind = Surrogate.fit(studied, fit), Surrogate.fit(studied, fit, names=())
    if config.out:
        surrogate.save(config.out)
    judged = _judge(config, tasks, surrogate, proposer, store)
    models = dict(zip(PREDICTORS, (surrogate, blind, None), strict=True))
    result: Figures = {
        "rank_correlation": _pooled({label: _ranks(models, one) for label, one in judged.items()}),
        "first_proposal": _first(judged),
        "searches": _searches(judged, config.budget),
        "landmark_cost": {
            **{f"{kind} from surrogate": LANDMARK_COST for kind in config.searches},
            **({"recurrent": proposer.landmark_cost} if proposer else {}),
        },
    }
    if config.parts:
        result["held_out"] = _held_out(studied, config.parts, fit)
    present(sheets_of(result), config.markdown)
    if config.figures:
        save({"surrogate": surrogate_figure(result), "surrogate-searches": search_figure(result)}, config.figures)
    if config.json:
        names = ("tasks", "trials", "seeds", "bank", "first", "budget", "search_seeds")
        settings = {name: getattr(config, name) for name in names}
        write_json(config.json, {**result, **settings, "computed_on": provenance("cpu")})


def _judge(
    config: Config, tasks: dict[str, Task], surrogate: Surrogate, proposer: Proposer | None, store: Store
) -> dict[str, Judged]:
    """Run what `store` does not hold, and gather it."""
    seeds, found = tuple(range(config.seeds)), {}
    proposals = {label: tuple(surrogate.propose(task, config.first)) for label, task in tasks.items()}
    runs: dict[str, dict[str, list[Cell]]] = {}
    searches: dict[str, dict[str, list[Cell]]] = {}
    for label, task in tasks.items():
        runs[label] = {
            "bank": bank(task, config.bank),
            "calibrated": [Cell(task, Cosine("calibrated"), seeds)],
            "proposed": [Cell(task, Configured(proposals[label][0]), seeds)],
        }
        starts = {"": (), " from calibrated": (calibrated(task.optimizer),), " from surrogate": proposals[label]}
        searches[label] = {
            kind + start: [
                Cell(task, OptunaSearch(kind, config.budget, first=first), (seed,))
                for seed in seeds[: config.search_seeds]
            ]
            for kind in config.searches
            for start, first in starts.items()
        }
    every = [cell for of in (runs, searches) for named in of.values() for cells in named.values() for cell in cells]
    with work_bar("judging") as report:
        run_cells(every, store, workers=config.workers, report=report)
    for label, task in tasks.items():
        trials, base, own = (_load(store, cells) for cells in runs[label].values())
        expected = expected_best(losses(trials, "val"))[: config.budget]
        best = {"random": np.tile(expected, (config.search_seeds, 1))}
        done = {name: _load(store, cells) for name, cells in searches[label].items()}
        if proposer:
            done["recurrent"] = RecurrentSearch(proposer, config.budget).run(task, seeds[: config.search_seeds])
        for name, of_kind in done.items():
            pairs = zip(of_kind, base, strict=False)  # fewer searches than runs
            best[name] = np.stack([capped(search.best, run.initial_loss) for search, run in pairs])
        found[label] = Judged(task, proposals[label], trials, base, own, best)
    return found


def _load(store: Store, cells: Sequence[Cell]) -> list[Any]:
    return [result for cell in cells for result in store.load(cell)]


def _ranks(models: Mapping[str, Surrogate | None], one: Judged) -> dict[str, dict[float, float]]:
    optimizer = one.task.optimizer
    trials = sample_schedules(optimizer, len(one.bank), np.random.default_rng(RandomTrials.seed))
    settings = np.stack([to_unit(trial, optimizer) for trial in trials])
    curves = np.array([[run.initial_loss, *run.val_loss] for run in one.bank])
    curves = capped(curves, curves[:, :1])
    return {name: correlations(model, meta_features(one.task), settings, curves) for name, model in models.items()}


def correlations(
    model: Surrogate | None, features: Mapping[str, float], settings: Array, curves: Array
) -> dict[float, float]:
    """Spearman's rank correlation of predicted and final losses, by the share of the run that is seen.

    Args:
        model: the present loss where there is none, which says nothing before training.
        settings, curves: of trials, `[trials, controls]` and `[trials, 1 + horizon]`.
    """
    horizon, found = curves.shape[1] - 1, {}
    for share in (0.0, *SHARES):
        seen = intervals(share, horizon)
        if model is not None:
            predicted = model.predict(features, settings, curves[:, : seen + 1], seen / horizon)[0]
        elif seen:
            predicted = curves[:, seen]
        else:
            continue
        found[share] = float(spearmanr(predicted, curves[:, -1]).statistic)
    return found


def _pooled(by_task: Mapping[str, Mapping[str, Mapping[float, float]]]) -> Figures:
    """Means over tasks with bootstrap intervals, and each task's own."""
    found: Figures = {}
    for name, of_first in next(iter(by_task.values())).items():
        found[name] = {}
        for share in of_first:
            own = {label: of_task[name][share] for label, of_task in by_task.items()}
            found[name][f"{share:g}"] = _interval(mean([list(own.values())])) | {"by_task": own}
    return found


def _interval(interval: Interval) -> Figures:
    return {"value": interval.value, "ci": [interval.low, interval.high]}


def _first(judged: Mapping[str, Judged]) -> Figures:
    """What one trial with the first proposal is worth."""
    found: Figures = {"by_task": {}}
    ratios: dict[str, list[Array]] = {measure: [] for measure in MEASURES}
    for label, one in judged.items():
        row: Figures = {"settings": one.proposals[0].to_dict()}
        for name, runs in (("rse", one.proposed), ("rse_calibrated", one.calibrated)):
            row[name] = random_search_equivalents(losses(one.bank, "val"), float(losses(runs, "val").mean()))
        for measure, of_tasks in ratios.items():
            of_tasks.append(log_ratio(losses(one.calibrated, measure), losses(one.proposed, measure)))
            row[measure] = _interval(mean([of_tasks[-1]]))
        found["by_task"][label] = row
    for measure, of_tasks in ratios.items():
        found[measure] = _interval(interquartile_mean(of_tasks))
    for name in ("rse", "rse_calibrated"):
        found[name] = float(np.median([row[name] for row in found["by_task"].values()]))
    return found


def _searches(judged: Mapping[str, Judged], budget: int) -> Figures:
    """Log ratios of the best so far to the calibrated schedule, by search and number of trials."""
    found: Figures = {}
    for name in next(iter(judged.values())).searches:
        found[name] = {}
        for trials in (2**power for power in range(budget.bit_length())):
            ratios = []
            for one in judged.values():
                best = one.searches[name][:, trials - 1]
                ratios.append(log_ratio(losses(one.calibrated, "val")[: len(best)], best))
            found[name][str(trials)] = _interval(interquartile_mean(ratios))
    return found


def _held_out(studied: Sequence[Studied], parts: int, fit: Fit) -> Figures:
    """On meta-train data sets that the surrogate has not seen: its rank correlations, and the mean score of the trial
    that it would pick from the task's own before training, by kappa, with what the best and a random one score."""
    ranks: dict[str, dict[str, dict[float, float]]] = {}
    picks: dict[float, list[float]] = {kappa: [] for kappa in KAPPAS}
    for index, (surrogate, one) in enumerate(held_out(studied, parts, fit)):
        own = correlations(surrogate, one.features, one.settings, np.exp(one.curves))
        present = correlations(None, one.features, one.settings, np.exp(one.curves))
        ranks[f"{index}"] = {"surrogate": own, "present loss": present}
        means, doubts = surrogate.predict(one.features, one.settings)
        for kappa, scores in picks.items():
            scores.append(float(one.scores[np.argmin(means + kappa * doubts)]))
    found = {f"kappa {kappa:g}": _interval(mean([scores])) for kappa, scores in picks.items()}
    found["best trial"] = _interval(mean([[one.scores.min() for one in studied]]))
    found["random trial"] = _interval(mean([[one.scores.mean() for one in studied]]))
    return {"rank_correlation": _pooled(ranks), "score_of_the_pick": found, "tasks": len(studied)}


if __name__ == "__main__":
    run_main(Config, main)
