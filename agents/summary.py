"""The figures of an evaluation. A log ratio is ln(the other's loss / the policy's loss): above 0, the policy is better.

Losses are capped (`agents.measures.capped`). Validation losses are those at the end of a run; test losses those at
the interval of its best validation loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import Array
from hpo_env.rewards import CEILING

from .application import Run
from .evaluation import FACTORS, Evaluation
from .measures import (
    LOSS_FLOOR,
    Interval,
    capped,
    equivalents_interval,
    expected_at_best,
    interquartile_mean,
    log_ratio,
    mean,
    random_search_equivalents,
    speedup,
    trials_to_reach,
    win_rate,
    worst_decile,
)
from .presets import PRESETS
from .searches import Searched

MEASURES = ("val", "test")
REFERENCE = "calibrated"
NEAR = 1.05
"""A bad start is made good if the run ends within this factor of the loss that it ends with from the good start."""

BEST_ON_TEST = 8
"""Trials of the bank that stand for the best on the test split."""

COSTS = (2, 4, 8, 16, 32, 64, 128, 256)
"""Costs, in full runs, at which searches are compared."""


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """All figures, as JSON has them: `tasks` one by one and the `summary` over them."""
    tasks = {label: _task(evaluation, label) for label in evaluation.tasks}
    methods = [name for name in evaluation.runs if name != "policy"]
    speedups = interquartile_mean([np.log(task["speedup"]) for task in tasks.values()])
    banks = [losses(evaluation.banks[label], "val") for label in tasks]
    equivalents = equivalents_interval(banks, [losses(evaluation.runs["policy"][label], "val") for label in tasks])
    summary: dict[str, Any] = {
        "rse_median": equivalents.value,
        "rse_median_ci": [equivalents.low, equivalents.high],
        "rse_by_task": {label: task["rse"] for label, task in tasks.items()},
        "rse_calibrated_by_task": {label: task["rse_calibrated"] for label, task in tasks.items()},
        "rse_test_median": float(np.median([task["rse_test"] for task in tasks.values()])),
        "rse_best_val_median": float(np.median([task["rse_best_val"] for task in tasks.values()])),
        "rse_cap": evaluation.budget.bank,
        "speedup_iqm": math.exp(speedups.value),
        "speedup_ci": [math.exp(speedups.low), math.exp(speedups.high)],
        "speedup_at_an_end": float(np.mean([task["speedup_at_an_end"] for task in tasks.values()])),
    }
    against = {name: _against(evaluation, name) for name in methods}
    for name, figures in against.items():
        figures["rse_median"] = float(np.median([task["methods"][name]["rse"] for task in tasks.values()]))
    reference = against[REFERENCE]
    for measure in MEASURES:
        summary |= {f"{measure}_log_ratio_{end}": reference[f"{measure}_log_ratio_{end}"] for end in ("iqm", "ci")}
    summary |= {key: reference[key] for key in ("win_rate", "worst_decile", "test_win_rate", "test_worst_decile")}
    for key, name in (
        ("replay", "replay-other-tasks"),
        ("replay_same_task", "replay-same-task"),
        ("shuffled", "shuffled"),
    ):
        summary[f"{key}_log_ratio_ci"] = against[name]["val_log_ratio_ci"] if name in against else None
    summary["bad_start_failures"] = _bad_starts(evaluation)
    summary["bad_start_recovery"] = recovery(tasks)
    summary["against"] = against
    summary["against_searches"] = _against_searches(evaluation)
    summary["pays_for_itself_after_runs"] = _pays_after(evaluation, tasks)
    return {"tasks": tasks, "summary": summary}


def losses(runs: Sequence[Run], measure: str) -> Array:
    """Capped losses, `[runs]`: `val` at the end, `val_best`, `test` at the best validation loss, `test_final`."""
    taken: Callable[[Run], float] = {
        "val": lambda run: run.val_loss[-1],
        "val_best": lambda run: min(run.val_loss, key=lambda loss: loss if math.isfinite(loss) else math.inf),
        "test": lambda run: run.test_loss,
        "test_final": lambda run: run.final_test_loss,
    }[measure]
    return capped([taken(run) for run in runs], [run.initial_loss for run in runs])


def ratios(evaluation: Evaluation, name: str, measure: str) -> list[Array]:
    """Log ratios of a method's losses to the policy's, one array `[seeds]` a task."""
    runs = evaluation.runs
    return [
        log_ratio(losses(runs[name][label], measure), losses(runs["policy"][label], measure))
        for label in evaluation.tasks
    ]


def search_losses(searches: list[Searched], cost: float, measure: str) -> Array:
    """What each search has found by `cost`, `[searches]`; infinite where it has finished no trial."""
    found = []
    for search in searches:
        finished = [index for index, spent in enumerate(search.cost) if spent <= cost + 1e-9]
        entries = search.best if measure == "val" else search.test
        found.append(entries[finished[-1]] if finished else math.inf)
    return np.array(found)


def _task(evaluation: Evaluation, label: str) -> dict[str, Any]:
    trials = evaluation.banks[label]
    bank = losses(trials, "val")
    runs = {name: by_label[label] for name, by_label in evaluation.runs.items()}
    own = losses(runs["policy"], "val")
    multiples = sorted(evaluation.budgets[label])
    # One curve for all seeds: that of a single seed hardly falls where noise is larger than what a budget gains.
    curve = [_geometric_mean(losses(evaluation.budgets[label][multiple], "val")) for multiple in multiples]
    speedups = [speedup(multiples, curve, loss) for loss in own.tolist()]
    expected = {measure: _expected(evaluation, label, measure) for measure in MEASURES}
    equivalents = equivalents_interval([bank], [own])
    costs = [cost for cost in COSTS if cost <= len(bank)]
    best_on_test = bank[np.argsort(losses(trials, "test_final"), kind="stable")[:BEST_ON_TEST]].tolist()
    return {
        "horizon": evaluation.tasks[label].horizon,
        "rse": int(equivalents.value),
        "rse_ci": [equivalents.low, equivalents.high],
        "rse_test": trials_to_reach(
            expected_at_best(bank, losses(trials, "test")), float(losses(runs["policy"], "test").mean())
        ),
        "rse_best_val": random_search_equivalents(
            losses(trials, "val_best"), float(losses(runs["policy"], "val_best").mean())
        ),
        "rse_of_best_on_test": float(np.median([random_search_equivalents(bank, loss) for loss in best_on_test])),
        "rse_by_seed": [random_search_equivalents(bank, loss) for loss in own.tolist()],
        "rse_calibrated": random_search_equivalents(bank, float(losses(runs[REFERENCE], "val").mean())),
        "speedup": speedups,
        "speedup_at_an_end": float(np.mean([value in (multiples[0], multiples[-1]) for value in speedups])),
        "calibrated_by_budget": {str(multiple): loss for multiple, loss in zip(multiples, curve, strict=True)},
        "methods": {name: _method(runs[name], runs["policy"], bank) for name in runs},
        "random_search": {
            str(cost): {measure: float(values[cost - 1]) for measure, values in expected.items()} for cost in costs
        },
        "searches": {
            name: {
                str(cost): {measure: _finite(search_losses(searches, cost, measure)) for measure in MEASURES}
                for cost in _costs(searches)
            }
            for name, searches in evaluation.searches[label].items()
        },
        "bad_starts": {
            name: {str(factor): _finite(losses(runs, "val")) for factor, runs in by_factor.items()}
            for name, by_factor in evaluation.starts[label].items()
        },
        "bank": _finite(bank),
    }


def _method(runs: list[Run], policy: list[Run], bank: Array) -> dict[str, Any]:
    figures: dict[str, Any] = {
        measure: losses(runs, measure).tolist() for measure in ("val", "val_best", "test", "test_final")
    }
    figures["rse"] = random_search_equivalents(bank, float(np.mean(figures["val"])))
    figures["seconds"] = float(np.mean([run.seconds for run in runs]))
    figures["lost"] = int(_lost(runs).sum())
    if runs is not policy:
        for measure in MEASURES:
            ratio = mean([log_ratio(losses(runs, measure), losses(policy, measure))])
            figures[f"{measure}_log_ratio"] = asdict(ratio)
    return figures


def _against(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """The policy against a method, over all tasks and seeds."""
    figures: dict[str, Any] = {}
    for measure in (*MEASURES, "val_best", "test_final"):
        by_task = ratios(evaluation, name, measure)
        figures |= _interval(f"{measure}_log_ratio", interquartile_mean(by_task))
        prefix = "" if measure == "val" else f"{measure}_"
        pooled = np.concatenate(by_task)
        figures |= {f"{prefix}win_rate": win_rate(pooled), f"{prefix}worst_decile": worst_decile(pooled)}
    return figures


def _against_searches(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """The policy against each search at each cost; random search is the bank's expectation."""
    table: dict[str, dict[str, Any]] = {"random": {}}
    own = {m: {label: losses(evaluation.runs["policy"][label], m) for label in evaluation.tasks} for m in MEASURES}
    for cost in (cost for cost in COSTS if cost <= evaluation.budget.bank):
        figures: dict[str, Any] = {}
        for measure in MEASURES:
            by_task = [
                log_ratio(
                    np.full(evaluation.budget.seeds, _expected(evaluation, label, measure)[cost - 1]),
                    own[measure][label],
                )
                for label in evaluation.tasks
            ]
            figures |= _interval(f"{measure}_log_ratio", interquartile_mean(by_task))
        table["random"][str(cost)] = figures
    for name in next(iter(evaluation.searches.values())):
        everywhere = {label: found[name] for label, found in evaluation.searches.items()}
        table[name] = {}
        for cost in _costs([search for searches in everywhere.values() for search in searches]):
            figures = {}
            for measure in MEASURES:
                by_task = [
                    log_ratio(search_losses(searches, cost, measure), own[measure][label][: len(searches)])
                    for label, searches in everywhere.items()
                ]
                figures |= _interval(f"{measure}_log_ratio", interquartile_mean(by_task))
                if evaluation.budget.search_seeds == 1:  # there is nothing to resample
                    figures[f"{measure}_log_ratio_ci"] = None
            table[name][str(cost)] = figures
    return table


