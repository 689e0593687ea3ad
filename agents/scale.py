"""How a policy does along one axis at a time: the length of the run, the size of the model, the noise in the labels, a
learning rate that is off at the start, a batch size that stays.

Few methods, so that long runs and large models can be paid for: the policy, the calibrated schedule, the base schedule
that the policy deviates from, AdamW's defaults with a cosine; and a replay, which says whether looking at the run is of
any use there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpo_env.hyperparameters import CONTROLS, Array
from inner_models.names import unknown
from inner_models.tasks import Task

from .application import Run
from .cells import Cell, Store, run_cells
from .controllers import GRID, Replay, WithPolicy, of_the_others
from .evaluation import labels, scaled
from .measures import interquartile_mean, log_ratio, win_rate
from .policy import ControlPolicy
from .schedules import Cosine
from .summary import losses, nearness

OTHERS = ("calibrated", "base-rule", "cosine", "replay")
"""`replay`: the policy's mean trajectory on the same task where nothing was changed (of the other seeds), open-loop."""


@dataclass(frozen=True)
class Point:
    """Where on an axis the tasks are run.

    Attributes:
        axis: `horizon` (intervals), `width` (a factor), `label_noise` (as in `Task`), `start`: a factor on the
            learning rate of the user's own schedule, the calibrated one, which the policy then deviates from; or
            `batch_size`, where the batch size stays, all methods' learning rates with it.
    """

    axis: str
    value: float

    def place(self, task: Task) -> Task:
        if self.axis == "horizon":
            return replace(task, horizon=int(self.value))
        if self.axis == "width":
            return scaled(task, width=self.value)
        if self.axis == "label_noise":
            return replace(task, label_noise=self.value)
        if self.axis in ("start", "batch_size"):
            return task
        raise ValueError(unknown("axis", self.axis, ["horizon", "width", "label_noise", "start", "batch_size"]))

    @property
    def lr_factor(self) -> float | None:
        """On the given learning rate; None where none is given."""
        return self.value if self.axis == "start" else None

    @property
    def batch_size(self) -> float | None:
        """Where the batch size stays; None where it does not."""
        return self.value if self.axis == "batch_size" else None


def _attached(policy: ControlPolicy, lr_factor: float | None, batch_size: float | None = None) -> WithPolicy:
    if lr_factor is None:
        return WithPolicy(policy, batch_size=batch_size, record=True)
    return WithPolicy(policy, start="given", lr_factor=lr_factor, record=True)


def _compared(policy: ControlPolicy, trajectories: Array, point: Point) -> dict[str, Any]:
    """The others, by name.

    Args:
        trajectories: what to replay, `[runs, GRID, controls]`.
    """
    rules, stay = policy.header.base_rules, np.zeros((1, GRID, len(CONTROLS)))
    lr_factor, batch_size = point.lr_factor, point.batch_size
    factor = 1.0 if lr_factor is None else lr_factor
    return {
        "calibrated": Cosine("calibrated", factor, batch_size),
        "base-rule": Replay(rules, stay, lr_factor, batch_size),
        "cosine": Cosine("default", factor, batch_size),
        "replay": Replay(rules, trajectories, lr_factor, batch_size),
    }


def measure(
    policy: ControlPolicy,
    tasks: Sequence[Task],
    points: Sequence[Point],
    store: Store,
    *,
    seeds: int = 5,
    workers: int = 2,
    device: str = "cpu",
    report: Callable[[float, float, str], None] = lambda done, total, name: None,
) -> list[dict[str, Any]]:
    """One row a point: log ratios of the others' losses to the policy's, above 0 where the policy is better. On the
    axis `start` also how near the policy's runs end to those from the good start (`agents.summary.nearness`).

    Args:
        seeds: runs of each task and method, paired.
        workers, device, report: as for `agents.cells.run_cells`.
    """
    numbers, named = tuple(range(seeds)), labels(tasks)
    settings: dict[str, Any] = {"workers": workers, "device": device, "report": report}
    given = {1.0 if point.axis == "start" else None for point in points}
    unchanged = {(g, label): Cell(task, _attached(policy, g), numbers) for g in given for label, task in named.items()}
    run_cells(list(unchanged.values()), store, **settings)  # the replays are made from these
    trajectories = {key: of_the_others(store.load(cell)) for key, cell in unchanged.items()}  # type: ignore[arg-type]
    cells: dict[Any, Cell] = {}
    for point in points:
        for label, task in named.items():
            replayed = trajectories[None if point.lr_factor is None else 1.0, label]
            methods = {
                "policy": _attached(policy, point.lr_factor, point.batch_size),
                **_compared(policy, replayed, point),
            }
            cells |= {
                (point, label, name): Cell(point.place(task), method, numbers) for name, method in methods.items()
            }
    run_cells(list(cells.values()), store, **settings)
    runs: dict[Any, list[Run]] = {key: store.load(cell) for key, cell in cells.items()}  # type: ignore[misc]
    rows = [_row(point, list(named), runs) for point in points]
    for row, point in zip(rows, points, strict=True):
        if point.axis == "start":
            runs |= {("good", label): store.load(unchanged[1.0, label]) for label in named}  # type: ignore[misc]
            pairs = [(runs[point, label, "policy"], runs["good", label]) for label in named]
            ends, good = (np.concatenate([losses(found, "val") for found in side]) for side in zip(*pairs, strict=True))
            row["against_good_start"] = nearness(ends, good)
    return rows


def _row(point: Point, names: Sequence[str], runs: Mapping[Any, list[Run]]) -> dict[str, Any]:
    own = {label: runs[point, label, "policy"] for label in names}
    row: dict[str, Any] = {"axis": point.axis, "value": point.value, "runs": sum(map(len, own.values())), "against": {}}
    for other in OTHERS:
        against: dict[str, Any] = {}
        for kind in ("val", "test"):
            ratios = [log_ratio(losses(runs[point, label, other], kind), losses(own[label], kind)) for label in names]
            interval = interquartile_mean(ratios)
            against[kind] = {
                "iqm": interval.value,
                "ci": [interval.low, interval.high],
                "win_rate": win_rate(np.concatenate(ratios)),
                "by_task": {label: float(ratio.mean()) for label, ratio in zip(names, ratios, strict=True)},
            }
        row["against"][other] = against
    lost = [flag for label in names for run in own[label] for flag in run.notes["out_of_depth"]]
    row["out_of_depth_share"] = float(np.mean(lost))
    return row
