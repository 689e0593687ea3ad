"""Evaluations of runs that nobody trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agents.application import Run
from agents.evaluation import FACTORS, Budget, Evaluation
from agents.searches import Searched
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from tests.tiny import random_policy

TASK = Task("digits", ModelSpec("mlp", 8, 1), "sgd", horizon=3)
SEEDS = 4


def run(val: float, seed: int = 0, test: float | None = None, initial: float = 4.0, seconds: float = 2.0) -> Run:
    """A run that ends at `val`, after something in between."""
    test = 1.5 * val if test is None else test
    return Run(seed, initial, [initial, 2.0, val], [initial, 2.0, val], {"lr": [0.1] * 3}, test, 2 * test, seconds)


def runs(*vals: float) -> list[Run]:
    return [run(val, seed) for seed, val in enumerate(vals)]


def evaluation(
    policy: dict[str, list[Run]],
    bank: Callable[[str], list[Run]],
    others: dict[str, Callable[[str], list[Run]]] | None = None,
    starts: Callable[[str, str, float], list[Run]] | None = None,
    searches: dict[str, dict[str, list[Searched]]] | None = None,
    training: dict[str, Any] | None = None,
) -> Evaluation:
    """An evaluation of runs given, the calibrated schedule's at one budget; by default, starts end as that does."""
    judged = random_policy()
    judged.header = replace(judged.header, training=training or {})
    others = {"calibrated": lambda label: list(policy[label])} | (others or {})
    banks = {label: bank(label) for label in policy}
    calibrated = {label: others["calibrated"](label) for label in policy}
    starting = starts or (lambda label, name, factor: calibrated[label])
    seeds = len(next(iter(policy.values())))
    names = next(iter(searches.values())) if searches else ()
    return Evaluation(
        judged,
        Budget(seeds, len(next(iter(banks.values()))), (1.0,), tuple(names), search_seeds=1),
        dict.fromkeys(policy, TASK),
        runs={"policy": policy} | {name: {label: make(label) for label in policy} for name, make in others.items()},
        banks=banks,
        budgets={label: {1.0: calibrated[label]} for label in policy},
        starts={
            label: {n: {f: starting(label, n, f) for f in FACTORS} for n in ("policy", "calibrated", "cosine")}
            for label in policy
        },
        searches=searches or {label: {} for label in policy},
    )
