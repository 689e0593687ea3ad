"""The judge: a policy, everything that a user would pick instead, and the controls that must lose, on the same tasks.

All methods meet the same seeds: equal initial weights, data order and dropout masks. `agents.summary` has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpo_env.hyperparameters import CONTROLS
from inner_models.names import unknown
from inner_models.splits import META_TEST, META_VALIDATION, META_VALIDATION_SMALL
from inner_models.tasks import Task

from .application import Run
from .calibration import RandomTrials
from .cells import Cell, Store, run_cells
from .controllers import GRID, Elsewhere, Replay, WithPolicy, mean_trajectory, of_the_others
from .policy import ControlPolicy
from .population_based import PopulationBased
from .proposer import Proposer
from .recurrent_search import RecurrentSearch
from .schedules import (
    Constant,
    Cosine,
    Hypergradient,
    OneCycle,
    Plateau,
    Prodigy,
    ScheduleFree,
    WarmupStableDecay,
)
from .searches import SEARCHES, OptunaSearch, Searched

SPLITS: dict[str, tuple[Task, ...]] = {
    "meta-validation": META_VALIDATION,
    "meta-validation-small": META_VALIDATION_SMALL,
    "meta-test": META_TEST,
}

BASELINES: dict[str, Any] = {
    "calibrated": Cosine("calibrated"),
    "cosine": Cosine(),
    "constant": Constant(),
    "plateau": Plateau(),
    "plateau-calibrated": Plateau("calibrated"),
    "warmup-stable-decay": WarmupStableDecay(),
    "one-cycle": OneCycle(),
    "schedule-free": ScheduleFree(),
    "prodigy": Prodigy(),
    "hypergradient": Hypergradient(),
}
"""What a user would pick in one trial. The last four act at every step and train in plain PyTorch."""

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Bad starts: factors on the learning rate."""

_CHUNK = 64  # trials of a bank that train as one cell


@dataclass(frozen=True)
class Budget:
    """How much an evaluation may cost.

    Attributes:
        seeds: runs of each task and method.
        bank: random-search trials of each task.
        multiples: budgets of the calibrated schedule, in units of the run's own.
        searches: names of the searches; `population-based` is one.
        search_cost: full runs that each search may spend.
        search_seeds: searches of each kind.
    """

    seeds: int = 5
    bank: int = 256
    multiples: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    searches: tuple[str, ...] = ()
    search_cost: int = 32
    search_seeds: int = 2

    def __post_init__(self) -> None:
        if self.seeds < 2 or self.bank < 2 or not 1 <= self.search_seeds <= self.seeds:
            raise ValueError(
                f"seeds and bank must be at least 2 and search_seeds lie in 1..seeds, not {self.seeds}, {self.bank} "
                f"and {self.search_seeds}"
            )


BUDGETS: dict[str, Budget] = {
    "quick": Budget(),
    "full": Budget(searches=(*SEARCHES, "population-based")),
}
"""`quick`: all but the searches. `full`: everything."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was run.

    Attributes:
        tasks: label -> task.
        runs: method -> label -> one run a seed; the policy first.
        banks: label -> random-search trials.
        budgets: label -> budget multiple -> the calibrated schedule's runs, one a seed.
        starts: label -> (`policy` or a baseline) -> factor on the learning rate -> runs, one a seed. The policy starts
            from given values here.
        searches: label -> name -> finished searches, one a search seed.
    """

    policy: ControlPolicy
    budget: Budget
    tasks: dict[str, Task]
    runs: dict[str, dict[str, list[Run]]]
    banks: dict[str, list[Run]]
    budgets: dict[str, dict[float, list[Run]]]
    starts: dict[str, dict[str, dict[float, list[Run]]]]
    searches: dict[str, dict[str, list[Searched]]]


