"""The figures of an evaluation as tables: on the terminal, and as a Markdown document that leaves none out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from agents import population_based, searches
from agents.evaluation import BASELINES, Budget
from agents.schedules import DEFAULTS
from agents.summary import MEASURES, NEAR, REFERENCE
from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import CONTROLS
from hpo_env.rewards import CEILING
from scripts.reporting.sheet import Sheet, pipes

NOT_REACHED = "not reached"

_WORDS = {name: "learning rate" if name == "lr" else name.replace("_", " ") for name in CONTROLS}

SETTINGS: dict[str, str] = {
    "calibrated": "calibrated values, warm-up over 5 % of the run, cosine decay to 0",
    "cosine": "default values, warm-up over 5 % of the run, cosine decay to 0",
    "constant": "default values, never changed",
    "plateau": "default values, ReduceLROnPlateau: learning rate x 0.5 after a tenth of the run (at least 2 intervals) "
    "without a better validation loss",
    "plateau-calibrated": "the same from calibrated values",
    "warmup-stable-decay": "calibrated values but half the learning rate, warm-up over 5 % of the run, then constant, "
    "falling as 1 - sqrt in the last fifth",
    "one-cycle": "calibrated values, torch's OneCycleLR at every step with the calibrated learning rate as its maximum",
    "schedule-free": "calibrated values, AdamWScheduleFree at the calibrated learning rate (SGDScheduleFree at ten "
    "times it), warm-up over 5 % of the steps",
    "prodigy": "calibrated batch size and dropout, AdamW's calibrated weight decay, Prodigy at learning rate 1 with "
    "use_bias_correction and safeguard_warmup, cosine annealing at every step",
    "hypergradient": "default values, hypergradient descent on the learning rate at every step: Adam-HD with its "
    "authors' beta of 1e-7 (SGD-HD with 1e-3), which moves the rate of so short runs little",
    **{
        f"{name}-only": f"the policy moves the {words} alone, without the guard, the rest is as in `base-rule`"
        for name, words in _WORDS.items()
    },
    "lr-and-batch-size": "the policy moves these two, without the guard, the rest is as in `base-rule`",
    "base-rule": "the schedule that the policy deviates from: the calibrated one, fitted to the run's length and size",
    "blanked": "the policy with every measured feature at its mean in meta-training, after the first decision",
    "shuffled": "the policy, shown at each decision the measured features of a random run of another task at that "
    "progress",
    "random-actions": "uniformly random actions within the policy's bounds",
    "replay-other-tasks": "the policy's mean trajectory over all other tasks, replayed without looking",
    "replay-same-task": "the policy's mean trajectory over the other seeds of the same task, replayed without looking; "
    "a tie says that it adapts to the task, not to the run",
    "without-guard": "the policy without the guard against divergence",
    "with-initial-loss": "the policy, told the validation loss before training",
    "length-not-told": "the policy, not told the number of training examples before the first interval is over",
}
"""How each method of one trial is set up, in a line."""

LEARNED: dict[str, str] = {
    "warm-start": "the trial that did best on the nearest tasks of meta-train, warm-up and cosine decay",
    "surrogate": "the configuration with the best score predicted from the task's meta-features, warm-up and cosine "
    "decay",
    "learned-schedule": "a schedule learned by hypergradients; the calibrated batch size and dropout",
}

LEARNED_SEARCH = {
    "recurrent-search": "the calibrated schedule, then what an LSTM proposes that reads the trials so far; landmarks "
    "are in the cost"
}

_VARIANTS = ("replay-same-task", "without-guard", "with-initial-loss", "length-not-told")

GROUPS: dict[str, tuple[str, ...]] = {
    "one trial": tuple(BASELINES),
    "one trial, learned on meta-train": tuple(LEARNED),
    "controls that must lose": tuple(name for name in SETTINGS if name not in (*BASELINES, *_VARIANTS)),
    "variants, which may tie": _VARIANTS,
}
"""The parts of the tables of methods."""

_RANDOM = (
    "expected best of n trials drawn from the bank: each with warm-up and cosine decay, learning rate, batch size and "
    "weight decay log-uniform, dropout uniform; its interval comes from the policy's seeds alone"
)


def overview(result: Mapping[str, Any]) -> list[Table]:
    """The tables for the terminal: the headline, all methods, all searches, and each task's own.

    Args:
        result: as from `agents.summary.summarize`, or read back from its JSON.
    """
    return [sheet.to_rich() for sheet in (*_shared(result), *(_task(result, label) for label in result["tasks"]))]


def markdown_tables(result: Mapping[str, Any]) -> str:
    """What `overview` shows, in Markdown."""
    sheets = (*_shared(result), *(_task(result, label) for label in result["tasks"]))
    return "\n\n".join(sheet.to_markdown() for sheet in sheets) + "\n"


def markdown(result: Mapping[str, Any], provenance: Mapping[str, Any], budget: Budget) -> str:
    """The whole evaluation as a document.

    Args:
        result: as for `overview`.
        provenance: where and with what it was computed, as in the JSON.
        budget: what was run.
    """
    shared = _shared(result, measures=("val", "test", "val_best", "test_final"), by_seed=True)
    multiples = f"{min(budget.multiples):g} to {max(budget.multiples):g} times the run's own budget"
    parts = [
        f"# Evaluation: {n_runs(result)}",
        "A log ratio is ln(the other's loss / the policy's loss): above 0, the policy is better; +0.100 is a loss "
        "10.5 % higher than the policy's. Runs are paired: equal seeds have equal initial weights, data order and "
        "dropout masks. Over tasks and seeds, ratios are interquartile means (IQM), in brackets their 95 % intervals "
        "from a bootstrap stratified by task; those of one task are means. `val` is the validation loss at the end of "
        "the run, `best val` its least one, `test` the test loss at the interval of that least one, `final test` the "
        "test loss at the end. Losses are means over seeds; a lost run counts as "
        f"{CEILING:g} times its initial loss. Win rates "
        f"and worst deciles (the 10 % quantile of the log ratios) are over all tasks and seeds. Speedups lie within "
        f"{multiples}, random-search equivalents (RSE) within the bank of {budget.bank} trials. Seconds are those of a "
        "run; where seeds train together they share them, so only those of one kind compare.",
        "## Over all tasks",
        *(sheet.to_markdown() for sheet in shared),
        "## Task by task",
    ]
    for label in result["tasks"]:
        sheets = (_task(result, label), *_searches_of(result, label), _bad_starts_of(result, label))
        parts += [*(sheet.to_markdown() for sheet in sheets), _bank(result["tasks"][label])]
    parts += ["## How the methods are set up", *_settings(result)]
    parts += [
        "## What was run, and where",
        _pairs("budget", {name: _listed(value) for name, value in asdict(budget).items()}),
        _pairs("provenance", {name: _listed(value) for name, value in provenance.items()}),
    ]
    return "\n\n".join(parts) + "\n"


def n_runs(result: Mapping[str, Any]) -> str:
    """`n = tasks x seeds`."""
    tasks = result["tasks"].values()
    return _n(len(tasks), len(next(iter(tasks))["methods"]["policy"]["val"]), "seed")


def n_searches(result: Mapping[str, Any]) -> str:
    """`n = tasks x searches`, where there are any beside random search; that is an expectation over the bank."""
    tasks = list(result["tasks"].values())
    found = [figures["val"] for by_cost in tasks[0]["searches"].values() for figures in by_cost.values()]
    return _n(len(tasks), len(found[0]), "search") if found else n_runs(result)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of methods by the `GROUPS` that they belong to, in their order; those of none come last."""
    given = list(names)
    groups = {group: [name for name in members if name in given] for group, members in GROUPS.items()}
    known = [name for members in groups.values() for name in members]
    groups["others"] = [name for name in given if name not in known]
    return {group: members for group, members in groups.items() if members}


