"""The reference inner training: plain PyTorch, one run, no tricks. The engine is held to it by twin tests."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from inner_models.datasets import Split
from inner_models.models import Dropout, build_model
from inner_models.sampling import MICRO_BATCH, BatchSampler
from inner_models.signals import GradientMeter
from inner_models.tasks import OptimizerName, Task, TaskData, elementwise_loss, prepare

SGD_MOMENTUM = 0.9


class Streams:
    """The random streams of one run: initial weights, row order, and one stream of dropout masks a module."""

    def __init__(self, seed: int, dropouts: int) -> None:
        init, order, *masks = np.random.SeedSequence(seed).spawn(2 + dropouts)
        self.init = torch.Generator().manual_seed(int(init.generate_state(1)[0]))
        self.order = np.random.default_rng(order)
        self.masks = [np.random.default_rng(child) for child in masks]


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
        seed: fixes initial weights, row order and dropout masks.
        data: the task's prepared data, where the caller decides whether the test split is in it.

    Attributes:
        model: the `nn.Module` in training.
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
        skeleton = build_model(task.model, self.data.dataset)
        streams = Streams(seed, sum(isinstance(m, Dropout) for m in skeleton.modules()))
        self.model = build_model(task.model, self.data.dataset, streams.init).to(self._device, dtype)
        dropouts = [module for module in self.model.modules() if isinstance(module, Dropout)]
        for module, stream in zip(dropouts, streams.masks, strict=True):
            module.stream = stream
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
            losses = self._losses(split.inputs[rows], split.targets[rows])
            losses.mean().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += losses.detach().mean() * len(rows)
        signals = self._meter.finish()
        signals["train_loss"] = total.item() / self.data.interval_examples
        signals["val_loss"] = self.evaluate("val")
        return signals

    @torch.no_grad()
    def evaluate(self, split: Literal["train", "val", "test"] | Split) -> float:
        """Mean loss on a split of the task's, or on rows of the caller's, dropout off.

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

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs, targets = inputs.to(self._device), targets.to(self._device)
        if inputs.is_floating_point():
            inputs = inputs.to(self._dtype)
        if targets.is_floating_point():
            targets = targets.to(self._dtype)
        return elementwise_loss(self.model(inputs), targets, self.data.loss)