def labels(tasks: Sequence[Task]) -> dict[str, Task]:
    """A name for each task, distinct ones also where data set and model are the same."""
    named: dict[str, Task] = {}
    for task in tasks:
        label = task.name if task.optimizer == "adamw" else f"{task.name}/{task.optimizer}"
        same = sum(known == label or known.startswith(f"{label}#") for known in named)
        named[f"{label}#{same + 1}" if same else label] = task
    return named


def chosen(tasks: Mapping[str, Task], names: Sequence[str]) -> dict[str, Task]:
    """Those of labelled tasks that are named, in the tasks' order; all of them where none is.

    Raises:
        ValueError: a name that no task has.
    """
    for name in names:
        if name not in tasks:
            raise ValueError(unknown("task", name, list(tasks)))
    return {label: task for label, task in tasks.items() if not names or label in names}


def scaled(task: Task, *, horizon: float = 1.0, width: float = 1.0) -> Task:
    """A longer run, or one of a larger model."""
    model = replace(task.model, width=round(task.model.width * width))
    return replace(task, horizon=max(1, round(task.horizon * horizon)), model=model)


def evaluate(
    policy: ControlPolicy,
    tasks: Sequence[Task],
    budget: Budget,
    store: Store,
    *,
    learned: Mapping[str, Any] | None = None,
    workers: int = 2,
    device: str = "cpu",
    report: Callable[[float, float, str], None] = lambda done, total, name: None,
) -> Evaluation:
    """Run what `store` does not hold yet, and gather all of it.

    Args:
        learned: by name, as from `agents.learned.read_all`: further methods of one trial (with `attach`), and
            proposers, which search at the cost of the other searches.
        workers, device, report: as for `agents.cells.run_cells`.

    Raises:
        ValueError: a package that is missing, a damaged cell.
    """
    named = labels(tasks)
    seeds = tuple(range(budget.seeds))
    own = {label: [Cell(task, WithPolicy(policy, record=True), seeds)] for label, task in named.items()}
    proposers = {name: one for name, one in (learned or {}).items() if isinstance(one, Proposer)}
    others = {name: one for name, one in (learned or {}).items() if name not in proposers}
    methods = {**BASELINES, **others, **ablations(policy)}
    runs = {
        name: {label: _cells(task, method, seeds) for label, task in named.items()} for name, method in methods.items()
    }
    banks = {label: bank(task, budget.bank) for label, task in named.items()}
    budgets = {
        label: {m: _cells(scaled(task, horizon=m), Cosine("calibrated"), seeds) for m in budget.multiples}
        for label, task in named.items()
    }
    starters: dict[str, Callable[[float], Any]] = {
        "policy": lambda factor: WithPolicy(policy, start="given", lr_factor=factor),
        "calibrated": lambda factor: Cosine("calibrated", factor),
        "cosine": lambda factor: Cosine("default", factor),
    }
    starts = {
        label: {name: {f: _cells(task, of(f), seeds) for f in FACTORS} for name, of in starters.items()}
        for label, task in named.items()
    }
    searching = {name: _search(name, budget) for name in budget.searches}
    searching |= {name: _learned_search(proposer, budget) for name, proposer in proposers.items()}
    searches = {
        label: {
            name: [Cell(task, search, (seed,)) for seed in seeds[: budget.search_seeds]]
            for name, search in searching.items()
        }
        for label, task in named.items()
    }
    # The policy's own runs come first: some controls are made from them.
    everything = [own, runs, banks, budgets, starts, searches]
    total = sum(cell.cost for cell in {cell.key: cell for cell in _leaves(everything)}.values())
    settings: dict[str, Any] = {"workers": workers, "device": device}
    run_cells(list(_leaves(own)), store, report=lambda done, _, name: report(done, total, name), **settings)
    recorded = _loaded(own, store)
    for label, task in named.items():
        for name, method in _made_from(policy, recorded, label).items():
            runs.setdefault(name, {})[label] = _cells(task, method, seeds)
    run_cells(list(_leaves(everything)), store, report=report, **settings)
    return Evaluation(
        policy,
        budget,
        named,
        runs={"policy": recorded, **_loaded(runs, store)},
        banks=_loaded(banks, store),
        budgets=_loaded(budgets, store),
        starts=_loaded(starts, store),
        searches=_loaded(searches, store),
    )


