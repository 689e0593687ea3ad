"""Why did it do that? What a policy looks at, or, with `--run`, why it decided as it did in one run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agents.application import jsonable
from agents.cells import Store
from agents.evaluation import SPLITS
from agents.inspection import Importance, Inspection, inspect
from agents.measures import Interval
from agents.optional import require
from agents.policy import ControlPolicy
from agents.trajectory import TRAJECTORY_FILE, Trajectory
from agents.tuner import pretrained_path
from hpo_env.hyperparameters import CONTROLS
from scripts.common import (
    Quiet,
    at_least,
    beside,
    check_device,
    check_out,
    console,
    run_main,
    work_bar,
    write_config,
    write_json,
)
from scripts.evaluate import default_cache
from scripts.reporting.inspection_plots import write, write_run
from scripts.reporting.sheet import Sheet

SEEDS = {"quick": 2, "default": 5}

_PLACES = (TRAJECTORY_FILE, f"*/{TRAJECTORY_FILE}")
"""Where a run's folder may have its trajectory."""


@dataclass
class Config(Quiet):
    """Inspect a policy: its responses to each feature, and the worth of each on runs that it was not trained on.

    Needs the extras `compare` and `data`. Leaves tables and figures. Takes three minutes on 2 cores, less with --budget
    quick; what has been run is kept in the cache. With `--run`, only that run's decisions, one by one, in words, in
    seconds.

        python scripts/inspect_policy.py --policy runs/default/policy.safetensors --out runs/why
        python scripts/inspect_policy.py --run trajectory.json --out runs/decisions
    """

    out: Path
    """Folder for tables and figures."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    run: Path | None = None
    """A trajectory that a tuner saved (tuner.trajectory.save), or a folder of scripts/apply_policy.py with one."""
    json: Path | None = None
    """Also write the figures to this file."""
    split: Literal["meta-validation", "meta-validation-small"] = "meta-validation"
    """Which tasks the policy is inspected on."""
    budget: Literal["quick", "default"] = "default"
    """Runs of each task and group of features: 2, or 5 (some minutes on 2 cores)."""
    cache: Path | None = None
    """Where finished cells are kept; $HYPERPILOT_CACHE or ~/.cache/hyperpilot when left out."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    workers: int = 2
    """Processes, one thread each. On a GPU there is one."""


def main(config: Config) -> None:
    at_least(config, 1, "workers")
    check_device(config.device)
    require("matplotlib", extra="compare")  # rather now than after minutes
    policy = ControlPolicy.load(config.policy or pretrained_path())
    trajectory = read_run(config.run) if config.run else None
    check_out(config.out)
    result = _explain(config, policy, trajectory) if trajectory else _inspect(config, policy)
    if config.json:
        write_json(config.json, jsonable(result))
    write_config(config.out, "inspect_policy", config)
    console.print(f"tables and figures are in {config.out}", soft_wrap=True)


