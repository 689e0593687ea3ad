"""How fast inner training is: the batched engine against the reference, and what the tuner costs a user's loop."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from agents.policy import ControlPolicy
from agents.tuner import Tuner, pretrained_path
from hpo_env.actions import calibrated
from hpo_env.hyperparameters import CONTROLS
from inner_models.batched_training import BatchedTraining
from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import Task
from inner_models.training import Training
from scripts.common import check_device, console, run_main, write_json

TASKS = ("digits/linear", "digits/mlp", "digits/cnn", "waveforms/gru", "waveforms/transformer")


@dataclass
class Config:
    """Measure inner steps per second (batches of 16, one thread) and the tuner's overhead; medians of repeats."""

    device: str = "cpu"
    """cpu or cuda."""
    json: Path | None = None
    """Also write the figures to this file."""
    replicas: tuple[int, ...] = (1, 8, 32, 128)
    """Replica counts of the engine."""
    repeats: int = 5
    """Measurements of each; the median is reported."""


def main(config: Config) -> None:
    check_device(config.device)
    torch.set_num_threads(1)
    table = Table(title=f"inner steps per second, batches of {MICRO_BATCH}, one thread, {config.device}")
    for heading in ("task", "reference", *(f"engine, {count} replicas" for count in config.replicas), "best ratio"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    result: dict[str, Any] = {}
    for name in TASKS:
        task = Task.named(name, interval_examples=512)
        reference = _median(partial(_reference, task, config.device), config.repeats)
        engine = {
            count: _median(partial(_engine, task, count, config.device), config.repeats) for count in config.replicas
        }
        best = max(engine.values())
        result[name] = {"reference": reference, "engine": engine, "best_ratio": best / reference}
        table.add_row(
            name, f"{reference:,.0f}", *(f"{rate:,.0f}" for rate in engine.values()), f"{best / reference:.1f}x"
        )
    console.print(table)
    tuner = _tuner_overhead(config.repeats)
    console.print(
        f"tuner, 1 M-parameter MLP, batches of 128: {tuner['share_of_loop']:.2%} of the loop, "
        f"{1e3 * tuner['seconds_per_decision']:.2f} ms a decision"
    )
    if config.json:
        machine = {"machine": platform.machine(), "torch": torch.__version__, "repeats": config.repeats}
        write_json(config.json, {config.device: result, "tuner": tuner, "provenance": machine})


def _median(measure: Callable[[], float], repeats: int) -> float:
    measure()  # warm-up
    return statistics.median(measure() for _ in range(repeats))


def _reference(task: Task, device: str) -> float:
    training = Training(task, 0, device=device)
    training.batch_sampler.batch_size = MICRO_BATCH
    started = time.perf_counter()
    training.advance()
    _synchronize(device)
    return training.data.interval_examples / MICRO_BATCH / (time.perf_counter() - started)


def _engine(task: Task, replicas: int, device: str) -> float:
    training = BatchedTraining(task, range(replicas), device=device)
    values = calibrated(task.optimizer).values(np.full(replicas, 0.5)) | {"batch_size": np.full(replicas, 16.0)}
    started = time.perf_counter()
    training.advance({name: values[name] for name in CONTROLS})
    _synchronize(device)
    assert task.interval_examples is not None
    return replicas * (task.interval_examples // MICRO_BATCH) / (time.perf_counter() - started)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _tuner_overhead(repeats: int) -> dict[str, float]:
    """Time of an epoch of 50 batches with and without the tuner, in turn; and of a decision alone."""
    policy = ControlPolicy.load(pretrained_path())
    x, y = torch.randn(128, 512), torch.randint(10, (128,))

    def loop(with_tuner: bool) -> tuple[float, float]:
        model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 450), nn.ReLU(), nn.Linear(450, 10))
        optimizer = torch.optim.AdamW(model.parameters())
        tuner = Tuner(policy, optimizer, model=model, total_epochs=10) if with_tuner else None
        started = time.perf_counter()
        for _ in range(50):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        middle = time.perf_counter()
        if tuner:
            tuner.step(train_loss=loss.item(), val_loss=1.0)
        return middle - started, time.perf_counter() - middle

    loop(True)
    pairs = [(loop(True), loop(False)) for _ in range(repeats)]
    share = statistics.median((sum(tuned) - sum(plain)) / sum(plain) for tuned, plain in pairs)
    return {"share_of_loop": share, "seconds_per_decision": statistics.median(tuned[1] for tuned, _ in pairs)}


if __name__ == "__main__":
    run_main(Config, main)
