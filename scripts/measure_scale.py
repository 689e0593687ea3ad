"""A policy along one axis at a time: longer runs, larger models, noisier labels, learning rates off at the start,
batch sizes that stay."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agents.cells import Store
from agents.evaluation import SPLITS
from agents.policy import ControlPolicy
from agents.scale import OTHERS, Point, measure
from agents.tuner import pretrained_path
from inner_models.tasks import Task
from scripts.common import Quiet, at_least, check_device, console, known, run_main, work_bar, write_json
from scripts.evaluate import default_cache
from scripts.reporting.sheet import Sheet


@dataclass
class Config(Quiet):
    """Measure a policy at points of an axis: lengths, widths, wrong labels, wrong starts, fixed batch sizes.

    Against it stand the calibrated schedule, the base schedule, AdamW's defaults, and the policy's own mean trajectory
    on the same task where nothing is changed, replayed without looking.

    Needs the packages of the extra `data`. Leaves a JSON file and prints its tables, for people and as Markdown. Takes
    from minutes to an hour on 2 cores, in proportion to the points, tasks and seeds; what has been run is kept in the
    cache.

        python scripts/measure_scale.py --axis width --values 0.5 1 2 --tasks concrete/mlp --seeds 2 --json width.json
    """

    json: Path
    """File for the figures."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    axis: Literal["horizon", "width", "label_noise", "start", "batch_size"] = "horizon"
    """horizon: intervals in a run; width: factor on the model's; label_noise: share of labels drawn anew; start: factor
    on the learning rate that the user gives; batch_size: that of the run, which stays."""
    values: tuple[float, ...] = (8, 16, 32, 64, 128, 256)
    """Points on the axis."""
    split: Literal["meta-validation", "meta-validation-small", "meta-test"] = "meta-validation"
    """Which tasks."""
    tasks: tuple[str, ...] = ()
    """Only these of the split's tasks."""
    seeds: int = 5
    """Runs of each task and method, paired."""
    cache: Path | None = None
    """Where finished cells are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    workers: int = 2
    """Processes, one thread each. On a GPU there is one."""


def main(config: Config) -> None:
    at_least(config, 1, "seeds", "workers")
    check_device(config.device)
    policy = ControlPolicy.load(config.policy or pretrained_path())
    started = time.perf_counter()
    with work_bar(f"measuring ({config.axis})") as report:
        rows = measure(
            policy,
            _tasks(config),
            [Point(config.axis, value) for value in config.values],
            store := Store(config.cache or default_cache()),
            seeds=config.seeds,
            workers=config.workers,
            device=config.device,
            report=report,
        )
    title = "log ratio of the other's loss to the policy's: above 0 the policy is better"
    sheet, by_task = (Sheet.plain(title, head, lines) for head, *lines in (_cells(rows), _by_task(rows)))
    console.print(sheet.to_rich())
    console.out(f"\n{sheet.body()}\n\n{by_task.body()}", highlight=False)
    provenance = {
        "policy": policy.digest,
        "split": config.split,
        "seeds": config.seeds,
        "computed_on": store.origins,
        "command": _command(config),
        "seconds_of_this_call": time.perf_counter() - started,
    }
    write_json(config.json, {"rows": rows, "provenance": provenance})


def _tasks(config: Config) -> list[Task]:
    split = SPLITS[config.split]
    for name in config.tasks:
        known("task", name, [task.name for task in split])
    return [task for task in split if not config.tasks or task.name in config.tasks]


def _cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table, its head first: log ratios, interquartile means with their intervals."""
    columns = [(other, kind) for other in OTHERS for kind in ("val", "test")]
    started = "against_good_start" in rows[0]
    near = ["val within 5% of that from a good start, median ratio"] if started else []
    lines = [[rows[0]["axis"], "runs", *(f"{kind}, {other}" for other, kind in columns), "out of depth", *near]]
    for row in rows:
        entries = [row["against"][other][kind] for other, kind in columns]
        ratios = [f"{entry['iqm']:+.3f} [{entry['ci'][0]:+.3f}, {entry['ci'][1]:+.3f}]" for entry in entries]
        lines.append([f"{row['value']:g}", str(row["runs"]), *ratios, f"{row['out_of_depth_share']:.1%}"])
        if started:
            good = row["against_good_start"]
            lines[-1].append(f"{good['near']:.0%}, x {good['median']:.3f}")
    return lines


def _by_task(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line a task: the mean log ratio to the calibrated schedule's validation loss at each point."""
    found = [row["against"]["calibrated"]["val"]["by_task"] for row in rows]
    head = ["val, calibrated", *(f"{rows[0]['axis']} {row['value']:g}" for row in rows)]
    return [head, *([task, *(f"{point[task]:+.3f}" for point in found)] for task in found[0])]


def _command(config: Config) -> str:
    tasks = f" --tasks {' '.join(config.tasks)}" if config.tasks else ""
    values = " ".join(f"{value:g}" for value in config.values)
    return (
        f"python scripts/measure_scale.py --axis {config.axis} --values {values} --split {config.split}{tasks} "
        f"--seeds {config.seeds} --json {config.json.name}"
    )


if __name__ == "__main__":
    run_main(Config, main)
