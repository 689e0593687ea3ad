"""Tables and the figure of ways to choose a model.

Matplotlib is of the extra `compare`; nothing of its global state is left changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agents.architecture_choice import PARTS
from scripts.reporting.drawing import POLICY, legend, paper, powers_of_two, subplots
from scripts.reporting.sheet import Sheet, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANDOM, PRESENT, HYPERBAND = "the best of n at random", "halving by present loss", "Hyperband"
PREDICTED = "halving by predicted loss"
STYLES: dict[str, dict[str, str]] = {
    RANDOM: {"color": "#777777", "ls": "--", "marker": "."},
    PRESENT: {"color": "#332288", "marker": "s"},
    HYPERBAND: {"color": "#117733", "marker": "D"},
    PREDICTED: {"color": POLICY, "marker": "o"},
}


def sheets_of(
    rows: Sequence[dict[str, Any]], gains: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]]
) -> list[Sheet]:
    return [_regrets(rows), _gains(gains), _correlations(ranks)]


def _regrets(rows: Sequence[dict[str, Any]]) -> Sheet:
    head = ["way", "runs", "regret", "normalized", "on test", *rows[0]["regret"]["by_dataset"]]
    groups: dict[str, list[list[str]]] = {row["kind"]: [] for row in rows}
    for row in rows:
        cells = [_number(row[name]) for name in ("regret", "normalized", "test")]
        by_dataset = [f"{value:.3f}" for value in row["regret"]["by_dataset"].values()]
        groups[row["kind"]].append([row["way"], f"{row['runs']['mean']:.1f}", *cells, *by_dataset])
    title = f"regret: ln(final loss of the chosen model / of the best), n = {rows[0]['n']}"
    return Sheet(title, tuple(head), groups)


def _gains(gains: Sequence[dict[str, Any]]) -> Sheet:
    lines = [[f"{row['share']:.0%}", _number(row), _number({"mean": row["iqm"], "ci": row["iqm_ci"]})] for row in gains]
    title = "regret of halving by present loss less that by predicted loss: above 0 the prediction is better"
    return Sheet.plain(title, ["share that goes on", "mean", "interquartile mean"], lines)


def _correlations(ranks: Sequence[dict[str, Any]]) -> Sheet:
    lines = [[f"{row['part']:g}", *(_number(row[name]) for name in ("present", "predicted"))] for row in ranks]
    return Sheet.plain("rank correlation with the final loss", ["share of the run", "present", "predicted"], lines)


def _number(found: Mapping[str, Any]) -> str:
    return with_ends(found["mean"], found["ci"], "")


@paper
def figure(rows: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]]) -> Figure:
    """Regret against cost, and rank correlations."""
    found, ((*costs, order),) = subplots(1, 3, width=10.0, height=3.6)
    for axes, name, title in zip(
        costs,
        ("regret", "normalized"),
        (f"regret (n = {rows[0]['n']})", "regret / that of a random choice, by data set"),
        strict=True,
    ):
        for kind, style in STYLES.items():
            chosen = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["runs"]["mean"])
            _errorbar(axes, [(row["runs"]["mean"], row[name]) for row in chosen], label=kind, **style)
        powers_of_two(axes, 1, 8)
        axes.set(xlabel="full runs of a candidate", title=title)
        axes.set_ylim(bottom=0)
    legend(found, costs[0], columns=4)
    for name, style in {"present": STYLES[PRESENT], "predicted": STYLES[PREDICTED]}.items():
        _errorbar(order, [(row["part"], row[name]) for row in ranks], label=name, **style)
    powers_of_two(order, ranks[0]["part"], ranks[-1]["part"])
    order.set(xticks=PARTS, xticklabels=["1/8", "1/4", "1/2"], xlabel="share of the run")
    order.set(title="rank correlation with the final loss")
    order.legend(loc="lower right")
    return found


def _errorbar(axes: Any, points: Sequence[tuple[float, Mapping[str, Any]]], **style: str) -> None:
    values = np.array([[found["mean"], *found["ci"]] for _, found in points])
    errors = np.abs(values[:, 1:] - values[:, :1]).T
    axes.errorbar([at for at, _ in points], values[:, 0], errors, markersize=4, **style)