def _shared(result: Mapping[str, Any], measures: tuple[str, ...] = MEASURES, *, by_seed: bool = False) -> list[Sheet]:
    """The tables over all tasks."""
    return [
        _headline(result),
        _by_task(result, by_seed),
        _bad_starts(result),
        _recovery(result),
        _against(result, measures),
        *(_against_searches(result, measure) for measure in MEASURES),
    ]


def _headline(result: Mapping[str, Any]) -> Sheet:
    summary, against = result["summary"], result["summary"]["against"]
    others = [name for name in (REFERENCE, "cosine") if name in against]
    cap, failures = summary["rse_cap"], summary["bad_start_failures"]
    pays = summary["pays_for_itself_after_runs"]
    rse = [list(summary[key].values()) for key in ("rse_by_task", "rse_calibrated_by_task")]
    blank = [""] * len(others)
    rows = [
        ["RSE, median over tasks", f"{_median(rse[0], cap)} {_ends(summary['rse_median_ci'])}", _median(rse[1], cap)],
        ["RSE on test, on best val", f"{_rse(summary['rse_test_median'], cap)}, "
         f"{_rse(summary['rse_best_val_median'], cap)}", ""],
        ["speedup", _times(summary["speedup_iqm"], summary["speedup_ci"]), ""],
        ["speedups that are bounds", _share(summary["speedup_at_an_end"]), ""],
    ]  # fmt: skip
    for measure in MEASURES:
        prefix = "" if measure == "val" else f"{measure}_"
        rows += [
            [f"{measure} log ratio to it", "", *(_of(against[name], f"{measure}_log_ratio") for name in others)],
            [f"{measure} win rate, worst decile", "",
             *(f"{_share(against[n][f'{prefix}win_rate'])}, {_ratio(against[n][f'{prefix}worst_decile'])}"
               for n in others)],
        ]  # fmt: skip
    rows += [
        ["bad starts that fail, policy chooses the start", _share(failures["policy"]), ""],
        ["bad starts that fail, start is given", *(_share(failures[name]) for name in ("policy_given", *others))],
        ["runs until meta-training has paid for itself", NOT_REACHED if pays is None else f"{pays:,.0f}", ""],
    ]
    title = f"the policy: {n_runs(result)}; log ratios above 0: the policy is better"
    width = 2 + len(others)
    return Sheet(title, ("", "policy", *others), {"": [[*row, *blank][:width] for row in rows]})


