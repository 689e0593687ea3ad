"""The figures of an evaluation. A log ratio is ln(the other's loss / the policy's loss): above 0, the policy is better.

Losses are capped (`agents.measures.capped`). Validation losses are those at the end of a run; test losses those at
the interval of its best validation loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from hpo_env.hyperparameters import Array

from .application import Run
from .evaluation import FACTORS, Evaluation
from .measures import (
    Interval,
    capped,
    expected_at_best,
    expected_best,
    interquartile_mean,
    log_ratio,
    mean,
    random_search_equivalents,
    speedup,
    win_rate,
    worst_decile,
)
from .searches import Searched

MEASURES = ("val", "test")
REFERENCE = "calibrated"
COSTS = (2, 4, 8, 16, 32, 64, 128, 256)
"""Costs, in full runs, at which searches are compared."""


def summarize(evaluation: Evaluation) -> dict[str, Any]:
    """All figures, as JSON has them: `tasks` one by one and the `summary` over them."""
    tasks = {label: _task(evaluation, label) for label in evaluation.tasks}
    methods = [name for name in evaluation.runs if name != "policy"]
    summary: dict[str, Any] = {
        "rse_median": float(np.median([task["rse"] for task in tasks.values()])),
        "rse_by_task": {label: task["rse"] for label, task in tasks.items()},
        "rse_calibrated_by_task": {label: task["rse_calibrated"] for label, task in tasks.items()},
        "rse_cap": evaluation.budget.bank,
        **_interval("speedup", interquartile_mean([task["speedup"] for task in tasks.values()])),
    }
    against = {name: _against(evaluation, name) for name in methods}
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
    summary["against"] = against
    summary["against_searches"] = _against_searches(evaluation)
    summary["pays_for_itself_after_runs"] = _pays_after(evaluation, summary["rse_median"])
    summary["training_seconds"] = _training_seconds(evaluation)
    return {"tasks": tasks, "summary": summary}


def losses(runs: list[Run], measure: str) -> Array:
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
    bank = losses(evaluation.banks[label], "val")
    runs = {name: by_label[label] for name, by_label in evaluation.runs.items()}
    own = losses(runs["policy"], "val")
    multiples = sorted(evaluation.budgets[label])
    calibrated = np.array([losses(evaluation.budgets[label][multiple], "val") for multiple in multiples])
    expected = {"val": expected_best(bank), "test": expected_at_best(bank, losses(evaluation.banks[label], "test"))}
    costs = [cost for cost in COSTS if cost <= len(bank)]
    return {
        "horizon": evaluation.tasks[label].horizon,
        "rse": random_search_equivalents(bank, float(own.mean())),
        "rse_by_seed": [random_search_equivalents(bank, loss) for loss in own.tolist()],
        "rse_calibrated": random_search_equivalents(bank, float(losses(runs[REFERENCE], "val").mean())),
        "speedup": [speedup(multiples, column, loss) for column, loss in zip(calibrated.T, own.tolist(), strict=True)],
        "methods": {name: _method(runs[name], runs["policy"]) for name in runs},
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


def _method(runs: list[Run], policy: list[Run]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        measure: losses(runs, measure).tolist() for measure in ("val", "val_best", "test", "test_final")
    }
    figures["seconds"] = float(np.mean([run.seconds for run in runs]))
    figures["lost"] = sum(not math.isfinite(run.val_loss[-1]) for run in runs)
    if runs is not policy:
        for measure in MEASURES:
            ratio = mean([log_ratio(losses(runs, measure), losses(policy, measure))])
            figures[f"{measure}_log_ratio"] = asdict(ratio)
    return figures


def _against(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """The policy against a method, over all tasks and seeds."""
    figures: dict[str, Any] = {}
    for measure in (*MEASURES, "val_best"):
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
            by_task = []
            for label, bank in evaluation.banks.items():
                expected = expected_at_best(losses(bank, "val"), losses(bank, measure))[cost - 1]
                by_task.append(log_ratio(np.full(evaluation.budget.seeds, expected), own[measure][label]))
            figures |= _interval(f"{measure}_log_ratio", interquartile_mean(by_task))
        table["random"][str(cost)] = figures
    for name in evaluation.budget.searches:
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
            table[name][str(cost)] = figures
    return table


def _costs(searches: list[Searched]) -> list[int]:
    """The costs at which every one of the searches has found something, up to what they spent."""
    most = math.ceil(max(search.cost[-1] for search in searches))
    reached = [cost for cost in COSTS if cost <= most or cost / 2 < most]
    return [cost for cost in reached if np.isfinite(search_losses(searches, cost, "test")).all()]


def _bad_starts(evaluation: Evaluation) -> dict[str, Any]:
    """Share of runs that diverge or end worse than the calibrated schedule does from its own, good start."""
    failures: dict[str, list[bool]] = {"policy_given": [], "calibrated": [], "cosine": []}
    by_factor: dict[str, dict[str, list[bool]]] = {name: {str(f): [] for f in FACTORS} for name in failures}
    own = []
    for label in evaluation.tasks:
        bar = losses(evaluation.runs[REFERENCE][label], "val")
        # A tuner that chooses absolute values does not read the user's rate: one run stands for all its starts.
        own += _failed(evaluation.runs["policy"][label], bar)
        for name, starts in evaluation.starts[label].items():
            key = "policy_given" if name == "policy" else name
            for factor, runs in starts.items():
                failed = _failed(runs, bar)
                failures[key] += failed
                by_factor[key][str(factor)] += failed
    shares = {"policy": float(np.mean(own))} | {name: float(np.mean(values)) for name, values in failures.items()}
    detail = {name: {f: float(np.mean(values)) for f, values in table.items()} for name, table in by_factor.items()}
    return shares | {"by_factor": detail}


def _failed(runs: list[Run], bar: Array) -> list[bool]:
    lost = np.array([not math.isfinite(run.val_loss[-1]) for run in runs])
    worse = losses(runs, "val") > bar * (1 + 1e-9)
    return [bool(failed) for failed in lost | worse]


def _pays_after(evaluation: Evaluation, rse: float) -> float | None:
    """Runs after which meta-training has paid for itself in time: each saves `rse` - 1 trials of random search."""
    spent = evaluation.policy.header.training.get("seconds")
    saved = np.mean([(rse - 1) * np.mean([run.seconds for run in bank]) for bank in evaluation.banks.values()])
    return float(spent / saved) if spent and saved > 0 else None


def _training_seconds(evaluation: Evaluation) -> float:
    """What all of it took on one core: methods, banks, budgets, starts and searches."""
    groups = [runs for by_label in evaluation.runs.values() for runs in by_label.values()]
    groups += list(evaluation.banks.values())
    groups += [runs for by_multiple in evaluation.budgets.values() for runs in by_multiple.values()]
    groups += [
        runs for starts in evaluation.starts.values() for by_factor in starts.values() for runs in by_factor.values()
    ]
    searches = [search for found in evaluation.searches.values() for group in found.values() for search in group]
    return sum(run.seconds for runs in groups for run in runs) + sum(search.seconds for search in searches)


def _interval(name: str, interval: Interval) -> dict[str, Any]:
    return {f"{name}_iqm": interval.value, f"{name}_ci": [interval.low, interval.high]}


def _finite(values: Array) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