def _costs(searches: list[Searched]) -> list[int]:
    """The costs at which every one of the searches has found something, up to what they spent."""
    most = math.ceil(max(search.cost[-1] for search in searches))
    reached = [cost for cost in COSTS if cost <= most or cost / 2 < most]
    return [cost for cost in reached if np.isfinite(search_losses(searches, cost, "test")).all()]


def _expected(evaluation: Evaluation, label: str, measure: str) -> Array:
    """What n trials of the bank find in expectation, `[N]`: geometric means, as the other searches' ratios are means of
    logarithms."""
    bank = evaluation.banks[label]
    logs = np.log(np.maximum(losses(bank, measure), LOSS_FLOOR))
    return np.exp(expected_at_best(losses(bank, "val"), logs))


def _geometric_mean(values: Array) -> float:
    return float(np.exp(np.log(np.maximum(values, LOSS_FLOOR)).mean()))


def _bad_starts(evaluation: Evaluation) -> dict[str, Any]:
    """Share of runs that are lost or end worse than the calibrated schedule does from its own, good start."""
    # Tuners and optimizers that choose absolute rates do not read the user's: one run stands for all its starts.
    blind = [name for name in ("policy", "prodigy") if name in evaluation.runs]
    failures: dict[str, list[bool]] = {name: [] for name in (*blind, "policy_given", "calibrated", "cosine")}
    by_factor: dict[str, dict[str, list[bool]]] = {
        name: {str(f): [] for f in FACTORS} for name in failures if name not in blind
    }
    for label in evaluation.tasks:
        bar = losses(evaluation.runs[REFERENCE][label], "val")
        for name in blind:
            failures[name] += _failed(evaluation.runs[name][label], bar)
        for starter, starts in evaluation.starts[label].items():
            key = "policy_given" if starter == "policy" else starter
            for factor, runs in starts.items():
                failed = _failed(runs, bar)
                failures[key] += failed
                by_factor[key][str(factor)] += failed
    shares = {name: float(np.mean(values)) for name, values in failures.items()}
    detail = {name: {f: float(np.mean(values)) for f, values in table.items()} for name, table in by_factor.items()}
    return shares | {"by_factor": detail}


