"""A model for a data set: a learned successive halving over a menu, against other ways to spend the same runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from agents.architecture_choice import (
    PARTS,
    Choice,
    Halving,
    Recorded,
    hyperband,
    problems,
    race,
    train_menus,
)
from agents.cells import Store
from agents.controllers import WithPolicy
from agents.final_loss import Curve, FinalLoss, Trained, intervals_of
from agents.measures import LOSS_FLOOR, expected_at_best, interquartile_mean, log_ratio, mean
from agents.policy import ControlPolicy
from agents.state_file import save_state
from agents.summary import losses
from agents.tuner import pretrained_path
from hpo_env.hyperparameters import Array
from inner_models.splits import META_VALIDATION
from inner_models.tasks import Task
from scripts.common import Quiet, at_least, known, run_main, work_bar, write_json
from scripts.evaluate import default_cache
from scripts.reporting.architecture_choice_plots import HYPERBAND, PREDICTED, PRESENT, RANDOM, figure, sheets_of
from scripts.reporting.drawing import save
from scripts.reporting.sheet import present

DRAWS = 8
"""Of Hyperband, for each run."""

SHARES = (0.25, 0.5, 0.75)
"""Of the candidates, that halvings let go on."""


@dataclass
class Config(Quiet):
    """Learn on meta-train to foretell final losses, and choose models for meta-validation's data sets with it.

    Prints, for each way to choose, what is lost by it against the best candidate, and what it costs. Needs the extras
    `compare` (figure) and `data`. Takes some eleven minutes on 2 cores; runs are kept in the cache.

        python scripts/choose_architecture.py --json results/architecture_choice.json
    """

    tasks: int = 144
    """Of meta-train, to learn from, with a menu of models each; there are 72 data sets."""
    trials: int = 2
    """Runs of each model there."""
    datasets: tuple[str, ...] = ()
    """Only these of meta-validation's."""
    seeds: int = 5
    """Runs of each of their models, each run a choice."""
    cache: Path | None = None
    """Where finished runs are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    workers: int = 2
    """Processes, one thread each."""
    rule: Path | None = None
    """Write the fitted prediction to this file (safetensors)."""
    json: Path | None = None
    """Write all figures to this file."""
    markdown: Path | None = None
    """Write the tables to this file."""
    figure: Path | None = None
    """Write the figure to this file (PNG)."""


@dataclass(frozen=True)
class Spent:
    """What a way to choose comes to, on average over its own chance.

    Attributes:
        regret: ln(final validation loss of what it chose / that of the best candidate).
        test: the same of test losses at the best validation loss, against those of the same best candidate.
        runs, seconds: trained, in full runs of a candidate and in CPU time.
    """

    regret: float
    test: float
    runs: float
    seconds: float


def main(config: Config) -> None:
    at_least(config, 1, "tasks", "trials", "seeds", "workers")
    store = Store(config.cache or default_cache())
    judged, learned_from = _judged(config), problems(config.tasks)
    learning = _trained("menus to learn from", learned_from, config.trials, store, config)
    menus = _trained("menus to be judged on", judged, config.seeds, store, config)
    predictor = FinalLoss.fit(learning)
    if config.rule:
        save_state(config.rule, predictor.state_dict())
    rows = [_row(group, name, way, menus) for group, ways in _groups(predictor).items() for name, way in ways.items()]
    gains = [_gain(share, predictor, menus) for share in SHARES]
    ranks = [_ranks(part, predictor, menus) for part in PARTS]
    present(sheets_of(rows, gains, ranks), config.markdown)
    if config.figure:
        save({config.figure.stem: figure(rows, ranks)}, config.figure.parent)
    if config.json:
        settings = {name: getattr(config, name) for name in ("tasks", "trials", "seeds")}
        candidates = {menu.tasks[0].dataset: [_model(task) for task in menu.tasks] for menu in menus}
        found = {"ways": rows, "gains": gains, "rank_correlations": ranks, "candidates": candidates}
        write_json(config.json, {**found, **settings, "computed_on": store.origins})


def _judged(config: Config) -> list[Task]:
    """Of each data set the first task with AdamW."""
    first = {task.dataset: task for task in reversed(META_VALIDATION) if task.optimizer == "adamw"}
    for name in config.datasets:
        known("data set", name, list(first))
    return [task for name, task in first.items() if not config.datasets or name in config.datasets]


def _trained(what: str, tasks: Sequence[Task], runs: int, store: Store, config: Config) -> list[Trained]:
    method = WithPolicy(ControlPolicy.load(pretrained_path()))
    with work_bar(what) as report:
        return train_menus(tasks, method, range(runs), store, workers=config.workers, report=report)


Way = Callable[[Trained, int], Spent]
"""A way to choose, given a menu and which of the runs of its models."""


def _groups(predictor: FinalLoss) -> dict[str, dict[str, Way]]:
    """The ways by kind, from cheap to dear."""
    return {
        RANDOM: {f"best of {n} at random": _at_random(n) for n in (1, 2, 4, 8)} | {"train all": _at_random(None)},
        PRESENT: {f"{share:.0%} by present loss go on": _raced(Halving(None, share)) for share in SHARES},
        HYPERBAND: {"Hyperband": _hyperband},
        PREDICTED: {f"{share:.0%} by predicted loss go on": _raced(Halving(predictor, share)) for share in SHARES},
    }


def _at_random(count: int | None) -> Way:
    """The best of so many candidates, trained to the end: expectations."""

    def way(menu: Trained, run: int) -> Spent:
        val, test, seconds = _ends(menu, run)
        n = min(count or len(val), len(val))
        regret, on_test = (float(expected_at_best(val, losses)[n - 1]) for losses in (val, test))
        return Spent(regret, on_test, n, n * float(seconds.mean()))

    return way


def _raced(rule: Halving) -> Way:
    return lambda menu, run: _spent(menu, run, [race(_pool(menu, run), rule)])


def _hyperband(menu: Trained, run: int) -> Spent:
    rng = np.random.default_rng(run)
    return _spent(menu, run, [hyperband(_pool(menu, run), rng) for _ in range(DRAWS)])


def _pool(menu: Trained, run: int) -> Recorded:
    return Recorded(menu.tasks, [[runs[run]] for runs in menu.runs])


def _ends(menu: Trained, run: int) -> tuple[Array, Array, Array]:
    """Of each candidate: how far its validation and its test loss are above those of the best by validation loss, as
    log ratios; and the seconds that it took. `[candidates]` each."""
    runs = [one[run] for one in menu.runs]
    ends = {kind: losses(runs, kind) for kind in ("val", "test")}
    best = int(ends["val"].argmin())
    on_val, on_test = (log_ratio(own, np.full(len(runs), own[best])) for own in ends.values())
    return on_val, on_test, np.array([one.seconds for one in runs])


def _spent(menu: Trained, run: int, choices: Sequence[Choice]) -> Spent:
    val, test, seconds = _ends(menu, run)
    horizon = menu.tasks[0].horizon
    by_choice = [
        (
            val[choice.chosen],
            test[choice.chosen],
            choice.cost,
            sum(seconds[candidate] * len(curve.train) / horizon for candidate, curve in choice.curves.items()),
        )
        for choice in choices
    ]
    return Spent(*(float(np.mean(column)) for column in zip(*by_choice, strict=True)))


def _row(group: str, name: str, way: Way, menus: Sequence[Trained]) -> dict[str, Any]:
    """What a way comes to over all data sets and runs, and by data set."""
    spent = [[way(menu, run) for run in range(len(menu.runs[0]))] for menu in menus]
    row: dict[str, Any] = {"kind": group, "way": name, "n": sum(map(len, spent))}
    for field in fields(Spent):
        strata = [[getattr(one, field.name) for one in runs] for runs in spent]
        by_dataset = {menu.tasks[0].dataset: float(np.mean(s)) for menu, s in zip(menus, strata, strict=True)}
        row[field.name] = _interval(strata) | {"by_dataset": by_dataset}
    # By data set in units of a random choice, so that all weigh alike.
    of_random = [
        float(np.mean([_at_random(1)(menu, run).regret for run in range(len(menu.runs[0]))])) for menu in menus
    ]
    row["normalized"] = _interval(
        [[one.regret / max(unit, LOSS_FLOOR) for one in runs] for runs, unit in zip(spent, of_random, strict=True)]
    )
    return row


def _gain(share: float, predictor: FinalLoss, menus: Sequence[Trained]) -> dict[str, Any]:
    """What halving by predicted in place of present losses takes off the regret, run by run, at the same cost."""
    ways = [_raced(Halving(by, share)) for by in (None, predictor)]
    strata = []
    for menu in menus:
        present, predicted = ([way(menu, run).regret for run in range(len(menu.runs[0]))] for way in ways)
        strata.append(np.subtract(present, predicted).tolist())
    middle = interquartile_mean(strata)
    return {"share": share, **_interval(strata), "iqm": middle.value, "iqm_ci": [middle.low, middle.high]}


def _interval(strata: Sequence[Sequence[float]]) -> dict[str, Any]:
    found = mean(strata)
    return {"mean": found.value, "ci": [found.low, found.high]}


def _ranks(part: float, predictor: FinalLoss, menus: Sequence[Trained]) -> dict[str, Any]:
    """Spearman's correlation of present and of predicted losses with the final ones, after a part of the run."""
    strata: dict[str, list[list[float]]] = {"present": [], "predicted": []}
    for menu in menus:
        by_run: dict[str, list[float]] = {name: [] for name in strata}
        for run in range(len(menu.runs[0])):
            whole = [Curve.of([runs[run]]) for runs in menu.runs]
            curves = [curve.until(intervals_of(part, menu.tasks[0].horizon)) for curve in whole]
            guesses = {
                "present": [curve.val[-1] for curve in curves],
                "predicted": predictor.predict(menu.tasks, curves),
            }
            for name, guess in guesses.items():
                by_run[name].append(float(spearmanr(guess, [curve.val[-1] for curve in whole])[0]))
        for name, found in by_run.items():
            strata[name].append(found)
    return {"part": part, **{name: _interval(found) for name, found in strata.items()}}


def _model(task: Task) -> str:
    spec = task.model
    return spec.kind if spec.kind == "linear" else f"{spec.kind} {spec.width} x {spec.depth}"


if __name__ == "__main__":
    run_main(Config, main)
