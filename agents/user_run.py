"""What the tuner and the replay share about a user's run: its losses, and its batches."""

from __future__ import annotations

import math
import operator
from collections.abc import Sized
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from inner_models.sampling import MICRO_BATCH, BatchSampler

from .arguments import count, real
from .batch_size import BatchSize, Loader, examples_in, settable
from .ranks import averaged
from .tolerance import Notices


def own_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that takes the steps: what Accelerate prepares is a wrapper around it, without hooks."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def losses_of(
    model: nn.Module | None, train_loss: float | Tensor | None, val_loss: float | Tensor | None
) -> dict[str, float]:
    """The losses that are not None: infinity where not finite, and the mean over a distributed model's processes.

    Raises:
        ValueError: a loss is neither a number nor None.
    """
    told = {"train_loss": train_loss, "val_loss": val_loss}
    losses = {name: real(name, value) for name, value in told.items() if value is not None}
    return averaged({name: loss if math.isfinite(loss) else math.inf for name, loss in losses.items()}, model)


def batch_size_of(
    batch_size: int | None, loader: Loader | None, model: nn.Module | None, batches_per_step: int, notices: Notices
) -> BatchSize | None:
    """The batch size of a run, from now on in our hands; None where the run has none that can be set.

    Args:
        batch_size, loader: what the user gave: one of them, or none.
        model: what is trained on the batches, if given.
        batches_per_step: batches that make one optimizer step, over all processes.

    Raises:
        ValueError: both were given.
    """
    if loader is None:
        return None if batch_size is None else BatchSize(count("batch_size", batch_size), batches_per_step)
    if batch_size is not None:
        raise ValueError(f"batch_size={batch_size} and loader: give one of them; a loader has its own")
    sampler = settable(loader)
    if sampler is None:
        notices.tell("loader", "this loader's batch size cannot be set from outside: it stays as it is")
        return None
    rows = examples_in(loader)
    if rows and rows % MICRO_BATCH == 1 and not getattr(sampler, "drop_last", True) and _has_norm(model):
        notices.tell(
            "last row", "an epoch's last batch can be a single row, on which batch norm fails: give drop_last=True"
        )
    found = BatchSize(sampler.batch_size, batches_per_step)
    found.follow(sampler, rows)
    return found


def _has_norm(model: nn.Module | None) -> bool:
    return model is not None and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def batch_sampler(
    batch_size: BatchSize | None, data: Sized | SupportsIndex, seed: int | np.random.Generator, drop_last: bool
) -> BatchSampler:
    """A batch sampler over `data` (a data set, or its number of rows) that follows `batch_size`.

    Raises:
        ValueError: there is no batch size to follow.
    """
    if batch_size is None:
        raise ValueError("made without batch_size=..., so the batch size is not controlled")
    rows = len(data) if isinstance(data, Sized) else operator.index(data)
    sampler = BatchSampler(rows, 1, np.random.default_rng(seed), drop_last=drop_last)
    batch_size.follow(sampler)
    return sampler