def _by_task(result: Mapping[str, Any], by_seed: bool) -> Sheet:
    cap = result["summary"]["rse_cap"]
    rows = []
    for label, task in result["tasks"].items():
        cells = [label, str(task["horizon"]), f"{_rse(task['rse'], cap)} {_ends(task['rse_ci'])}"]
        cells += [_rse(task[key], cap) for key in ("rse_calibrated", "rse_of_best_on_test", "rse_test", "rse_best_val")]
        cells.append(_speedups(task))
        cells += [_of_task(task["methods"][REFERENCE], measure) for measure in MEASURES]
        if by_seed:
            cells.append(", ".join(_rse(value, cap) for value in task["rse_by_seed"]))
            cells.append(", ".join(_times(value) for value in task["speedup"]))
            cells.append(", ".join(_loss(loss) for loss in task["calibrated_by_budget"].values()))
        rows.append(cells)
    head = ("task", "intervals", "RSE", f"{REFERENCE}'s", "of the best on test", "on test", "on best val", "speedup",
            *(f"{measure} log ratio" for measure in MEASURES))  # fmt: skip
    title = f"random-search equivalents (RSE), speedup and log ratios to {REFERENCE}: {n_runs(result)}"
    budgets = ", ".join(f"x {float(m):g}" for m in next(iter(result["tasks"].values()))["calibrated_by_budget"])
    seeds = ("RSE by seed", "speedup by seed", f"{REFERENCE}'s val at budgets {budgets}") if by_seed else ()
    return Sheet(title, head + seeds, {"": rows})


def _bad_starts(result: Mapping[str, Any]) -> Sheet:
    failures = result["summary"]["bad_start_failures"]
    factors = list(failures["by_factor"]["policy_given"])
    rows = [["policy, chooses its start", *("" for _ in factors), _share(failures["policy"])]]
    for name, by_factor in failures["by_factor"].items():
        shares = [_share(by_factor[factor]) for factor in factors]
        rows.append([name.replace("_given", ", start is given"), *shares, _share(failures[name])])
    title = f"bad starts: share lost or worse than {REFERENCE} from its own start: {n_runs(result)} a start"
    return Sheet(title, ("learning rate", *(f"x {float(factor):g}" for factor in factors), "all"), {"": rows})


def _recovery(result: Mapping[str, Any]) -> Sheet:
    found = result["summary"]["bad_start_recovery"]
    factors = [factor for factor in next(iter(found.values())) if float(factor) != 1]
    rows = [
        [f"{name}, start is given", *(f"{_share(figures[f]['near'])}, x {figures[f]['median']:.3f}" for f in factors)]
        for name, figures in found.items()
    ]
    title = (
        f"bad starts, given ones: share that ends within {NEAR - 1:.0%} of the same run from the good start, and the "
        f"median of the two losses' ratio: {n_runs(result)} a start"
    )
    return Sheet(title, ("learning rate", *(f"x {float(factor):g}" for factor in factors)), {"": rows})