def _leaves(tree: Any) -> Iterator[Cell]:
    """All cells in nested dicts and lists."""
    if isinstance(tree, Cell):
        yield tree
        return
    for branch in tree.values() if isinstance(tree, dict) else tree:
        yield from _leaves(branch)


def _loaded(tree: Any, store: Store) -> Any:
    """Nested dicts of lists of cells, with the cells' results in their place."""
    if isinstance(tree, dict):
        return {name: _loaded(branch, store) for name, branch in tree.items()}
    return [result for cell in tree for result in store.load(cell)]


def bank(task: Task, trials: int) -> list[Cell]:
    """Random search. Trial i trains with seed i modulo the seeds of a full evaluation, whatever this one's are."""
    chunks = [range(start, min(start + _CHUNK, trials)) for start in range(0, trials, _CHUNK)]
    return [
        Cell(task, RandomTrials(chunk.start, len(chunk)), tuple(trial % Budget.seeds for trial in chunk))
        for chunk in chunks
    ]


def ablations(policy: ControlPolicy) -> dict[str, Any]:
    """Less than the whole policy: parts of it, and what it does without eyes or without sense."""
    return {
        "base-rule": Replay(policy.header.base_rules, np.zeros((1, GRID, len(CONTROLS)))),
        **{f"{name}-only": WithPolicy(policy, controls=(name,), guard=False) for name in policy.header.controls},
        "lr-and-batch-size": WithPolicy(policy, controls=("lr", "batch_size"), guard=False),
        "without-guard": WithPolicy(policy, guard=False),
        "with-initial-loss": WithPolicy(policy, initial_loss=True),
        "length-not-told": WithPolicy(policy, examples=False),
        "blanked": WithPolicy(policy, sees="nothing"),
        "random-actions": WithPolicy(policy, acts="random"),
    }


def _made_from(policy: ControlPolicy, runs: dict[str, list[Run]], label: str) -> dict[str, Any]:
    """The controls on task `label` that need the policy's own runs on all tasks."""
    rules = policy.header.base_rules
    trajectories = {name: [np.array(run.notes["offsets"]) for run in own] for name, own in runs.items()}
    elsewhere = [name for name in runs if name != label]
    controls: dict[str, Any] = {"replay-same-task": Replay(rules, of_the_others(runs[label]))}
    if elsewhere:
        others = mean_trajectory([mean_trajectory(trajectories[name]) for name in elsewhere])
        controls["replay-other-tasks"] = Replay(rules, others[None])
        seen = tuple(np.array(run.notes["observations"], np.float32) for name in elsewhere for run in runs[name])
        controls["shuffled"] = WithPolicy(policy, sees=Elsewhere(seen))
    return controls


def _cells(task: Task, method: Any, seeds: tuple[int, ...]) -> list[Cell]:
    """One cell where the seeds train together, one a seed in plain PyTorch."""
    return [Cell(task, method, seeds)] if hasattr(method, "attach") else [Cell(task, method, (seed,)) for seed in seeds]


def _search(name: str, budget: Budget) -> Any:
    if name == "population-based":
        return PopulationBased(budget.search_cost)
    return OptunaSearch(name, budget.search_cost)  # type: ignore[arg-type]


def _learned_search(proposer: Proposer, budget: Budget) -> RecurrentSearch:
    """As many trials as the searches' cost has room for, beside the landmarks that the proposer reads."""
    trials = int(budget.search_cost - proposer.landmark_cost)
    if trials < 1:
        raise ValueError(f"a search cost of {budget.search_cost} leaves no trial beside the landmarks; allow 2 or more")
    return RecurrentSearch(proposer, trials)