def recovery(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """How near bad starts end to the same run's end from the good start, x 1.

    Args:
        tasks: as in `summarize`; their `bad_starts` are looked at.

    Returns:
        Starter -> factor -> `nearness`.
    """
    starters = next(iter(tasks.values()))["bad_starts"]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_factor in starters.items():
        tables = [task["bad_starts"][name] for task in tasks.values()]
        good = np.concatenate([table["1.0"] for table in tables])
        found[name] = {}
        for factor in by_factor:
            found[name][factor] = nearness(np.concatenate([table[factor] for table in tables]), good)
    return found


def nearness(ends: Array, good: Array) -> dict[str, float]:
    """`near`: the share of runs that end within `NEAR` of the loss from the good start; `median`: of the losses' ratio.

    Args:
        ends, good: final losses, `[runs]`, from the bad start and from the good one.
    """
    ratios = ends / good
    return {"near": float(np.mean(ratios <= NEAR)), "median": float(np.median(ratios))}


def _failed(runs: list[Run], bar: Array) -> list[bool]:
    worse = losses(runs, "val") > bar * (1 + 1e-9)
    return [bool(failed) for failed in _lost(runs) | worse]


def _lost(runs: list[Run]) -> NDArray[np.bool_]:
    """Whose final loss is capped."""
    return np.array([not run.val_loss[-1] <= CEILING * run.initial_loss for run in runs])


def _pays_after(evaluation: Evaluation, tasks: dict[str, Any]) -> float | None:
    """Runs after which meta-training has paid for itself in time on one core: each saves the trials of random search
    that the policy is worth beyond those that the calibrated schedule, which costs nothing more, is worth."""
    training = evaluation.policy.header.training
    preset = PRESETS.get(training.get("preset", ""))
    spent = training.get("seconds", 0.0) * (preset.workers if preset else 1)
    saved = np.mean(
        [
            (task["rse"] - task["rse_calibrated"]) * np.mean([run.seconds for run in evaluation.banks[label]])
            for label, task in tasks.items()
        ]
    )
    return float(spent / saved) if spent and saved > 0 else None


def _interval(name: str, interval: Interval) -> dict[str, Any]:
    return {f"{name}_iqm": interval.value, f"{name}_ci": [interval.low, interval.high]}


def _finite(values: Array) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