def _against(result: Mapping[str, Any], measures: tuple[str, ...]) -> Sheet:
    against = result["summary"]["against"]

    def row(name: str) -> list[str]:
        figures = against[name]
        cells = [name, f"{figures['rse_median']:g}"]
        for measure in measures:
            prefix = "" if measure == "val" else f"{measure}_"
            cells += [_of(figures, f"{measure}_log_ratio"), _share(figures[f"{prefix}win_rate"])]
            cells.append(_ratio(figures[f"{prefix}worst_decile"]))
        return cells

    names = [{"val_best": "best val", "test_final": "final test"}.get(measure, measure) for measure in measures]
    head = ("method", "RSE", *(f"{name} {kind}" for name in names for kind in ("log ratio", "wins", "worst")))
    groups = {group: [row(name) for name in members] for group, members in grouped(against).items()}
    title = f"policy against each method: {n_runs(result)}; above 0: the policy is better; worst: the worst decile"
    return Sheet(title, head, groups)


def _against_searches(result: Mapping[str, Any], measure: str) -> Sheet:
    table = result["summary"]["against_searches"]
    costs = _costs(table)
    cells = {
        name: {cost: _of(figures, f"{measure}_log_ratio") for cost, figures in by_cost.items()}
        for name, by_cost in table.items()
    }
    title = f"policy, one run, against searches by their cost: {measure} log ratio, {n_searches(result)}; above 0: the "
    return Sheet(f"{title}policy is better", ("full runs", *costs), {"": _by_cost(cells, costs)})


def _task(result: Mapping[str, Any], label: str) -> Sheet:
    task = result["tasks"][label]

    def row(name: str) -> list[str]:
        figures = task["methods"][name]
        losses = [_loss(_mean(figures[measure])) for measure in ("val", "val_best", "test", "test_final")]
        ratios = [_of_task(figures, measure) for measure in MEASURES]
        return [name, *losses, *ratios, str(figures["lost"]), f"{figures['seconds']:.3g}"]

    head = ("method", "val", "best val", "test", "final test", "val log ratio", "test log ratio", "lost", "seconds")
    members = grouped(name for name in task["methods"] if name != "policy")
    groups = {"": [row("policy")]} | {group: [row(name) for name in names] for group, names in members.items()}
    seeds = len(task["methods"]["policy"]["val"])
    title = f"{label}: {task['horizon']} intervals, n = {seeds} seeds; log ratios above 0: the policy is better"
    return Sheet(title, head, groups)


def _searches_of(result: Mapping[str, Any], label: str) -> list[Sheet]:
    """What searches found on a task; random search's is an expectation."""
    task = result["tasks"][label]
    table: dict[str, Any] = {"random": task["random_search"], **task["searches"]}
    costs = _costs(table)
    sheets = []
    for measure in MEASURES:
        cells = {
            name: {cost: _loss(_mean(found[measure])) for cost, found in by_cost.items()}
            for name, by_cost in table.items()
        }
        title = f"{label}: {measure} loss of what searches found, by cost"
        sheets.append(Sheet(title, ("full runs", *costs), {"": _by_cost(cells, costs)}))
    return sheets


def _bad_starts_of(result: Mapping[str, Any], label: str) -> Sheet:
    table = result["tasks"][label]["bad_starts"]
    factors = list(next(iter(table.values())))
    rows = [[name, *(_loss(_mean(by_factor[factor])) for factor in factors)] for name, by_factor in table.items()]
    head = ("learning rate", *(f"x {float(factor):g}" for factor in factors))
    return Sheet(f"{label}: val loss from bad starts, for the policy given ones", head, {"": rows})


def _bank(task: Mapping[str, Any]) -> str:
    bank = np.array([math.inf if loss is None else loss for loss in task["bank"]])
    quantiles = zip(("best", "median", "worst"), np.quantile(bank, [0, 0.5, 1]).tolist(), strict=True)
    return f"The bank, {len(bank)} trials: {', '.join(f'{name} val loss {_loss(loss)}' for name, loss in quantiles)}."


