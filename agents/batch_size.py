"""The batch size in use, and the samplers that follow it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from hpo_env.hyperparameters import HasBatchSize
from inner_models.sampling import BatchSampler


class BatchSize:
    """A batch size that every sampler in `samplers` takes over."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.samplers: list[HasBatchSize] = []

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = value
        for sampler in self.samplers:
            sampler.batch_size = value

    def follow(self, sampler: HasBatchSize) -> None:
        """Have `sampler` take over the batch size, now and from now on."""
        sampler.batch_size = self._batch_size
        self.samplers.append(sampler)

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


def _plain(state: Any) -> Any:
    """A generator's state without arrays, which `torch.load(weights_only=True)` refuses."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state
