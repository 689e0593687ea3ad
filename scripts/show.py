"""Open TensorBoard on a folder of runs, with charts that lay policies and baselines over one another."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars

from agents.board import RUN_RESULTS, RUN_TAGS
from agents.files import write_atomically
from scripts.common import beside, console, run_main

LAYOUT_FILE = "events.out.tfevents.0.hyperpilot-layout"
"""Sorts before a run's own event files: TensorBoard reads a folder's files in the order of their names, and does not
come back to one after it has gone on to the next."""

DEPTHS = ("*/", "*/*/", "*/*/*/")
"""How far below a folder events are looked for when none are where they should be."""

SCORE = "meta_validation/log_ratio_to_calibrated"

PINNED = ("inner/val_loss", "control/lr", SCORE, "meta_validation/return")

CHARTS: dict[str, dict[str, str]] = {
    "Losses": {
        "validation loss": "inner/val_loss",
        "training loss": "inner/train_loss",
    },
    "Hyperparameters": {
        "learning rate": "control/lr",
        "batch size": "control/batch_size",
        "weight decay": "control/weight_decay",
        "dropout": "control/dropout",
        "augmentation": "control/augmentation",
        "label smoothing": "control/label_smoothing",
        "learning rate by parameter group": "control_groups/lr/*",
        "weight decay by parameter group": "control_groups/weight_decay/*",
    },
    "Gradients": {
        "gradient norm": "inner/grad_norm",
        "standard deviation of the gradient norm": "inner/grad_norm_std",
        "cosine of gradient and momentum": "inner/grad_cosine",
        "update to parameter ratio": "inner/update_ratio",
    },
    "Meta-training: meta-validation": {
        "ln(calibrated schedule's loss / policy's); above 0 the policy is better": SCORE,
        "the same, task by task": "meta_validation_log_ratio/*",
        "return (fall of ln loss)": "meta_validation/return",
        "return of the inner trainings": "rollout/ep_rew_mean",
    },
    "Meta-training: what the policy sets, on average": {
        "mean learning rate": "control/lr_mean",
        "mean batch size": "control/batch_size_mean",
        "mean weight decay": "control/weight_decay_mean",
        "mean dropout": "control/dropout_mean",
        "mean augmentation": "control/augmentation_mean",
        "mean label smoothing": "control/label_smoothing_mean",
        "share of inner trainings that diverged": "inner/diverged_share",
    },
    "Meta-training: PPO": {
        "policy loss": "train/policy_gradient_loss",
        "value loss": "train/value_loss",
        "explained variance of the value": "train/explained_variance",
        "KL divergence of an update": "train/approx_kl",
        "share of clipped samples": "train/clip_fraction",
        "standard deviation of the actions": "train/std",
    },
}
"""Category -> chart -> tag, `*` standing for any rest; every run that has it is a curve."""


@dataclass
class Config:
    """Open TensorBoard on a folder of runs, with charts that lay them over one another. Ctrl-C ends it.

    Leaves a layout beside the events of the first run; the runs stay as they are. Takes seconds. Without a terminal it
    prints TensorBoard's command instead. There is no --quiet: what it prints is what it is for.

        python scripts/show.py --logdir runs
    """

    logdir: Path
    """Folder with meta-trainings, applied runs or runs of your own (`Tuner(writer=...)`), at any depth."""
    port: int = 6006
    """Where TensorBoard listens."""
    write_only: bool = False
    """Only write the layout and print the command, as without a terminal."""


def main(config: Config) -> None:
    if not config.logdir.is_dir():
        raise ValueError(f"no folder {config.logdir}{_nearby(config.logdir)}")
    _remove_layouts(config.logdir)
    runs = runs_in(config.logdir)
    if not runs:
        raise ValueError(f"no TensorBoard events in {config.logdir}{_nearby(config.logdir)}")
    for kind, names in kinds(runs).items():
        console.print(f"{kind}: {', '.join(names)}", soft_wrap=True, highlight=False)
    _write_layout(config.logdir, runs)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(config.logdir), "--port", str(config.port)]
    if config.write_only or not console.is_terminal:
        print(shlex.join(command))
        return
    print(f"open {address(config.port, runs)} (Ctrl-C ends it)", flush=True)
    raise SystemExit(_run(command))


def runs_in(logdir: Path) -> dict[str, set[str]]:
    """Run -> tags of its scalars, as TensorBoard finds them."""
    multiplexer = EventMultiplexer(size_guidance={"scalars": 1}).AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    return {run: set(tags["scalars"]) for run, tags in sorted(multiplexer.Runs().items())}


def kinds(runs: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Kind of run -> the runs of that kind, if there are any."""
    found: dict[str, list[str]] = {"applied": [], "meta-training": [], "your own": [], "other": []}
    for run, tags in runs.items():
        if SCORE in tags:
            kind = "meta-training"
        elif not tags.isdisjoint(RUN_RESULTS):
            kind = "applied"
        else:
            kind = "other" if tags.isdisjoint(RUN_TAGS) else "your own"
        found[kind].append(run)
    return {kind: names for kind, names in found.items() if names}


def layout(tags: set[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts that `tags` have something for, as `custom_scalars` takes them."""
    fitting: dict[str, dict[str, list[Any]]] = {}
    for category, charts in CHARTS.items():
        for title, tag in charts.items():
            pattern = f"^{re.escape(tag).replace(re.escape('*'), '.+')}$"
            if any(re.match(pattern, found) for found in tags):
                fitting.setdefault(category, {})[title] = ["Multiline", [pattern]]
    return fitting


def address(port: int, runs: Mapping[str, set[str]]) -> str:
    """Where to look first: at the layout, without smoothing, and with the main curves pinned on the page of all."""
    tags = set().union(*runs.values())
    pins = [{"plugin": "scalars", "tag": tag} for tag in PINNED if tag in tags]
    query = urlencode({"smoothing": 0, "pinnedCards": json.dumps(pins, separators=(",", ":"))})
    return f"http://localhost:{port}/?{query}#custom_scalars&_smoothingWeight=0"


def _remove_layouts(logdir: Path) -> None:
    """Remove what was written before, in folders below, too: TensorBoard would merge the layouts."""
    for path in logdir.rglob(LAYOUT_FILE):
        with suppress(OSError):
            path.unlink()


def _write_layout(logdir: Path, runs: Mapping[str, set[str]]) -> None:
    """Put the layout beside the events of the first run that it is for: in a folder of its own it would be a run."""
    fitting = layout(set().union(*runs.values()))
    if not fitting:
        return
    path = logdir / next(run for run, tags in runs.items() if layout(tags)) / LAYOUT_FILE
    began = next(iter(EventFileLoader(str(min(path.parent.glob("*tfevents*")))).Load())).wall_time
    file = io.BytesIO()
    for event in (Event(file_version="brain.Event:2"), Event(summary=custom_scalars(fitting))):  # type: ignore[no-untyped-call]
        event.wall_time = began  # the run's own, which TensorBoard orders runs by
        RecordWriter(file).write(event.SerializeToString())
    try:
        write_atomically(path, file.getvalue())
    except OSError as error:
        console.print(f"no Custom Scalars: {error}", soft_wrap=True)


def _nearby(logdir: Path) -> str:
    """Folders with events that may have been meant."""
    found = beside(logdir, (f"{depth}*tfevents*" for depth in DEPTHS))
    return f"; there are events in {', '.join(map(str, found))}" if found else ""


def _run(command: list[str]) -> int:
    """Run a program to its end, or to ours."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    run_main(Config, main)
