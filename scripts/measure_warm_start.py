"""What a metric-based warm start is worth in one trial, alone and under a policy, and whether its distance tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.cells import Cell, Store, run_cells
from agents.controllers import WithPolicy
from agents.evaluation import SPLITS, ablations, bank, chosen, labels
from agents.measures import LOSS_FLOOR, Interval, interquartile_mean, mean, random_search_equivalents, win_rate
from agents.meta_dataset import Studied, draw, study
from agents.meta_features import LANDMARK_COST
from agents.policy import ControlPolicy
from agents.provenance import provenance
from agents.schedules import Cosine
from agents.summary import losses
from agents.transfer import best_on_average, held_out, normalized_regret, transfer_order
from agents.tuner import pretrained_path
from agents.warm_start import METRICS, PolicyWarmStart, WarmStart
from hpo_env.hyperparameters import Array
from inner_models.splits import META_TRAIN
from inner_models.tasks import Task
from scripts.common import Quiet, at_least, run_main, work_bar, write_json
from scripts.evaluate import default_cache
from scripts.reporting.drawing import POLICY, paper, powers_of_two, save, subplots
from scripts.reporting.sheet import Sheet, present, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of neighbours that the curve is drawn for, as far as there are as many tasks."""

REFERENCE = "calibrated"
COLOURS = {"euclidean": "#0072B2", "cosine": "#009E73", "learned": POLICY}


@dataclass
class Config(Quiet):
    """Study tasks of meta-train, and judge what their nearest ones recommend to the tasks of meta-validation.

    Prints the normalized regret of the first trial and its log ratios to the calibrated schedule for each distance, for
    the policy, and for the policy from the warm start; and whether the distances order the tasks studied by how well
    their best trials transfer. Needs the extras `compare` (figure) and `data`. Takes some eight minutes on 2 cores;
    what has been run is kept in the cache.

        python scripts/measure_warm_start.py --json results/warm_start.json --figure docs/figures/warm_start.png
    """

    tasks: int = 96
    """Tasks of meta-train to study."""
    trials: int = 32
    """Random trials of each."""
    neighbours: int = 16
    """Nearest tasks that have a say."""
    folds: int = 6
    """Parts of meta-train, split by data set; each is held out in turn for the curve over neighbours."""
    judge: tuple[str, ...] = ()
    """Only these tasks of meta-validation."""
    seeds: int = 5
    """Runs of each task and method, paired."""
    bank: int = 256
    """Random-search trials that regrets are measured by."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    cache: Path | None = None
    """Where finished cells are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    workers: int = 2
    """Processes, one thread each."""
    json: Path | None = None
    """Write all figures to this file."""
    markdown: Path | None = None
    """Write the tables to this file."""
    save: Path | None = None
    """Write the warm start by the Euclidean distance to this file, for scripts/evaluate.py --learned."""
    figure: Path | None = None
    """Write the figure to this file (PNG)."""


def main(config: Config) -> None:
    judged = chosen(labels(SPLITS["meta-validation"]), config.judge)
    at_least(config, 1, "tasks", "neighbours", "workers")
    at_least(config, 2, "trials", "folds", "seeds", "bank")
    policy = ControlPolicy.load(config.policy or pretrained_path())
    store = Store(config.cache or default_cache())
    studied = _study(draw(META_TRAIN, config.tasks), "studying meta-train", config, store)
    starts: dict[str, WarmStart] = {metric: WarmStart.fit(studied, metric, config.neighbours) for metric in METRICS}
    targets = _study(list(judged.values()), "trying the same trials on the judged tasks", config, store)
    methods = {
        REFERENCE: Cosine("calibrated"),
        "base rule": ablations(policy)["base-rule"],
        **{f"warm start, {metric}": start for metric, start in starts.items()},
        "policy": WithPolicy(policy, record=True),
        "policy, begins with the warm start": PolicyWarmStart(policy, starts["euclidean"]),
    }
    rows = _rows(methods, judged, config, store)
    curve = _curve(studied, config)
    orders: dict[str, dict[str, Any]] = {
        metric: {"meta-validation": _interval(mean([[transfer_order(start, target, studied) for target in targets]]))}
        for metric, start in starts.items()
    }
    for metric in METRICS:
        orders[metric]["meta-train, held out"] = curve[metric].pop("order")
    present([_methods(rows), _orders(orders, len(judged), len(studied))], config.markdown)
    if config.save:
        starts["euclidean"].save(config.save)
    if config.figure:
        save({config.figure.stem: figure(rows, curve, orders)}, config.figure.parent)
    if config.json:
        settings = {name: getattr(config, name) for name in ("tasks", "trials", "neighbours", "folds", "seeds", "bank")}
        weights = {
            name: dict(zip(starts["learned"].features, table.weights.tolist(), strict=True))
            for name, table in starts["learned"].tables.items()
        }
        found = {"methods": rows, "neighbours": curve, "rank_correlation": orders, "learned_weights": weights}
        about = {"judged": list(judged), "landmark_cost": LANDMARK_COST, "policy": policy.digest}
        write_json(config.json, {**found, "settings": settings, **about, "computed_on": provenance("cpu")})


