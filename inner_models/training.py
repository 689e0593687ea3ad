"""The reference inner training: plain PyTorch, one run, no tricks. The engine is held to it by twin tests."""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from inner_models.augmentation import START, Augment
from inner_models.datasets import Split
from inner_models.models import Dropout, build_model, random_layers
from inner_models.sampling import MICRO_BATCH, BatchSampler
from inner_models.signals import GradientMeter
from inner_models.tasks import OptimizerName, Task, TaskData, elementwise_loss, prepare
from inner_models.updates import SGD_MOMENTUM


class Streams:
    """The random streams of one run: initial weights, row order, and one for each of `models.random_layers`."""

    def __init__(self, seed: int, layers: int) -> None:
        init, order, *others = np.random.SeedSequence(seed).spawn(2 + layers)
        self.init = torch.Generator().manual_seed(int(init.generate_state(1)[0]))
        self.order = np.random.default_rng(order)
        self.layers = [np.random.default_rng(child) for child in others]


def hyperparameters_of(model: nn.Module, data: TaskData) -> tuple[str, ...]:
    """Names of the hyperparameters that trainings of a task have."""
    layers = random_layers(model)
    has = {
        "dropout": any(isinstance(layer, Dropout) for layer in layers),
        "augmentation": any(isinstance(layer, Augment) for layer in layers),
        "label_smoothing": "label_smoothing" in data.regularizers,
    }
    return ("lr", "batch_size", "weight_decay", *(name for name, present in has.items() if present))


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Two optimizer groups: matrices, which decay, and biases and norms, which do not."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, object]] = [{"params": decayed}]
    return [*groups, {"params": others, "weight_decay": 0.0}] if others else groups


def build_optimizer(name: OptimizerName, model: nn.Module) -> torch.optim.Optimizer:
    """The inner optimizer, with torch's own defaults apart from SGD's momentum; controls set lr and weight decay."""
    groups = parameter_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=SGD_MOMENTUM, weight_decay=1e-4)


class Training:
    """One inner training run.

    Args:
        task: what to train.
        seed: fixes initial weights, row order, dropout masks and augmentation.
        data: the task's prepared data, where the caller decides whether the test split is in it.

    Attributes:
        model: the `nn.Module` in training.
        criterion: its loss as a module, which holds the label smoothing that it trains with.
        optimizer: its `torch.optim` optimizer.
        batch_sampler: its batches; set `batch_size` between intervals.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        *,
        data: TaskData | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.task = task
        self.data = data or prepare(task)
        self._device, self._dtype = torch.device(device), dtype
        regularizers = self.data.regularizers
        build = partial(build_model, task.model, self.data.dataset, augmented="augmentation" in regularizers)
        streams = Streams(seed, len(random_layers(build())))
        self.model = build(streams.init).to(self._device, dtype)
        for layer, stream in zip(random_layers(self.model), streams.layers, strict=True):
            layer.stream = stream
        smoothing = START if "label_smoothing" in regularizers else 0.0
        self.criterion = nn.MSELoss() if self.data.loss == "mse" else nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.optimizer = build_optimizer(task.optimizer, self.model)
        rows = len(self.data.dataset.train)
        self.batch_sampler = BatchSampler(rows, 2 * MICRO_BATCH, streams.order, self.data.interval_examples)
        self._meter = GradientMeter(self.optimizer)

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Train with another optimizer of the model's parameters."""
        self._meter.close()
        self.optimizer = optimizer
        self._meter = GradientMeter(optimizer)

    def advance(self) -> dict[str, float]:
        """Train for one interval. Returns its signals (`inner_models.signals.SIGNALS`)."""
        self._mode(training=True)
        split = self.data.dataset.train
        total = torch.zeros((), device=self._device, dtype=self._dtype)
        for rows in self.batch_sampler:
            self.optimizer.zero_grad()
            losses = self._losses(split.inputs[rows], split.targets[rows], self.criterion)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += losses.detach().mean() * len(rows)
        signals = self._meter.finish()
        signals["train_loss"] = total.item() / self.data.interval_examples
        signals["val_loss"] = self.evaluate("val")
        return signals

    @torch.no_grad()
    def evaluate(self, split: Literal["train", "val", "test"] | Split) -> float:
        """Mean loss on a split of the task's, or on rows of the caller's, without any regularization.

        Raises:
            LookupError: the test split was not handed to this run.
        """
        rows: Split | None = split if isinstance(split, Split) else getattr(self.data.dataset, split)
        if rows is None:
            raise LookupError(f"this run was made without the {split} split")
        self._mode(training=False)
        chunks = zip(torch.split(rows.inputs, 4096), torch.split(rows.targets, 4096), strict=True)
        return sum(self._losses(x, y).sum().item() for x, y in chunks) / rows.targets.numel()

    def _mode(self, *, training: bool) -> None:
        """Optimizers that train at one point and evaluate at another (schedule-free ones) switch with the model."""
        self.model.train(training)
        switch = getattr(self.optimizer, "train" if training else "eval", None)
        if switch is not None:
            switch()

    def _losses(self, inputs: Tensor, targets: Tensor, criterion: nn.Module | None = None) -> Tensor:
        inputs, targets = inputs.to(self._device), targets.to(self._device)
        if inputs.is_floating_point():
            inputs = inputs.to(self._dtype)
        if targets.is_floating_point():
            targets = targets.to(self._dtype)
        smoothing = getattr(criterion, "label_smoothing", 0.0)
        return elementwise_loss(self.model(inputs), targets, self.data.loss, smoothing)
