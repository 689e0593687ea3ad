"""The engine: many replicas of one task train together, each with its own seed and hyperparameters.

All parameters of all replicas lie in one `[replicas, parameters]` buffer, of which the layers are views, so that an
optimizer step is one pass over it. Replicas consume micro-batches in lockstep, accumulate gradients, and step when
their own batch is full: the gradient is exactly the mean over the replica's batch, whatever the batch sizes of the
others. Twin tests hold every model kind and optimizer to `inner_models.training.Training`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inner_models.datasets import Split
from inner_models.denormals import denormals_as_zero
from inner_models.masks import source_of
from inner_models.models import build_model, initialize, random_layers
from inner_models.programs import Program, Tape, Workspace
from inner_models.replicated_layers import record, record_loss, takes_images
from inner_models.sampling import MICRO_BATCH, draw_order
from inner_models.signals import MEASURE_EVERY, SIGNALS
from inner_models.tasks import Task, TaskData, prepare
from inner_models.training import Streams, hyperparameters_of
from inner_models.twins import Parameter
from inner_models.updates import BETA1, BETA2, COLUMNS, SGD_MOMENTUM, STEPS

_EVALUATION_ROWS = 1 << 10  # replicas x rows that are evaluated at once on a CPU
_EVALUATION_ROWS_ON_GPU = 1 << 17
_STATE_BYTES = 1 << 24  # on a CPU, what a block keeps from micro-step to micro-step should stay in the cache
_ACTIVATION_BYTES = 1 << 23  # and what it makes in a micro-step all the more


class BatchedTraining:
    """Replicas of one task.

    Args:
        task: what to train.
        seeds: one seed a replica, with the meaning of `Training`'s.
        data: the task's prepared data, where the caller decides whether the test split is in it.

    Attributes:
        hyperparameters: names of those that `advance` reads.
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
        data = data or prepare(task)
        job = _Job(task, data, torch.device(device), dtype)
        self.parameters = job.parameters
        self.hyperparameters = hyperparameters_of(job.skeleton, data)
        self._state = {
            name: torch.zeros(self.replicas, job.parameters, device=device, dtype=dtype)
            for name in ("values", "gradients", "momentum", "square")
            if name != "square" or task.optimizer == "adamw"
        }
        size = job.block(self.replicas)
        self._blocks = [
            _Block(
                job,
                {name: buffer[start : start + size] for name, buffer in self._state.items()},
                seeds[start : start + size],
            )
            for start in range(0, self.replicas, size)
        ]
        self._block_of = [(block, row) for block in self._blocks for row in range(block.replicas)]

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "an engine cannot be copied or pickled, as the calls that it has recorded work on its own buffers: keep "
            "snapshots of its replicas, or the state_dict of the environment"
        )

    def restart(self, replica: int, seed: int) -> None:
        """Start one replica afresh from a new seed; the others are untouched."""
        block, row = self._block_of[replica]
        block.restart(row, seed)

    def snapshot(self, replica: int) -> dict[str, Tensor]:
        """Copy of one replica's weights and optimizer state."""
        block, row = self._block_of[replica]
        kept = {name: buffer[replica].clone() for name, buffer in self._state.items() if name != "gradients"}
        return kept | {"steps": torch.tensor(block.steps[row])}

    def restore(self, replica: int, snapshot: Mapping[str, Tensor]) -> None:
        """Set one replica back to a snapshot; its data order and dropout masks go on where they are."""
        block, row = self._block_of[replica]
        block.steps[row] = int(snapshot["steps"])
        for name, buffer in self._state.items():
            if name != "gradients":
                buffer[replica].copy_(snapshot[name])

    @denormals_as_zero()
    def advance(self, hyperparameters: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """Train every replica for one interval.

        Args:
            hyperparameters: `[replicas]` each; names that the task lacks are ignored. `batch_size` in multiples of
                `MICRO_BATCH`.

        Returns:
            The interval's signals, each `[replicas]`, by the definitions of `inner_models.signals`.
        """
        values = {name: np.asarray(hyperparameters[name], np.float64) for name in self.hyperparameters}
        parts = batch_parts(values["batch_size"])
        bounds = np.cumsum([block.replicas for block in self._blocks])[:-1]
        signals = [
            block.advance(parts[rows], {name: column[rows] for name, column in values.items()})
            for block, rows in zip(self._blocks, np.split(np.arange(self.replicas), bounds), strict=True)
        ]
        # One transfer: on a GPU each waits for all that was launched.
        table = torch.cat([torch.stack([*part.values()]) for part in signals], dim=1).double().cpu().numpy()
        result = dict(zip(signals[0], table, strict=True)) | {"val_loss": self.evaluate("val")}
        return {name: result[name] for name in SIGNALS}

    @denormals_as_zero()
    def evaluate(self, split: Literal["train", "val", "test"] | Split) -> NDArray[np.float64]:
        """Mean loss of each replica, `[replicas]`, on a split of the task's, or on rows of the caller's, without any
        regularization.

        Raises:
            LookupError: the test split was not handed to this run.
        """
        return torch.cat([block.evaluate(split) for block in self._blocks]).cpu().numpy()


class _Job:
    """What the blocks of one engine share."""

    def __init__(self, task: Task, data: TaskData, device: torch.device, dtype: torch.dtype) -> None:
        self.task, self.data, self.device, self.dtype = task, data, device, dtype
        self.skeleton = build_model(task.model, data.dataset, augmented="augmentation" in data.regularizers)
        self.random_layers = random_layers(self.skeleton)
        self.smooths = "label_smoothing" in data.regularizers
        self.slices: dict[str, tuple[int, torch.Size]] = {}
        self.parameters = 0
        decays = []
        for name, parameter in self.skeleton.named_parameters():
            self.slices[name] = (self.parameters, parameter.shape)
            self.parameters += parameter.numel()
            decays.append(torch.full((parameter.numel(),), float(parameter.ndim >= 2)))
        self.decays = torch.cat(decays).to(device, dtype)
        self.workspace = Workspace(device, dtype)
        units = sum(_output_units(self.skeleton, data.dataset.train.inputs[:MICRO_BATCH]))
        self.stride = max(1, _ACTIVATION_BYTES // (dtype.itemsize * units)) if device.type == "cpu" else sys.maxsize
        self._placed: dict[str, Split] = {}

    def split(self, name: Literal["train", "val", "test"]) -> Split:
        """A split of the task's, `placed`."""
        if name not in self._placed:
            rows: Split | None = getattr(self.data.dataset, name)
            if rows is None:
                raise LookupError(f"this run was made without the {name} split")
            self._placed[name] = self.placed(rows)
        return self._placed[name]

    def placed(self, rows: Split) -> Split:
        """Rows on the device, in the layout that the model's twin takes."""
        inputs = rows.inputs.movedim(1, -1).contiguous() if takes_images(self.skeleton) else rows.inputs
        return Split(self._place(inputs), self._place(rows.targets))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

    def block(self, replicas: int) -> int:
        """Replicas that train together for an interval: all on a GPU, on a CPU those whose state its cache holds."""
        if self.device.type != "cpu":
            return replicas
        return _even(replicas, _STATE_BYTES // (4 * self.dtype.itemsize * self.parameters))


def _even(total: int, limit: int) -> int:
    """Size of the parts when `total` is divided evenly into parts of at most `limit`, or of 1."""
    return -(-total // -(-total // max(1, limit)))


def _output_units(model: nn.Module, inputs: Tensor) -> list[int]:
    """Sizes of the outputs of all layers. The model is left in evaluation mode, where no layer draws at random."""
    sizes: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.numel()))
        for module in model.modules()
        if not list(module.children())
    ]
    model.eval()  # dropout would draw from the global generator
    with torch.no_grad():
        model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    return sizes


class _Block:
    """Replicas that run in lockstep.

    Args:
        state: rows of the engine's buffers.
        seeds: one a replica.
    """

    def __init__(self, job: _Job, state: Mapping[str, Tensor], seeds: Sequence[int]) -> None:
        self._job, self._state = job, state
        self.replicas = len(seeds)
        self.steps = np.zeros(self.replicas, np.int64)
        self._streams = [Streams(seed, len(job.random_layers)) for seed in seeds]
        self._sources = [
            source_of(layer, [streams.layers[index] for streams in self._streams], job.device, job.dtype)
            for index, layer in enumerate(job.random_layers)
        ]
        self._smoothing = self._place(np.zeros(self.replicas)) if job.smooths else None
        self._parameters = {
            name: Parameter(*(self._view(state[kind], name) for kind in ("values", "gradients"))) for name in job.slices
        }
        train = job.split("train")
        self._x, self._y = (
            job.workspace.named(name, (self.replicas, MICRO_BATCH, *rows.shape[1:]), rows.dtype)
            for name, rows in (("x", train.inputs), ("y", train.targets))
        )
        self._programs = {fresh: self._record(self._x, self._y, training=True, fresh=fresh) for fresh in (True, False)}
        self._columns = job.workspace.named("columns", (self.replicas, COLUMNS[job.task.optimizer]))
        self._updates = {clear: self._record_update(clear) for clear in (True, False)}
        self._evaluations: dict[int, tuple[Tensor, Tensor, Program, Tensor]] = {}
        for row in range(self.replicas):
            self._initialize(row)

    def restart(self, row: int, seed: int) -> None:
        streams = self._streams[row] = Streams(seed, len(self._sources))
        for source, stream in zip(self._sources, streams.layers, strict=True):
            source.restart(row, stream)
        self._initialize(row)

    @torch.no_grad()
    def advance(self, parts: NDArray[np.int64], values: Mapping[str, NDArray[np.float64]]) -> dict[str, Tensor]:
        """Train for one interval. All arguments are `[replicas]`, `parts` in micro-batches a batch."""
        job = self._job
        plan = _Plan(job.data.interval_examples // MICRO_BATCH, parts, self.steps)
        self.steps = plan.done
        train = job.split("train")
        order = [draw_order(len(train), plan.micro_steps * MICRO_BATCH, s.order) for s in self._streams]
        batches = np.stack(order).reshape(self.replicas, plan.micro_steps, MICRO_BATCH).swapaxes(0, 1)
        chosen = torch.from_numpy(batches.reshape(plan.micro_steps, -1)).to(job.device)
        for source in self._sources:
            source.set_strengths(values[source.hyperparameter])
        if self._smoothing is not None:
            self._smoothing.copy_(self._place(values["label_smoothing"]))
        columns = self._place(plan.columns(job.task.optimizer, values["lr"], values["weight_decay"]))
        measured = self._place(plan.measured)
        weights, gradients, momentum = (self._state[name] for name in ("values", "gradients", "momentum"))
        start = weights.clone()
        total, sums = self._place(np.zeros(self.replicas)), self._place(np.zeros((4, self.replicas)))
        fresh = True
        for step in range(plan.micro_steps):
            torch.index_select(train.inputs, 0, chosen[step], out=self._x.flatten(0, 1))
            torch.index_select(train.targets, 0, chosen[step], out=self._y.flatten(0, 1))
            program, losses = self._programs[fresh]
            program.run()
            total += losses
            fresh = bool(plan.all_full[step])
            if plan.any_measured[step]:
                sums += measured[step] * self._measure(gradients, momentum, columns[step])
            if plan.any_full[step]:
                self._columns.copy_(columns[step])
                self._updates[not fresh].run()
        norms = torch.linalg.vector_norm(weights, dim=1)
        moved = torch.linalg.vector_norm(start.sub_(weights), dim=1)
        count, norm, square, cosine = sums
        mean = norm / count
        return {
            "train_loss": total / plan.micro_steps,
            "grad_norm": mean,
            "grad_norm_std": (square / count - mean.square()).clamp_min(0).sqrt(),
            "grad_cosine": cosine / count,
            "update_ratio": moved / norms.clamp_min(1e-12),
        }

    @torch.no_grad()
    def evaluate(self, split: Literal["train", "val", "test"] | Split) -> Tensor:
        """Mean losses, `[replicas]`, in double precision."""
        rows = self._job.placed(split) if isinstance(split, Split) else self._job.split(split)
        at_once = _EVALUATION_ROWS if self._job.device.type == "cpu" else _EVALUATION_ROWS_ON_GPU
        size = max(MICRO_BATCH, at_once // self.replicas)
        total = torch.zeros(self.replicas, device=self._job.device, dtype=torch.float64)
        for x, y in zip(torch.split(rows.inputs, size), torch.split(rows.targets, size), strict=True):
            if len(x) not in self._evaluations:
                x_buffer, y_buffer = torch.empty_like(x), torch.empty_like(y)
                expanded = (buffer.expand(self.replicas, *buffer.shape) for buffer in (x_buffer, y_buffer))
                program, losses = self._record(*expanded, training=False)
                self._evaluations[len(x)] = (x_buffer, y_buffer, program, losses)
            x_buffer, y_buffer, program, losses = self._evaluations[len(x)]
            x_buffer.copy_(x)
            y_buffer.copy_(y)
            program.run()
            total += losses.double() * len(x)
        return total / len(rows)

    def _record(self, x: Tensor, y: Tensor, *, training: bool, fresh: bool = False) -> tuple[Program, Tensor]:
        """The program of a micro-step or of an evaluation, and the buffer of its losses."""
        job = self._job
        tape = Tape(job.workspace, training=training, fresh=fresh)
        losses = job.workspace.named("losses", (self.replicas,))
        stride = _even(self.replicas, job.stride)
        for start in range(0, self.replicas, stride):
            tape.rows = rows = slice(start, min(start + stride, self.replicas))
            parameters = {
                name: Parameter(both.value[rows], both.gradient[rows]) for name, both in self._parameters.items()
            }
            with torch.no_grad():
                outputs, backward = record(job.skeleton, parameters, self._sources, tape, x[rows])
                smoothing = self._smoothing[rows] if training and self._smoothing is not None else None
                mean, gradient = record_loss(tape, outputs, y[rows], job.data.loss, smoothing)
                tape.call(losses[rows].copy_, mean)
                if training:
                    tape.release(backward(gradient))
            tape.release(outputs, mean, gradient)
        return tape.program, losses

    def _record_update(self, clear: bool) -> Program:
        """The program of an optimizer step, with the scalars in `_columns`."""
        buffers = [self._state[name] for name in ("values", "gradients", "momentum", "square") if name in self._state]
        program = Program(self._job.device)
        program.add(STEPS[self._job.task.optimizer], *buffers, self._job.decays, self._columns, clear)
        return program

    @staticmethod
    def _measure(gradients: Tensor, momentum: Tensor, columns: Tensor) -> Tensor:
        """`[4, replicas]`: one, the norm of the batch gradient, its square, its cosine with the momentum."""
        norm = torch.linalg.vector_norm(gradients, dim=1)
        dot = torch.linalg.vecdot(gradients, momentum)
        cosine = dot / (norm * torch.linalg.vector_norm(momentum, dim=1)).clamp_min(1e-12)
        norm = norm * columns[:, 0]
        return torch.stack([torch.ones_like(norm), norm, norm.square(), cosine])

    @torch.no_grad()
    def _initialize(self, row: int) -> None:
        model = self._job.skeleton  # building one anew takes six times as long
        initialize(model, self._streams[row].init)
        for buffer in self._state.values():
            buffer[row].zero_()
        for name, parameter in model.named_parameters():
            self._parameters[name].value[row].copy_(parameter)
        self.steps[row] = 0

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        start, shape = self._job.slices[name]
        return buffer[:, start : start + shape.numel()].view(self.replicas, *shape)

    def _place(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float64)).to(self._job.device, self._job.dtype)


def batch_parts(batch_sizes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Batch sizes in micro-batches.

    Raises:
        ValueError: a size is not a positive multiple of `MICRO_BATCH`.
    """
    parts = np.rint(np.nan_to_num(batch_sizes, posinf=0.0) / MICRO_BATCH).astype(np.int64)
    if (parts < 1).any() or not np.allclose(parts * MICRO_BATCH, batch_sizes):
        raise ValueError(f"batch sizes must be multiples of {MICRO_BATCH}, not {np.asarray(batch_sizes)}")
    return parts


class _Plan:
    """Which replica steps at which micro-step of an interval: known on the host, so that nothing waits for the device.

    Args:
        micro_steps: micro-steps in the interval.
        parts: `[replicas]`, micro-batches in a batch.
        before: `[replicas]`, optimizer steps before the interval.

    Attributes:
        full: `[micro steps, replicas]`, the replica's batch is full (or the interval ends) and it steps.
        batch_parts: `[micro steps, replicas]`, micro-batches in the batch then full.
        steps: `[micro steps, replicas]`, the replica's optimizer steps so far, this one included (at least 1).
        measured: `[micro steps, replicas]`, the step is one whose gradient is measured.
        any_full, all_full, any_measured: `[micro steps]`.
        done: `[replicas]`, optimizer steps in all once the interval is over.
    """

    def __init__(self, micro_steps: int, parts: NDArray[np.int64], before: NDArray[np.int64]) -> None:
        self.micro_steps = micro_steps
        position = np.arange(1, micro_steps + 1)[:, None]
        self.full = (position % parts == 0) | (position == micro_steps)
        self.batch_parts = np.where(position % parts == 0, parts, position % parts)
        index = np.cumsum(self.full, axis=0) - 1
        self.steps = np.maximum(before + index + 1, 1)
        self.measured = self.full & (index % MEASURE_EVERY == 0)
        self.any_full, self.all_full = self.full.any(1), self.full.all(1)
        self.any_measured = self.measured.any(1)
        self.done = before + index[-1] + 1

    def columns(
        self, optimizer: str, lr: NDArray[np.float64], weight_decay: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The scalars of every step, `[micro steps, replicas, ...]`, as `inner_models.updates` takes them."""
        ones = np.ones_like(self.full, np.float64)
        if optimizer == "sgd":
            table = [1 / self.batch_parts, ones * weight_decay, ones * (1 - SGD_MOMENTUM), ones * lr]
        else:
            table = [
                1 / self.batch_parts,
                ones * (1 - BETA1),
                ones * (1 - BETA2),
                ones * lr * weight_decay,
                lr / (1 - BETA1**self.steps),
                1 / np.sqrt(1 - BETA2**self.steps),
            ]
        return np.asarray(np.stack(table, axis=2) * self.full[:, :, None])
