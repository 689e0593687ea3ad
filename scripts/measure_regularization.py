"""What fixed strengths of augmentation and of label smoothing are worth, against the calibrated schedule without."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from agents.cells import Store
from agents.evaluation import labels
from agents.measures import Interval, interquartile_mean, win_rate
from agents.meta_dataset import draw
from agents.regularization import Effect, measure
from inner_models.splits import META_TRAIN, META_VALIDATION
from inner_models.tasks import Regularizer
from scripts.common import Quiet, at_least, run_main, work_bar, write_json
from scripts.evaluate import default_cache
from scripts.reporting.drawing import LABELS, legend, paper, save, subplots
from scripts.reporting.sheet import Sheet, present, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"table": "#332288", "image": "#D55E00", "sequence": "#117733", "text": "#CC79A7"}


@dataclass
class Config(Quiet):
    """Train the calibrated schedule at fixed strengths of augmentation and of label smoothing, and without either.

    Needs the extra `data`, and `compare` for the figure. Takes a few minutes on 2 cores; what has been run is kept in
    the cache. With `--split meta-train` it does so on drawn tasks, for the values that base schedules have.

        python scripts/measure_regularization.py --json runs/regularization.json --figure runs/regularization.png
    """

    json: Path
    """File for the figures."""
    markdown: Path | None = None
    """Write the tables to this file."""
    figure: Path | None = None
    """Draw the log ratios to this file (PNG)."""
    strengths: tuple[float, ...] = (0.02, 0.1, 0.3)
    """Small, medium, large."""
    split: Literal["meta-validation", "meta-train"] = "meta-validation"
    """Whose tasks."""
    tasks: int = 96
    """How many to draw from meta-train."""
    seeds: int = 5
    """Runs of each task and strength, paired."""
    cache: Path | None = None
    """Where finished cells are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    workers: int = 2
    """Processes, one thread each."""


@dataclass(frozen=True)
class Row:
    """A regularizer at one strength, on all tasks or on those of one modality: log ratios with their intervals."""

    regularizer: Regularizer
    modality: str
    strength: float
    n: int
    val: Interval
    test: Interval
    mean_val: float
    wins: float


def main(config: Config) -> None:
    at_least(config, 1, "tasks", "workers")
    tasks = labels(META_VALIDATION if config.split == "meta-validation" else draw(META_TRAIN, config.tasks, 0))
    started = time.perf_counter()
    store = Store(config.cache or default_cache())
    with work_bar("measuring") as report:
        effects = measure(tasks, config.strengths, store, seeds=config.seeds, workers=config.workers, report=report)
    rows = list(_rows(effects, config.strengths))
    sheets = (
        [_sheet(rows), _by_task(effects, config.strengths)] if config.split == "meta-validation" else [_sheet(rows)]
    )
    present(sheets, config.markdown)
    if config.figure:
        save({config.figure.stem: figure(effects, rows, config.strengths)}, config.figure.parent)
    record = {
        "rows": [_plain(row) for row in rows],
        "effects": [_plain(effect) for effect in effects],
        "strengths": config.strengths,
        "split": config.split,
        "tasks": len(tasks),
        "seeds": config.seeds,
        "computed_on": store.origins,
        "seconds_of_this_call": time.perf_counter() - started,
    }
    write_json(config.json, record)


def _plain(entry: Row | Effect) -> dict[str, Any]:
    values = {name: vars(value) if isinstance(value, Interval) else value for name, value in vars(entry).items()}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _rows(effects: Sequence[Effect], strengths: Sequence[float]) -> Iterator[Row]:
    for regularizer in get_args(Regularizer):
        own = [effect for effect in effects if effect.regularizer == regularizer]
        for modality in ("all", *dict.fromkeys(effect.modality for effect in own)):
            chosen = [effect for effect in own if modality in ("all", effect.modality)]
            for index, strength in enumerate(strengths):
                val, test = ([getattr(effect, kind)[index] for effect in chosen] for kind in ("val", "test"))
                pooled = np.concatenate(val)
                means = float(np.clip(pooled, -1, 1).mean())
                intervals = interquartile_mean(val), interquartile_mean(test)
                yield Row(regularizer, modality, strength, len(pooled), *intervals, means, win_rate(pooled))


def _sheet(rows: Sequence[Row]) -> Sheet:
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        line = [f"{row.modality}, {row.strength:g}", str(row.n), _shown(row.val), _shown(row.test)]
        groups.setdefault(LABELS[row.regularizer], []).append([*line, f"{row.mean_val:+.3f}", f"{row.wins:.0%}"])
    head = ("data, strength", "n", "validation", "test", "mean, validation", "wins, validation")
    return Sheet("log ratio to the run without: above 0 it helps", head, groups)


def _by_task(effects: Sequence[Effect], strengths: Sequence[float]) -> Sheet:
    head = ("task", *(f"{kind}, {strength:g}" for strength in strengths for kind in ("val", "test")))
    groups: dict[str, list[list[str]]] = {}
    for effect in effects:
        means = np.stack([effect.val.mean(axis=1), effect.test.mean(axis=1)], axis=1).ravel()
        groups.setdefault(LABELS[effect.regularizer], []).append([effect.label, *(f"{mean:+.3f}" for mean in means)])
    return Sheet("mean log ratio of each task", head, groups)


def _shown(interval: Interval) -> str:
    return with_ends(interval.value, (interval.low, interval.high))


@paper
def figure(effects: Sequence[Effect], rows: Sequence[Row], strengths: Sequence[float]) -> Figure:
    """Log ratios against the strength: a line a task, its colour that of its modality, and the interquartile mean."""
    names = list(dict.fromkeys(effect.regularizer for effect in effects))
    drawn, panels = subplots(2, len(names), width=3.6 * len(names) + 0.6, height=5.4, sharex=True, sharey="row")
    places = range(len(strengths) + 1)
    for column, name in enumerate(names):
        for axes, kind in zip(panels[:, column], ("val", "test"), strict=True):
            axes.axhline(0, color="#777777", linewidth=0.8)
            for effect in effects:
                if effect.regularizer == name:
                    means = np.clip(getattr(effect, kind).mean(axis=1), -0.6, 0.6)
                    color = _COLORS[effect.modality]
                    axes.plot(places, [0, *means], color=color, linewidth=0.9, alpha=0.75, label=effect.modality)
            own = [getattr(row, kind) for row in rows if row.regularizer == name and row.modality == "all"]
            line = {"color": "black", "linewidth": 2.0, "label": "interquartile mean, 95 %"}
            axes.plot(places, [0, *(interval.value for interval in own)], **line)
            ends = [[0, *(getattr(interval, end) for interval in own)] for end in ("low", "high")]
            axes.fill_between(places, *ends, color="black", alpha=0.15, linewidth=0)
            axes.set_xticks(places, ["0", *(f"{strength:g}" for strength in strengths)])
        panels[0, column].set_title(LABELS[name], loc="left")
        panels[1, column].set_xlabel("strength")
    for axes, kind in zip(panels[:, 0], ("val", "test"), strict=True):
        axes.set_ylabel(f"{LABELS[kind]}\nln(loss without / with)".replace(", at", ",\nat"))
    drawn.suptitle("Fixed strengths on the calibrated schedule; above 0 they help")
    legend(drawn, panels[0, 0], columns=5)
    return drawn


if __name__ == "__main__":
    run_main(Config, main)
