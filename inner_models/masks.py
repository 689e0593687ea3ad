"""What layers draw at random, for many replicas at once: each draws the numbers of its reference run."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inner_models.augmentation import Augment
from inner_models.sampling import draw_bytes

_REFILL_BYTES = 1 << 20
_REFILL_STEPS_ON_GPU = 8  # at least, for thousands of replicas: a call for a few bytes takes four times as long a byte


class _Source:
    """Numbers of one layer for all replicas of a block, drawn many at a time.

    Args:
        streams: one a replica.

    Attributes:
        hyperparameter: name of the strength that the layer has.
        replicas: number of streams.
    """

    hyperparameter: ClassVar[str]
    _kind: ClassVar[type[np.generic]]

    def __init__(self, streams: list[np.random.Generator], device: torch.device, dtype: torch.dtype) -> None:
        self.replicas = len(streams)
        self._streams = streams
        self._device, self._dtype = device, dtype
        self._cpu = device.type == "cpu"
        self._drawn: NDArray[Any] | None = None
        self._on_device = torch.empty(0)
        self._at = 0
        self.set_strengths(np.zeros(len(streams)))

    def set_strengths(self, strengths: NDArray[np.float64]) -> None:
        """Set the strength of each replica, `[replicas]`."""
        raise NotImplementedError

    def restart(self, replica: int, stream: np.random.Generator) -> None:
        """Give one replica a new stream."""
        self._streams[replica] = stream
        if self._drawn is not None and self._at < self._drawn.shape[1]:
            self._draw(replica, self._at)
            if not self._cpu:
                self._on_device[replica].copy_(torch.from_numpy(self._drawn[replica]))

    def _numbers(self, stream: np.random.Generator, count: int) -> NDArray[Any]:
        raise NotImplementedError

    def _next(self, units: int) -> slice:
        """Where the next `units` numbers of each replica lie."""
        if self._drawn is None or self._at == self._drawn.shape[1]:
            row = units * self.replicas * np.dtype(self._kind).itemsize
            steps = max(1 if self._cpu else _REFILL_STEPS_ON_GPU, _REFILL_BYTES // row)
            self._drawn = np.empty((self.replicas, units * steps), self._kind)
            for replica in range(self.replicas):
                self._draw(replica, 0)
            self._upload()
            self._at = 0
        self._at += units
        return slice(self._at - units, self._at)

    def _draw(self, replica: int, start: int) -> None:
        assert self._drawn is not None
        count = self._drawn.shape[1] - start
        self._drawn[replica, start:] = self._numbers(self._streams[replica], count)

    def _upload(self) -> None:
        if not self._cpu:
            assert self._drawn is not None
            drawn = torch.from_numpy(self._drawn)
            if self._device.type == "cuda":
                drawn = drawn.pin_memory()
            self._on_device = drawn.to(self._device, non_blocking=True)


class MaskSource(_Source):
    """Masks of a `models.Dropout`, whose strength is its rate, rounded to multiples of 1/256."""

    hyperparameter, _kind = "dropout", np.uint8

    def set_strengths(self, strengths: NDArray[np.float64]) -> None:
        threshold = np.rint(strengths * 256)[:, None]
        self._threshold = torch.from_numpy(threshold.astype(np.uint8)).to(self._device)
        self._scale = torch.from_numpy(256 / (256 - threshold)).to(self._device, self._dtype)

    def draw(self, units: int) -> None:
        """Draw the next masks of all replicas, of `units` each."""
        self._chosen = self._next(units)

    def fill(self, rows: slice, keep: Tensor, mask: Tensor) -> None:
        """Write the masks drawn: zero for a dropped unit, 1 / (share kept) for the others.

        Args:
            rows: the replicas whose masks to write.
            keep: scratch of type bool, `[rows, units]`.
            mask: where to write, `[rows, units]`.
        """
        if self._cpu:  # numpy compares and casts several times as fast as torch, if it casts by itself
            assert self._drawn is not None
            np.greater_equal(self._drawn[rows, self._chosen], self._threshold[rows].numpy(), out=keep.numpy())
            np.copyto(mask.numpy(), keep.numpy())
            np.multiply(mask.numpy(), self._scale[rows].numpy(), out=mask.numpy())
        else:
            torch.ge(self._on_device[rows, self._chosen], self._threshold[rows], out=keep)
            torch.mul(keep, self._scale[rows], out=mask)

    def _numbers(self, stream: np.random.Generator, count: int) -> NDArray[Any]:
        return draw_bytes(stream, count)


class NoiseSource(_Source):
    """Random numbers of an `Augment`.

    Args:
        layer: whose they are.

    Attributes:
        strengths: of the replicas, `[replicas]`, in memory that stays the same.
    """

    hyperparameter, _kind = "augmentation", np.float32

    def __init__(
        self, layer: Augment, streams: list[np.random.Generator], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layer = layer
        self.strengths = torch.zeros(len(streams), device=device, dtype=dtype)
        super().__init__(streams, device, dtype)

    def set_strengths(self, strengths: NDArray[np.float64]) -> None:
        self.strengths.copy_(torch.from_numpy(strengths))

    def fill(self, numbers: Tensor) -> None:
        """Draw the next numbers, `[replicas, units]`."""
        chosen = self._next(numbers.shape[1])
        if self._cpu:
            assert self._drawn is not None
            numbers.copy_(torch.from_numpy(self._drawn[:, chosen]))
        else:
            numbers.copy_(self._on_device[:, chosen])

    def _numbers(self, stream: np.random.Generator, count: int) -> NDArray[Any]:
        return self._layer.draw(stream, count)


Source = MaskSource | NoiseSource


def source_of(
    layer: torch.nn.Module, streams: list[np.random.Generator], device: torch.device, dtype: torch.dtype
) -> Source:
    """The source of one of `models.random_layers`, with one stream a replica."""
    if isinstance(layer, Augment):
        return NoiseSource(layer, streams, device, dtype)
    return MaskSource(streams, device, dtype)
