"""Tables and figures of what a surrogate predicts, proposes and saves.

Matplotlib is of the extra `compare`; nothing of its global state is left changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from agents.surrogate import SHARES
from scripts.reporting.drawing import POLICY, legend, paper, powers_of_two, subplots
from scripts.reporting.sheet import Sheet, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = dict[str, Any]


def sheets_of(result: Figures) -> list[Sheet]:
    pooled = result["rank_correlation"]
    shares = [f"{share:g}" for share in (0.0, *SHARES)]
    groups = {
        "": pooled,
        **({"meta-train, held out": result["held_out"]["rank_correlation"]} if "held_out" in result else {}),
    }
    ranks = {
        heading: [
            [name, *(_signed(rows[name][share]) if share in rows[name] else "" for share in shares)] for name in rows
        ]
        for heading, rows in groups.items()
    }
    head = ("rank correlation at the share", *shares)
    sheets = [Sheet("predicted and true final losses", head, ranks)]
    first = result["first_proposal"]
    rows = [
        [label, *(_signed(row[kind]) for kind in ("val", "test")), str(row["rse"]), str(row["rse_calibrated"])]
        for label, row in first["by_task"].items()
    ]
    rows.append(
        [
            "all",
            *(_signed(first[kind]) for kind in ("val", "test")),
            *(f"{first[n]:g}" for n in ("rse", "rse_calibrated")),
        ]
    )
    head = ("task", "validation", "test", "RSE", "calibrated's RSE")
    sheets.append(Sheet.plain("first proposal, log ratio to calibrated: above 0 better", head, rows))
    searches = result["searches"]
    trials = list(searches["random"])
    rows = [[name, *(_signed(by_trials[n]) for n in trials)] for name, by_trials in searches.items()]
    sheets.append(
        Sheet.plain("best of so many trials, log ratio to calibrated: above 0 better", ("search", *trials), rows)
    )
    if "held_out" in result:
        rows = [[name, _signed(value)] for name, value in result["held_out"]["score_of_the_pick"].items()]
        sheets.append(
            Sheet.plain("meta-train, held out: score of the trial picked, below 0 better", ("by", "score"), rows)
        )
    return sheets


def _signed(figures: Figures) -> str:
    return with_ends(figures["value"], figures["ci"])


_COLORS = (POLICY, "#332288", "#777777")

_KINDS = ("black", "#332288", "#44AA99", "#AA4499", "#999933")

_STARTS: dict[str, dict[str, Any]] = {
    "": {"ls": (0, (1, 1.2)), "marker": "o"},
    "calibrated": {"ls": (0, (5, 1.5)), "marker": "s"},
    "surrogate": {"ls": "-", "marker": "D"},
}


@paper
def surrogate_figure(result: Figures) -> Figure:
    """How predictions rank trials, and what the first proposal is worth, task by task."""
    found, ((ranks, worth),) = subplots(1, 2, width=8.4, height=3.6)
    for index, (name, by_share) in enumerate(result["rank_correlation"].items()):
        at = [float(share) + 0.008 * (index - 1) for share in by_share]
        values = np.array([[entry["value"], *entry["ci"]] for entry in by_share.values()])
        style: dict[str, Any] = {"color": _COLORS[index]}
        ranks.errorbar(
            at, values[:, 0], np.abs(values[:, 1:] - values[:, :1]).T, fmt="o-", markersize=4, label=name, **style
        )
        if not index:
            for x, entry in zip(at, by_share.values(), strict=True):
                tasks = list(entry["by_task"].values())
                ranks.scatter([x] * len(tasks), tasks, s=8, alpha=0.35, linewidths=0, **style)
    ranks.set(
        xlabel="share of the run that is seen", ylabel="rank correlation", title="predicted and true final losses"
    )
    ranks.set_xticks([0, *SHARES], ["0", "1/8", "1/4", "1/2"])
    ranks.legend(loc="lower right")
    by_task = result["first_proposal"]["by_task"]
    rows = np.arange(len(by_task) + 1)
    for kind, shift, color, marker in (("val", -0.12, POLICY, "o"), ("test", 0.12, "#332288", "s")):
        entries = [*(row[kind] for row in by_task.values()), result["first_proposal"][kind]]
        values = np.array([[entry["value"], *entry["ci"]] for entry in entries])
        label = {"val": "validation", "test": "test"}[kind]
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        bar: dict[str, Any] = {"fmt": marker, "markersize": 4, "color": color, "label": label}
        worth.errorbar(values[:, 0], rows + shift, xerr=errors, **bar)
    worth.axvline(0, color="#777777", ls="--", linewidth=1)
    worth.axhline(len(by_task) - 0.5, color="#777777", linewidth=0.8)
    worth.set_yticks(rows, [*by_task, "all"])
    worth.set_ylim(len(by_task) + 0.5, -0.5)
    worth.set(xlabel="log ratio to calibrated", title="first proposal, one trial")
    worth.legend(loc="lower right")
    return found


@paper
def search_figure(result: Figures) -> Figure:
    """The best so far against trials, searches beside one another. The landmarks count among the trials."""
    searches = result["searches"]
    kinds = list(dict.fromkeys(name.partition(" from ")[0] for name in searches))
    found, ((axes,),) = subplots(1, 1, width=6.4, height=4.2)
    axes.axhline(0, color="#777777", linewidth=1)
    for index, (name, by_trials) in enumerate(searches.items()):
        kind, _, start = name.partition(" from ")
        trials = np.array([int(number) for number in by_trials]) + result["landmark_cost"].get(name, 0.0)
        at = trials * 2 ** (0.04 * (index - len(searches) / 2))  # side by side, lest intervals hide one another
        values = np.array([[entry["value"], *entry["ci"]] for entry in by_trials.values()])
        color = _KINDS[kinds.index(kind) % len(_KINDS)]
        axes.vlines(at, values[:, 1], values[:, 2], linewidth=1, alpha=0.5, color=color)
        axes.plot(at, values[:, 0], color=color, markersize=4.5, label=name, **_STARTS[start])
    powers_of_two(axes, 1, max(int(number) for number in searches["random"]))
    axes.set(xlabel="trials, landmarks included", ylabel="log ratio to calibrated, best so far")
    axes.set_ylim(bottom=-0.3)  # the first random trials would leave no room for the rest
    legend(found, axes, columns=4)
    return found
