"""An evaluation for other programs: CSV files and TensorBoard runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from agents.application import Run
from agents.evaluation import Evaluation
from agents.measures import capped
from hpo_env.hyperparameters import CONTROLS, Array
from scripts.reporting.tables import markdown_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN_COLUMNS = (
    "task", "method", "seed", "val_loss", "best_val_loss", "test_loss", "final_test_loss", "seconds",
)  # fmt: skip
"""`val_loss` is that at the end, `test_loss` that at the interval of the best validation loss."""

SEARCHES_FILE = "searches.csv"
SEARCH_COLUMNS = ("task", "search", "seed", "cost", "best_val_loss", "test_loss")
"""`cost` is in full runs; the losses are those of what had been found by then."""


def write_csv(evaluation: Evaluation, path: Path) -> list[Path]:
    """Write a row a run to `path` and, where there are searches, a row each time that trials of one finished to
    `SEARCHES_FILE` beside it. Losses are as they were, not capped; those that are not finite are empty.

    Returns:
        The files.
    """
    runs = (
        (
            label,
            method,
            run.seed,
            run.val_loss[-1],
            _least(run.val_loss),
            run.test_loss,
            run.final_test_loss,
            run.seconds,
        )
        for method, by_label in evaluation.runs.items()
        for label, runs_ in by_label.items()
        for run in runs_
    )
    _write_rows(path, RUN_COLUMNS, runs)
    found = [
        (label, name, search.seed, *entry)
        for label, by_name in evaluation.searches.items()
        for name, searches in by_name.items()
        for search in searches
        for entry in zip(search.cost, search.best, search.test, strict=True)
    ]
    if not found:
        return [path]
    _write_rows(path.with_name(SEARCHES_FILE), SEARCH_COLUMNS, found)
    return [path, path.with_name(SEARCHES_FILE)]


def write_tensorboard(
    evaluation: Evaluation, result: Mapping[str, Any], figures: Mapping[str, Figure], folder: Path
) -> None:
    """Write a TensorBoard run for each method, with the tags of each task together, and one, `summary`, with the
    headline, all figures and all tables. (A run for each task and method would be more than TensorBoard shows at once.)

    The curves are means over seeds, a step an interval; losses are capped, so that a lost run counts as in the tables.

    Args:
        result: as from `agents.summary.summarize`.
        figures: name -> figure.
        folder: the runs are `<folder>/<method>` and `<folder>/summary`; tags are `<task, with - for />/val_loss`.
    """
    for method, by_label in evaluation.runs.items():
        with SummaryWriter(str(folder / method)) as writer:
            for label, runs in by_label.items():
                for name, curve in _curves(runs).items():
                    for step, value in enumerate(curve.tolist(), start=1):
                        writer.add_scalar(f"{label.replace('/', '-')}/{name}", value, step)
    with SummaryWriter(str(folder / "summary")) as writer:
        for name, value in result["summary"].items():
            if isinstance(value, int | float):
                writer.add_scalar(f"headline/{name}", value, 0)
        writer.add_text("overview", markdown_tables(result))
        for name, figure in figures.items():
            writer.add_figure(name, figure, close=False)


def _curves(runs: Sequence[Run]) -> dict[str, Array]:
    """Losses and controls by name, means over runs, `[intervals]`."""
    initial = [[run.initial_loss] for run in runs]
    curves = {name: capped([getattr(run, name) for run in runs], initial) for name in ("val_loss", "train_loss")}
    controls = [name for name in CONTROLS if name in runs[0].controls]
    curves |= {name: np.array([run.controls[name] for run in runs]) for name in controls}
    return {tag: values.mean(axis=0) for tag, values in curves.items()}


def _least(losses: Iterable[float]) -> float:
    return min((loss for loss in losses if math.isfinite(loss)), default=math.nan)


def _write_rows(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(["" if isinstance(v, float) and not math.isfinite(v) else v for v in row] for row in rows)
