"""Dropout masks of many replicas, drawn from one stream of bytes a replica."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inner_models.sampling import draw_bytes

_REFILL_BYTES = 1 << 20


class MaskSource:
    """Dropout masks of one module for all replicas of a block.

    The bytes are those that `models.Dropout` draws, so a replica sees the masks of its reference run.

    Args:
        streams: one a replica.

    Attributes:
        replicas: number of streams.
    """

    def __init__(self, streams: list[np.random.Generator], device: torch.device, dtype: torch.dtype) -> None:
        self.replicas = len(streams)
        self._streams = streams
        self._device, self._dtype = device, dtype
        self._drawn: NDArray[np.uint8] | None = None
        self._on_device = torch.empty(0)
        self._at = 0
        self.set_rates(np.zeros(len(streams)))

    def set_rates(self, rates: NDArray[np.float64]) -> None:
        """Set the dropout rate of each replica, `[replicas]`, rounded to multiples of 1/256."""
        threshold = np.rint(rates * 256)[:, None]
        self._threshold = torch.from_numpy(threshold.astype(np.uint8)).to(self._device)
        self._scale = torch.from_numpy(256 / (256 - threshold)).to(self._device, self._dtype)

    def restart(self, replica: int, stream: np.random.Generator) -> None:
        """Give one replica a new stream."""
        self._streams[replica] = stream
        if self._drawn is not None and self._at < self._drawn.shape[1]:
            self._draw(replica, self._at)
            self._upload()

    def fill(self, keep: Tensor, mask: Tensor) -> None:
        """Draw the next masks: zero for a dropped unit, 1 / (share kept) for the others.

        Args:
            keep: scratch of type bool, `[replicas, units]`.
            mask: where to write, `[replicas, units]`.
        """
        units = mask.shape[1]
        if self._drawn is None or self._at == self._drawn.shape[1]:
            count = units * max(1, _REFILL_BYTES // (units * self.replicas))
            self._drawn = np.empty((self.replicas, count), np.uint8)
            for replica in range(self.replicas):
                self._draw(replica, 0)
            self._upload()
            self._at = 0
        chosen = slice(self._at, self._at + units)
        self._at += units
        if mask.is_cpu:  # numpy compares and casts several times as fast as torch
            np.greater_equal(self._drawn[:, chosen], self._threshold.numpy(), out=keep.numpy())
            np.multiply(keep.numpy(), self._scale.numpy(), out=mask.numpy())
        else:
            torch.ge(self._on_device[:, chosen], self._threshold, out=keep)
            torch.mul(keep, self._scale, out=mask)

    def _draw(self, replica: int, start: int) -> None:
        assert self._drawn is not None
        count = self._drawn.shape[1] - start
        self._drawn[replica, start:] = draw_bytes(self._streams[replica], count)

    def _upload(self) -> None:
        if self._device.type != "cpu":
            assert self._drawn is not None
            self._on_device = torch.from_numpy(self._drawn).pin_memory().to(self._device, non_blocking=True)
