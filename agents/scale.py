"""How a policy does along one axis at a time: the length of the run, the size of the model, the noise in the labels.

Few methods, so that long runs and large models can be paid for: the policy, the calibrated schedule, the base rule that
the policy deviates from, and AdamW's defaults with a cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpo_env.hyperparameters import CONTROLS
from inner_models.tasks import Task

from .application import Run
from .cells import Cell, Store, run_cells
from .controllers import GRID, Replay, WithPolicy
from .evaluation import labels, scaled
from .measures import interquartile_mean, log_ratio, win_rate
from .policy import ControlPolicy
from .schedules import Cosine
from .summary import losses

OTHERS = ("calibrated", "base-rule", "cosine")


@dataclass(frozen=True)
class Point:
    """Where on an axis the tasks are run.

    Attributes:
        axis: `horizon` (intervals), `width` (a factor) or `label_noise` (as in `Task`).
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
        raise ValueError(f"no axis {self.axis!r}; known: horizon, width, label_noise")


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
    """One row a point: log ratios of the others' losses to the policy's, above 0 where the policy is better.

    Args:
        seeds: runs of each task and method, paired.
        workers, device, report: as for `agents.cells.run_cells`.
    """
    methods = {
        "policy": WithPolicy(policy, record=True),
        "calibrated": Cosine("calibrated"),
        "base-rule": Replay(policy.header.base_rules, np.zeros((1, GRID, len(CONTROLS)))),
        "cosine": Cosine(),
    }
    numbers = tuple(range(seeds))
    cells = {
        (point, label, name): Cell(point.place(task), method, numbers)
        for point in points
        for label, task in labels(tasks).items()
        for name, method in methods.items()
    }
    run_cells(list(cells.values()), store, workers=workers, device=device, report=report)
    runs: dict[Any, list[Run]] = {key: store.load(cell) for key, cell in cells.items()}  # type: ignore[misc]
    return [_row(point, list(labels(tasks)), runs) for point in points]


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
