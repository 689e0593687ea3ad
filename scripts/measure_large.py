"""A policy on runs far larger than those of its meta-training, in a plain PyTorch loop, and what people start from."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from agents.application import jsonable, number_of
from agents.measures import log_ratio, mean
from agents.policy import ControlPolicy
from agents.provenance import provenance
from agents.schedules import DEFAULTS
from agents.tuner import Tuner, pretrained_path
from hpo_env.base_schedules import calibrated
from inner_models.datasets import Dataset, load_dataset
from inner_models.models import ModelSpec, build_model
from scripts.common import Quiet, at_least, check_device, console, known, progress_bar, recorded, run_main, write_json
from scripts.reporting.sheet import Sheet, with_ends

Problem = Literal["resnet", "transformer"]

DATASETS: dict[Problem, str] = {"resnet": "fashion-mnist", "transformer": "pydoc-topics"}

TUNED = ("policy", "policy-at-128", "base-rule", "base-rule-at-128")
METHODS = (*TUNED, "calibrated", "adamw", "sgd")
"""The policy; the schedule that it deviates from; both with batches that stay at 128; the calibrated schedule of small
runs; AdamW 1e-3 and SGD 0.1 with momentum 0.9, at batches of 128 and a dropout of 0.1, with a cosine to 0."""

BATCH, EVAL_BATCH = 128, 1024

HEAD = ("method", "n", "validation loss", "test loss", "test accuracy", "ln, validation", "ln, test", "seconds")


@dataclass
class Config(Quiet):
    """Train a large model in a plain PyTorch loop, under a policy and under four schedules.

    A residual network on all of Fashion-MNIST, or a transformer on the characters of a manual. Needs the extra `data`.
    Runs that the file already has are not trained again, so that it can be stopped and go on.

        python scripts/measure_large.py --problem resnet --blocks 3 --width 16 --epochs 20 --json resnet.json
    """

    json: Path
    """File for the runs and figures."""
    problem: Problem = "resnet"
    """resnet: after He et al. (2016), three stages, on fashion-mnist; transformer: on pydoc-topics."""
    blocks: int = 1
    """Residual blocks a stage, or the transformer's layers."""
    width: int = 16
    """Channels of the first stage, or the transformer's width."""
    epochs: int = 10
    """Passes over the training rows."""
    methods: tuple[str, ...] = METHODS
    """Which of them."""
    seeds: int = 2
    """Runs of each method, paired."""
    rows: int | None = None
    """Only so many training rows; all when left out."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""


def main(config: Config) -> None:
    check_device(config.device)
    at_least(config, 1, "blocks", "width", "epochs", "seeds")
    methods = [known("method", name, list(METHODS)) for name in config.methods]
    policy = ControlPolicy.load(config.policy or pretrained_path())
    setting = _setting(config, policy)
    runs = _found(config.json, setting)
    dataset = load_dataset(DATASETS[config.problem])
    wanted = [(method, seed) for seed in range(config.seeds) for method in methods]
    left = [pair for pair in wanted if pair not in {(run["method"], run["seed"]) for run in runs}]
    with progress_bar(f"training ({config.problem})", len(left) * config.epochs) as update:
        for number, (method, seed) in enumerate(left):
            trained = _Run(config, policy, dataset, method, seed)
            for epoch in range(config.epochs):
                trained.train_epoch()
                update(number * config.epochs + epoch + 1, f"{method}, validation loss {trained.val_loss[-1]:.4f}")
            runs.append(trained.record())
            write_json(config.json, jsonable({"setting": setting, "runs": runs}))
    chosen = [run for run in runs if (run["method"], run["seed"]) in wanted]
    rows = [_row(method, chosen) for method in methods]
    sheet = Sheet.plain("ln(its loss / the policy's): above 0 the policy is better", HEAD, map(_cells, rows))
    console.print(sheet.to_rich())
    console.out(f"\n{sheet.body()}", highlight=False)
    origin = {**provenance(config.device), "threads": torch.get_num_threads()}
    write_json(config.json, jsonable({"setting": setting, "rows": rows, "runs": runs, "provenance": origin}))


def _setting(config: Config, policy: ControlPolicy) -> dict[str, Any]:
    """What runs must have in common to stand in one file."""
    names = ("problem", "blocks", "width", "epochs", "rows", "device")
    return {**{name: getattr(config, name) for name in names}, "policy": policy.digest}


def _found(path: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if record.get("setting") != setting:
        other = record.get("setting")
        raise ValueError(f"{recorded(path)} holds runs of another setting: {other}; choose another file")
    runs: list[dict[str, Any]] = record["runs"]
    for run in runs:
        run["val_loss"] = [number_of(loss) for loss in run["val_loss"]]
        run["test"] = {name: number_of(value) for name, value in run["test"].items()}
    return runs


class _Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, https://arxiv.org/abs/1512.03385, figure 2)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(fan_in, fan_out, 3, stride), nn.ReLU(), *_convolution(fan_out, fan_out, 3, 1)
        )
        same = fan_in == fan_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(fan_in, fan_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convolutions(x) + self.shortcut(x))


def _convolution(fan_in: int, fan_out: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(fan_in, fan_out, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(fan_out)


def residual_network(blocks: int, width: int, channels: int, classes: int) -> nn.Module:
    """6 `blocks` + 2 layers in three stages of `width`, 2 and 4 times `width` channels."""
    layers: list[nn.Module] = [*_convolution(channels, width, 3, 1), nn.ReLU()]
    fan_in = width
    for stage in range(3):
        for block in range(blocks):
            layers.append(_Block(fan_in, width << stage, 2 if stage and not block else 1))
            fan_in = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, classes))


class _Run:
    """One run under one method.

    Attributes:
        train_loss, val_loss: of every epoch so far.
    """

    def __init__(self, config: Config, policy: ControlPolicy, dataset: Dataset, method: str, seed: int) -> None:
        torch.manual_seed(seed)
        self._config, self._dataset, self._method, self._seed = config, dataset, method, seed
        self._model = self._build().to(config.device)
        self._dropouts = [layer for layer in self._model.modules() if isinstance(layer, nn.Dropout)]
        if method in ("adamw", "sgd"):
            for layer in self._dropouts:
                layer.p = DEFAULTS["adamw"].dropout
        self._optimizer = _optimizer(method, self._model)
        rows = slice(config.rows)
        train = TensorDataset(dataset.train.inputs[rows], dataset.train.targets[rows])
        batch = round(calibrated("adamw").batch_size) if method == "calibrated" else BATCH
        self._loader = DataLoader(train, batch, shuffle=True)
        self._tuner = self._attached(policy)
        self.train_loss: list[float] = []
        self.val_loss: list[float] = []
        self._used: list[dict[str, float]] = []
        self._lowest, self._best = math.inf, {"loss": math.nan, "accuracy": math.nan}
        self._seconds = 0.0

    def _build(self) -> nn.Module:
        config, dataset = self._config, self._dataset
        if config.problem == "resnet":
            network = residual_network(config.blocks, config.width, dataset.input_shape[0], dataset.outputs)
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on the CPU
            return network
        return build_model(ModelSpec("transformer", config.width, config.blocks, "gelu"), dataset, self._seed)

    def _attached(self, policy: ControlPolicy) -> Tuner | None:
        if self._method not in TUNED:
            return None
        if self._method.startswith("base-rule"):
            policy = copy.deepcopy(policy)
            with torch.no_grad():
                for parameter in policy.linear_layers[-1].parameters():
                    parameter.zero_()
        has = ["lr", "weight_decay", "dropout"] if self._dropouts else ["lr", "weight_decay"]
        return Tuner(
            policy,
            self._optimizer,
            model=self._model,
            loader=self._loader,
            total_epochs=self._config.epochs,
            controls=has if self._method.endswith("at-128") else None,
        )

    def train_epoch(self) -> None:
        """Train one epoch and evaluate."""
        started = time.perf_counter()
        self._schedule(len(self.val_loss) / self._config.epochs)
        self._used.append(self._values())
        self._model.train()
        total, seen = torch.zeros((), device=self._config.device), 0
        for batch, (inputs, targets) in enumerate(self._loader):
            self._schedule((len(self.val_loss) + batch / len(self._loader)) / self._config.epochs)
            loss = self._loss(inputs, targets)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += loss.detach() * len(inputs)
            seen += len(inputs)
        self.train_loss.append(total.item() / seen)
        self.val_loss.append(self._evaluate("val")["loss"])
        if self._tuner:
            self._tuner.step(train_loss=self.train_loss[-1], val_loss=self.val_loss[-1])
        self._seconds += time.perf_counter() - started
        if self.val_loss[-1] < self._lowest:
            self._lowest, self._best = self.val_loss[-1], self._evaluate("test")

    def _values(self) -> dict[str, float]:
        if self._tuner:
            return self._tuner.hyperparameters
        group = self._optimizer.param_groups[0]
        values = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        return values | {"dropout": self._dropouts[0].p} if self._dropouts else values

    def _schedule(self, progress: float) -> None:
        """What the methods without a tuner do before every batch."""
        if self._tuner:
            return
        if self._method == "calibrated":
            values = {name: float(value) for name, value in calibrated("adamw").values(np.array(progress)).items()}
            for layer in self._dropouts:
                layer.p = values["dropout"]
            values = {"lr": values["lr"], "weight_decay": values["weight_decay"]}
        else:
            values = {"lr": self._optimizer.defaults["lr"] * (1 + np.cos(np.pi * progress)) / 2}
        for group in self._optimizer.param_groups:
            group.update(values)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        device = self._config.device
        outputs = self._model(inputs.to(device)).flatten(0, -2)
        return F.cross_entropy(outputs, targets.to(device).flatten())

    @torch.no_grad()
    def _evaluate(self, split: Literal["val", "test"]) -> dict[str, float]:
        """Loss and accuracy."""
        part = getattr(self._dataset, split)
        self._model.eval()
        loss, right, count = 0.0, 0, 0
        for start in range(0, len(part), EVAL_BATCH):
            rows = slice(start, start + EVAL_BATCH)
            outputs = self._model(part.inputs[rows].to(self._config.device)).flatten(0, -2)
            targets = part.targets[rows].to(self._config.device).flatten()
            loss += F.cross_entropy(outputs, targets, reduction="sum").item()
            right += int((outputs.argmax(1) == targets).sum())
            count += len(targets)
        return {"loss": loss / count, "accuracy": right / count}

    def record(self) -> dict[str, Any]:
        return {
            "method": self._method,
            "seed": self._seed,
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
            "hyperparameters": self._used,
            "test": self._best,
            "seconds": self._seconds,
            "out_of_depth": [entry["out_of_depth"] for entry in self._tuner.history] if self._tuner else [],
        }


def _optimizer(method: str, model: nn.Module) -> torch.optim.Optimizer:
    if method == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _row(method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A method's means, and its log ratios to the policy at the same seeds, with intervals from three on; no ratios if
    any of them has diverged."""
    by_seed = {name: {run["seed"]: run for run in runs if run["method"] == name} for name in (method, "policy")}
    own, policy = by_seed[method], by_seed["policy"]
    row: dict[str, Any] = {"method": method, "runs": len(own)}
    losses: dict[str, Any] = {"val": lambda run: run["val_loss"][-1], "test": lambda run: run["test"]["loss"]}
    for split, of in losses.items():
        row[split] = float(np.mean([of(run) for run in own.values()]))
        shared = sorted(own.keys() & policy.keys())
        pairs = [[of(runs[seed]) for seed in shared] for runs in (own, policy)]
        if method != "policy" and shared and np.isfinite(pairs).all():
            ratios = log_ratio(*pairs)
            interval = mean([ratios]) if len(shared) > 2 else None
            ends = [interval.low, interval.high] if interval else None
            row[f"log_ratio_{split}"] = {"mean": float(np.mean(ratios)), "ci": ends}
    row["accuracy"] = float(np.mean([run["test"]["accuracy"] for run in own.values()]))
    row["seconds"] = float(np.median([run["seconds"] for run in own.values()]))
    return row


def _cells(row: dict[str, Any]) -> list[str]:
    ratios = []
    for split in ("val", "test"):
        ratio = row.get(f"log_ratio_{split}")
        alone = ratio and not ratio["ci"]
        ratios.append("" if not ratio else f"{ratio['mean']:+.3f}" if alone else with_ends(ratio["mean"], ratio["ci"]))
    losses = [f"{row[split]:.4f}" for split in ("val", "test")]
    return [row["method"], str(row["runs"]), *losses, f"{row['accuracy']:.2%}", *ratios, f"{row['seconds']:.0f}"]


if __name__ == "__main__":
    run_main(Config, main)
