"""Denormal numbers, and doing without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Count single-precision numbers below 1.2e-38 as zero, in this thread and on a CPU that can.

    The momentum of a unit that gets no gradient any more decays to such numbers, and some processors, Intel's among
    them, then take up to ten times as long for an optimizer step. Next to nothing comes of them: they are added to a
    weight.
    """
    before = _are_zero()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _are_zero() -> bool:
    """The mode is one of the thread, which torch can set but not tell; numpy's arithmetic follows it."""
    return not np.float32(1e-40) * np.float32(1)
