"""The figures of an evaluation as a paper would draw them.

Matplotlib is of the extra `compare`; nothing of its global state is left changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.application import Run
from agents.evaluation import BASELINES, Evaluation
from agents.measures import LOSS_FLOOR, capped, log_ratio, performance_profile
from agents.optional import require
from agents.summary import MEASURES, REFERENCE, losses
from hpo_env.hyperparameters import CONTROLS, Array
from scripts.reporting.drawing import LABELS, POLICY, legend, log_axis, paper, powers_of_two, subplots
from scripts.reporting.tables import n_runs, n_searches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BANK = "#D9D9D9"

_MUTED = (
    "#332288", "#44AA99", "#999933", "#88CCEE", "#117733", "#AA4499", "#777777", "#6699CC", "#882255", "#661100",
)  # fmt: skip
"""After Paul Tol's muted scheme, which colour-blind readers can tell apart, less what is near the policy's colour."""

_DASHES: tuple[Any, ...] = ((0, (5, 1.5)), "-", (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))

_MARKERS = "osD^vP*X<>"

_COLUMNS = (3, 4, 5)  # of panels, one a task: whichever leaves the fewest gaps
_RESAMPLES = 1000


def figures(evaluation: Evaluation, result: Mapping[str, Any]) -> dict[str, Figure]:
    """All figures by name.

    Args:
        result: as from `agents.summary.summarize`.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    return {
        "random-search-equivalents": rse_plot(result),
        "performance-profile": performance_profile_plot(evaluation),
        "searches": search_curves(result),
        "loss-curves": loss_curves(evaluation),
        "trajectories": trajectories(evaluation),
    }


@paper
def rse_plot(result: Mapping[str, Any]) -> Figure:
    """Random-search equivalents, task by task: the policy's (its seeds small beside it) and the calibrated schedule's.

    What lies at the cap may be worth more trials than there are.
    """
    tasks, cap = result["tasks"], result["summary"]["rse_cap"]
    figure, ((axes,),) = subplots(1, 1, width=6.4, height=1.3 + 0.34 * (len(tasks) + 1))
    medians = [float(np.median([task[key] for task in tasks.values()])) for key in ("rse", "rse_calibrated")]
    rows = [(task["rse"], task["rse_calibrated"], task["rse_by_seed"]) for task in tasks.values()]
    for row, (own, other, seeds) in enumerate([*rows, (*medians, [])]):
        axes.plot([own, other], [row, row], color="#BBBBBB", linewidth=1.2, zorder=1)
        axes.scatter(seeds, [row + 0.28] * len(seeds), s=12, color=POLICY, alpha=0.6, linewidths=0, zorder=4)
        axes.scatter(
            [other], [row], s=75, marker="s", facecolor="white", edgecolor=_color(REFERENCE), linewidth=1.6, zorder=3
        )
        axes.scatter([own], [row], s=46, marker="o", color=POLICY, zorder=4)
    axes.plot([], [], linestyle="none", marker="o", color=POLICY, label="policy")
    axes.plot([], [], linestyle="none", marker="s", markersize=8, markerfacecolor="white", markeredgewidth=1.6,
              color=_color(REFERENCE), label=REFERENCE)  # fmt: skip
    axes.plot([], [], linestyle="none", marker="o", markersize=3.5, color=POLICY, alpha=0.6, label="policy, a seed")
    axes.axvline(
        cap, color="black", linewidth=1, linestyle=(0, (4, 2)), zorder=2, label=f"cap: the bank of {cap} trials"
    )
    axes.axhline(len(rows) - 0.5, color="#777777", linewidth=0.8)
    axes.set_yticks(range(len(rows) + 1), [*tasks, "median over tasks"])
    axes.set_ylim(len(rows) + 0.5, -0.5)
    powers_of_two(axes, 1, cap)
    axes.set_xlim(0.85, cap * 1.18)
    axes.set_xlabel("random-search equivalents [trials]")
    axes.grid(axis="y", visible=False)
    axes.set_title(f"Random search that one run replaces ({n_runs(result)})", loc="left")
    legend(figure, axes, columns=4)
    return figure


