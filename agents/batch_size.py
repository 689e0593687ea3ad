"""The batch size in use, and the samplers that follow it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sized
from typing import Any

import numpy as np
from torch.utils import data

from hpo_env.hyperparameters import HasBatchSize
from inner_models.sampling import BatchSampler

Loader = data.DataLoader[Any]


class BatchSize:
    """A batch size that every sampler in `samplers` takes over.

    Args:
        batch_size: rows of one batch.
        batches_per_step: batches that make one optimizer step, over all processes.

    Attributes:
        batch_size: rows of one optimizer step, by the first sampler where there is one. What it is set to is rounded to
            whole batches, and never so large that a sampler that drops a last batch drops all.
    """

    def __init__(self, batch_size: int, batches_per_step: int = 1) -> None:
        self._rows, self._batches, self._most = batch_size, batches_per_step, sys.maxsize
        self.samplers: list[HasBatchSize] = []
        self._lent: list[tuple[HasBatchSize, int]] = []

    @property
    def batch_size(self) -> int:
        return (self.samplers[0].batch_size if self.samplers else self._rows) * self._batches

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._rows = min(max(1, round(value / self._batches)), self._most)
        for sampler in self.samplers:
            sampler.batch_size = self._rows

    def follow(self, sampler: HasBatchSize, rows: int | None = None) -> None:
        """Have `sampler`, which has so many `rows` if it cannot say that itself, take over the batch size, now and from
        now on."""
        if getattr(sampler, "drop_last", False) and (rows := rows or rows_of(sampler)):
            self._most = min(self._most, rows)
            self._rows = min(self._rows, rows)
        if not isinstance(sampler, BatchSampler):  # ours have none of their own
            self._lent.append((sampler, sampler.batch_size))
        sampler.batch_size = self._rows
        self.samplers.append(sampler)

    def give_back(self) -> None:
        """Set the batch sizes that the user's own samplers had before, which take over no other from now on."""
        for sampler, size in reversed(self._lent):  # one that was followed twice had its own at first
            sampler.batch_size = size
            self.samplers.remove(sampler)
        self._lent.clear()

    def state_dict(self) -> list[Any]:
        """The row orders' generators of the samplers that are this project's, as plain values."""
        return [_plain(generator.bit_generator.state) for generator in self._generators()]

    def check(self, state: list[Any]) -> None:
        """Raise a ValueError or a TypeError unless `load_state_dict` can go on from `state`."""
        if len(state) != len(self._generators()):
            raise ValueError(
                f"it is of a run with {len(state)} batch samplers, not {len(self._generators())}: make them first"
            )
        for generator, entry in zip(self._generators(), state, strict=True):
            copy.deepcopy(generator).bit_generator.state = entry

    def load_state_dict(self, state: list[Any]) -> None:
        """Go on from `state_dict()` of as many samplers."""
        for generator, entry in zip(self._generators(), state, strict=True):
            generator.bit_generator.state = entry

    def _generators(self) -> list[np.random.Generator]:
        return [sampler.generator for sampler in self.samplers if isinstance(sampler, BatchSampler)]


def settable(loader: Loader) -> data.BatchSampler | BatchSampler | None:
    """What decides on the batch size of `loader`, if it can be set: samplers of torch's or of ours, which look at their
    `batch_size` at the beginning of every pass."""
    sampler: Any = loader.batch_sampler
    own = isinstance(sampler, BatchSampler)
    return sampler if own or getattr(type(sampler), "__iter__", None) is data.BatchSampler.__iter__ else None


def examples_in(loader: Loader) -> int | None:
    """Examples in one pass over `loader` (of this process), where that is known."""
    if loader.batch_sampler is None:
        return rows_of(loader.sampler)  # if that makes the batches: else the data set does, as large as it likes
    if isinstance(loader.dataset, data.IterableDataset):
        return length_of(loader.dataset)  # its sampler goes on for ever
    return rows_of(loader.batch_sampler, loader.dataset)


def batch_in(loader: Loader) -> int | None:
    """Rows of a batch of `loader`, where what makes the batches says it."""
    return _batch_of(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)


def length_of(container: Any) -> int | None:
    """`len(container)`, where that is known."""
    try:
        return len(container) if isinstance(container, Sized) else None
    except (TypeError, NotImplementedError):  # it inherits a __len__ which it cannot answer
        return None


def rows_of(sampler: Any, otherwise: Any = None) -> int | None:
    """Rows in one pass of a batch sampler; of one that does not say, those of `otherwise`."""
    if isinstance(sampler, BatchSampler):
        return sampler.examples
    if isinstance(sampler, data.BatchSampler) and hasattr(sampler, "sampler"):  # Accelerate's shards have none
        return length_of(sampler.sampler)
    batch, batches = _batch_of(sampler), length_of(sampler)
    return batch * batches if batch and batches else length_of(otherwise)


def _batch_of(sampler: Any) -> int | None:
    size = getattr(sampler, "batch_size", None)
    return size if type(size) is int and size > 0 else None


def _plain(state: Any) -> Any:
    """A generator's state without arrays, which `torch.load(weights_only=True)` refuses."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state
