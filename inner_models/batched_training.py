"""The engine: many replicas of one task train together, each with its own seed and hyperparameters.

All parameters of all replicas lie in one `[replicas, parameters]` buffer, of which the layers are views, so that an
optimizer step is a handful of in-place calls. Replicas consume micro-batches in lockstep, accumulate gradients, and
step when their own batch is full: the gradient is exactly the mean over the replica's batch, whatever the batch sizes
of the others. Twin tests hold every model kind and optimizer to `inner_models.training.Training`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inner_models.datasets import Split
from inner_models.models import Dropout, build_model
from inner_models.replicated_layers import MaskSource, replicate
from inner_models.sampling import MICRO_BATCH, draw_order
from inner_models.signals import MEASURE_EVERY, SIGNALS
from inner_models.tasks import Task, TaskData, elementwise_loss, prepare
from inner_models.training import SGD_MOMENTUM, Streams

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # torch.optim.AdamW's defaults
_EVALUATION_ROWS = 8192  # replicas x rows that are evaluated at once


class BatchedTraining:
    """Replicas of one task.

    Args:
        task: what to train.
        seeds: one seed a replica, with the meaning of `Training`'s.
        data: the task's prepared data, where the caller decides whether the test split is in it.
    """

    def __init__(
        self,
        task: Task,
        seeds: Sequence[int],
        *,
        data: TaskData | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.task = task
        self.replicas = len(seeds)
        self._data = data or prepare(task)
        self._device, self._dtype = torch.device(device), dtype
        skeleton = build_model(task.model, self._data.dataset)
        # Decayed parameters first, so that weight decay acts on one leading slice of the buffer.
        named = sorted(skeleton.named_parameters(), key=lambda item: item[1].ndim < 2)
        self._slices: dict[str, tuple[int, torch.Size]] = {}
        self.parameters = 0
        for name, parameter in named:
            self._slices[name] = (self.parameters, parameter.shape)
            self.parameters += parameter.numel()
        self._decayed = sum(parameter.numel() for _, parameter in named if parameter.ndim >= 2)

        self._values, self._gradients, self._momentum = (self._buffer() for _ in range(3))
        self._square = self._buffer() if task.optimizer == "adamw" else None
        self._steps = np.zeros(self.replicas, np.int64)
        self._streams = [self._new_streams(seed, skeleton) for seed in seeds]
        self._masks = [
            MaskSource([streams.masks[k] for streams in self._streams], self._device)
            for k in range(len(self._streams[0].masks))
        ]
        self._leaves = self._views(self._values)
        for leaf, gradient in zip(self._leaves.values(), self._views(self._gradients).values(), strict=True):
            leaf.requires_grad_(True).grad = gradient  # backward() adds to these views in place
        self._forward = replicate(skeleton, self._leaves, self._masks)
        for replica in range(self.replicas):
            self._initialize(replica)
        train = self._data.dataset.train
        self._inputs, self._targets = self._place(train.inputs), self._place(train.targets)

    @property
    def has_dropout(self) -> bool:
        """Whether the model has dropout layers."""
        return bool(self._masks)

    def restart(self, replica: int, seed: int) -> None:
        """Start one replica afresh from a new seed; the others are untouched."""
        streams = self._streams[replica] = self._new_streams(seed)
        for source, stream in zip(self._masks, streams.masks, strict=True):
            source.restart(replica, stream)
        self._initialize(replica)

    def advance(self, hyperparameters: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """Train every replica for one interval.

        Args:
            hyperparameters: `lr`, `batch_size` (multiples of `MICRO_BATCH`), `weight_decay` and `dropout`, each
                `[replicas]`.

        Returns:
            The interval's signals, each `[replicas]`, by the definitions of `inner_models.signals`.
        """
        plan = _Plan(self._data.interval_examples, hyperparameters["batch_size"], self._steps)
        self._steps = plan.done
        rows = len(self._data.dataset.train)
        order = np.stack([draw_order(rows, plan.micro_steps * MICRO_BATCH, s.order) for s in self._streams])
        batches = torch.from_numpy(order).to(self._device).view(self.replicas, plan.micro_steps, MICRO_BATCH)
        batches = batches.transpose(0, 1).contiguous()
        rates = self._column(hyperparameters["dropout"])
        for source in self._masks:
            source.set_rates(rates.squeeze(1))
            source.active = True
        update = self._updater(hyperparameters, plan)

        start = self._values.clone()
        self._gradients.zero_()
        total = torch.zeros(self.replicas, device=self._device, dtype=self._dtype)
        sums = torch.zeros(4, self.replicas, device=self._device, dtype=self._dtype)
        with warnings.catch_warnings():
            # Views into a flat buffer are not dense; copying gradients instead costs a third of the throughput.
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            for step in range(plan.micro_steps):
                chosen = batches[step]
                losses = self._losses(self._inputs[chosen], self._targets[chosen])
                losses.sum().backward()  # type: ignore[no-untyped-call]
                total += losses.detach()
                update(step, sums)

        with torch.no_grad():
            norms = torch.linalg.vector_norm(self._values, dim=1)
            moved = torch.linalg.vector_norm(self._values - start, dim=1)
            count, norm, square, cosine = sums
            mean = norm / count
            signals = {
                "train_loss": total / plan.micro_steps,
                "grad_norm": mean,
                "grad_norm_std": (square / count - mean.square()).clamp_min(0).sqrt(),
                "grad_cosine": cosine / count,
                "update_ratio": moved / norms.clamp_min(1e-12),
            }
        result = {name: value.double().cpu().numpy() for name, value in signals.items()}
        result["val_loss"] = self.evaluate("val")
        return {name: result[name] for name in SIGNALS}

    @torch.no_grad()
    def evaluate(self, split: Literal["train", "val", "test"]) -> NDArray[np.float64]:
        """Mean loss of each replica on a split, dropout off, `[replicas]`.

        Raises:
            LookupError: the test split was not handed to this run.
        """
        rows: Split | None = getattr(self._data.dataset, split)
        if rows is None:
            raise LookupError(f"this run was made without the {split} split")
        for source in self._masks:
            source.active = False
        size = max(1, _EVALUATION_ROWS // self.replicas)
        total = torch.zeros(self.replicas, device=self._device, dtype=torch.float64)
        for x, y in zip(torch.split(rows.inputs, size), torch.split(rows.targets, size), strict=True):
            inputs = self._place(x).expand(self.replicas, *x.shape)
            targets = self._place(y).expand(self.replicas, *y.shape)
            total += self._losses(inputs, targets).double() * len(x)
        return (total / len(rows.inputs)).cpu().numpy()

    def _losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return elementwise_loss(self._forward(inputs), targets, self._data.loss).flatten(1).mean(1)

    def _updater(self, hyperparameters: Mapping[str, NDArray[np.float64]], plan: _Plan) -> _Update:
        lr, decay = self._column(hyperparameters["lr"]), self._column(hyperparameters["weight_decay"])
        adamw = self._square is not None
        lr_by_step = self._columns(plan.full) * lr
        keep = 1 - self._columns(plan.full)
        mean = self._columns(plan.full / np.maximum(plan.batch_parts, 1))
        measured = self._columns(plan.measured)
        correction1 = self._columns(1 - _BETA1**plan.steps)
        correction2 = self._columns(np.sqrt(1 - _BETA2**plan.steps))
        p, g, m, v = self._values, self._gradients, self._momentum, self._square
        decayed = slice(0, self._decayed)

        @torch.no_grad()
        def update(step: int, sums: Tensor) -> None:
            if not plan.any_full[step]:
                return
            scaled = g * mean[step]
            full = 1 - keep[step]
            if plan.any_measured[step]:
                norm = torch.linalg.vector_norm(scaled, dim=1)
                dot = torch.linalg.vecdot(scaled, m)
                cosine = dot / (norm * torch.linalg.vector_norm(m, dim=1)).clamp_min(1e-12)
                sums += measured[step].T * torch.stack([torch.ones_like(norm), norm, norm.square(), cosine])
            if adamw:
                assert v is not None
                p[:, decayed].mul_(1 - lr_by_step[step] * decay)
                m.lerp_(scaled, full * (1 - _BETA1))
                v.lerp_(scaled.square_(), full * (1 - _BETA2))
                denominator = torch.sqrt(v, out=scaled).div_(correction2[step]).add_(_EPS)
                p.sub_(torch.div(m, denominator, out=denominator).mul_(lr_by_step[step] / correction1[step]))
            else:
                scaled[:, decayed].addcmul_(p[:, decayed], full * decay)
                # torch.optim.SGD: buffer = momentum * buffer + gradient (the first step's buffer is the gradient)
                m.mul_(1 - full * (1 - SGD_MOMENTUM)).add_(scaled)
                p.sub_(torch.mul(m, lr_by_step[step], out=scaled))
            if plan.all_full[step]:
                g.zero_()
            else:
                g.mul_(keep[step])

        return update

    def _new_streams(self, seed: int, model: torch.nn.Module | None = None) -> Streams:
        dropouts = len(self._masks) if model is None else sum(isinstance(m, Dropout) for m in model.modules())
        return Streams(seed, dropouts)

    @torch.no_grad()
    def _initialize(self, replica: int) -> None:
        model = build_model(self.task.model, self._data.dataset, self._streams[replica].init)
        for name, parameter in model.named_parameters():
            self._leaves[name].data[replica].copy_(parameter)
        for buffer in (self._gradients, self._momentum, self._square):
            if buffer is not None:
                buffer[replica].zero_()
        self._steps[replica] = 0

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[:, start : start + shape.numel()].view(self.replicas, *shape)
            for name, (start, shape) in self._slices.items()
        }

    def _buffer(self) -> Tensor:
        return torch.zeros(self.replicas, self.parameters, device=self._device, dtype=self._dtype)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def _column(self, values: NDArray[np.float64]) -> Tensor:
        return torch.as_tensor(values, dtype=self._dtype).to(self._device).unsqueeze(1)

    def _columns(self, values: NDArray[np.generic]) -> Tensor:
        """`[micro steps, replicas]` to `[micro steps, replicas, 1]` on the device."""
        return torch.from_numpy(np.asarray(values, np.float64)).to(self._device, self._dtype).unsqueeze(2)


class _Update(Protocol):
    """Signature of the optimizer step: `(micro step, running signal sums)`."""

    def __call__(self, step: int, sums: Tensor) -> None: ...


class _Plan:
    """Which replica steps at which micro-step of an interval: known on the host, so that nothing waits for the device.

    Attributes (all `[micro steps, replicas]` unless said):
        micro_steps: number of micro-steps, an int.
        full: the replica's batch is full (or the interval ends) and it steps.
        batch_parts: micro-batches in the batch then full.
        steps: the replica's optimizer steps so far in its run, this one included (at least 1).
        measured: the step is one whose gradient is measured.
        done: `[replicas]`, optimizer steps in all once the interval is over.
    """

    def __init__(self, examples: int, batch_sizes: NDArray[np.float64], done: NDArray[np.int64]) -> None:
        parts = np.rint(np.nan_to_num(batch_sizes, posinf=0.0) / MICRO_BATCH).astype(np.int64)
        if (parts < 1).any() or not np.allclose(parts * MICRO_BATCH, batch_sizes):
            raise ValueError(f"batch sizes must be multiples of {MICRO_BATCH}, not {np.asarray(batch_sizes)}")
        self.micro_steps = examples // MICRO_BATCH
        position = np.arange(1, self.micro_steps + 1)[:, None]
        last = position == self.micro_steps
        self.full = (position % parts == 0) | last
        self.batch_parts = np.where(position % parts == 0, parts, position % parts)
        index = np.cumsum(self.full, axis=0) - 1
        self.steps = np.maximum(done + index + 1, 1)
        self.measured = self.full & (index % MEASURE_EVERY == 0)
        self.any_full, self.all_full = self.full.any(1), self.full.all(1)
        self.any_measured = self.measured.any(1)
        self.done = done + index[-1] + 1