@paper
def performance_profile_plot(evaluation: Evaluation) -> Figure:
    """Performance profiles (Agarwal et al. 2021, 4.2): the share of (task, seed) on which a method's log ratio to the
    calibrated schedule is above a threshold, with the policy's 95 % band from a bootstrap stratified by task."""
    names = ["policy", *(name for name in BASELINES if name in evaluation.runs and name != REFERENCE)]
    ratios = {measure: {name: _to_reference(evaluation, name, measure) for name in names} for measure in MEASURES}
    pooled = np.concatenate([np.concatenate(by_task) for by_name in ratios.values() for by_task in by_name.values()])
    low, high = np.quantile(pooled, [0.1, 0.995])  # the worst losses would leave no room for the rest
    margin = 0.06 * max(high - low, 0.1)
    thresholds = np.linspace(min(low, 0) - margin, max(high, 0) + margin, 400)
    figure, (panels,) = subplots(1, 2, width=7.6, height=3.7, sharex=True, sharey=True)
    for axes, (measure, by_name) in zip(panels, ratios.items(), strict=True):
        axes.axvline(0, color=_color(REFERENCE), linewidth=1, linestyle=(0, (4, 2)), label=REFERENCE)
        band = _profile_band(by_name["policy"], thresholds)
        axes.fill_between(thresholds, *band, step="mid", color=POLICY, alpha=0.15, linewidth=0)
        for name, by_task in reversed(by_name.items()):
            profile = performance_profile(np.concatenate(by_task), thresholds)
            axes.plot(thresholds, profile, drawstyle="steps-mid", label=name, **_line(name))
        axes.set_xlim(thresholds[0], thresholds[-1])
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(require("matplotlib.ticker", extra="compare").PercentFormatter(1))
        axes.set_xlabel(r"threshold $\tau$ on ln(calibrated's loss / method's loss)")
        axes.set_title(LABELS[measure], loc="left")
    panels[0].set_ylabel(r"share of (task, seed) above $\tau$")
    figure.suptitle(f"Performance profiles, higher is better ({_n(evaluation)})")
    legend(figure, panels[0], columns=4, reverse=True)
    return figure


@paper
def search_curves(result: Mapping[str, Any]) -> Figure:
    """What searches find at a cost, against the policy's one run: IQM of the log ratios, with 95 % intervals where
    there are several searches of a kind."""
    table = result["summary"]["against_searches"]
    figure, (panels,) = subplots(1, 2, width=7.6, height=3.9, sharey=True)
    costs = sorted({int(cost) for by_cost in table.values() for cost in by_cost})
    for axes, measure in zip(panels, MEASURES, strict=True):
        axes.axhline(0, color=POLICY, linewidth=2.4, label="policy, one run")
        for index, (name, by_cost) in enumerate(table.items()):
            values = [by_cost[cost][f"{measure}_log_ratio_iqm"] for cost in by_cost]
            intervals = [figures[f"{measure}_log_ratio_ci"] for figures in by_cost.values()]
            bounds = np.array([i or [v, v] for i, v in zip(intervals, values, strict=True)]).reshape(-1, 2)
            # Side by side, lest their intervals hide one another.
            shift = 2 ** (0.3 * ((index + 0.5) / len(table) - 0.5))
            at = [int(cost) * shift for cost in by_cost]
            style: dict[str, Any] = {"color": "black" if name == "random" else _MUTED[(index - 1) % len(_MUTED)]}
            axes.vlines(at, bounds[:, 0], bounds[:, 1], linewidth=1, alpha=0.6, **style)
            axes.plot(at, values, marker=_MARKERS[index % len(_MARKERS)], markersize=4.5, label=name,
                      linestyle=_DASHES[(index + 1) % len(_DASHES)], linewidth=1.1, **style)  # fmt: skip
        powers_of_two(axes, costs[0], costs[-1])
        axes.set_xlabel("cost of the search [full runs]")
        axes.set_title(LABELS[measure], loc="left")
    panels[0].set_ylabel("ln(search's loss / policy's loss)\nabove 0: the policy is better")
    figure.suptitle(f"Searches against one run with the policy ({n_searches(result)})")
    legend(figure, panels[0], columns=5)
    return figure


@paper
def loss_curves(evaluation: Evaluation) -> Figure:
    """Validation losses, task by task: medians over seeds, with bands from the least to the most."""
    names = [name for name in ("constant", "cosine", REFERENCE, "policy") if name in evaluation.runs]
    figure, panels = _panels_by_task(evaluation)
    for axes, label in zip(panels, evaluation.tasks, strict=False):
        bank = sorted(evaluation.banks[label], key=lambda run: losses([run], "val")[0])
        best = _curves(bank[: math.ceil(len(bank) / 10)])
        band = np.quantile(best, [0.1, 0.9], axis=0)
        axes.fill_between(_progress(best), *band, color=BANK, linewidth=0, zorder=1, label="best 10 % of the bank")
        for name in names:
            curves = _curves(evaluation.runs[name][label])
            at, median = _progress(curves), np.median(curves, axis=0)
            axes.fill_between(at, curves.min(axis=0), curves.max(axis=0), color=_color(name), alpha=0.16, linewidth=0)
            axes.plot(at, median, label=name, **_line(name))
        axes.set_title(f"{label}\n{evaluation.tasks[label].horizon} intervals", loc="left")
        log_axis(axes)
    columns = len({axes.get_subplotspec().colspan.start for axes in panels})
    for index, axes in enumerate(panels):
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        axes.set_xlim(0, 1.02)
        if index + columns >= len(panels):
            axes.set_xlabel("share of the run")
        if index % columns == 0:
            axes.set_ylabel("validation loss")
    figure.suptitle(f"Validation loss: median and range over seeds ({_n(evaluation)})")
    legend(figure, panels[0], columns=5, reverse=True)
    return figure