def _settings(result: Mapping[str, Any]) -> list[str]:
    known: dict[str, str] = {"random": _RANDOM, **population_based.SETTINGS}
    known |= {str(name): setting for name, setting in searches.SETTINGS.items()} | LEARNED_SEARCH
    methods = {name: (SETTINGS | LEARNED).get(name, "") for name in result["summary"]["against"]}
    methods |= {name: known.get(name, "") for name in result["summary"]["against_searches"]}
    values = {
        kind: {optimizer: of(optimizer) for optimizer in DEFAULTS}
        for kind, of in (("default", DEFAULTS.__getitem__), ("calibrated", calibrated))
    }
    described = [
        f"- {kind} values, {optimizer}: "
        + ", ".join(f"{words} {getattr(schedule, name):.3g}" for name, words in _WORDS.items())
        for kind, by_optimizer in values.items()
        for optimizer, schedule in by_optimizer.items()
    ]
    listed = "\n".join(f"- `{name}`: {setting}" for name, setting in methods.items())
    return [listed.replace("<", "&lt;"), "\n".join(described)]


def _n(tasks: int, runs: int, name: str) -> str:
    plural = "es" if name == "search" else "s"
    return f"n = {tasks} task{'s' * (tasks > 1)} x {runs} {name}{plural * (runs > 1)}"


def _costs(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return sorted({cost for by_cost in table.values() for cost in by_cost}, key=float)


def _by_cost(table: Mapping[str, Mapping[str, str]], costs: Sequence[str]) -> list[list[str]]:
    """A row a search; costs before its first are not reached, those beyond its last were not run."""
    rows = []
    for name, by_cost in table.items():
        last = max(map(float, by_cost), default=math.inf)
        missing = (NOT_REACHED if float(cost) < last else "" for cost in costs)
        rows.append([name, *(by_cost.get(cost, without) for cost, without in zip(costs, missing, strict=True))])
    return rows


def _mean(losses: float | Sequence[float | None] | None) -> float | None:
    """None where one of them is."""
    values = losses if isinstance(losses, Sequence) else [losses]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _ratio(value: float | None) -> str:
    return NOT_REACHED if value is None else f"{round(value, 3) + 0.0:+.3f}"


def _of(figures: Mapping[str, Any], name: str) -> str:
    """An aggregate with its interval, if it has one."""
    interval = figures[f"{name}_ci"]
    ends = f" [{', '.join(map(_ratio, interval))}]" if interval else ""
    return f"{_ratio(figures[f'{name}_iqm'])}{ends}"


def _of_task(figures: Mapping[str, Any], measure: str) -> str:
    """A task's log ratio with its interval; the policy has none."""
    ratio = figures.get(f"{measure}_log_ratio")
    return f"{_ratio(ratio['value'])} [{_ratio(ratio['low'])}, {_ratio(ratio['high'])}]" if ratio else ""


def _loss(value: float | None) -> str:
    """Four significant digits."""
    return NOT_REACHED if value is None or not math.isfinite(value) else f"{value:#.4g}".rstrip(".")


def _share(value: float) -> str:
    return f"{value:.1%}"


def _rse(value: float, cap: int) -> str:
    """The cap also stands for everything above it."""
    return f"{'>= ' if value >= cap else ''}{value:g}"


def _ends(interval: Sequence[float]) -> str:
    """Of random-search equivalents."""
    low, high = interval
    return f"[{low:.0f}, {high:.0f}]"


def _times(value: float, interval: Sequence[float] = ()) -> str:
    ends = f" [{', '.join(f'{end:.2f}' for end in interval)}]" if interval else ""
    return f"{value:.2f}{ends}"


def _median(values: Sequence[float], cap: int) -> str:
    """Of random-search equivalents: a bound if a value that it is made of is one."""
    ordered, middle = sorted(values), len(values) // 2
    bound = ordered[middle] >= cap
    return f"{'>= ' if bound else ''}{float(np.median(values)):g}"


def _speedups(task: Mapping[str, Any]) -> str:
    """A task's, marked where some are bounds: the reference is there at its least budget, or never gets there."""
    share = task["speedup_at_an_end"]
    note = f" ({share:.0%} bounds)" if share else ""
    return _times(math.exp(float(np.mean(np.log(task["speedup"]))))) + note


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_listed(entry)}" for name, entry in value.items())
    return ", ".join(map(_listed, value)) or "none" if isinstance(value, list | tuple) else str(value)


def _pairs(name: str, values: Mapping[str, str]) -> str:
    lines = [(name, ""), ("---", "---"), *values.items()]
    return "\n".join(pipes(line) for line in lines)
