"""A policy on task families: samples of rows, classes and features of data sets that it has never seen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.application import Run
from agents.cells import Cell, Store, run_cells
from agents.controllers import WithPolicy
from agents.linear_probe import Probed, code_size, labelled, probe_inputs
from agents.measures import interquartile_mean, log_ratio, mean, win_rate
from agents.policy import ControlPolicy
from agents.schedules import Constant, Cosine
from agents.summary import losses
from agents.tuner import pretrained_path
from inner_models.families import FamilyKind, family
from inner_models.splits import META_VALIDATION, datasets_of
from inner_models.tasks import Task
from scripts.common import Quiet, at_least, known, run_main, work_bar, write_json
from scripts.evaluate import default_cache
from scripts.reporting.drawing import POLICY, legend, paper, save, subplots
from scripts.reporting.sheet import Sheet, present, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHERS = ("calibrated", "constant")
ALL = "all"
EVAL_ROWS = 512


@dataclass
class Config(Quiet):
    """Measure a policy on families of tasks: classification, regression and embedding, out of each data set.

    Prints log ratios to the calibrated schedule and to AdamW's defaults, constant, and the scores of linear probes on
    the autoencoders' codes. Needs the extra `data`, and `compare` for the figure. Takes some five minutes on 2 cores;
    what has been run is kept in the cache.

        python scripts/measure_families.py --json results/families.json --figure docs/figures/families.png
    """

    json: Path
    """File for the figures."""
    markdown: Path | None = None
    """Write the tables to this file."""
    figure: Path | None = None
    """Write the figure to this file (PNG)."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    parents: tuple[str, ...] = ("satimage", "spambase", "concrete", "marketing", "mnist-5k", "japanese-vowels")
    """Data sets of meta-validation to draw from."""
    kinds: tuple[FamilyKind, ...] = ("classification", "regression", "embedding")
    """What to make of each of them."""
    members: int = 8
    """Tasks of a family."""
    seeds: int = 3
    """Runs of each task and method, paired."""
    epochs: int = 30
    """Length of a run."""
    cache: Path | None = None
    """Where finished cells are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    workers: int = 2
    """Processes, one thread each."""


Runs = Mapping[tuple[Task, str], list[Run]]
"""Of a task under a method, one a seed."""


def main(config: Config) -> None:
    at_least(config, 2, "members", "seeds")
    at_least(config, 1, "epochs", "workers")
    if not config.parents or not config.kinds:
        raise ValueError("--parents and --kinds must not be empty")
    allowed = sorted(datasets_of(META_VALIDATION))
    parents = [known("data set of meta-validation", name, allowed) for name in dict.fromkeys(config.parents)]
    policy = ControlPolicy.load(config.policy or pretrained_path())
    families = {
        (kind, parent): family(parent, kind, config.members, horizon=config.epochs, eval_rows=EVAL_ROWS)
        for kind in dict.fromkeys(config.kinds)
        for parent in parents
    }
    started = time.perf_counter()
    store = Store(config.cache or default_cache())
    runs = _run(config, policy, [task for tasks in families.values() for task in tasks], store)
    rows = [_row(kind, parent, [tasks], runs) for (kind, parent), tasks in families.items()]
    for kind in dict.fromkeys(config.kinds):
        rows.append(_row(kind, ALL, [families[kind, parent] for parent in parents], runs))
    probes = [_probe(parent, tasks, runs) for (kind, parent), tasks in families.items() if kind == "embedding"]
    present([_ratios_sheet(rows), *([_probes_sheet(probes)] if probes else [])], config.markdown)
    if config.figure:
        save({config.figure.stem: figure(rows, probes)}, config.figure.parent)
    about = {
        "policy": policy.digest,
        "members": {f"{parent}, {kind}": [t.dataset for t in tasks] for (kind, parent), tasks in families.items()},
        "seeds": config.seeds,
        "epochs": config.epochs,
        "computed_on": store.origins,
        "seconds_of_this_call": round(time.perf_counter() - started),
    }
    write_json(config.json, {"rows": rows, "probes": probes, "provenance": about})


def _run(config: Config, policy: ControlPolicy, tasks: Sequence[Task], store: Store) -> Runs:
    methods: dict[str, WithPolicy | Cosine | Constant] = {
        "policy": WithPolicy(policy, record=True),
        "calibrated": Cosine("calibrated"),
        "constant": Constant(),
    }
    cells = {
        (task, name): Cell(task, Probed(method) if _embeds(task) else method, tuple(range(config.seeds)))
        for task in tasks
        for name, method in methods.items()
    }
    with work_bar("measuring families") as report:
        run_cells(list(cells.values()), store, workers=config.workers, report=report)
    return {key: store.load(cell) for key, cell in cells.items()}  # type: ignore[misc]


def _embeds(task: Task) -> bool:
    return task.model.kind == "autoencoder"


def _row(kind: str, parent: str, families: Sequence[Sequence[Task]], runs: Runs) -> dict[str, Any]:
    """Log ratios of the others' losses to the policy's. Members are drawn at random, so the interval is over these."""
    row: dict[str, Any] = {"kind": kind, "parent": parent, "against": {}}
    for other in OTHERS:
        against = row["against"][other] = {}
        for loss in ("val", "test"):
            ratios = [  # [members, seeds] each
                np.stack(
                    [log_ratio(losses(runs[task, other], loss), losses(runs[task, "policy"], loss)) for task in tasks]
                )
                for tasks in families
            ]
            interval = interquartile_mean([ratio.mean(axis=1) for ratio in ratios])
            against[loss] = {
                "iqm": interval.value,
                "ci": [interval.low, interval.high],
                "win_rate": win_rate(np.concatenate(ratios)),
                "by_member": [float(value) for ratio in ratios for value in ratio.mean(axis=1)],
            }
    own = [run for tasks in families for task in tasks for run in runs[task, "policy"]]
    row["runs"] = len(own)
    row["out_of_depth_share"] = float(np.mean([run.notes["out_of_depth"] for run in own]))
    return row


def _probe(parent: str, tasks: Sequence[Task], runs: Runs) -> dict[str, Any]:
    """Scores of linear probes, means over the members, and what the policy's code gains on the calibrated one."""
    scores = {
        name: np.array([np.mean([run.notes["probe"] for run in runs[task, name]]) for task in tasks])
        for name in ("policy", *OTHERS)
    }
    scores["components"] = np.array([probe_inputs(task, code_size(task)) for task in tasks])
    scores["inputs"] = np.array([probe_inputs(task) for task in tasks])
    gain = mean([scores["policy"] - scores["calibrated"]])
    return {
        "parent": parent,
        "score": "accuracy" if labelled(tasks[0]).target == "classification" else "R2",
        "mean": {name: float(values.mean()) for name, values in scores.items()},
        "by_member": {name: values.tolist() for name, values in scores.items()},
        "gain": {"mean": gain.value, "ci": [gain.low, gain.high]},
    }