def _study(tasks: Sequence[Task], doing: str, config: Config, store: Store) -> list[Studied]:
    with work_bar(doing) as report:
        return study(tasks, config.trials, store, workers=config.workers, report=report)


def _rows(methods: Mapping[str, Any], judged: Mapping[str, Task], config: Config, store: Store) -> list[dict[str, Any]]:
    """The figures of each method on the judged tasks, those of a random trial first."""
    seeds = tuple(range(config.seeds))
    cells = {name: [Cell(task, method, seeds) for task in judged.values()] for name, method in methods.items()}
    banks = [bank(task, config.bank) for task in judged.values()]
    every = [cell for own in (*cells.values(), *banks) for cell in own]
    with work_bar("judging") as report:
        run_cells(every, store, workers=config.workers, report=report)
    found = {name: [store.load(cell) for cell in own] for name, own in cells.items()}
    trials = [[run for cell in bank for run in store.load(cell)] for bank in banks]
    logs = {kind: [_logs(losses(runs, kind)) for runs in trials] for kind in ("val", "test")}  # type: ignore[arg-type]
    own = {
        name: {kind: [_logs(losses(runs, kind)) for runs in of_task] for kind in ("val", "test")}  # type: ignore[arg-type]
        for name, of_task in found.items()
    }
    own = {"a random trial, expected": {k: [np.full(config.seeds, log.mean()) for log in logs[k]] for k in logs}, **own}
    rows = []
    for name, by_kind in own.items():
        row: dict[str, Any] = {"method": name, "n": len(judged) * config.seeds}
        regrets = [normalized_regret(float(o.mean()), log) for o, log in zip(by_kind["val"], logs["val"], strict=True)]
        row["normalized_regret"] = _interval(mean([regrets])) | {"by_task": dict(zip(judged, regrets, strict=True))}
        for kind, of_task in by_kind.items():
            ratios = [base - o for base, o in zip(own[REFERENCE][kind], of_task, strict=True)]
            row[kind] = _interval(interquartile_mean(ratios)) | {
                "wins": win_rate(np.concatenate(ratios)),
                "by_task": {task: float(ratio.mean()) for task, ratio in zip(judged, ratios, strict=True)},
            }
        equivalents = [
            random_search_equivalents(np.exp(log), float(np.exp(o).mean()))
            for log, o in zip(logs["val"], by_kind["val"], strict=True)
        ]
        row["rse"] = {"median": float(np.median(equivalents)), "by_task": dict(zip(judged, equivalents, strict=True))}
        rows.append(row)
    return rows


def _logs(values: Array) -> Array:
    return np.asarray(np.log(np.maximum(values, LOSS_FLOOR)))


def _curve(studied: Sequence[Studied], config: Config) -> dict[str, Any]:
    """On data sets of meta-train that are held out: the normalized regret of what is recommended, by number of
    neighbours, and the correlation of `transfer_order`."""
    split = held_out(studied, config.folds)
    found: dict[str, Any] = {}
    alike = [
        normalized_regret(one.scores[best_on_average(one.task.optimizer, rest)], one.scores)
        for rest, out in split
        for one in out
    ]
    for metric in METRICS:
        starts = [WarmStart.fit(rest, metric, 1) for rest, _ in split]
        fewest = min(len(table.scores) for start in starts for table in start.tables.values())
        sizes = [size for size in CURVE if size <= fewest]
        pairs = [(start, one, rest) for start, (rest, out) in zip(starts, split, strict=True) for one in out]
        regrets = {
            size: [
                normalized_regret(one.scores[replace(start, neighbours=size).choose(one.task)], one.scores)
                for start, one, _ in pairs
            ]
            for size in sizes
        }
        found[metric] = {
            str(size): _interval(mean([values])) | {"below_all_alike": _interval(mean([np.subtract(alike, values)]))}
            for size, values in regrets.items()
        }
        found[metric]["order"] = _interval(mean([[transfer_order(*pair) for pair in pairs]]))
    found["all tasks alike"] = _interval(mean([alike]))
    found[REFERENCE] = _interval(mean([[normalized_regret(0.0, one.scores) for one in studied]]))
    return found


