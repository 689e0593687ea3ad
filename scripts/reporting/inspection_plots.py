"""The figures of an inspection: what a policy responds to and depends on, and what it did in one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.inspection import ALL_MEASURED, Inspection
from agents.optional import require
from agents.trajectory import Trajectory
from hpo_env.hyperparameters import CONTROLS
from scripts.reporting.drawing import LABELS, POLICY, legend, log_axis, paper, powers_of_two, save, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES: dict[str, dict[str, Any]] = {
    "lr": {"color": POLICY, "linestyle": "-", "linewidth": 1.8},
    "batch_size": {"color": "#117733", "linestyle": (0, (1, 1.2))},
    "weight_decay": {"color": "#332288", "linestyle": (0, (5, 1.5))},
    "dropout": {"color": "#44AA99", "linestyle": (0, (5, 1.2, 1, 1.2))},
    "augmentation": {"color": "#CC79A7", "linestyle": (0, (3, 1))},
    "label_smoothing": {"color": "#88662A", "linestyle": (0, (1, 3))},
}
"""How a control is drawn."""

_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "train_loss": ("training", {"color": "#777777", "linestyle": "--"}),
    "val_loss": ("validation", {"color": "black"}),
}

_COLUMNS = 6
_NUMBERED = 6  # decisions that a run's figure has words for, at most
_MEASURED = "#332288"


def write(inspection: Inspection, folder: Path) -> list[Path]:
    """`responses.png` and `importance.png`."""
    return _save({"responses": response_grid(inspection), "importance": importance_bars(inspection)}, folder)


def write_run(trajectory: Trajectory, folder: Path) -> list[Path]:
    """`decisions.png`."""
    return _save({"decisions": decisions(trajectory)}, folder)


def _save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """With a palette: a third of the bytes."""
    paths = save(figures, folder)
    for path in paths:
        require("PIL.Image", extra="compare").open(path).convert("RGB").quantize(64).save(path, optimize=True)
    return paths


@paper
def response_grid(inspection: Inspection) -> Figure:
    """A panel a feature, the most important first, a line a control; shaded where the feature usually lies."""
    order = sorted(inspection.features, key=lambda name: -inspection.features[name].action.value)
    names = [*order, *(name for name in inspection.responses if name not in order)]
    rows = -(-len(names) // _COLUMNS)
    figure, grid = subplots(rows, _COLUMNS, width=11.0, height=1.2 + 1.35 * rows, sharey=True)
    medians = np.concatenate([inspection.responses[name].actions[1].ravel() for name in names])
    limit = min(1.0, 1.1 * max(float(np.abs(medians).max()), 0.05))
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for name, axes in zip(names, grid.flat, strict=False):
        response = inspection.responses[name]
        axes.axvspan(*response.usual, color="#F0F0F0", linewidth=0, zorder=0)
        axes.axhline(0, color="#999999", linewidth=0.6)
        for column, control in enumerate(CONTROLS):
            if control not in inspection.groups[ALL_MEASURED].by_control:
                continue
            axes.plot(response.values, response.actions[1, :, column], label=control, **_LINES[control])
        axes.set_title(name, loc="left", pad=2, fontsize=8)
        axes.set_xlim(response.values[0], response.values[-1])
        axes.set_ylim(-limit, limit)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(length=2, labelsize=7)
        axes.grid(visible=False)
    figure.supylabel("action in -1..1, median over real observations", fontsize=9)
    figure.suptitle(
        f"What each control answers to each feature, the most important first ({_n(inspection)})\n"
        "across: the feature's range in meta-training; shaded: where its middle 90 % lies in these runs\n"
        f"blind to: {', '.join(inspection.blind) or 'nothing'}",
    )
    legend(figure, grid.flat[0], columns=4)
    return figure


@paper
def importance_bars(inspection: Inspection) -> Figure:
    """Groups by the loss that they save and by the actions that they change, and below them single features."""
    groups = dict(sorted(inspection.groups.items(), key=lambda item: (item[0] == ALL_MEASURED, -item[1].action.value)))
    figure, (panels,) = subplots(1, 2, width=9.0, height=1.4 + 0.24 * len(groups), sharey=True)
    _bars(panels[0], {name: (i.action.value, i.action.low, i.action.high) for name, i in groups.items()}, POLICY)
    panels[0].set_xlabel("change of the actions, in -1..1")
    losses = {name: (i.loss.value, i.loss.low, i.loss.high) for name, i in groups.items() if i.loss is not None}
    _bars(panels[1], losses, _MEASURED)
    panels[1].axvline(0, color="black", linewidth=0.8)
    panels[1].set_xlabel("ln(final validation loss, permuted / own)\nabove 0: seeing it helps")
    panels[0].set_title("what it moves", loc="left")
    panels[1].set_title("what it is worth", loc="left")
    figure.suptitle(
        f"Features taken from a random run of another task, at the same share of the run ({_n(inspection)})"
    )
    return figure


def _bars(axes: Any, figures: Mapping[str, tuple[float, float, float]], color: str) -> None:
    """Horizontal bars with their 95 % intervals, the first on top."""
    values, low, high = np.array(list(figures.values())).T
    rows = range(len(figures))
    axes.barh(rows, values, color=color, alpha=0.75, height=0.66)
    axes.hlines(rows, low, high, color="black", linewidth=1.1)
    axes.set_yticks(rows, list(figures))
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


@paper
def decisions(trajectory: Trajectory) -> Figure:
    """Losses, the controls below them, and the largest moves numbered, with their reasons."""
    epochs = np.arange(1, trajectory.epochs + 1)
    numbered = largest_moves(trajectory)
    notes = [
        fill(f"{number}  {described(decision)}", 140, subsequent_indent="    ")
        for number, decision in enumerate(numbered, start=1)
    ]
    lines = sum(note.count("\n") + 1 for note in notes)
    figure, panels = subplots(
        1 + len(trajectory.controls), 1, width=8.4, height=3.4 + 1.15 * len(trajectory.controls) + 0.15 * lines,
        sharex=True, gridspec_kw={"height_ratios": [1.7, *[1.0] * len(trajectory.controls)]},
    )  # fmt: skip
    top = panels[0][0]
    for name, (kind, style) in _LOSSES.items():
        losses = np.array([np.nan if loss is None else loss for loss in trajectory.losses.get(name, [])])
        if len(losses):
            top.plot(epochs, losses, label=kind, **style)
    if all(loss is None or loss > 0 for losses in trajectory.losses.values() for loss in losses):
        log_axis(top)
    top.set_ylabel("loss")
    top.legend(loc="upper right", ncols=2)
    for (axes,), name in zip(panels[1:], trajectory.controls, strict=True):
        values = np.array(trajectory.values[name])
        axes.step(epochs, values, where="mid", color=_LINES[name]["color"], linewidth=1.6)
        axes.set_ylabel(LABELS[name])
        if CONTROLS[name].multiple:
            powers_of_two(axes, values.min(), values.max(), "y")
            axes.set_ylim(values.min() / 1.3, values.max() * 1.3)
        elif CONTROLS[name].scale == "log" and values.min() > 0:
            log_axis(axes)
    for number, decision in enumerate(numbered, start=1):
        for (axes,) in panels:
            axes.axvline(decision["epoch"] + 0.5, color="#777777", linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
        top.annotate(str(number), (decision["epoch"] + 0.5, 1.0), xycoords=("data", "axes fraction"), ha="center",
                     va="bottom", fontsize=8)  # fmt: skip
    panels[-1][0].set_xlabel("epoch")
    panels[-1][0].set_xlim(0.5, max(trajectory.epochs, 1) + 0.5)
    whole = require("matplotlib.ticker", extra="compare").MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10])
    panels[-1][0].xaxis.set_major_locator(whole)
    figure.suptitle(
        f"A run of {trajectory.epochs} epochs: what was decided, and why ({trajectory.optimizer})\n"
        f"numbered, {_NUMBERED} at most: the start, where the guard stepped in, and the policy's largest actions"
    )
    if notes:
        figure.supxlabel("\n".join(notes), x=0.02, ha="left", fontsize=7.5, linespacing=1.25)
    figure.align_ylabels()
    return figure


def largest_moves(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The decisions, in order, that a figure has words for: the first, guarded ones, and the largest actions."""

    def weight(decision: Mapping[str, Any]) -> float:
        if decision["guard"] or not decision["epoch"]:
            return np.inf
        acts = zip(CONTROLS, decision["action"], strict=False)
        moved = [abs(act or 0.0) for name, act in acts if name in decision["hyperparameters"]]
        return max(moved, default=0.0)

    kept = sorted(trajectory.decisions, key=lambda decision: -weight(decision))[:_NUMBERED]
    return sorted(kept, key=lambda decision: int(decision["epoch"]))


def described(decision: Mapping[str, Any]) -> str:
    """A decision, in a line."""
    return f"epoch {decision['epoch'] + 1}: {decision.get('reason', 'no reason was recorded')}"


def _n(inspection: Inspection) -> str:
    return f"n = {len(inspection.tasks)} tasks x {inspection.seeds} seeds"
