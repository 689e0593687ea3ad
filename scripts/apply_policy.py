"""Train a task once with a policy and once with each baseline; print, compare, and write all of it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from agents.application import MakeController, Run, RunController, following, train
from agents.board import ABOUT, RUN_RESULTS, RUN_TAGS, about, group_values, write_decision, write_epoch, write_hparams
from agents.controllers import with_policy
from agents.policy import ControlPolicy
from agents.schedules import BASELINES
from agents.trajectory import TRAJECTORY_FILE
from agents.tuner import Tuner, pretrained_path
from hpo_env.hyperparameters import CONTROLS
from inner_models.tasks import OptimizerName, Task
from inner_models.training import Training
from scripts.common import (
    Quiet,
    at_least,
    check_device,
    check_out,
    console,
    progress_bar,
    run_main,
    tensorboard_hint,
    write_config,
    write_json,
)

RESULT_FILE = "result.json"


@dataclass
class Config(Quiet):
    """Apply a saved policy to a training run that it has never seen, beside the usual baselines.

    Needs the extra `data` for most data sets; iris, wine, digits and the procedural ones come without. Leaves
    result.json, for each method TensorBoard events, and the policy's trajectory.json, which `inspect_policy.py --run`
    explains. Takes seconds on small tables, minutes on images, on one thread.

        python scripts/apply_policy.py --task iris/mlp --epochs 20 --out runs/iris
        python scripts/apply_policy.py --task letter/mlp --policy runs/default/policy.safetensors --out runs/letter
    """

    task: str
    """What to train: <data set>/<model>, such as letter/mlp."""
    out: Path
    """Folder for TensorBoard events (a run each method) and result.json."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    json: Path | None = None
    """Also write the result to this file."""
    seed: int = 0
    """Fixes initial weights, data order and dropout masks: the same for every method."""
    epochs: int = 30
    """Length of the run."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    optimizer: OptimizerName = "adamw"
    """The inner optimizer."""


def main(config: Config) -> None:
    at_least(config, 1, "epochs")
    at_least(config, 0, "seed")
    check_device(config.device)
    task = Task.named(config.task, horizon=config.epochs, optimizer=config.optimizer)
    policy = ControlPolicy.load(config.policy or pretrained_path())
    Training(task, config.seed)  # what cannot be made is an error before anything is written
    check_out(config.out)
    methods = {"policy": with_policy(policy), **baselines()}
    results = compare(task, methods, config.seed, config.device, config.out)
    write_json(config.out / RESULT_FILE, results)
    if config.json:
        write_json(config.json, results)
    write_config(config.out, "apply_policy", config)  # last: marks the folder as done
    console.print(tensorboard_hint(config.out), soft_wrap=True)


def baselines() -> dict[str, MakeController]:
    """What a user would do without a policy."""
    return {name: following(schedule) for name, schedule in BASELINES.items()}


def compare(
    task: Task, methods: Mapping[str, MakeController], seed: int, device: str, out: Path
) -> dict[str, dict[str, Any]]:
    """Train `task` with each method, print the tables, and return the result as JSON has it."""
    torch.set_num_threads(1)  # on busy cores, two threads wait for each other most of the time, some methods by chance
    runs: dict[str, Run] = {}
    with progress_bar(f"training {task.name}", task.horizon * len(methods)) as update:
        for index, (name, attach) in enumerate(methods.items()):
            with SummaryWriter(str(out / name), purge_step=0) as writer:  # what an interrupted call left does not count
                if not index:
                    writer.add_text(ABOUT, about(RUN_TAGS, "epochs"))
                runs[name] = train(
                    task,
                    watched(attach, writer),
                    seed,
                    device=device,
                    writer=writer,
                    report=lambda epoch, done=index * task.horizon, name=name: update(done + epoch, name),  # type: ignore[misc]
                )
                hparams = {"method": name, "task": task.name, "optimizer": task.optimizer}
                numbers = {"seed": seed, "epochs": task.horizon}
                write_hparams(writer, {**hparams, **numbers}, results(runs[name]), task.horizon)
    for name, run in runs.items():
        if name.startswith("policy"):
            console.print(epoch_table(name, run))
    console.print(summary_table(task, runs, seed))
    return {name: run.to_dict() for name, run in runs.items()}


class _Watched:
    """A controller that has its parameter groups' values written, and if it is a tuner, its reasons and trajectory."""

    def __init__(self, controller: RunController, optimizer: torch.optim.Optimizer, writer: SummaryWriter) -> None:
        self._controller, self._optimizer, self._writer = controller, optimizer, writer
        self._epoch, self._told = 1, 0
        self._tell()

    @property
    def hyperparameters(self) -> dict[str, float]:
        return self._controller.hyperparameters

    def step(self, *, train_loss: float, val_loss: float | None = None) -> None:
        write_epoch(self._writer, self._epoch, {}, {}, group_values(self._optimizer))
        self._controller.step(train_loss=train_loss, val_loss=val_loss)
        self._epoch += 1
        self._tell()
        if isinstance(self._controller, Tuner) and self._controller.epoch == self._controller.total_epochs:
            self._controller.trajectory.save(Path(self._writer.log_dir) / TRAJECTORY_FILE)

    def _tell(self) -> None:
        history = getattr(self._controller, "history", [])
        for decision in history[self._told :]:
            write_decision(self._writer, decision["epoch"] + 1, decision["reason"])
        self._told = len(history)


def watched(attach: MakeController, writer: SummaryWriter) -> MakeController:
    """`attach`, with what `train` does not see going to TensorBoard, too."""
    return lambda run: _Watched(attach(run), run.optimizer, writer)


def results(run: Run) -> dict[str, float]:
    """TensorBoard's tags of a run's results -> values."""
    figures = (run.val_loss[-1], min(run.val_loss), run.test_loss, run.final_test_loss)
    return dict(zip(RUN_RESULTS, figures, strict=True))


def epoch_table(name: str, run: Run) -> Table:
    """Hyperparameters and losses, epoch by epoch."""
    table = Table(title=f"{name}: what it set, and what came of it")
    for heading in ("epoch", *run.controls, "train loss", "val loss"):
        table.add_column(heading, justify="right")
    for epoch, (train_loss, val_loss) in enumerate(zip(run.train_loss, run.val_loss, strict=True)):
        values = [f"{run.controls[control][epoch]:.3g}" for control in CONTROLS if control in run.controls]
        table.add_row(str(epoch + 1), *values, f"{train_loss:.4f}", f"{val_loss:.4f}")
    return table


def summary_table(task: Task, runs: Mapping[str, Run], seed: int) -> Table:
    """One row a method."""
    table = Table(title=f"{task.name}, {task.optimizer}, {task.horizon} epochs, seed {seed}")
    for heading in ("method", "final val loss", "best val loss", "test loss at best val", "final test loss", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    winner = min(runs, key=lambda name: runs[name].val_loss[-1])
    for name, run in runs.items():
        style = "bold" if name == winner else None
        table.add_row(name, *(f"{figure:.4f}" for figure in results(run).values()), f"{run.seconds:.1f}", style=style)
    return table


if __name__ == "__main__":
    run_main(Config, main)
