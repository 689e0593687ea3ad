"""MAML on the textbook's tasks: telling two digits apart that it was not meta-trained to tell apart."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agents.class_pairs import ClassPairs, network, scored, starts
from agents.maml import Config as MetaTraining
from agents.measures import mean
from agents.provenance import provenance
from scripts.common import Quiet, at_least, known, progress_bar, run_main, write_json
from scripts.reporting.drawing import POLICY, legend, paper, save, subplots
from scripts.reporting.sheet import Sheet, present, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOTS, STEPS = (5, 10, 20), (1, 5, 10)
COLORS = (POLICY, "#AA4499", "#332288", "#44AA99", "#777777")

DRAWS = 10
"""Support sets drawn of each unseen pair."""


@dataclass
class Config(Quiet):
    """Meta-train initial weights on some pairs of classes with MAML; adapt them to the other pairs in a few steps.

    Prints the accuracy on unseen pairs beside random initial weights, joint pretraining, and the weights of the nearest
    pair. Needs the extra `data` for mnist-5k. Takes about ten minutes of one core.

        python scripts/maml_digits.py --datasets digits --models linear --seeds 1
        python scripts/maml_digits.py --json results/maml.json --figure docs/figures/maml.png
    """

    datasets: tuple[str, ...] = ("digits", "mnist-5k")
    """Data sets with classes."""
    models: tuple[str, ...] = ("linear", "mlp")
    """linear (logistic regression), mlp (one hidden layer of 64)."""
    seeds: int = 3
    """Meta-trainings, each with other pairs held out."""
    held_out: int = 15
    """Pairs that are kept for meta-testing."""
    iterations: int = 400
    """Updates of the initial weights."""
    json: Path | None = None
    """Write all figures to this file."""
    markdown: Path | None = None
    """Write the tables to this file."""
    figure: Path | None = None
    """Draw the accuracies into this PNG file."""


def main(config: Config) -> None:
    for name in config.models:
        known("model", name, ["linear", "mlp"])
    at_least(config, 1, "seeds", "iterations")
    started = time.process_time()
    cells = [(dataset, model) for dataset in config.datasets for model in config.models]
    rows: list[dict[str, Any]] = []
    with progress_bar("MAML", len(cells) * config.seeds) as update:
        for index, (dataset, model) in enumerate(cells):
            found: dict[tuple[str, int, int], list[np.ndarray[Any, Any]]] = {}
            for seed in range(config.seeds):
                update(index * config.seeds + seed, f"{dataset}/{model}, seed {seed}")
                for key, accuracies in _one(config, dataset, model, seed).items():
                    found.setdefault(key, []).append(accuracies)
            for (method, shots, steps), strata in found.items():
                value = mean([np.concatenate(strata)])
                about = {"data set": dataset, "model": model, "method": method, "shots": shots, "steps": steps}
                rows.append(
                    {**about, "n": sum(map(len, strata)), "accuracy": value.value, "ci": [value.low, value.high]}
                )
    present([_sheet(dataset, model, rows) for dataset, model in cells], config.markdown)
    if config.json:
        settings = {name: getattr(config, name) for name in ("seeds", "held_out", "iterations")}
        cost = {"cpu_seconds": time.process_time() - started, "computed_on": provenance("cpu")}
        write_json(config.json, {"rows": rows, **settings, **cost})
    if config.figure:
        save({config.figure.stem: draw(rows, cells)}, config.figure.parent)


def _one(config: Config, dataset: str, model: str, seed: int) -> dict[tuple[str, int, int], np.ndarray[Any, Any]]:
    """(method, shots, steps) -> mean accuracy on each unseen pair, `[pairs]`, of one meta-training."""
    rng = np.random.default_rng(seed)
    tasks = ClassPairs(dataset, rng)
    if not 0 < config.held_out < len(tasks.pairs):
        raise ValueError(f"--held-out must leave some of the {len(tasks.pairs)} pairs, not be {config.held_out}")
    order = [tasks.pairs[index] for index in rng.permutation(len(tasks.pairs))]
    unseen, seen = order[: config.held_out], order[config.held_out :]
    torch.manual_seed(seed)
    net = network(model, tasks.inputs)
    meta_training = MetaTraining(iterations=config.iterations)
    methods = starts(tasks, net, seen, meta_training, torch.Generator().manual_seed(seed))
    found = {}
    for shots in SHOTS:
        task = tasks.draw(unseen * DRAWS, shots, 15)
        for steps in STEPS:
            for method, start in methods.items():
                accuracies = scored(net, start, task, steps).numpy()
                found[method, shots, steps] = accuracies.reshape(DRAWS, -1).mean(0)
    return found


@paper
def draw(rows: list[dict[str, Any]], cells: list[tuple[str, str]]) -> Figure:
    """Accuracy against steps: a row for each number of examples, a column a data set and model."""
    figure, grid = subplots(
        len(SHOTS), len(cells), width=0.8 + 2.3 * len(cells), height=1.2 + 1.7 * len(SHOTS), sharex=True
    )
    for shots, panels in zip(SHOTS, grid, strict=True):
        for (dataset, model), axes in zip(cells, panels, strict=True):
            own = [row for row in rows if (row["data set"], row["model"], row["shots"]) == (dataset, model, shots)]
            for index, method in enumerate(dict.fromkeys(row["method"] for row in own)):
                points = [row for row in own if row["method"] == method]
                middle, (low, high) = (
                    np.array([row["accuracy"] for row in points]),
                    np.array([row["ci"] for row in points]).T,
                )
                at = np.arange(len(STEPS)) + 0.08 * (index - 2)
                axes.errorbar(
                    at,
                    middle,
                    [middle - low, high - middle],
                    label=method,
                    color=COLORS[index],
                    marker="o",
                    markersize=3,
                )
            axes.set_xticks(range(len(STEPS)), [str(steps) for steps in STEPS])
        panels[0].set_ylabel(f"accuracy\n{shots} examples a class")
    for (dataset, model), top, bottom in zip(cells, grid[0], grid[-1], strict=True):
        top.set_title(f"{dataset}, {model}")
        bottom.set_xlabel("gradient steps")
    legend(figure, grid[0, 0], columns=5)
    return figure


def _of(rows: list[dict[str, Any]], dataset: str, model: str) -> Mapping[str, list[str]]:
    """Method -> its cells."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if (row["data set"], row["model"]) == (dataset, model):
            found.setdefault(row["method"], []).append(with_ends(row["accuracy"], row["ci"], ""))
    return found


HEADS = [f"{shots} examples, {steps} step{'s' * (steps > 1)}" for shots in SHOTS for steps in STEPS]


def _sheet(dataset: str, model: str, rows: list[dict[str, Any]]) -> Sheet:
    lines = ((method, *cells) for method, cells in _of(rows, dataset, model).items())
    return Sheet.plain(f"{dataset}, {model}: accuracy on unseen pairs", ("method", *HEADS), lines)


if __name__ == "__main__":
    run_main(Config, main)