@paper
def trajectories(evaluation: Evaluation) -> Figure:
    """What the policy sets: a row a control, a column a task, a line a seed, beside the calibrated schedule."""
    tasks = evaluation.tasks
    found = {name for runs in evaluation.runs["policy"].values() for name in runs[0].controls}
    controls = {name: control for name, control in CONTROLS.items() if name in found}
    figure, panels = subplots(
        len(controls), len(tasks), width=1.1 + 1.75 * max(len(tasks), 3), height=1.4 + 1.35 * len(controls),
        sharex=True, sharey="row",
    )  # fmt: skip
    for row, (name, control) in zip(panels, controls.items(), strict=True):
        for axes, label in zip(row, tasks, strict=True):
            reference, runs = evaluation.runs[REFERENCE][label][0], evaluation.runs["policy"][label]
            if name not in runs[0].controls:
                axes.text(0.5, 0.5, "none in\nthis model", transform=axes.transAxes, ha="center", va="center",
                          fontsize=8, color="#777777")  # fmt: skip
                continue
            for run in runs:
                values = np.array(run.controls[name])
                axes.plot(_midpoints(values), values, color=POLICY, linewidth=0.9, alpha=0.75, label="policy, a seed")
            values = np.array(reference.controls[name])
            axes.plot(_midpoints(values), values, color=_color(REFERENCE), linestyle=(0, (4, 2)), label=REFERENCE)
        row[0].set_ylabel(LABELS[name])
        if control.multiple:
            powers_of_two(row[0], control.low, control.high, "y")
            row[0].set_ylim(control.low / 1.2, control.high * 1.2)
        elif control.scale == "log":
            log_axis(row[0])
        else:
            row[0].set_ylim(-0.02 * control.high, 1.05 * control.high)
    for axes, label in zip(panels[0], tasks, strict=True):
        axes.set_title(label.replace("/", "/\n", 1), loc="left", fontsize=8.5)
    panels[0][0].set_xlim(0, 1)
    panels[0][0].set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    for axes in panels[-1]:
        axes.set_xlabel("share of the run")
    figure.align_ylabels()
    figure.suptitle(f"What the policy sets ({_n(evaluation)})")
    legend(figure, panels[0][0], columns=2)
    return figure


def _to_reference(evaluation: Evaluation, name: str, measure: str) -> list[Array]:
    """Log ratios of the calibrated schedule's losses to a method's, `[seeds]` a task: above 0, the method is better."""
    runs = evaluation.runs
    return [
        log_ratio(losses(runs[REFERENCE][label], measure), losses(runs[name][label], measure))
        for label in evaluation.tasks
    ]


def _profile_band(by_task: Sequence[Array], thresholds: Array) -> tuple[Array, Array]:
    """95 % of the profiles of seeds resampled within each task, pointwise: lower and upper end, `[thresholds]`."""
    rng = np.random.default_rng(0)
    profiles = [
        performance_profile(np.concatenate([rng.choice(ratios, len(ratios)) for ratios in by_task]), thresholds)
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(profiles, [0.025, 0.975], axis=0)
    return low, high


def _curves(runs: Sequence[Run]) -> Array:
    """Capped validation losses, `[runs, intervals]`, fit for a logarithmic axis."""
    curves = capped([run.val_loss for run in runs], [[run.initial_loss] for run in runs])
    return np.maximum(curves, LOSS_FLOOR)


def _progress(curves: Array) -> Array:
    """Where intervals end, as shares of the run."""
    return np.linspace(0, 1, curves.shape[-1] + 1)[1:]


def _midpoints(values: Array) -> Array:
    return (np.arange(len(values)) + 0.5) / len(values)


def _n(evaluation: Evaluation) -> str:
    tasks = len(evaluation.tasks)
    return f"n = {tasks} task{'s' * (tasks > 1)} x {evaluation.budget.seeds} seeds"


def _color(name: str) -> str:
    return POLICY if name == "policy" else str(_line(name)["color"])


def _line(name: str) -> dict[str, Any]:
    """How a method is drawn, the same in every figure."""
    if name == "policy":
        return {"color": POLICY, "linewidth": 2.4, "zorder": 5}
    index = list(BASELINES).index(name)
    return {"color": _MUTED[index % len(_MUTED)], "linestyle": _DASHES[index % len(_DASHES)], "zorder": 3}


def _panels_by_task(evaluation: Evaluation) -> tuple[Figure, list[Any]]:
    """A panel a task, and none left over."""
    count = len(evaluation.tasks)
    columns = count if count < min(_COLUMNS) else min(_COLUMNS, key=lambda columns: (-count % columns, columns))
    rows = math.ceil(count / columns)
    figure, grid = subplots(rows, columns, width=max(6.4, 0.4 + 2.5 * columns), height=1.0 + 2.1 * rows)
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]
