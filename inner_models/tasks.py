"""Tasks, and the distributions that meta-training samples them from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from inner_models.datasets import Dataset, DatasetError, Split, check_dataset_name, load_dataset
from inner_models.models import Activation, ModelKind, ModelSpec, Normalization
from inner_models.names import unknown
from inner_models.sampling import MICRO_BATCH

OptimizerName = Literal["adamw", "sgd"]
Loss = Literal["cross_entropy", "mse"]
Regularizer = Literal["augmentation", "label_smoothing"]

DEFAULT_SPECS: dict[str, ModelSpec] = {
    "linear": ModelSpec("linear"),
    "mlp": ModelSpec("mlp", width=64, depth=2),
    "cnn": ModelSpec("cnn", width=16, depth=2),
    "gru": ModelSpec("gru", width=32, depth=1),
    "transformer": ModelSpec("transformer", width=32, depth=2, activation="gelu"),
    "autoencoder": ModelSpec("autoencoder", width=64, depth=1),
}


@dataclass(frozen=True)
class Task:
    """One training problem: data set x model x loss x optimizer x budget.

    The loss follows from the data and the model: cross-entropy for classes and tokens, mean squared error for
    regression and for an autoencoder's reconstruction.

    Attributes:
        dataset: a name that `load_dataset` knows.
        model: the architecture.
        optimizer: `adamw` or `sgd` (momentum 0.9).
        horizon: intervals in an episode.
        interval_examples: training examples in an interval, rounded down to whole micro-batches; one epoch when None.
        train_rows: use this many rows of the training split; all when None.
        eval_rows: use at most this many rows of the validation split; all when None.
        label_noise: share of training labels drawn anew at random (classes, tokens), or standard deviation of the
            noise added to standardized training targets (regression).
        seed: seed of the split, the subset and the noise.
        regularizers: what the training has beside weight decay and dropout, where it fits (`TaskData.regularizers`).
    """

    dataset: str
    model: ModelSpec
    optimizer: OptimizerName = "adamw"
    horizon: int = 30
    interval_examples: int | None = None
    train_rows: int | None = None
    eval_rows: int | None = None
    label_noise: float = 0.0
    seed: int = 0
    regularizers: tuple[Regularizer, ...] = ()

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(OptimizerName):
            raise ValueError(f"optimizer {self.optimizer!r} is not one of {', '.join(get_args(OptimizerName))}")
        if not isinstance(self.horizon, int) or self.horizon < 1:
            raise ValueError(f"horizon must be a whole number of intervals, at least 1, not {self.horizon!r}")
        for name in ("interval_examples", "train_rows", "eval_rows"):
            value = getattr(self, name)
            if value is not None and value < MICRO_BATCH:
                raise ValueError(f"{name} must be at least {MICRO_BATCH}, not {value}")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise must lie in 0..1, not {self.label_noise}")
        if not isinstance(self.regularizers, tuple):
            raise ValueError(f"regularizers must be a tuple of names, not {self.regularizers!r}")
        for name in self.regularizers:
            if name not in get_args(Regularizer):
                raise ValueError(unknown("regularizer", name, get_args(Regularizer)))

    @classmethod
    def named(cls, name: str, **overrides: Any) -> Task:
        """Build the task `<data set>/<model kind>` (`letter/mlp`) with default sizes; keywords replace fields.

        Raises:
            ValueError: no such data set or model kind; the message suggests the nearest.
        """
        dataset, slash, kind = name.rpartition("/")
        if not slash:
            raise ValueError(f"task {name!r} is not of the form <data set>/<model>, such as letter/mlp")
        if kind not in DEFAULT_SPECS:
            raise ValueError(unknown("model", kind, DEFAULT_SPECS))
        check_dataset_name(dataset)
        return cls(**{"dataset": dataset, "model": DEFAULT_SPECS[kind], **overrides})

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.model.kind}"


@dataclass(frozen=True)
class TaskData:
    """A task's data, ready to train on: subset taken, noise added, reconstruction targets in place.

    Attributes:
        dataset: the data set, without the test split where that must be out of reach.
        loss: the task's loss.
        interval_examples: examples in an interval, a multiple of `MICRO_BATCH`.
        regularizers: those of the task's that it can have: no augmentation where inputs are targets, too (an
            autoencoder), label smoothing with cross-entropy only.
    """

    dataset: Dataset
    loss: Loss
    interval_examples: int
    regularizers: tuple[Regularizer, ...] = ()


@lru_cache(maxsize=64)
def prepare(task: Task, *, with_test: bool = False) -> TaskData:
    """Load and prepare the data of `task`.

    Args:
        with_test: include the test split. Environments never do.

    Raises:
        DatasetError: the data set is unknown, not installed, or too small.
    """
    dataset = load_dataset(task.dataset, seed=task.seed)
    rng = np.random.default_rng([task.seed, 1])
    train = dataset.train
    if task.train_rows is not None and task.train_rows < len(train):
        rows = torch.from_numpy(np.sort(rng.choice(len(train), task.train_rows, replace=False)))
        train = Split(train.inputs[rows], train.targets[rows])
    if len(train) < MICRO_BATCH:
        raise DatasetError(f"data set {task.dataset!r} has {len(train)} training rows; at least {MICRO_BATCH} needed")
    val = Split(dataset.val.inputs[: task.eval_rows], dataset.val.targets[: task.eval_rows])
    test = dataset.test if with_test else None
    if task.model.kind == "autoencoder":
        train, val = _reconstruction(train), _reconstruction(val)
        test = _reconstruction(test) if test is not None else None
    elif task.label_noise:
        train = Split(train.inputs, _noisy(train.targets, dataset.outputs, task.label_noise, rng))
    loss: Loss = "mse" if task.model.kind == "autoencoder" or dataset.target == "regression" else "cross_entropy"
    examples = task.interval_examples or len(train)
    fits = {"augmentation": task.model.kind != "autoencoder", "label_smoothing": loss == "cross_entropy"}
    return TaskData(
        replace(dataset, train=train, val=val, test=test),
        loss,
        examples // MICRO_BATCH * MICRO_BATCH,
        tuple(name for name in task.regularizers if fits[name]),
    )


def _reconstruction(split: Split) -> Split:
    return Split(split.inputs, split.inputs.flatten(1))


def _noisy(targets: Tensor, classes: int, noise: float, rng: np.random.Generator) -> Tensor:
    if targets.is_floating_point():
        return targets + noise * torch.from_numpy(rng.standard_normal(targets.shape)).to(targets.dtype)
    redrawn = torch.from_numpy(rng.integers(0, classes, targets.shape))
    return torch.where(torch.from_numpy(rng.random(targets.shape) < noise), redrawn, targets)


def elementwise_loss(outputs: Tensor, targets: Tensor, loss: Loss, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each target, in the shape of `targets`; `outputs` has one more dimension (logits) for cross-entropy.

    Args:
        label_smoothing: share of cross-entropy's targets that is spread evenly over all classes (Szegedy et al. 2016,
            arXiv:1512.00567).
    """
    if loss == "mse":
        return (outputs - targets).square()
    losses = torch.nn.functional.cross_entropy(
        outputs.flatten(0, -2), targets.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return losses.view(targets.shape)


COST_SHARE: dict[str, float] = {"cnn": 0.3, "gru": 0.25, "transformer": 0.25}
"""Share of the examples that a sampled task of this kind gets: each takes several times an MLP's time an example."""

FULL_SHARE_WIDTH = 64
"""Width up to which a sampled task gets all its examples; a wider one gets fewer, in proportion."""


@dataclass(frozen=True)
class TaskDistribution:
    """Where tasks are sampled from. Scales are log-uniform; see `sample`.

    Attributes:
        entries: (data set, model kinds) pairs; a data set is drawn first, then one of its kinds.
        widths: range of the hidden width; CNN channels are a quarter of it, GRU and transformer widths a half.
        depths: range of the depth; at most 2 for GRU, transformer and autoencoder.
        optimizers: drawn uniformly from this tuple, so repetition gives weight.
        horizons: range of intervals an episode.
        examples: range of training examples an episode; at least two micro-batches an interval.
        train_rows: range of the training subset's size, capped at what there is.
        eval_rows: validation rows used, of costly kinds their `COST_SHARE`; at least 128, as far as there are so many.
        noisy_share: share of tasks with label noise, drawn uniformly from 0.05..0.3.
        regularizers: of all tasks.
    """

    entries: tuple[tuple[str, tuple[ModelKind, ...]], ...]
    widths: tuple[int, int] = (12, 256)
    depths: tuple[int, int] = (1, 4)
    optimizers: tuple[OptimizerName, ...] = ("adamw", "adamw", "adamw", "sgd")
    horizons: tuple[int, int] = (8, 64)
    examples: tuple[int, int] = (1024, 131_072)
    train_rows: tuple[int, int] = (48, 8192)
    eval_rows: int = 384
    noisy_share: float = 0.3
    regularizers: tuple[Regularizer, ...] = ()

    def __post_init__(self) -> None:
        if not self.entries or not self.optimizers:
            raise ValueError("a task distribution needs at least one entry and one optimizer")
        for name in ("widths", "depths", "horizons", "examples", "train_rows"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be a range of positive numbers, low to high, not {low}..{high}")
        if self.train_rows[0] < MICRO_BATCH:
            raise ValueError(f"train_rows must be at least {MICRO_BATCH}, not {self.train_rows[0]}")
        if not 0 <= self.noisy_share <= 1:
            raise ValueError(f"noisy_share must lie in 0..1, not {self.noisy_share}")

    def sample(self, rng: np.random.Generator) -> Task:
        """Draw a task. Costly models, by kind (`COST_SHARE`) and width, get fewer examples."""
        dataset, kinds = self.entries[rng.integers(len(self.entries))]
        kind = kinds[rng.integers(len(kinds))]
        width = _log_uniform_int(rng, *self.widths)
        depth = int(rng.integers(self.depths[0], self.depths[1] + 1))
        share = COST_SHARE.get(kind, 1.0)
        examples = share * min(1.0, FULL_SHARE_WIDTH / width) * _log_uniform_int(rng, *self.examples)
        horizon = _log_uniform_int(rng, *self.horizons)
        if kind == "cnn":
            width = max(4, width // 4)
        elif kind in ("gru", "transformer"):
            width = max(16, width // 2 // 16 * 16)
        if kind in ("gru", "transformer", "autoencoder"):
            depth = min(depth, 2)
        spec = ModelSpec(
            kind,
            width,
            depth,
            activation=_choice(rng, get_args(Activation)),
            normalization=_choice(rng, get_args(Normalization)),
        )
        noisy = rng.random() < self.noisy_share
        return Task(
            dataset=dataset,
            model=spec,
            optimizer=_choice(rng, self.optimizers),
            horizon=horizon,
            interval_examples=max(2 * MICRO_BATCH, int(examples / horizon)),
            train_rows=_log_uniform_int(rng, *self.train_rows),
            eval_rows=max(128, int(share * self.eval_rows)),
            label_noise=float(rng.uniform(0.05, 0.3)) if noisy else 0.0,
            seed=int(rng.integers(4)),
            regularizers=self.regularizers,
        )


def _log_uniform_int(rng: np.random.Generator, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _choice(rng: np.random.Generator, options: tuple[Any, ...]) -> Any:
    return options[rng.integers(len(options))]