def _interval(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "ci": [interval.low, interval.high]}


def _shown(figures: Mapping[str, Any], sign: str = "+") -> str:
    return with_ends(figures["value"], figures["ci"], sign)


def _methods(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    head = ("method", "normalized regret", "validation, to calibrated", "test, to calibrated", "wins, test", "RSE")
    lines = [
        [
            row["method"],
            _shown(row["normalized_regret"], ""),
            *(_shown(row[kind]) for kind in ("val", "test")),
            f"{row['test']['wins']:.0%}",
            f"{row['rse']['median']:g}",
        ]
        for row in rows
    ]
    return Sheet.plain(f"one trial, n = {rows[0]['n']}: log ratios above 0 are better than calibrated", head, lines)


def _orders(orders: Mapping[str, Any], judged: int, studied: int) -> Sheet:
    head = ("distance", f"meta-validation, n = {judged}", f"meta-train, held out, n = {studied}")
    lines = [[metric, *(_shown(interval) for interval in by_split.values())] for metric, by_split in orders.items()]
    return Sheet.plain("rank correlation of distance with the regret of a task's best trial", head, lines)


@paper
def figure(rows: Sequence[Mapping[str, Any]], curve: Mapping[str, Any], orders: Mapping[str, Any]) -> Figure:
    """Normalized regret of the first trial; the same by number of neighbours; rank correlations."""
    found, ((first, second, third),) = subplots(1, 3, width=11.0, height=3.6, width_ratios=(1.2, 1.0, 0.9))
    names = [row["method"] for row in reversed(rows)]
    for at, row in enumerate(reversed(rows)):
        _point(first, row["normalized_regret"], at, COLOURS.get(row["method"].rpartition(", ")[2], "#777777"))
    first.set(yticks=range(len(names)), yticklabels=names, xlabel="normalized regret")
    first.set(title=f"first trial on meta-validation ({len(rows[0]['val']['by_task'])} tasks)")
    for metric, colour in COLOURS.items():
        by_size = {int(size): entry for size, entry in curve[metric].items()}
        values = np.array([[entry["value"], *entry["ci"]] for entry in by_size.values()])
        second.plot(list(by_size), values[:, 0], color=colour, marker="o", markersize=3, label=metric)
        second.fill_between(list(by_size), values[:, 1], values[:, 2], color=colour, alpha=0.1, linewidth=0)
    for name, style in (("all tasks alike", "--"), (REFERENCE, ":")):
        second.axhline(curve[name]["value"], color="#777777", ls=style, label=name)
    powers_of_two(second, 1, max(by_size))
    second.set(xlabel="neighbours", ylabel="normalized regret", title="meta-train, data sets held out")
    second.legend()
    for at, (metric, by_split) in enumerate(orders.items()):
        for (split, interval), shift, marker in zip(by_split.items(), (0.12, -0.12), "os", strict=True):
            _point(third, interval, at + shift, COLOURS[metric], marker, label=split if not at else None)
    third.axvline(0, color="#777777", ls="--", linewidth=1)
    third.set(yticks=range(len(orders)), yticklabels=list(orders), ylim=(-0.5, len(orders)))
    third.set(xlabel="rank correlation", title="distance and transfer")
    third.legend(loc="upper left")
    return found


def _point(axes: Any, figures: Mapping[str, Any], at: float, colour: str, marker: str = "o", **more: Any) -> None:
    low, high = figures["ci"]
    errors = [[figures["value"] - low], [high - figures["value"]]]
    axes.errorbar(figures["value"], at, xerr=errors, color=colour, fmt=marker, markersize=4, **more)


if __name__ == "__main__":
    run_main(Config, main)