def read_run(path: Path) -> Trajectory:
    """The trajectory in a file, in a folder, or in one of its folders.

    Raises:
        ValueError, OSError: there is none (the nearest name is suggested), or more than one, or it cannot be used.
    """
    if not path.exists():
        near = beside(path, ("*.json", *(f"*/{place}" for place in _PLACES)), cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no run folder or trajectory file {path}{hint}")
    if path.is_dir():
        found = sorted(match for place in _PLACES for match in path.glob(place))
        if not found:
            raise ValueError(f"{path} holds no {TRAJECTORY_FILE}; have one written with tuner.trajectory.save(path)")
        if len(found) > 1:
            raise ValueError(f"{path} holds {len(found)} runs; choose one of {', '.join(map(str, found))}")
        path = found[0]
    return Trajectory.load(path)


def _explain(config: Config, policy: ControlPolicy, trajectory: Trajectory) -> dict[str, Any]:
    sheet = decision_sheet(trajectory)
    table = sheet.to_rich()
    table.columns[-1].justify = "left"
    console.print(table)
    remarks = []
    if trajectory.policy != policy.digest:
        another = str(trajectory.policy)[:12]
        remarks.append(f"This run was done with another policy ({another}) than the one given ({policy.digest[:12]}).")
        console.print(f"note: {remarks[-1]}", soft_wrap=True)
    _write_markdown(config.out / "decisions.md", [*remarks, sheet.to_markdown().replace("---: |\n", "--- |\n", 1)])
    write_run(trajectory, config.out)
    return {
        "policy": trajectory.policy,
        "same_policy": not remarks,
        "decisions": [{"epoch": d["epoch"] + 1, **{key: d.get(key) for key in _TOLD}} for d in trajectory.decisions],
    }


_TOLD = ("reason", "hyperparameters", "action", "guard", "out_of_depth")


def decision_sheet(trajectory: Trajectory) -> Sheet:
    """Decision by decision: the epoch that it is for, the validation loss before it, the values set, and why."""
    rows = []
    for decision in trajectory.decisions:
        losses = trajectory.losses.get("val_loss", [])
        before = decision["epoch"] - 1
        loss = losses[before] if 0 <= before < len(losses) else None
        values = [f"{decision['hyperparameters'][name]:.3g}" for name in trajectory.controls]
        reason = decision.get("reason", "no reason was recorded")
        rows.append([str(decision["epoch"] + 1), "" if loss is None else f"{loss:.4f}", *values, reason])
    head = ("epoch", "val loss before", *trajectory.controls, "why")
    return Sheet.plain(f"Decisions in a run of {trajectory.total_epochs} epochs, {trajectory.optimizer}", head, rows)


def _inspect(config: Config, policy: ControlPolicy) -> dict[str, Any]:
    started = time.perf_counter()
    store = Store(config.cache or default_cache())
    with work_bar("inspecting") as report:
        inspection = inspect(
            policy,
            SPLITS[config.split],
            SEEDS[config.budget],
            store,
            workers=config.workers,
            device=config.device,
            report=report,
        )
    sheets = importance_sheets(inspection)
    for sheet in sheets:
        console.print(sheet.to_rich())
    unseen = f"Blind to (never varied in its training): {', '.join(inspection.blind) or 'nothing'}."
    console.print(unseen, soft_wrap=True)
    _write_markdown(config.out / "inspection.md", [*(sheet.to_markdown() for sheet in sheets), unseen])
    write(inspection, config.out)
    provenance = {
        "policy": policy.digest,
        "split": config.split,
        "command": f"python scripts/inspect_policy.py --split {config.split} --budget {config.budget} --out runs/why",
        "computed_on": store.origins,
        "seconds_of_this_call": time.perf_counter() - started,
    }
    return {**inspection.to_dict(), "provenance": provenance}


def importance_sheets(inspection: Inspection) -> list[Sheet]:
    """Groups, and single features, the most important first."""
    n = f"n = {len(inspection.tasks)} tasks x {inspection.seeds} seeds"
    controls = list(CONTROLS)
    groups = [
        [name, _interval(i.loss, signed=True) if i.loss else "", _interval(i.action), *_by_control(i)]
        for name, i in _ordered(inspection.groups)
    ]
    features = [[name, _interval(i.action), *_by_control(i)] for name, i in _ordered(inspection.features)]
    return [
        Sheet.plain(f"Groups of features, permuted ({n})", ("group", "validation loss", "actions", *controls), groups),
        Sheet.plain(f"Features, permuted ({n})", ("feature", "actions", *controls), features),
    ]


def _ordered(importances: Mapping[str, Importance]) -> Iterable[tuple[str, Importance]]:
    return sorted(importances.items(), key=lambda item: -item[1].action.value)


def _by_control(importance: Importance) -> list[str]:
    return [f"{importance.by_control[name]:.3f}" if name in importance.by_control else "" for name in CONTROLS]


def _interval(figure: Interval, signed: bool = False) -> str:
    value, low, high = (f"{x:+.3f}" if signed else f"{x:.3f}" for x in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _write_markdown(path: Path, parts: list[str]) -> None:
    path.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    run_main(Config, main)
