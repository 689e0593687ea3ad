"""Tables and the figure of a learned search beside others.

Matplotlib is of the extra `compare`; nothing of its global state is left changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.reporting.drawing import POLICY, legend, paper, powers_of_two, subplots
from scripts.reporting.sheet import Sheet, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = dict[str, Any]

_TITLES = {"searches": "meta-validation", "held_out": "emulators of data sets held out"}


def sheets_of(result: Figures) -> list[Sheet]:
    sheets = []
    for kind, title in _TITLES.items():
        if kind in result:
            counts = [key for key in next(iter(result[kind].values())) if key.isdecimal() or key == "test"]
            rows = [[name, *(_signed(row[key]) for key in counts)] for name, row in result[kind].items()]
            title = f"{title}: log ratio to the calibrated schedule, above 0 better"
            sheets.append(Sheet.plain(title, ("best of so many trials", *counts), rows))
    quartiles = result["emulators"]["quartiles"]
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in quartiles.items()]
    sheets.append(Sheet.plain("emulators, leave-one-out, by task", ("", "lower quartile", "median", "upper"), rows))
    return sheets


def _signed(figures: Figures) -> str:
    return with_ends(figures["value"], figures["ci"])


_STYLES: dict[str, dict[str, Any]] = {
    "random": {"color": "#777777", "ls": ":"},
    "tpe": {"color": "#332288", "ls": "--"},
    "tpe from calibrated": {"color": "#332288"},
    "gp": {"color": "#44AA99", "ls": "--"},
    "gp from calibrated": {"color": "#44AA99"},
    "lstm": {"color": POLICY, "linewidth": 2},
    "lstm-without-features": {"color": "#882255"},
    "lstm-blind": {"color": POLICY, "ls": ":"},
}


LOWEST = -0.15
"""Where the vertical axis ends, lest random search's first trials take all of it."""


@paper
def search_figure(result: Figures) -> Figure:
    """Best so far against trials, trained and on emulators held out; and what the emulators predict."""
    panels = {kind: title for kind, title in _TITLES.items() if kind in result}
    found, (axes,) = subplots(1, len(panels) + 1, width=3.7 * (len(panels) + 1), height=3.9)
    for (kind, title), ax in zip(panels.items(), axes, strict=False):
        for name, row in result[kind].items():
            trials = [int(key) for key in row if key.isdecimal()]
            values = np.array([[row[str(n)]["value"], *row[str(n)]["ci"]] for n in trials])
            cost = np.array(trials) + row.get("landmark_cost", 0.0)
            (line,) = ax.plot(cost, values[:, 0], label=name, **_STYLES.get(name, {}))
            ax.fill_between(cost, values[:, 1], values[:, 2], alpha=0.12, linewidth=0, color=line.get_color())
        ax.axhline(0, color="#777777", linewidth=0.8)
        powers_of_two(ax, 1, trials[-1])
        ax.set_ylim(bottom=max(ax.get_ylim()[0], LOWEST))
        ax.set(xlabel="full runs, landmarks included", ylabel="log ratio to calibrated, best so far", title=title)
    legend(found, axes[0], columns=4)
    sample = result["emulators"]["sample"]
    axes[-1].plot([-1, 0.5], [-1, 0.5], color="#777777", linewidth=0.8)
    axes[-1].scatter(sample["scores"], sample["predicted"], s=5, alpha=0.4, linewidths=0, color="#332288")
    axes[-1].set(xlim=(-1, 0.5), ylim=(-1, 0.5), xlabel="score of a trial", ylabel="predicted from the others")
    axes[-1].set(title="emulators, leave-one-out")
    return found