def _ratios_sheet(rows: Sequence[dict[str, Any]]) -> Sheet:
    columns = [(other, loss) for other in OTHERS for loss in ("val", "test")]
    head = [
        "family",
        "runs",
        *(f"{loss}, {other}" for other, loss in columns),
        "wins, test, calibrated",
        "out of depth",
    ]
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        found = [row["against"][other][loss] for other, loss in columns]
        ratios = [with_ends(entry["iqm"], entry["ci"]) for entry in found]
        shares = [f"{row['against']['calibrated']['test']['win_rate']:.0%}", f"{row['out_of_depth_share']:.1%}"]
        groups.setdefault(row["kind"], []).append([row["parent"], str(row["runs"]), *ratios, *shares])
    return Sheet("log ratio of the other's loss to the policy's: above 0 the policy is better", tuple(head), groups)


def _probes_sheet(probes: Sequence[dict[str, Any]]) -> Sheet:
    names = ("inputs", "components", "constant", "calibrated", "policy")
    head = ["data set", "score", *names, "policy less calibrated"]
    lines = [
        [
            row["parent"],
            row["score"],
            *(f"{row['mean'][name]:.3f}" for name in names),
            with_ends(row["gain"]["mean"], row["gain"]["ci"]),
        ]
        for row in probes
    ]
    return Sheet.plain("linear probe on the validation rows", head, lines)


@paper
def figure(rows: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]]) -> Figure:
    """Log ratios to the calibrated schedule, a panel a kind; and what the probes' scores gain on it."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    names = list(dict.fromkeys(row["parent"] for row in rows))
    count = len(kinds) + bool(probes)
    found, (panels,) = subplots(1, count, width=2.3 * count + 0.8, height=3.2, sharey=True)
    for axes, kind in zip(panels, kinds, strict=False):
        entries = [row["against"]["calibrated"] for row in rows if row["kind"] == kind]
        for loss, shift, style in (
            ("val", -0.14, {"color": POLICY, "fmt": "o", "label": "validation"}),
            ("test", 0.14, {"color": "#332288", "fmt": "s", "label": "test"}),
        ):
            intervals = [(entry[loss]["iqm"], entry[loss]["ci"]) for entry in entries]
            _forest(axes, intervals, shift, **style)
        axes.set_xscale("symlog", linthresh=0.4)
        axes.minorticks_off()
        ticks = [tick for tick in (-0.4, -0.2, 0, 0.2, 0.4, 2) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set(xlabel="log ratio to calibrated", title=kind)
    if probes:
        _forest(panels[-1], [(probe["gain"]["mean"], probe["gain"]["ci"]) for probe in probes], color=POLICY, fmt="D")
        panels[-1].set(xlabel="score less calibrated's", title="linear probe on the code")
    panels[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    legend(found, panels[0], columns=2)
    return found


def _forest(axes: Any, intervals: Sequence[tuple[float, Sequence[float]]], shift: float = 0.0, **style: Any) -> None:
    """A value and its interval a line."""
    values = np.array([value for value, _ in intervals])
    errors = np.abs(np.array([ends for _, ends in intervals]).T - values)
    axes.errorbar(values, np.arange(len(values)) + shift, xerr=errors, markersize=4, **style)
    axes.axvline(0, color="#777777", ls="--", linewidth=1)


if __name__ == "__main__":
    run_main(Config, main)
